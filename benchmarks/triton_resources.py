"""The resources that the Triton kernels of the ``cufft`` backend need on each GPU, from compiling them without a GPU.

The backend's operators run on small CPU tensors while their launches are recorded instead of executed. Each launch is
then compiled with the types and specialisations that Triton would have chosen.
"""

import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from dfformer_kernels.backend.cuda.layout import CHIPS
from dfformer_kernels.backend.cufft import passes as cufft

# Triton's target; threads, ctas and bytes of shared memory per multiprocessor; the most shared memory of a CTA.
TARGETS = {
    arch: (
        GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
        chip.threads_per_multiprocessor,
        chip.ctas_per_multiprocessor,
        chip.shared_per_multiprocessor,
        chip.shared_per_cta,
    )
    for arch, chip in CHIPS.items()
} | {arch: (GPUTarget("hip", arch, 64), 2048, 32, 64 << 10, 64 << 10) for arch in ("gfx90a", "gfx942")}
OPS = ("dynamic_filter", "global_filter")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (H, W, C) of the models' four stages, and one whose strides are not aligned
SHAPES = ((56, 56, 64), (28, 28, 128), (14, 14, 320), (7, 7, 512), (9, 15, 5))

Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


def launches(op: str, shape: tuple[int, int, int], dtype: torch.dtype, backward: bool, F: int = 4) -> list[Launch]:
    """The backend's launches for ``op`` with StarReLU on two samples of shape (H,W,C): (kernel, args, kwargs)."""
    H, W, C = shape
    K, parameters = W // 2 + 1, torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.zeros(2, H, W, C, dtype=dtype)
    filters: dict[str, list[Tensor]] = {
        "dynamic_filter": [torch.zeros(2, F, C, dtype=dtype), torch.zeros(H, K, F, 2, dtype=parameters)],
        "global_filter": [torch.zeros(H, K, C, 2, dtype=parameters)],
    }
    arguments = [x, *filters[op], torch.ones(1), torch.zeros(1)]
    with _recorded() as recorded:
        if backward:
            cufft.KERNELS[f"{op}_backward"](x, *arguments, [True] * len(arguments))
        else:
            cufft.KERNELS[op](*arguments)
    return recorded


def rows(
    targets: Sequence[str] = tuple(TARGETS),
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Iterator[dict[str, object]]:
    """A row for each distinct kernel, with the columns of ``benchmarks/results/gpu_resources.csv``."""
    for target in targets:
        for dtype in dtypes:
            for H, W, C in shapes:
                seen = set()
                for backward in (False, True):
                    for op in OPS:
                        for launch in launches(op, (H, W, C), dtype, backward):
                            key, resources = _resources(launch, target)
                            if key in seen:
                                continue
                            seen.add(key)
                            yield {
                                "backend": "cufft",
                                "kernel": launch[0].__name__.removeprefix("_").removesuffix("_kernel"),
                                "target": target,
                                "H": H,
                                "W": W,
                                "dtype": str(dtype).removeprefix("torch."),
                                "direction": "backward" if backward else "forward",
                                **resources,
                                "dispatched": 1,
                            }


@contextmanager
def _recorded() -> Iterator[list[Launch]]:
    recorded: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        if not warmup:
            recorded.append((kernel, args, kwargs))

    transforms = (
        lambda u: u.new_empty((*u.shape[:2], u.shape[2] // 2 + 1, u.shape[3], 2)),
        lambda Z, W: Z.new_empty((*Z.shape[:2], W, Z.shape[3])),
    )
    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(cufft, "_transforms", return_value=transforms),
    ):
        yield recorded


def compiled(launch: Launch, target: str) -> Any:
    """The launch's kernel as Triton would compile it for the target."""
    kernel, args, kwargs = launch
    backend = make_backend(TARGETS[target][0])
    bind = create_function_from_signature(inspect.signature(kernel.fn), kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs, debug=False)
    options, signature, constants, attributes = kernel._pack_args(
        backend, {**kwargs, "debug": False}, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target][0], options=options.__dict__)


def _resources(launch: Launch, target: str) -> tuple[str, dict[str, int]]:
    """The identity of a compiled kernel, and its registers, spills, shared memory and ctas per multiprocessor."""
    result = compiled(launch, target)
    registers, spilled = _nvidia(result) if target.startswith("sm_") else _amd(result)
    gpu, threads, ctas, shared, _ = TARGETS[target]
    used = result.metadata.shared
    warps = result.metadata.num_warps
    if gpu.backend == "cuda":
        resident = CHIPS[target].resident_ctas(warps * gpu.warp_size, registers, used)
    else:
        by_registers = min(8, 512 // (-(-registers // 8) * 8)) * 4 // warps
        resident = min(ctas, threads // (warps * gpu.warp_size), by_registers, shared // max(used, 1))
    return result.hash, {"regs": registers, "spill_bytes": spilled, "smem_bytes": used, "ctas_per_sm": resident}


def _nvidia(result: Any) -> tuple[int, int]:
    """Registers of a cubin, and bytes of its stack, which holds spilled registers."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(result.asm["cubin"])
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(cuobjdump), "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)


def _amd(result: Any) -> tuple[int, int]:
    """Vector registers of a code object's assembly, and bytes of its scratch memory, which holds spilled registers."""
    assembly = result.asm["amdgcn"]
    return _number(r"\.vgpr_count:\s*(\d+)", assembly), _number(r"\.private_segment_fixed_size:\s*(\d+)", assembly)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's output")
    return int(match[1])
