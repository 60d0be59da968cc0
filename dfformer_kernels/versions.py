"""Which versions of other packages are installed."""

from importlib import metadata


def version(distribution: str) -> str:
    """The installed version of a distribution, or "absent"."""
    return next((found.version for found in metadata.distributions(name=distribution)), "absent")
