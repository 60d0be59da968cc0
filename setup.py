"""Builds the compiled core, dfformer_kernels._C. Everything else about the package is in pyproject.toml.

DFFORMER_PURE=1 leaves the core out: a py3-none-any wheel, which runs through torch.fft.
"""

import os
import platform
import re
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

# The kernels use vector extensions that gcc and clang share; Apple's clang has no OpenMP runtime. With other compilers
# (MSVC) and on other processors the package is installed without the core, and everything runs through torch.fft.
OPENMP = {"linux": ["-fopenmp"], "darwin": []}
core = Pybind11Extension(
    "dfformer_kernels._C",
    sources=sorted(glob("csrc/**/*.cpp", recursive=True)),
    depends=glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inl", recursive=True),
    cxx_std=20,
    extra_compile_args=["-O3", "-fno-math-errno", "-Wno-psabi", *OPENMP.get(sys.platform, [])],
    extra_link_args=OPENMP.get(sys.platform, []),
    # Without a working compiler the build goes on with a warning; `dfformer info` reports it too.
    optional=True,
)
buildable = sys.platform in OPENMP and platform.machine() in ("x86_64", "aarch64", "arm64")
pure = os.environ.get("DFFORMER_PURE") == "1"


def description() -> str:
    """README without pictures and with its relative links as text: beside a package's index there is no such file.

    Once the sources have a public address, links and pictures get it in front instead.
    """
    readme = Path("README.md").read_text(encoding="utf-8")
    readme = re.sub(r"(?m)^(\|.*\n)*\|.*!\[.*\n(\|.*\n)*", "", readme)  # tables of pictures
    readme = re.sub(r"(?m)^!\[.*\n", "", readme)
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", readme)


with ParallelCompile("DFFORMER_BUILD_JOBS", default=0):
    setup(
        license="MIT",
        long_description=description(),
        long_description_content_type="text/markdown",
        ext_modules=[core] if buildable and not pure else [],
    )
