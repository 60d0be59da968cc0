"""Builds the compiled core, dfformer_kernels._C. Everything else about the package is in pyproject.toml."""

import platform
import sys
from glob import glob

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
    # dlopen, in a library of its own before glibc 2.34
    libraries=["dl"] if sys.platform == "linux" else [],
    # Without a working compiler the build goes on with a warning; `dfformer info` reports it too.
    optional=True,
)
buildable = sys.platform in OPENMP and platform.machine() in ("x86_64", "aarch64", "arm64")

with ParallelCompile("DFFORMER_BUILD_JOBS", default=0):
    setup(license="MIT", ext_modules=[core] if buildable else [])
