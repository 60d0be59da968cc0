"""Layers that agree with the filter step on trial inputs and do something else on others, or later."""

import copy
from collections.abc import Callable
from typing import Any

import filter_copies as forms
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfformer import replace_dynamic_filters
from dfformer_kernels import fuse

DIM = 8


class Plain(nn.Module):
    """Channels-first, with hooks for what the cases below add."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.softmax = nn.Linear(DIM, 4 * DIM), nn.Softmax(1)
        self.weights = nn.Parameter(torch.randn(8, 5, 4, 2))
        self.register_buffer("keep", torch.ones(8, 5, 1, 1, dtype=torch.bool))
        self.register_buffer("order", torch.arange(4))

    def stored(self, w: Tensor) -> Tensor:
        return w

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor) -> Tensor:
        basis = torch.view_as_complex(self.stored(self.weights))
        routing = self.softmax(self.proj(x.mean((2, 3))).view(-1, 4, DIM))
        mixed = torch.einsum("bfc,hkf->bchk", routing.to(basis.dtype), basis)
        return self.after(x, torch.fft.irfft2(torch.fft.rfft2(x.float()) * mixed, s=x.shape[2:]))


def overwritten(self: Any, w: Tensor) -> Tensor:
    w = w.clone()
    w[..., :1].mul_(self.keep)
    return forms.interpolated(w, 8, 5)


FILTERS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "a mask that is one so far": (lambda self, w: w * self.keep, "mul lies between"),
    "an order that changes nothing so far": (lambda self, w: w[:, :, self.order].contiguous(), "order lies between"),
    "a wide clamp": (lambda self, w: w.clamp(-50, 50), "clamp lies between"),
    "a condition": (lambda self, w: torch.where(w.abs() < 1e6, w, 0 * w), "where lies between"),
    "written into": (overwritten, "writes into its filters"),
}
BRANCHES: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], str]] = {
    "len": (lambda self, x, y: 2 * y if len(x) == 1 else y, "with another batch"),
    "larger batch": (lambda self, x, y: 2 * y if x.shape[0] > 4 else y, "with another batch"),
    "shape": (lambda self, x, y: 2 * y if x.shape == torch.Size((1, 8, 8, 8)) else y, "with another batch"),
    "key": (lambda self, x, y: y * {1: 2}.get(x.shape[0], 1), "with another batch"),
    "in training": (lambda self, x, y: 2 * y if self.training and len(x) == 1 else y, "in training"),
    "dtype": (lambda self, x, y: 2 * y if x.dtype == torch.bfloat16 else y, "branches on dtype"),
    "dtype is": (lambda self, x, y: 2 * y if x.dtype is torch.bfloat16 else y, "branches on dtype"),
    "dtype as key": (lambda self, x, y: y * {torch.bfloat16: 2}.get(x.dtype, 1), "branches on dtype"),
    "name of dtype": (lambda self, x, y: 2 * y if "bfloat16" in str(x.dtype) else y, "branches on dtype"),
    "contiguity": (lambda self, x, y: y if x.is_contiguous() else 2 * y, "branches on is_contiguous"),
    "stride": (lambda self, x, y: 2 * y if x.stride(1) == 1 else y, "branches on stride"),
    "strides": (lambda self, x, y: 2 * y if x.stride() == (1, 2, 3, 4) else y, "branches on stride"),
    "requires_grad": (lambda self, x, y: y if x.requires_grad or not x.requires_grad else 0 * y, "requires_grad"),
    "device": (lambda self, x, y: 2 * y if x.is_cuda else y, "branches on is_cuda"),
}


def subclass(**methods: Any) -> nn.Module:
    kind: type[nn.Module] = type("Changed", (Plain,), methods)
    return kind()


@pytest.mark.parametrize(("stored", "reason"), FILTERS.values(), ids=FILTERS.keys())
def test_filters_that_are_changed_at_run_time_are_refused(stored: Any, reason: str) -> None:
    [outcome] = replace_dynamic_filters(nn.Sequential(subclass(stored=stored)))
    assert reason in outcome.reason


@pytest.mark.parametrize(("after", "reason"), BRANCHES.values(), ids=BRANCHES.keys())
def test_branches_on_what_an_input_is_are_refused(after: Any, reason: str) -> None:
    model = nn.Sequential(subclass(after=after))
    [outcome] = replace_dynamic_filters(model)
    assert reason in outcome.reason
    report = fuse(model, torch.randn(2, DIM, 8, 8))
    assert not report.fused
    assert reason in str(report)


def test_a_branch_on_one_image_that_no_trace_shows_is_refused() -> None:
    def after(self: Any, x: Tensor, y: Tensor) -> Tensor:
        return 2 * y if isinstance(x.shape[0], int) and x.shape[0] == 1 else y

    [outcome] = replace_dynamic_filters(nn.Sequential(subclass(after=after)))
    assert "its output 0 differs from ours" in outcome.reason


class Twice(Plain):
    """Two linear layers behind each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.u, self.v = nn.Parameter(torch.randn(DIM)), nn.Parameter(torch.randn(DIM))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.b(self.a(y.transpose(1, 3))) + F.linear(F.linear(y.transpose(1, 3), self.a.weight), self.b.weight)
        return (y * self.u + self.v).transpose(1, 3)


def tied(whole: bool) -> Twice:
    layer = Twice()
    layer.v = layer.u
    if whole:
        layer.b = layer.a
    else:
        layer.b.weight = layer.a.weight
    return layer


@pytest.mark.parametrize("whole", [True, False])
def test_ties_are_those_of_each_layer_and_of_later(whole: bool) -> None:
    model, x = nn.Sequential(tied(whole), Twice(), tied(whole)), torch.randn(2, DIM, 8, 8)
    original = copy.deepcopy(model)
    assert not any(r.reason for r in replace_dynamic_filters(model))
    torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-3)
    for m in (model, original):
        torch.manual_seed(1)
        m[0].b, m[2].v = nn.Linear(DIM, DIM), nn.Parameter(torch.randn(DIM))
    torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_softmax_module_is_still_called(when: str) -> None:
    model: Any = nn.Sequential(Plain(), Plain())
    x = torch.randn(2, DIM, 8, 8)
    change: list[Any] = []

    def hook() -> None:
        change.append(model[1].softmax.register_forward_hook(lambda module, inputs, y: 0 * y + 0.25))

    if when == "before":
        hook()
    original: Any = copy.deepcopy(model)
    assert not any(r.reason for r in replace_dynamic_filters(model))
    if when == "after":
        hook()
        original[1].softmax.register_forward_hook(lambda module, inputs, y: 0 * y + 0.25)
    torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-4)
    model[0].softmax = original[0].softmax = nn.Sigmoid()
    torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-4)


class Direct(nn.Module):
    """One filter for each channel, on the signal in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM, 8, 5, 2).permute(1, 2, 0, 3) * 100)

    def forward(self, x: Tensor) -> Tensor:
        X = torch.fft.rfft2(x.float(), dim=(1, 2))
        return torch.fft.irfft2(X * torch.view_as_complex(self.weight), s=x.shape[1:3], dim=(1, 2))


@pytest.mark.parametrize("change", [nn.Module.float, nn.Module.half, nn.Module.double])
def test_results_have_the_dtype_of_the_original(change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(nn.Sequential(Direct()))
    original, x = copy.deepcopy(model), (2000 * torch.rand(1, 8, 8, DIM)).half()
    assert not replace_dynamic_filters(model)[0].reason
    assert model(x).dtype == original(x).dtype
    torch.testing.assert_close(model(x), original(x), rtol=1e-3, atol=1.0)


class Star6(forms.Star):
    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu6(x / 10) ** 2 * 100 + self.bias


class Wide(forms.Authors):
    _activation = Star6


class Clamped(forms.Authors):
    def _filtered(self, x: Tensor, routing: Tensor) -> Tensor:
        return super()._filtered(x.clamp(max=100), routing)


class NotANumber(forms.Authors):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nan_to_num(super().forward(x))


class WithNorm(forms.Authors):
    def strength(self) -> Tensor:
        return self.complex_weights.norm()


@pytest.mark.parametrize(
    ("kind", "ours"),
    [
        (forms.Authors, "DynamicFilter"),
        (Wide, "DynamicFilter"),
        (Clamped, "FusedClamped"),
        (NotANumber, "FusedNotANumber"),
        (WithNorm, "FusedWithNorm"),
    ],
)
def test_only_the_authors_formula_becomes_our_layer(kind: type[forms.Authors], ours: str) -> None:
    model: Any = nn.Sequential(kind(DIM))
    x = 1000 * torch.randn(2, 8, 8, DIM)
    x[0, 0, 0, 0] = torch.nan if kind is NotANumber else 0
    expected = model(x)
    assert replace_dynamic_filters(model)[0].replacement == ours
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    if kind is WithNorm:
        assert model[0].strength() == model[0].complex_weights.norm()


def test_attributes_of_an_authors_layer_stay() -> None:
    layer: Any = forms.Authors(DIM)
    layer.layer_id = 7
    model = nn.Sequential(layer)
    assert replace_dynamic_filters(model)[0].replacement == "FusedAuthors"
    assert model[0].layer_id == 7


def test_names_of_fused_layers_are_not_hidden() -> None:
    model = nn.Sequential(subclass(code=lambda self: 1), subclass())
    model[1].restore = nn.Identity()
    for outcome, name in zip(replace_dynamic_filters(model), ("code", "restore"), strict=True):
        assert outcome.reason == f"its attribute {name!r} clashes with one of the replacement's"


@pytest.mark.parametrize("model", [None, {}])
def test_what_is_no_module_is_named(model: Any) -> None:
    with pytest.raises(TypeError, match=f"model: expected a torch.nn.Module, got {type(model).__name__}"):
        replace_dynamic_filters(model)
