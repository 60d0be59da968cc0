"""StarReLU of the compiled core: every instruction set, size, 16-bit pattern and special value."""

import math
from types import ModuleType

import pytest
import torch
from cases import DTYPES, assert_within_bound
from extent import pairwise
from native_core import BITS, CODES, ISAS, Guarded
from torch import Tensor

from dfformer_kernels import reference


def run_forward(core: ModuleType, x: Tensor, scale: float, bias: float, threads: int = 1) -> Tensor:
    """``star_relu`` of the core; NaN lies around x and a sentinel around y."""
    given, result = Guarded(x, math.nan), Guarded(torch.full_like(x, math.nan), 123.0)
    core.star_relu(given.n, CODES[x.dtype], threads, scale, bias, given.address, result.address)
    result.assert_margins_untouched()
    return result.inside


def run_backward(
    core: ModuleType, grad_y: Tensor, x: Tensor, scale: float, threads: int = 1
) -> tuple[Tensor, float, float]:
    """``star_relu`` of the core with ``grad_y``, in the same surroundings."""
    given, grad = Guarded(x, math.nan), Guarded(grad_y, math.nan)
    result = Guarded(torch.full_like(x, math.nan), 123.0)
    addresses = given.address, 0, grad.address, result.address
    sums = core.star_relu(given.n, CODES[x.dtype], threads, scale, 0.0, *addresses)
    result.assert_margins_untouched()
    return result.inside, *sums


def same_bits(actual: Tensor, wanted: Tensor) -> bool:
    """The same values to the sign of a zero, any NaN being as good as another."""
    bits = BITS[actual.dtype]
    return torch.equal(actual.isnan(), wanted.isnan()) and torch.equal(
        actual.nan_to_num(0, math.inf, -math.inf).view(bits), wanted.nan_to_num(0, math.inf, -math.inf).view(bits)
    )


# Whole registers of every width with every possible tail, then whole chunks of 16384 with one element less or more.
SIZES = [*range(71), 1023, 16383, 16384, 16385, 3 * 16384 + 5]


@pytest.mark.parametrize(**pairwise(isa=ISAS, dtype=DTYPES))
@pytest.mark.usefixtures("isa")
def test_every_size_is_computed_and_nothing_beyond_it(core: ModuleType, dtype: torch.dtype) -> None:
    scale, bias = torch.tensor([0.9, 0.3], dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for n in SIZES:
        x, noise = torch.randn(2, n, generator=generator, dtype=torch.float64)
        x = x.to(dtype)
        exact = x.double(), scale.double(), bias.double()
        y = run_forward(core, x, float(scale), float(bias), threads=2)
        assert_within_bound(f"y of {n}", y, reference.star_relu(*exact))
        grad_y = (y + noise / 2).to(dtype)
        grad_x, *sums = run_backward(core, grad_y, x, float(scale), threads=2)
        wanted = reference.star_relu_backward(grad_y.double(), *exact, [True, True, True])
        assert_within_bound(f"grad_x of {n}", grad_x, wanted[0])
        # The sums leave the core in float64, whatever they are of: they keep the accuracy of the arithmetic.
        arithmetic = reference.compute_dtype(dtype)
        assert_within_bound(f"sums of {n}", torch.tensor(sums, dtype=arithmetic), torch.stack(wanted[1:]))


def test_sums_do_not_depend_on_whether_grad_x_is_wanted(core: ModuleType) -> None:
    x, grad_y = torch.randn(2, 20_003, generator=torch.Generator().manual_seed(0))
    _, *sums = run_backward(core, grad_y, x, 0.9)
    addresses = x.data_ptr(), 0, grad_y.data_ptr()
    assert core.star_relu(x.numel(), CODES[x.dtype], 1, 0.9, 0.0, *addresses) == sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("isa")
def test_every_16_bit_pattern_is_read_and_rounded_like_torch(core: ModuleType, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    one, zero = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    for scale in (one, -one):
        assert same_bits(run_forward(core, every, float(scale), 0.0), reference.star_relu(every, scale, zero))
    # 2 * 1 * relu(1/2) * grad_y: reading and writing alone
    grad_x, _, _ = run_backward(core, every, torch.full_like(every, 0.5), 1.0)
    assert same_bits(grad_x, every)


def special_values(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    magnitudes = [0.0, info.smallest_normal * info.eps, info.smallest_normal, 0.5, 1.0, 3.0, info.max, math.inf]
    return torch.tensor([math.nan, *magnitudes, *(-m for m in magnitudes)], dtype=dtype)


SCALARS = [(1.0, 0.0), (-2.0, 0.5), (0.0, 1.0), (math.inf, 0.0), (1.0, -math.inf)]


@pytest.mark.parametrize(**pairwise(isa=ISAS, dtype=DTYPES, scalars=SCALARS))
@pytest.mark.usefixtures("isa")
def test_special_values_come_out_as_torch_has_them(
    core: ModuleType, dtype: torch.dtype, scalars: tuple[float, float]
) -> None:
    """NaN stays NaN through relu, infinities and signed zeros are kept, subnormals are not flushed."""
    scale, bias = scalars
    x = special_values(dtype)
    wanted = reference.star_relu(x, *torch.tensor([scale, bias], dtype=reference.compute_dtype(dtype)))
    assert same_bits(run_forward(core, x, scale, bias), wanted)


@pytest.mark.parametrize(**pairwise(isa=ISAS, dtype=DTYPES))
@pytest.mark.usefixtures("isa")
def test_special_gradients_come_out_as_autograd_has_them(core: ModuleType, dtype: torch.dtype) -> None:
    """Every special x with every special grad_y; an infinite one where relu is flat gives 0, as in torch."""
    x, grad_y = (t.contiguous() for t in torch.meshgrid(special_values(dtype), special_values(dtype), indexing="ij"))
    leaf = x.flatten().requires_grad_()
    one, zero = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    (wanted,) = torch.autograd.grad(reference.star_relu(leaf, one, zero), leaf, grad_y.flatten())
    grad_x, _, _ = run_backward(core, grad_y, x, 1.0)
    assert torch.equal(grad_x.isnan(), wanted.isnan())
    assert torch.equal(grad_x.nan_to_num(), wanted.nan_to_num())  # equal zeros, whatever their sign
