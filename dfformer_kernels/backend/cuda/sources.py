"""The CUDA kernels' source text, which is compiled for the GPU at hand when it is first used."""

from functools import cache
from pathlib import Path

from dfformer_kernels.problem import KernelBuildError

_PATTERNS = ("cuda/*.cu", "cuda/*.inl", "fft/*.inl")  # what pyproject.toml puts into the wheel, too


@cache
def cuda_sources() -> dict[str, str]:
    """Text by file name: the program first, then what it includes by that name.

    Raises KernelBuildError if the files were not installed.
    """
    package = Path(__file__).parents[2]
    # In the package where that was installed from a wheel; in a checkout, and from an editable install, beside it.
    folders = (package / "csrc", package.parent / "csrc")
    for folder in folders:
        paths = [path for pattern in _PATTERNS for path in sorted(folder.glob(pattern))]
        if paths:
            return {path.name: path.read_text(encoding="utf-8") for path in paths}
    raise KernelBuildError(f"no CUDA sources in {' or '.join(map(str, folders))}: reinstall dfformer")
