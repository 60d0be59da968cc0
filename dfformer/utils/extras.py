"""What the extras of this package install, and a message that names the missing one."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Turns a failing import of another project's package into a RuntimeError that names the extra to install.

    Errors of this project's own imports are its mistakes, which no installation mends: they stay as they are.
    """
    try:
        yield
    except ImportError as error:
        if not name or (error.name or "").split(".")[0] in ("dfformer", "dfformer_kernels"):
            raise
        raise RuntimeError(f"{error}: pip install 'dfformer[{name}]'") from error
