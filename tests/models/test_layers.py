"""The layers: arguments, dtypes and planes other than the stored one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfformer import AFNO2D, DynamicFilter, GlobalFilter, SepConv, StarReLU
from dfformer.models.filter_resize import RULES, resize_filter
from dfformer_kernels.tolerance import BOUND, relative_error

PLANE, OTHER = (6, 5), (7, 8)
DIM = 8

SPECTRAL = (DynamicFilter, GlobalFilter, AFNO2D)
FILTERS = pytest.mark.parametrize("layer_class", SPECTRAL[:2])
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "dynamic": lambda: DynamicFilter(DIM, size=PLANE),
    "dynamic_resized": lambda: DynamicFilter(DIM, size=OTHER, weight_resize=True),
    "global": lambda: GlobalFilter(DIM, size=PLANE),
    "global_resized": lambda: GlobalFilter(DIM, size=OTHER, weight_resize=True),
    "afno": lambda: AFNO2D(DIM),
    "sepconv": lambda: SepConv(DIM),
}
# Largest relative error with parameters and activations in 16 bits, in units of their roundoff. About five operations
# in a row (both projections, the filter, under autocast also input and weights) round once each, independently.
UNITS = 3


def image(*plane: int, dim: int = DIM, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, *plane, dim, dtype=dtype)


# Arguments


@pytest.mark.parametrize("layer", [*SPECTRAL, SepConv, StarReLU])
def test_unknown_argument(layer: Callable[..., nn.Module]) -> None:
    with pytest.raises(TypeError, match="sise"):
        layer(8, sise=14)


@FILTERS
def test_another_plane_is_an_error_without_weight_resize(layer_class: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"size=\(6, 5\).*\(7, 8\).*weight_resize=True"):
        layer_class(DIM, size=PLANE)(image(*OTHER))


@pytest.mark.parametrize(
    ("layer", "arguments", "message"),
    [
        (DynamicFilter, {"dim": -1}, "dim: expected a whole number from 1 up, got -1"),
        (DynamicFilter, {"num_filters": 0}, "num_filters: expected a whole number from 1 up, got 0"),
        (DynamicFilter, {"reweight_expansion_ratio": -1}, "reweight_expansion_ratio: expected .*, got -1"),
        (
            GlobalFilter,
            {"size": (3, 4, 5)},
            r"size: expected a whole number from 1 up or a pair of them, got \(3, 4, 5\)",
        ),
        (GlobalFilter, {"size": "14"}, "size: expected a whole number .*, got '14'"),
        (GlobalFilter, {"size": 0}, r"size: expected a whole number .*, got 0"),
        (
            GlobalFilter,
            {"expansion_ratio": 0.1},
            "expansion_ratio: expected one that leaves some of the 8 channels, got 0.1",
        ),
        (AFNO2D, {"expansion_ratio": "2"}, "expansion_ratio: expected a number from 0 up, got '2'"),
        *(
            (f, {"resize": "nearest"}, "resize: expected one of 'bicubic', 'fourier', got 'nearest'")
            for f in SPECTRAL[:2]
        ),
        *(
            (
                mixer,
                {"data_format": "NCHW"},
                "data_format: expected one of 'channels_last', 'channels_first', got 'NCHW'",
            )
            for mixer in SPECTRAL
        ),
        (AFNO2D, {"num_blocks": 3}, "num_blocks: expected a divisor of the 16 expanded channels, got 3"),
        (AFNO2D, {"num_blocks": 0}, "num_blocks: expected a whole number from 1 up, got 0"),
        (AFNO2D, {"sparsity_threshold": -0.1}, "sparsity_threshold: expected a number from 0 up, got -0.1"),
        (SepConv, {"kernel_size": 0}, "kernel_size: expected a whole number from 1 up, got 0"),
        (SepConv, {"padding": -1}, "padding: expected a whole number from 0 up, got -1"),
        (SepConv, {"act1_layer": "gelu"}, "act1_layer: expected a callable that returns a module, got 'gelu'"),
    ],
)
def test_arguments_are_refused_by_name(layer: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(**{"dim": DIM, **arguments})


@pytest.mark.parametrize("layer_class", SPECTRAL)
def test_maps_are_refused_by_name(layer_class: Callable[..., nn.Module]) -> None:
    last, first = layer_class(DIM, size=PLANE), layer_class(DIM, size=PLANE, data_format="channels_first")
    x = image(*PLANE)
    for layer, given, error, message in (
        (last, x.permute(0, 3, 1, 2), ValueError, r"x: expected shape \(B,H,W,dim\) with dim=8, got \(2, 8, 6, 5\)"),
        (last, x[0], ValueError, r"x: expected shape .*, got \(6, 5, 8\)"),
        (first, x, ValueError, r"x: expected shape \(B,dim,H,W\) with dim=8, got "),
        (last, x.double(), TypeError, "x: expected torch.float32, .*, got torch.float64"),
        (last, x.int(), TypeError, "x: expected torch.float32, .*, got torch.int32"),
        (last, None, TypeError, "x: expected a tensor, got NoneType"),
        (last, x.numpy(), TypeError, "x: expected a tensor, got ndarray"),
        (SepConv(DIM), x[..., 1:], ValueError, r"x: expected shape \(B,H,W,dim\) with dim=8, got \(2, 6, 5, 7\)"),
    ):
        with pytest.raises(error, match=message):
            layer(given)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"x: expected .*, got torch\.float64"):
        last(x.double())


class ReadsHalf(GlobalFilter):
    """Its maps have more channels than its first projection takes."""

    def step_input(self, x: Tensor) -> Any:
        return super().step_input(x[..., : x.shape[3] // 2])


def test_a_projection_of_another_class_decides_what_it_reads() -> None:
    layer = DynamicFilter(DIM, size=PLANE)
    layer.pwconv1 = nn.LazyLinear(2 * DIM)
    assert layer(image(*PLANE)).shape == (2, *PLANE, DIM)


def test_a_layer_with_its_own_load_may_read_other_maps() -> None:
    assert ReadsHalf(DIM, size=PLANE)(image(*PLANE, dim=2 * DIM)).shape == (2, *PLANE, DIM)


@FILTERS
def test_one_number_is_a_square(layer_class: Callable[..., DynamicFilter | GlobalFilter]) -> None:
    layer = layer_class(DIM, size=6)
    assert layer.size == (6, 6)
    assert layer.complex_weights.shape[:2] == (6, 4)


# Values


@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (0.9, -0.4)])
def test_star_relu_is_its_formula(scale: float, bias: float) -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    y = StarReLU(scale, bias).double()(x)
    expected = torch.tensor(scale, dtype=torch.float32).double() * x.relu() ** 2 + torch.tensor(bias).double()
    assert relative_error(y, expected) < BOUND[torch.float64]


class UnfusedStarReLU(StarReLU):
    """The same function, but not the class that the filter step applies itself."""


@FILTERS
def test_activation_inside_the_step_changes_nothing(layer_class: Callable[..., nn.Module]) -> None:
    fused, unfused = layer_class(DIM, size=PLANE), layer_class(DIM, size=PLANE, act1_layer=UnfusedStarReLU)
    unfused.load_state_dict(fused.state_dict())
    x = image(*PLANE)
    assert relative_error(fused(x), unfused(x)) < BOUND[torch.float32]


@FILTERS
@pytest.mark.parametrize("resize", RULES)
@pytest.mark.parametrize("plane", [(4, 3), (3, 4), (5, 6)], ids=["stored_plane", "other_plane", "larger_plane"])
def test_gradients(layer_class: Callable[..., nn.Module], resize: str, plane: tuple[int, int]) -> None:
    arguments = {"reweight_expansion_ratio": 1.0, "num_filters": 2} if layer_class is DynamicFilter else {}
    layer = layer_class(2, size=(4, 3), weight_resize=True, resize=resize, **arguments).double()
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x = image(*plane, dim=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("layer_class", SPECTRAL)
def test_channels_first_is_channels_last_turned(
    layer_class: Callable[..., nn.Module], memory: torch.memory_format
) -> None:
    last, first = layer_class(8, size=PLANE), layer_class(8, size=PLANE, data_format="channels_first")
    first.load_state_dict(last.state_dict())
    x = image(*PLANE, dim=8)
    y = first(x.permute(0, 3, 1, 2).contiguous(memory_format=memory))
    assert torch.equal(y, last(x).permute(0, 3, 1, 2))
    assert y.is_contiguous(memory_format=torch.channels_last)


def naive_afno(layer: AFNO2D, x: Tensor) -> Tensor:
    """AFNO2D in complex numbers, one frequency at a time: a block-diagonal MLP on each kept one, 0 for the others."""
    u = layer.act1(layer.pwconv1(x))
    X = torch.fft.rfft2(u, dim=(1, 2), norm="ortho")
    w1, b1, w2, b2 = (torch.complex(p[0], p[1]) for p in (layer.w1, layer.b1, layer.w2, layer.b2))
    first, second = torch.block_diag(*w1), torch.block_diag(*w2)
    Z = torch.zeros_like(X)
    for h in range(X.shape[1]):
        for k in range(int(X.shape[2] * layer.hard_thresholding_fraction)):
            hidden = torch.view_as_real(X[:, h, k] @ first + b1.flatten()).relu()
            mixed = torch.view_as_real(torch.view_as_complex(hidden) @ second + b2.flatten())
            shrunk = mixed.sign() * (mixed.abs() - layer.sparsity_threshold).relu()
            Z[:, h, k] = torch.view_as_complex(shrunk)
    filtered = torch.fft.irfft2(Z, s=u.shape[1:3], dim=(1, 2), norm="ortho")
    return layer.pwconv2(layer.act2(u + filtered))


@pytest.mark.parametrize("plane", [(6, 5), (7, 8), (1, 4), (5, 1)], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"hard_thresholding_fraction": 0.6}, {"hidden_size_factor": 2, "num_blocks": 4, "sparsity_threshold": 0.1}],
    ids=["default", "kept_60_percent", "wide_hidden"],
)
def test_afno_equals_naive(plane: tuple[int, int], arguments: dict[str, Any]) -> None:
    layer = AFNO2D(DIM, **arguments).double()
    with torch.no_grad():  # so large that both thresholds cut some values and keep others
        for parameter in (layer.w1, layer.b1, layer.w2, layer.b2):
            parameter.mul_(20)
    x = image(*plane, dtype=torch.float64)
    assert relative_error(layer(x), naive_afno(layer, x)) < BOUND[torch.float64]


@pytest.mark.parametrize("name", MIXERS)
def test_strides_of_the_input_do_not_matter(name: str) -> None:
    layer, x = MIXERS[name](), image(*PLANE)
    nchw = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not nchw.is_contiguous()
    assert relative_error(layer(nchw), layer(x)) < BOUND[torch.float32]


@pytest.mark.parametrize("name", MIXERS)
def test_empty_batch(name: str) -> None:
    assert MIXERS[name]()(image(*PLANE)[:0]).shape == (0, *PLANE, DIM)


# Dtypes


def assert_near_and_trains(
    layer: nn.Module, y: Tensor, expected: Tensor, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    """``y`` is of ``dtype`` and near ``expected``, and every parameter gets a finite gradient of ``grad_dtype``."""
    y.float().square().sum().backward()
    assert y.dtype == dtype
    assert relative_error(y, expected) < UNITS * BOUND[dtype]
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == grad_dtype
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", [*MIXERS, "star_relu"])
def test_16_bit_parameters(name: str, dtype: torch.dtype) -> None:
    layer = {**MIXERS, "star_relu": StarReLU}[name]().to(dtype)
    x = image(*PLANE, dtype=dtype)
    expected = copy.deepcopy(layer).float()(x.float())
    y = layer(x)
    assert_near_and_trains(layer, y, expected, dtype, grad_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", MIXERS)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    layer, x = MIXERS[name](), image(*PLANE)
    expected = layer(x)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert_near_and_trains(layer, y, expected, dtype, grad_dtype=torch.float32)


def test_autocast_leaves_star_relu_alone() -> None:
    layer, x = StarReLU(0.9, -0.4), torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, layer(x))


@FILTERS
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_filters_of_another_plane_follow_parameter_and_rule(layer_class: Callable[..., Any], rule: str) -> None:
    layer = layer_class(DIM, size=PLANE, weight_resize=True, dtype=torch.bfloat16).eval()
    layer.filters_for(OTHER)
    layer.complex_weights.data.mul_(2)
    layer.resize = rule
    expected = resize_filter(layer.complex_weights, PLANE, OTHER, rule)
    assert torch.equal(layer.filters_for(OTHER), expected.float())


# State dicts of another plane


@FILTERS
@pytest.mark.parametrize("resize", RULES)
@pytest.mark.parametrize("stored_plane", [(8, 8), (5, 4), (1, 1)], ids=str)
def test_loading_filters_of_another_plane(
    layer_class: Callable[..., Any], resize: str, stored_plane: tuple[int, int]
) -> None:
    stored = layer_class(DIM, size=stored_plane).state_dict()
    layer = layer_class(DIM, size=PLANE, resize=resize)
    assert layer.load_state_dict(stored) == ([], [])
    expected = resize_filter(stored["complex_weights"], stored_plane, PLANE, resize)
    assert torch.equal(layer.complex_weights, expected)
    assert torch.equal(layer.pwconv1.weight, stored["pwconv1.weight"])
    assert stored["complex_weights"].shape[:2] == (stored_plane[0], stored_plane[1] // 2 + 1)  # the caller's stays


@pytest.mark.parametrize(
    ("stored", "layer"),
    [
        (DynamicFilter(DIM, size=8, num_filters=2), DynamicFilter(DIM, size=PLANE, num_filters=4)),
        (GlobalFilter(DIM, size=8), GlobalFilter(DIM, size=PLANE, expansion_ratio=3)),
    ],
    ids=["filters", "channels"],
)
def test_loading_filters_that_no_resizing_fits(stored: nn.Module, layer: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for complex_weights: .*\[8, 5, \d+, 2\]"):
        layer.load_state_dict(stored.state_dict())


@FILTERS
def test_loading_without_filters_is_reported(layer_class: Callable[..., Any]) -> None:
    layer = layer_class(DIM, size=PLANE)
    stored = {name: value for name, value in layer.state_dict().items() if name != "complex_weights"}
    assert layer.load_state_dict(stored, strict=False).missing_keys == ["complex_weights"]


@pytest.mark.parametrize("kind", [*SPECTRAL, SepConv])
def test_device_and_dtype_of_construction(kind: Any) -> None:
    layer = kind(DIM, device="meta", dtype=torch.bfloat16)
    assert {(t.device.type, t.dtype) for t in layer.parameters()} == {("meta", torch.bfloat16)}
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in kind(DIM).named_parameters()]
