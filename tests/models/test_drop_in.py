"""Swapping look-alikes of the authors' layers in somebody else's model: what is swapped, and what is refused."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from filter_copies import Authors, ChannelsFirst, Gained, Routing, Star, results
from timm.utils import ModelEmaV2
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from dfformer import DynamicFilter, GlobalFilter, StarReLU, replace_dynamic_filters, restore_dynamic_filters
from dfformer_kernels.tolerance import relative_error


class Affine(Star):
    """The same parameters, another function."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.bias


class FrequencyMixer(Authors):
    """Somebody's copy of the dynamic (routed) or global filter."""

    def __init__(self, dim: int, plane: tuple[int, int], act: type[nn.Module], routed: bool, gain: float = 1.0) -> None:
        super().__init__(dim, plane, 4 if routed else 2 * dim, weight_resize=False)
        setattr(self, "act1", act())  # noqa: B010 (of another type than the authors')
        self._gain = gain
        if not routed:
            del self.reweight

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.view_as_complex(self.complex_weights)
        if hasattr(self, "reweight"):
            weights = torch.einsum("bfc,hkf->bhkc", self._route(x).to(weights.dtype), weights)
        spectrum = torch.fft.rfft2(self.act1(self.pwconv1(x)), dim=(1, 2), norm="ortho")
        x = torch.fft.irfft2(spectrum * weights * self._gain, s=x.shape[1:3], dim=(1, 2), norm="ortho")
        return self.pwconv2(self.act2(x))


class SomebodysModel(nn.Module):
    def __init__(self, *mixers: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({f"block{i}": nn.Sequential(nn.LayerNorm(16), m) for i, m in enumerate(mixers)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = x + block(x)
        return x

    def layer(self, block: int, index: int = 1) -> Any:
        """A block's norm (0) or mixer (1)."""
        return self.get_submodule(f"blocks.block{block}.{index}")


MIXERS: dict[str, Callable[[], FrequencyMixer]] = {
    "dynamic": lambda: FrequencyMixer(16, (8, 8), Star, routed=True),
    "dynamic-odd-rectangular": lambda: FrequencyMixer(16, (8, 7), Star, routed=True),
    "dynamic-gelu": lambda: FrequencyMixer(16, (8, 8), nn.GELU, routed=True),
    "global": lambda: FrequencyMixer(16, (8, 8), Star, routed=False),
}


@pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS.keys())
def test_swapped_model_agrees_and_shares_parameters(make: Callable[[], FrequencyMixer]) -> None:
    model = SomebodysModel(make(), make())
    x = torch.randn(2, 8, 7 if make is MIXERS["dynamic-odd-rectangular"] else 8, 16)
    before = results(model.eval(), x)
    names, state = dict(model.named_parameters()), list(model.state_dict())
    replaced = replace_dynamic_filters(model)
    assert [(r.name, r.reason) for r in replaced] == [("blocks.block0.1", ""), ("blocks.block1.1", "")]
    kind = GlobalFilter if make is MIXERS["global"] else DynamicFilter
    assert all(type(model.layer(i)) is kind for i in (0, 1))
    after = dict(model.named_parameters())
    assert all(after[name] is names[name] for name in after.keys() | names.keys())
    assert list(model.state_dict()) == state, "in the same order, which EMA copies rely on"
    for actual, expected in zip(results(model, x), before, strict=True):
        assert relative_error(actual, expected) < 1e-5
    assert replace_dynamic_filters(model) == [], "nothing is left to swap"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_models_are_swapped_too(dtype: torch.dtype) -> None:
    model = SomebodysModel(MIXERS["dynamic"]()).to(dtype)
    assert [r.reason for r in replace_dynamic_filters(model)] == [""]
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(1, 8, 8, 16).to(dtype)).dtype == dtype


def test_star_relu_is_fused_only_if_it_is_one() -> None:
    hooked = MIXERS["dynamic"]()
    hooked.act1.register_forward_hook(lambda module, inputs, output: None)
    others = [FrequencyMixer(16, (8, 8), act, routed=True) for act in (Affine, Gained)]
    model = SomebodysModel(MIXERS["dynamic"](), *others, hooked)
    assert [r.reason for r in replace_dynamic_filters(model)] == [""] * 4
    assert [type(model.layer(i).act1) for i in range(4)] == [StarReLU, Affine, Gained, Star]


def test_training_mode_is_kept() -> None:
    model = SomebodysModel(MIXERS["dynamic"]()).train()
    model.layer(0, 0).eval()
    model.layer(0).reweight.drop.eval()
    replace_dynamic_filters(model)
    assert model.layer(0).training
    assert not model.layer(0).reweight.drop.training
    assert not model.layer(0, 0).training


def test_zero_weights_hide_no_difference() -> None:
    model = SomebodysModel(FrequencyMixer(16, (8, 8), Star, routed=True, gain=1.01), MIXERS["dynamic"]())
    for mixer in (model.layer(0), model.layer(1)):
        nn.init.zeros_(mixer.pwconv2.weight)
    scaled, equal = replace_dynamic_filters(model)
    assert "its output differs from ours by a factor, 1.01 in the trial" in scaled.reason
    assert "left alone" in str(scaled)
    assert type(model.layer(0)) is FrequencyMixer
    assert not equal.reason
    assert not model.layer(1).pwconv2.weight.any(), "the trial changed nothing"


class OwnLoading(ChannelsFirst):
    loaded = 0

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.loaded += 1


HOOKS: dict[str, Callable[..., Any]] = {
    "forward hook": lambda m, hook: m.register_forward_hook(hook),
    "forward pre-hook": lambda m, hook: m.register_forward_pre_hook(hook),
    "backward hook": lambda m, hook: m.register_full_backward_hook(hook),
    "state dict hook": lambda m, hook: m.register_state_dict_post_hook(hook),
    "loading hook": lambda m, hook: m.register_load_state_dict_post_hook(hook),
    "global hook": lambda m, hook: nn.modules.module.register_module_forward_hook(hook),
}


@pytest.mark.parametrize("add", HOOKS.values(), ids=HOOKS.keys())
@pytest.mark.parametrize("make", [lambda: ChannelsFirst(8), lambda: Authors(8)], ids=["copy", "authors"])
def test_hooks_stay_and_see_no_trial(add: Callable[..., Any], make: Callable[[], nn.Module]) -> None:
    mixer = make()
    model, seen = nn.Sequential(mixer), list[nn.Module]()
    with add(mixer, lambda module, *_: seen.append(module)):
        report = replace_dynamic_filters(model)
        assert not report[0].reason
        assert mixer not in seen
        model(torch.randn(1, 8, 8, 8, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())
        assert model[0] in seen


def test_methods_stay() -> None:
    model = nn.Sequential(OwnLoading(8))
    report = replace_dynamic_filters(model)
    model.load_state_dict(model.state_dict())
    assert model[0].loaded == 1
    assert (report[0].replacement, report[0].reason) == ("FusedOwnLoading", "")


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


UNREADABLE: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "instance forward": (lambda m: setattr(m, "forward", lambda x: x), "its forward is not that of its class"),
    "parametrisation": (lambda m: parametrize.register_parametrization(m, "complex_weights", Doubled()), "parametris"),
    "meta device": (lambda m: m.to("meta"), "meta"),
}


@pytest.mark.parametrize(("change", "reason"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_cannot_be_tried_is_left_alone(change: Callable[[nn.Module], Any], reason: str) -> None:
    mixer = ChannelsFirst(16)
    model = nn.Sequential(mixer)
    change(mixer)
    kind = type(mixer)
    [outcome] = replace_dynamic_filters(model)
    assert reason in outcome.reason
    assert type(model[0]) is kind


def test_all_names_of_a_shared_layer_are_replaced_together() -> None:
    mixer, block = MIXERS["dynamic"](), nn.Sequential(ChannelsFirst(16))
    model = nn.Module()
    model.a, model.b, model.c, model.d = mixer, nn.ModuleList([mixer]), block, block
    report = replace_dynamic_filters(model)
    assert [r.name for r in report] == ["a", "b.0", "c.0", "d.0"]
    assert model.a is model.b[0] is mixer
    assert report[0].replacement == "DynamicFilter"
    assert model.c[0] is model.d[0]
    report.undo()
    assert model.a is model.b[0] is mixer
    assert [type(m) for m in (model.a, model.a.act1)] == [FrequencyMixer, Star]


class NotAFilter(nn.Module):
    """Parameters of these names, of shapes no filter has."""

    def __init__(self) -> None:
        super().__init__()
        self.complex_weights = nn.Parameter(torch.zeros(4, 3, 5, 2))
        self.pwconv1, self.pwconv2 = nn.Linear(16, 32), nn.Linear(32, 16)


class Positions(nn.Module):
    """A parameter of four axes, the last of two, and no transform."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(4, 3, 5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table.sum()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_where_nothing_is_found_the_report_says_what_was_looked_for() -> None:
    traced = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    others = (NotAFilter(), nn.Conv2d(2, 2, (3, 2)), Positions(), DynamicFilter(8, size=4), Routing(8, 8), traced)
    report = replace_dynamic_filters(nn.Sequential(*others))
    assert report == []
    assert "nothing to replace among the 21 modules of Sequential, 1 of them fused already: " in str(report)
    assert "(H, W//2 + 1, F, 2)" in str(report)
    assert "irfft2" in str(report)


def test_report_has_a_line_for_each_layer() -> None:
    model = nn.Sequential(ChannelsFirst(8), MIXERS["dynamic"](), ChannelsFirst(8).to("meta"))
    header, *lines = str(replace_dynamic_filters(model)).splitlines()
    assert header == "replaced 2 of 3"
    assert lines[:2] == ["0 (ChannelsFirst): is now FusedChannelsFirst", "1 (FrequencyMixer): is now DynamicFilter"]
    assert lines[2].startswith("2 (ChannelsFirst): left alone: ")


def test_a_bare_layer_stays_the_same_object() -> None:
    layer, x = Authors(8), torch.randn(1, 8, 8, 8)
    expected = layer(x)
    report = replace_dynamic_filters(layer)
    assert str(report[0]) == "the model (Authors): is now DynamicFilter"
    assert 0 < relative_error(layer(x), expected) < 1e-5
    report.undo()
    assert torch.equal(layer(x), expected)


class NoSecondActivation(Authors):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        del self.act2

    def forward(self, x: Tensor) -> Tensor:
        return self.pwconv2(self._filtered(self.act1(self.pwconv1(x)), self._route(x)))


def test_an_authors_layer_without_a_submodule_keeps_its_class() -> None:
    layer, x = NoSecondActivation(8), torch.randn(2, 8, 8, 8)
    expected, names = layer(x), [name for name, _ in layer.named_modules()]
    report = replace_dynamic_filters(layer)
    assert str(report[0]) == "the model (NoSecondActivation): is now FusedNoSecondActivation"
    assert isinstance(layer, NoSecondActivation)
    assert [name for name, _ in layer.named_modules()] == names
    assert 0 < relative_error(layer(x), expected) < 1e-5
    report.undo()
    assert type(layer) is NoSecondActivation
    assert torch.equal(layer(x), expected)


def test_the_trial_leaves_random_numbers_and_modes_alone() -> None:
    model = nn.Sequential(ChannelsFirst(8))
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not replace_dynamic_filters(model)[0].reason
    assert torch.equal(torch.randn(4), expected)
    assert all(p.grad is None for p in model.parameters())


def two_forms() -> nn.Sequential:
    """Layers that become a FusedChannelsFirst and a DynamicFilter, in (B,C,H,W) and (B,H,W,C) of C = H = W."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 1), ChannelsFirst(8), Authors(8))


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(2, 8, 8, 8)).square().mean().backward()
    optimizer.step()


def test_undo_gives_back_the_trained_original() -> None:
    model, x = two_forms(), torch.randn(2, 8, 8, 8)
    originals = list(model)
    report = replace_dynamic_filters(model)
    step(model)
    model[2].pwconv1 = nn.Sequential(model[2].get_submodule("pwconv1"))  # an adapter put in later stays
    model.double().eval()
    expected = model(x.double())
    report.undo()
    assert [a is b for a, b in zip(model, originals, strict=True)] == [True] * 3
    assert type(model[2].act1) is Star
    assert not any(m.training for m in model.modules())
    assert relative_error(model.to(torch.float32)(x), expected) < 1e-5
    with pytest.raises(ValueError, match="expected the layer that was put at '1', got ChannelsFirst"):
        report.undo()


class StarOfModules(Star):
    """The authors' form, with a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.relu(x) ** 2 + self.bias


@pytest.mark.parametrize("put_in", ["act1", "layer"])
def test_undo_keeps_what_was_put_in_later(put_in: str) -> None:
    model, x = nn.Sequential(FrequencyMixer(16, (8, 8), StarOfModules, routed=True)), torch.randn(2, 8, 8, 16)
    report = replace_dynamic_filters(model)
    assert type(model[0].act1) is StarReLU
    if put_in == "act1":
        model[0].act1 = StarReLU(0.5, 0.25)
    else:
        model[0] = DynamicFilter(16, size=8)
    expected = model(x)
    report.undo()
    assert type(model[0]) is FrequencyMixer
    assert relative_error(model(x), expected) < 1e-5


def test_copies_of_a_swapped_model_keep_everything_and_are_restored_by_the_same_report() -> None:
    model, x = two_forms(), torch.randn(2, 8, 8, 8)
    report = replace_dynamic_filters(model)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(duplicate.state_dict()) == list(model.state_dict())
        assert duplicate[1].num_filters == 4
        step(duplicate)
        expected = duplicate(x)
        restore_dynamic_filters(duplicate, report)
        assert [type(m) for m in duplicate] == [nn.Conv2d, ChannelsFirst, Authors]
        assert relative_error(duplicate(x), expected) < 1e-5
    assert type(model[2]) is DynamicFilter, "the report's own model is untouched"


def test_swapped_models_are_traced_and_exported() -> None:
    model, x = two_forms().eval(), torch.randn(2, 8, 8, 8)
    replace_dynamic_filters(model)
    expected = model(x)
    assert relative_error(torch.fx.symbolic_trace(model)(x), expected) < 1e-6
    assert relative_error(torch.export.export(model, (x,)).module()(x), expected) < 1e-6


@pytest.mark.parametrize("before", [True, False], ids=["EMA copy made before", "made after"])
def test_ema_copies_follow_a_swapped_model(before: bool) -> None:
    model = two_forms()
    report = None if before else replace_dynamic_filters(model)
    ema, average = ModelEmaV2(model, decay=0.5), AveragedModel(model)
    report = report or replace_dynamic_filters(model)
    if before:
        replace_dynamic_filters(ema.module)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model)
    ema.update(model)
    average.update_parameters(model)
    followed, averaged = dict(ema.module.named_parameters()), dict(average.module.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(followed[name].detach(), (old[name] + p.detach()) / 2)
        torch.testing.assert_close(averaged[name].detach(), p.detach())
    assert not torch.equal(ema.module(torch.ones(1, 8, 8, 8)), model(torch.ones(1, 8, 8, 8)))


def test_restoring_needs_a_report() -> None:
    with pytest.raises(TypeError, match="report: expected what replace_dynamic_filters returned, got list"):
        restore_dynamic_filters(nn.Identity(), [])  # type: ignore[arg-type]
