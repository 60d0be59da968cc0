"""``dfformer info``: versions, device, backends, and the model table."""

import argparse
import platform
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import timm
import torch

from dfformer.models.registry import VARIANTS
from dfformer.utils.profile import profile
from dfformer_kernels import __version__, backends
from dfformer_kernels.dispatch import instruction_sets
from dfformer_kernels.versions import version


def info_command(arguments: argparse.Namespace) -> int:
    """The command line's ``info``."""
    H, W = arguments.img_size
    print_environment()
    print("\nbackends, in order of preference")
    for name, reasons in backends().items():
        print(f"  {name:<8}{'no: ' + '; '.join(reasons) if reasons else 'available'}")
    print(f"\nmodels at {H}x{W}, with filters of this size, one image (transforms and filter mixing are counted)")
    print(*model_table((H, W)), sep="\n")
    return 0


def print_environment() -> None:
    for name, value in environment().items():
        print(f"{name + ':':<14}{value}")


def environment() -> dict[str, str]:
    """The versions and the hardware that measurements depend on."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    active, supported = instruction_sets()
    return {
        "dfformer": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "cpu kernels": f"{active} (this machine runs {', '.join(supported)})" if active else "compiled core absent",
        "gpu": "; ".join(_gpu(device) for device in gpus) or "none",
        "gpu software": ", ".join(f"{name} {number}" for name, number in _gpu_software().items()),
    }


def _gpu(device: int) -> str:
    p = torch.cuda.get_device_properties(device)
    return (
        f"{p.name} ({p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, {p.total_memory / 2**30:.0f} GiB)"
    )


def _gpu_software() -> dict[str, str]:
    """Versions of the software that compiles and runs kernels."""
    built_for = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    versions = {f"torch for {name}": number for name, number in built_for.items() if number}
    return versions | {name: version(name) for name in ("triton", "cuda-bindings")} | {"driver": _driver()}


def _driver() -> str:
    """The version of NVIDIA's driver, which is the same for all devices."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "absent"


def processor() -> str:
    """The processor's name, as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def model_table(img_size: tuple[int, int]) -> Iterator[str]:
    """A line for each model created with this ``img_size``: parameters, GMACs, what training saves, planes."""
    yield f"  {'model':<18}{'params M':>10}{'GMACs':>9}{'spectral GMACs':>16}{'saved MiB':>11}  stage planes"
    for name in VARIANTS:
        p = profile(partial(timm.create_model, name, img_size=img_size), img_size)
        numbers = f"{p.parameters / 1e6:>10.1f}{p.macs / 1e9:>9.2f}{p.spectral_macs / 1e9:>16.2f}"
        planes = " ".join(f"{H}x{W}x{C}" for H, W, C in p.planes)
        yield f"  {name:<18}{numbers}{p.saved_bytes / 2**20:>11.0f}  {planes}"
