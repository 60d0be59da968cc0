"""Public forms of the dynamic filter: swapped with the same results, gradients and training, or refused by name."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import different_copies as different
import filter_copies as forms
import pytest
import torch
from filter_copies import results
from torch import Tensor, distributed, nn

from dfformer import replace_dynamic_filters, restore_dynamic_filters
from dfformer.export.export import export
from dfformer_kernels.tolerance import gradient_errors, relative_error

DIM = 12
LAST, FIRST, TOKENS = (8, 8, DIM), (DIM, 8, 8), (64, DIM)
Make = Callable[[], nn.Module]

# Form, shapes of its inputs without the batch, and a larger plane that the original runs on, if any.
SWAPPED: dict[str, tuple[Make, list[Any], list[Any]]] = {
    "channels-first": (lambda: forms.ChannelsFirst(DIM), [FIRST], [(DIM, 14, 9)]),
    "channels-first rectangular F=2": (
        lambda: forms.ChannelsFirst(DIM, (6, 9), num_filters=2, bias=True),
        [(DIM, 6, 9)],
        [(DIM, 5, 4)],
    ),
    "F=8, as many channels as rows": (lambda: forms.ChannelsFirst(8, num_filters=8), [(8, 8, 8)], [(8, 10, 16)]),
    "convolution in front": (lambda: forms.InnerConvolution(6, DIM), [(6, 8, 8)], [(6, 20, 12)]),
    "second input": (lambda: forms.SecondInput(DIM), [LAST, LAST], [(12, 10, DIM), (12, 10, DIM)]),
    "second input, channels-first": (lambda: forms.CrossModal(DIM), [FIRST, FIRST], [(DIM, 9, 9), (DIM, 9, 9)]),
    "max-pool routing": (lambda: forms.MaxPoolFusion(DIM), [FIRST, FIRST], []),
    "summed-spectrum routing, no projections": (lambda: forms.SummedSpectrum(DIM), [FIRST], [(DIM, 11, 13)]),
    "spline routing": (lambda: forms.SplineRouting(DIM), [LAST], [(4, 6, DIM)]),
    "attention routing": (lambda: forms.AttentionRouting(DIM), [FIRST], [(DIM, 9, 6)]),
    "fixed square": (lambda: forms.FixedSquare(DIM), [FIRST], [(DIM, 9, 14)]),
    "undefined resize": (lambda: forms.UndefinedResize(DIM), [FIRST], [(DIM, 16, 5)]),
    "tokens": (lambda: forms.Tokens(DIM), [TOKENS], []),
    "complex filters stored first": (lambda: forms.FiltersFirst(DIM), [FIRST], []),
    "convolutions only, autocast off inside": (lambda: forms.SqueezeRouting(DIM), [FIRST], []),
    "tokens with their plane": (lambda: forms.TokensOfPlane(DIM), [TOKENS, 8, 8], []),
    "routed by a vector": (lambda: forms.Conditioned(DIM), [FIRST, (5,)], [(DIM, 9, 10), (5,)]),
    "resized if needed": (lambda: forms.ResizedIfNeeded(DIM), [LAST], [(16, 12, DIM)]),
    "resized without a size": (lambda: forms.WithoutSize(DIM), [LAST], [(16, 12, DIM)]),
    "dropout": (lambda: forms.WithDropout(DIM), [LAST], [(16, 16, DIM)]),
    "two filters in turn": (lambda: forms.TwoInTurn(DIM), [FIRST], []),
    "mixed by sigmoids": (lambda: forms.Gated(DIM), [LAST], [(9, 12, DIM)]),
}

REFUSED: dict[str, tuple[Make, str]] = {
    "viewed": (lambda: different.Viewed(DIM), "views (B,C,H,W) data as (B,H,W,C)"),
    "viewed, as many channels as rows": (lambda: different.Viewed(8), "views (B,C,H,W) data as (B,H,W,C)"),
    "windows": (lambda: different.Windows(DIM, 16), "16x16 windows of a 32x32 plane"),
    "scaled": (lambda: different.Scaled(DIM), "differs from ours by a factor"),
    "masked by ones": (lambda: different.Masked(DIM), "differs from ours by a factor"),
    "magnitudes and phases": (lambda: different.Polar(DIM), "what it makes of its filters (polar) differs from ours"),
    "shifted filters": (lambda: different.ShiftedFilters(DIM), "what it makes of its filters (ifftshift) differs"),
    "real part": (lambda: different.RealPart(DIM), "what it makes of its filters (to) differs from ours"),
    "overwritten": (lambda: different.Overwritten(DIM), "fft_rfft2, inside the chain, is also needed by mul_"),
    "no gradient": (lambda: different.ConstantRouting(DIM), "its gradient of reweight"),
    "by batch": (lambda: different.BatchOfTwo(DIM), "with another batch its forward does something else"),
    "large planes": (lambda: different.LargePlanes(DIM), "branches on whether a size is beyond 10000"),
    "mixed norms": (lambda: different.MixedNorms(DIM), "its norms, 'ortho' and 'forward', do not cancel out"),
    "bilinear": (lambda: different.Bilinear(DIM), "plane what it makes of its filters (contiguous) differs from"),
    "noise in training": (
        lambda: different.NoiseInTraining(DIM),
        "in training its forward does something else (at randn",
    ),
    "functional dropout": (lambda: different.FunctionalDropout(DIM), "in training its forward does something else"),
    "by value": (lambda: different.ByValue(DIM), "branches on the values of tensors"),
    "full spectrum": (lambda: different.FullSpectrum(DIM), "got fft2, ifft2"),
    "side effect": (lambda: different.SavesRouting(DIM), "changes self.last_routing"),
    "subclasses need a key": (
        lambda: different.Registered(DIM),
        "cannot be tried (TypeError: Registered.__init_subclass__",
    ),
    "side effect in a list": (lambda: different.CollectsRouting(DIM), "changes self.routings"),
}


# What runs, with the same parameters, where the form itself does not: on another plane, or at all.
RUNNING: dict[type[nn.Module], Make] = {
    forms.FixedSquare: lambda: forms.ChannelsFirst(DIM),
    forms.UndefinedResize: lambda: forms.ChannelsFirst(DIM),
}


class Parallel(nn.Module):
    """A form in somebody's model, which gives it all of its inputs."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer: Any = mixer

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.mixer(*inputs)


@pytest.mark.parametrize(("make", "shapes", "others"), SWAPPED.values(), ids=SWAPPED.keys())
def test_forms_are_swapped(make: Make, shapes: list[Any], others: list[Any], request: pytest.FixtureRequest) -> None:
    model = Parallel(make()).eval()
    reference = Parallel(RUNNING.get(type(model.mixer), make)()).eval()
    reference.load_state_dict(model.state_dict())
    parameters, state = dict(model.named_parameters()), list(model.state_dict())
    kind = "DynamicFilter" if "spline" in request.node.callspec.id else f"Fused{type(model.mixer).__name__}"
    [outcome] = replace_dynamic_filters(model)
    assert (outcome.reason, outcome.replacement) == ("", kind)
    after = dict(model.named_parameters())
    assert all(after[name] is parameters[name] for name in after.keys() | parameters.keys())
    assert list(model.state_dict()) == state
    for plane in (shapes, others or shapes):
        inputs = [torch.randn(3, *shape) if isinstance(shape, tuple) else shape for shape in plane]
        ours, theirs = (results(m, *inputs) for m in (model, reference))
        assert relative_error(ours[0], theirs[0]) < 1e-5
        assert max(gradient_errors(ours[1:], theirs[1:])) < 1e-4


@pytest.mark.parametrize(("make", "difference"), REFUSED.values(), ids=REFUSED.keys())
def test_other_formulas_are_refused_with_the_difference(make: Make, difference: str) -> None:
    model = Parallel(make())
    original = model.mixer
    [outcome] = replace_dynamic_filters(model)
    assert difference in outcome.reason
    assert model.mixer is original


class Counting(forms.Authors):
    def forward(self, x: Tensor) -> Tensor:
        assert len(self._parameters) == 1
        return super().forward(x)


class Scaled(Counting):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def test_the_forward_of_a_class_itself_is_traced_and_not_that_of_its_base() -> None:
    model = nn.Sequential(Scaled(DIM)).eval()
    original, x = copy.deepcopy(model), torch.randn(2, *LAST)
    assert replace_dynamic_filters(model).originals
    assert relative_error(model(x), original(x)) < 2e-6


class Masked(forms.Authors):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        y = super().forward(x)
        return y * mask if mask.is_floating_point() else y.masked_fill(mask, 0)


def test_an_input_of_another_kind_or_rank_runs_the_original() -> None:
    model = Masked(DIM).eval()
    original, x, mask = copy.deepcopy(model), torch.randn(2, *LAST), torch.rand(2, *LAST)
    assert replace_dynamic_filters(model).originals
    for m in (mask, mask > 0.5, mask[0]):
        assert relative_error(model(x, m), original(x, m)) < 2e-6


def test_copies_inside_copies_are_swapped_and_undone() -> None:
    model = Parallel(forms.Nested(DIM))
    outer, inner, x = model.mixer, model.mixer.inner, torch.randn(1, *FIRST)
    expected = model(x)
    report = replace_dynamic_filters(model)
    assert [(r.name, r.replacement) for r in report] == [
        ("mixer", "FusedNested"),
        ("mixer.inner", "FusedChannelsFirst"),
    ]
    assert relative_error(model(x), expected) < 1e-5
    report.undo()
    assert (model.mixer, model.mixer.inner) == (outer, inner)
    assert torch.equal(model(x), expected)


def test_dropout_stays_where_it_is() -> None:
    model = Parallel(forms.WithDropout(DIM))
    reference = copy.deepcopy(model)
    replace_dynamic_filters(model)
    x = torch.ones(1, *LAST)
    assert not torch.equal(model(x), model(x))
    model.mixer.drop.p = reference.mixer.drop.p = 0.0
    torch.manual_seed(0)
    expected = reference(x)
    torch.manual_seed(0)
    assert relative_error(model(x), expected) < 1e-5


def test_an_optional_input_runs_the_original() -> None:
    model = Parallel(forms.Tokens(DIM))
    original, x = copy.deepcopy(model), torch.randn(1, *TOKENS)
    replace_dynamic_filters(model)
    assert not torch.equal(model(x, None), original(x)), "the operator's rounding"
    assert torch.equal(model.mixer(x, spatial_size=(8, 8)), original(x, (8, 8)))
    for inputs, named in (((), {}), ((x, None, 1), {}), ((x,), {"x": x}), ((x,), {"size": 8})):
        with pytest.raises(TypeError, match="argument"):
            model.mixer(*inputs, **named)


class LowRank(nn.Module):
    """A LoRA-like wrapper of a linear layer."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, rank), nn.Linear(rank, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("before", [True, False], ids=["wrapped before", "wrapped after"])
@pytest.mark.parametrize("form", [forms.Authors, forms.ChannelsFirst])
def test_adapters_in_a_form_are_used(form: type[forms.Authors], before: bool) -> None:
    model = Parallel(form(8)).eval()
    reference, x = copy.deepcopy(model), torch.randn(2, 8, 8, 8)
    if not before:
        assert not replace_dynamic_filters(model)[0].reason
    torch.manual_seed(0)
    adapter = LowRank(model.mixer.pwconv1)
    model.mixer.pwconv1, reference.mixer.pwconv1 = adapter, copy.deepcopy(adapter)
    if before:
        assert not replace_dynamic_filters(model)[0].reason
    ours, theirs = (results(m, x) for m in (model, reference))
    for actual, expected in zip(ours, theirs, strict=True):
        assert relative_error(actual, expected) < 1e-4


class Detector(nn.Module):
    """A small detector: a stem of stride 32, two forms on the same maps, a head for every position."""

    def __init__(self, size: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 32, 32, bias=False), nn.BatchNorm2d(8))
        self.encoder = nn.ModuleList([forms.FixedSquare(8, size), forms.InnerConvolution(8, 4, size)])
        self.fusion, self.head = forms.CrossModal(4, size), nn.Conv2d(4, 5, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = x + self.encoder[0](x)
        y = self.encoder[1](x)
        return self.head(y + self.fusion(y, x[:, :4]))


@pytest.fixture(scope="module")
def swapped() -> tuple[Detector, Any]:
    torch.manual_seed(0)
    detector = Detector()
    report = replace_dynamic_filters(detector)
    assert [(r.name, r.reason) for r in report] == [("encoder.0", ""), ("encoder.1", ""), ("fusion", "")]
    return detector, report


@pytest.fixture
def detector(swapped: tuple[Detector, Any]) -> Detector:
    """A copy of the swapped detector."""
    return copy.deepcopy(swapped[0])


PLANES = [(320, 320), (640, 384), (352, 608)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_swapped_detector_trains_under_autocast_on_any_plane(
    detector: Detector, swapped: tuple[Detector, Any], dtype: torch.dtype
) -> None:
    optimizer, losses = torch.optim.Adam(detector.parameters(), 0.05), []
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    for step in range(12):
        image = torch.randn(2, 3, *PLANES[step % 3], generator=torch.Generator().manual_seed(step % 3))
        with torch.autocast("cpu", dtype=dtype):
            loss = (detector(image).float() - image.mean() - 1).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    detector.eval()
    image = torch.randn(1, 3, 320, 320)
    with torch.no_grad():
        expected = detector(image)
        with torch.autocast("cpu", dtype=dtype):
            assert relative_error(detector(image), expected) < 0.05
        restore_dynamic_filters(detector, swapped[1])
        assert type(detector.fusion) is forms.CrossModal
        assert relative_error(detector(image), expected) < 1e-5


def test_complex_filters_are_swapped_without_warnings() -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        report = replace_dynamic_filters(forms.FiltersFirst(DIM))
    assert not report[0].reason
    assert not warned


def test_swapping_and_exporting_under_another_default_dtype(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, DIM, 4, 4), forms.ChannelsFirst(DIM))
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert [r.reason for r in replace_dynamic_filters(model)] == [""]
        export(model, tmp_path / "model.pt2", 32)
    finally:
        torch.set_default_dtype(default)


def test_a_swapped_detector_runs_in_half(detector: Detector) -> None:
    detector.eval()
    image = torch.randn(1, 3, 352, 608)
    with torch.no_grad():
        expected = detector(image)
        assert relative_error(detector.half()(image.half()), expected) < 0.02


def test_a_swapped_detector_compiles_whole(detector: Detector) -> None:
    compiled = torch.compile(detector, backend="eager", fullgraph=True, dynamic=False)
    for size in PLANES[:2]:
        image = torch.randn(1, 3, *size)
        for a, e in zip(results(compiled, image), results(detector, image), strict=True):
            assert relative_error(a, e) < 1e-3


def test_forms_inside_distributed_data_parallel_are_swapped(tmp_path: Path) -> None:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        reference = Detector()
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(reference))
        assert not any(r.reason for r in replace_dynamic_filters(parallel))
        image = torch.randn(2, 3, 320, 320)
        for model in (parallel, reference):
            model(image).square().sum().backward()
        for ours, theirs in zip(parallel.module.parameters(), reference.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            assert relative_error(ours.grad, theirs.grad) < 1e-3
    finally:
        distributed.destroy_process_group()
