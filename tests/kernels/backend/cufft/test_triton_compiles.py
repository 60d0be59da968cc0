"""Every Triton kernel is compiled for the targets it may meet, whatever Triton specialises its integers on: no GPU.

Triton makes an integer argument of value 1 a constant of the kernel, and tells one that 16 divides from others. Planes
of one point, one row, one channel and one sample bring such values; the interpreter hides what they do.
DFFORMER_TEST_FULL=1 compiles every combination of a kernel, a target and one integer set apart.
"""

from itertools import product
from typing import Any

import pytest
import torch
from extent import FULL

triton_resources = pytest.importorskip("triton_resources", reason="it compiles with Triton")

TARGETS = tuple(triton_resources.TARGETS)
VALUES = {"one": 1, "divisible": 32, "neither": 7}


def kernels() -> dict[str, Any]:
    """A launch of each kernel, and of one that can leave out StarReLU."""
    found: dict[str, Any] = {}
    for op, backward in product(triton_resources.OPS, (False, True)):
        for launch in triton_resources.launches(op, (4, 6, 5), torch.float32, backward):
            kernel, args, _ = launch
            found.setdefault(kernel.__name__ + ("" if args[2] is not None else "-plain"), launch)
    return found


KERNELS = kernels()


def integers(name: str) -> list[int]:
    kernel, args, _ = KERNELS[name]
    pairs = enumerate(zip(kernel.params, args, strict=False))
    return [i for i, (parameter, value) in pairs if isinstance(value, int) and not parameter.is_constexpr]


# Each kernel with each value in all its integers, the targets in turn.
CASES: list[tuple[str, str, str, int | None]] = [
    (name, TARGETS[(i + j) % len(TARGETS)], value, None)
    for i, name in enumerate(KERNELS)
    for j, value in enumerate(VALUES)
]
if FULL:
    CASES = [(name, target, value, None) for name, target, value in product(KERNELS, TARGETS, VALUES)]
    CASES += [
        (name, target, value, alone)
        for name, target, value in product(KERNELS, TARGETS, ("one", "divisible"))
        for alone in integers(name)
    ]


def test_all_kernels_are_here() -> None:
    from dfformer_kernels.backend.cufft import triton_kernels

    names = {name for name in vars(triton_kernels) if name.endswith("_kernel")}
    assert {name.removesuffix("-plain") for name in KERNELS} == names
    assert all(integers(name) for name in KERNELS)


@pytest.mark.parametrize(("name", "target", "value", "alone"), CASES)
def test_a_kernel_compiles(name: str, target: str, value: str, alone: int | None) -> None:
    """``alone`` is the place of the only integer of that value; the others are of none of the special ones."""
    kernel, args, options = KERNELS[name]
    changed = list(args)
    for i in integers(name):
        changed[i] = VALUES[value] if alone in (None, i) else VALUES["neither"]
    compiled = triton_resources.compiled((kernel, tuple(changed), options), target)
    assert compiled.asm["cubin" if target.startswith("sm_") else "hsaco"]
