"""Writes a repository for Hugging Face's `kernels` package: the operators and their Python, Triton and CUDA sources.

    python examples/kernels_repository.py [FOLDER]

Kernels are compiled on the machine that runs them, so all variants are the same. The compiled core is left out, so the
operators run through torch.fft on a CPU. `kernels.get_local_kernel(FOLDER)` loads it from this machine.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import dfformer_kernels
from dfformer_kernels.backend.cuda.sources import cuda_sources

VARIANTS = {"torch-cpu": "cpu", "torch-cuda": "cuda", "torch-rocm": "rocm"}


def renamed(text: str, name: str) -> str:
    """A module of the package, renamed as `kernels` imports it, with its own namespace of operators."""
    text = text.replace("dfformer_kernels", name)
    return re.sub(r"(?<=torch\.ops\.)dfformer\b|\bdfformer(?=::|\", \"DEF\")", name, text)


def write(folder: Path) -> None:
    package, version = Path(dfformer_kernels.__file__).parent, dfformer_kernels.__version__
    modules = {path.relative_to(package): path.read_text("utf-8") for path in sorted(package.rglob("*.py"))}
    digest = hashlib.sha256("".join(modules.values()).encode()).hexdigest()[:8]
    for variant, backend in VARIANTS.items():
        target, name = folder / "build" / variant, f"dfformer_kernels_{backend}_{digest}"
        shutil.rmtree(target, ignore_errors=True)
        files = {path: renamed(text, name) for path, text in modules.items()}
        files |= {Path("csrc", "cuda", file): text for file, text in cuda_sources().items()}
        for path, text in files.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_text(text, encoding="utf-8")
        metadata = {"id": name, "name": "dfformer-kernels", "version": 0, "license": "MIT", "python-depends": [],
                    "backend": {"type": backend}}  # fmt: skip
        (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    print(f"wrote version {version} to {folder}/build for {', '.join(VARIANTS)}")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "kernels_repository"))
