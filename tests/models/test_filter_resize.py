"""Resizing spectral filters: what each rule promises, and the matrices that are kept between calls."""

from collections.abc import Callable
from inspect import unwrap

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from dfformer.models import filter_resize as resize
from dfformer.models.filter_resize import RULES, resize_filter, scriptable_resize
from dfformer_kernels import dynamic_filter
from dfformer_kernels.kept import kept
from dfformer_kernels.tolerance import BOUND, relative_error

Plane = tuple[int, int]

# even and odd, larger, smaller and both at once, square and not, down to and up from one pixel
PLANES: list[tuple[Plane, Plane]] = [
    ((14, 14), (12, 20)),
    ((7, 7), (14, 14)),
    ((14, 14), (7, 7)),
    ((8, 8), (9, 9)),
    ((9, 9), (8, 8)),
    ((8, 6), (12, 10)),
    ((12, 10), (8, 6)),
    ((9, 5), (13, 11)),
    ((13, 11), (9, 5)),
    ((2, 3), (3, 2)),
    ((3, 2), (2, 3)),
    ((6, 4), (6, 5)),
    ((5, 8), (1, 1)),
    ((1, 1), (5, 8)),
    ((1, 8), (8, 1)),
]
EACH_PLANE = pytest.mark.parametrize(("size", "new_size"), PLANES, ids=lambda plane: f"{plane[0]}x{plane[1]}")
EACH_RULE = pytest.mark.parametrize("rule", RULES)
REAL = torch.arange(108.0).sin().view(6, 3, 3, 2)
RESIZED = resize_filter(REAL.double(), (6, 5), (7, 8))
BICUBIC_ERROR = 1e-12  # torch computes its coefficients in another order


@pytest.fixture
def no_matrices(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Empties the store of matrices for the test, and again when called; the process's own stays as it is."""

    def empty() -> None:
        monkeypatch.setattr(resize, "_kept_matrices", kept(64)(unwrap(resize._kept_matrices)))

    empty()
    return empty


def filters(size: Plane, *trailing: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size[0], size[1] // 2 + 1, *(trailing or (3, 2)), dtype=dtype)


# Both rules


@EACH_RULE
@EACH_PLANE
def test_shape_and_dtype(rule: str, size: Plane, new_size: Plane) -> None:
    resized = resize_filter(filters(size, 4, 2, dtype=torch.float32), size, new_size, rule)
    assert resized.shape == (new_size[0], new_size[1] // 2 + 1, 4, 2)
    assert resized.dtype == torch.float32


@EACH_RULE
@pytest.mark.parametrize("size", [(14, 14), (9, 5), (6, 10), (1, 1)], ids=str)
def test_same_size_changes_no_bit(rule: str, size: Plane) -> None:
    weight = filters(size, dtype=torch.float32)
    assert torch.equal(resize_filter(weight, size, size, rule), weight)


@EACH_RULE
@pytest.mark.parametrize("trailing", [(4, 2), (16, 2), (2,), (2, 3, 2)], ids=str)
def test_every_trailing_element_by_itself(rule: str, trailing: tuple[int, ...]) -> None:
    size, new_size = (6, 5), (7, 8)
    weight = filters(size, *trailing)
    resized = resize_filter(weight, size, new_size, rule).flatten(2)
    alone = [resize_filter(w[..., None], size, new_size, rule) for w in weight.flatten(2).unbind(2)]
    assert relative_error(resized, torch.cat(alone, dim=2)) < BOUND[torch.float64]


@EACH_RULE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_8_and_16_bits_are_computed_in_float32(rule: str, dtype: torch.dtype) -> None:
    weight = filters((6, 5)).to(dtype)
    resized, expected = (resize_filter(w, (6, 5), (7, 8), rule) for w in (weight, weight.float()))
    assert resized.dtype == dtype
    assert torch.equal(resized.float(), expected.to(dtype).float())


@EACH_RULE
@pytest.mark.parametrize("new_size", [(5, 7), (3, 2)], ids=["larger", "smaller"])
def test_gradient(rule: str, new_size: Plane) -> None:
    weight = filters((4, 5), 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: resize_filter(w, (4, 5), new_size, rule), weight)


@EACH_RULE
def test_same_bits_again(rule: str, no_matrices: Callable[[], None]) -> None:
    weight = filters((14, 14), dtype=torch.float32).requires_grad_()
    grad = torch.randn(12, 11, 3, 2)

    def run() -> tuple[Tensor, Tensor]:
        resized = resize_filter(weight, (14, 14), (12, 20), rule)
        return resized, torch.autograd.grad(resized, weight, grad)[0]

    first, again = run(), run()
    no_matrices()
    rebuilt = run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, rebuilt, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_scripted() -> None:
    scripted = torch.jit.script(scriptable_resize)
    for rule in RULES:
        for size, new_size in PLANES:
            weight = filters(size, dtype=torch.float32)
            assert torch.equal(scripted(weight, size, new_size, rule), resize_filter(weight, size, new_size, rule))


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match="resize: expected one of 'bicubic', 'fourier', got 'linear'"):
        resize_filter(filters((4, 4)), (4, 4), (6, 6), "linear")


@EACH_RULE
@pytest.mark.parametrize("size", [(5, 4), (4, 6)], ids=["height", "width"])
def test_size_that_is_not_the_filters(rule: str, size: Plane) -> None:
    with pytest.raises(ValueError, match=rf"size: expected .*\(4, 3, 3, 2\).*, got \({size[0]}, {size[1]}\)"):
        resize_filter(filters((4, 4)), size, (6, 6), rule)


# bicubic


@EACH_PLANE
def test_bicubic_is_torch_interpolate(size: Plane, new_size: Plane) -> None:
    weight = filters(size)
    image = weight.flatten(2).permute(2, 0, 1)[None]
    expected = F.interpolate(image, (new_size[0], new_size[1] // 2 + 1), mode="bicubic", align_corners=True)
    resized = resize_filter(weight, size, new_size, "bicubic").flatten(2)
    assert relative_error(resized, expected[0].permute(1, 2, 0)) < BICUBIC_ERROR


# fourier


def frequencies(n: int) -> list[int]:
    """The frequency of every row, in cycles per image."""
    return [round(frequency) for frequency in np.fft.fftfreq(n, 1 / n)]


def resample(x: Tensor, new_size: Plane) -> Tensor:
    """(B,H,W,C) to (B,new_H,new_W,C): the same band-limited image, by copying its spectrum frequency by frequency."""
    X = torch.fft.fft2(x, dim=(1, 2), norm="forward")
    Z = X.new_zeros(x.shape[0], *new_size, x.shape[3])
    for row, vertical in enumerate(frequencies(x.shape[1])):
        for column, horizontal in enumerate(frequencies(x.shape[2])):
            if 2 * abs(vertical) < new_size[0] and 2 * abs(horizontal) < new_size[1]:
                Z[:, vertical, horizontal] = X[:, row, column]
    return torch.fft.ifft2(Z, dim=(1, 2), norm="forward").real


@EACH_PLANE
def test_fourier_filters_a_band_limited_image_as_before(size: Plane, new_size: Plane) -> None:
    # the largest odd plane that fits into both: an odd one has no frequency shared by two signs
    content = [2 * ((min(old, new) - 1) // 2) + 1 for old, new in zip(size, new_size, strict=True)]
    x = resample(torch.randn(2, *content, 3, dtype=torch.float64), size)
    logits, basis = torch.randn(2, 4, 3, dtype=torch.float64), filters(size, 4, 2)
    filtered = dynamic_filter(x, logits, basis)
    resized = resize_filter(basis, size, new_size, "fourier")
    assert relative_error(dynamic_filter(resample(x, new_size), logits, resized), resample(filtered, new_size)) < 1e-13


def aliases(frequency: int, n: int) -> set[int]:
    """The signed frequencies that one row of a plane of height n stands for: two at the highest of an even n."""
    return {frequency, -frequency} if 2 * abs(frequency) == n else {frequency}


@EACH_PLANE
def test_fourier_frequency_by_frequency(size: Plane, new_size: Plane) -> None:
    weight = filters(size)
    gains = {alias: row for row, f in zip(weight, frequencies(size[0]), strict=True) for alias in aliases(f, size[0])}
    expected = torch.zeros(new_size[0], new_size[1] // 2 + 1, 3, 2, dtype=torch.float64)
    kept = min(weight.shape[1], expected.shape[1])
    for row, frequency in enumerate(frequencies(new_size[0])):
        sources = [gains[alias] for alias in aliases(frequency, new_size[0]) if alias in gains]
        if sources:
            expected[row, :kept] = torch.stack(sources).mean(0)[:kept]
    assert relative_error(resize_filter(weight, size, new_size, "fourier"), expected) < BOUND[torch.float64]


@EACH_PLANE
def test_fourier_there_and_back(size: Plane, new_size: Plane) -> None:
    larger = tuple(max(old, new) for old, new in zip(size, new_size, strict=True))
    weight = filters(size)
    enlarged = resize_filter(weight, size, (larger[0], larger[1]), "fourier")
    assert torch.equal(resize_filter(enlarged, (larger[0], larger[1]), size, "fourier"), weight)


# The store of matrices


@pytest.mark.usefixtures("no_matrices")
def test_matrices_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = filters((6, 5))
    expected = resize_filter(weight, (6, 5), (7, 9))
    monkeypatch.delattr(resize, "_matrices")
    assert torch.equal(resize_filter(weight, (6, 5), (7, 9)), expected)


def under_fake_tensors() -> None:
    with FakeTensorMode():
        assert resize_filter(torch.randn(6, 3, 3, 2), (6, 5), (7, 8)).shape == (7, 5, 3, 2)


def under_fake_tensors_with_real_filters() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert resize_filter(REAL, (6, 5), (7, 8)).shape == (7, 5, 3, 2)


def on_meta_device() -> None:
    assert resize_filter(torch.randn(6, 3, 3, 2, device="meta"), (6, 5), (7, 8)).device.type == "meta"


def under_meta_context() -> None:
    with torch.device("meta"):
        assert resize_filter(torch.randn(6, 3, 3, 2), (6, 5), (7, 8)).device.type == "meta"


def under_inference_mode() -> None:
    with torch.inference_mode():
        assert relative_error(resize_filter(REAL, (6, 5), (7, 8)), RESIZED) < BOUND[torch.float32]


def under_compile() -> None:
    compiled = torch.compile(resize_filter, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(REAL, (6, 5), (7, 8)), RESIZED) < BOUND[torch.float32]
    torch._dynamo.reset()


def under_vmap() -> None:
    resized = torch.func.vmap(lambda weight: resize_filter(weight, (6, 5), (7, 8)))(torch.stack([REAL, -2 * REAL]))
    assert relative_error(resized, torch.stack([RESIZED, -2 * RESIZED])) < BOUND[torch.float32]


def under_function_transform() -> None:
    gradient = torch.func.grad(lambda weight: resize_filter(weight, (6, 5), (7, 8)).square().sum())(REAL)
    weight = REAL.double().requires_grad_()
    (wanted,) = torch.autograd.grad(resize_filter(weight, (6, 5), (7, 8)).square().sum(), weight)
    assert relative_error(gradient, wanted) < BOUND[torch.float32]


SPECIAL_MODES = [
    under_fake_tensors,
    under_fake_tensors_with_real_filters,
    on_meta_device,
    under_meta_context,
    under_inference_mode,
    under_compile,
    under_vmap,
    under_function_transform,
]


@pytest.mark.usefixtures("no_matrices")
@pytest.mark.parametrize("first", SPECIAL_MODES)
def test_special_modes_leave_nothing_behind(first: Callable[[], None]) -> None:
    weight = filters((6, 5), dtype=torch.float32).requires_grad_()
    first()
    resized = resize_filter(weight, (6, 5), (7, 8))
    resized.sum().backward()
    expected = resize_filter(weight.detach().double(), (6, 5), (7, 8))
    assert relative_error(resized, expected) < BOUND[torch.float32]
    assert weight.grad is not None


@pytest.mark.usefixtures("no_matrices")
@pytest.mark.parametrize("then", SPECIAL_MODES)
def test_special_modes_after_an_ordinary_call(then: Callable[[], None]) -> None:
    resize_filter(filters((6, 5), dtype=torch.float32), (6, 5), (7, 8))
    then()
