"""Hooks, adapters, prunings and patches in any module of a model: an optimised one computes what the model computes."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from extent import pairwise
from small_models import EVERY_COMPUTATION, images, trained
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune

from dfformer import StarReLU, optimize_for_inference
from dfformer.models import exact
from dfformer_kernels.tolerance import relative_error


class Adapter(nn.Module):
    """What adapters are: a module around the layer, with its weight's name."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        self.weight = base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


def subclassed(owner: nn.Module, name: str) -> None:
    getattr(owner, name).__class__ = Subclass


def patched(owner: nn.Module, name: str) -> None:
    replace_forward(getattr(owner, name), "forward")


def call_patched(owner: nn.Module, name: str) -> None:
    replace_forward(getattr(owner, name), "_call_impl")


def replace_forward(layer: nn.Module, attribute: str) -> None:
    forward = getattr(layer, attribute)
    setattr(layer, attribute, lambda x: forward(x) + forward(x).square())


def weight_as_buffer(owner: nn.Module, name: str) -> None:
    layer: Any = getattr(owner, name)
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", 2 * weight)


CONTENTS: dict[str, Callable[[nn.Module, str], object]] = {
    "adapter": lambda owner, name: setattr(owner, name, Adapter(getattr(owner, name))),
    "hook": lambda owner, name: getattr(owner, name).register_forward_hook(lambda m, i, y: y + y.square()),
    "pre_hook": lambda owner, name: getattr(owner, name).register_forward_pre_hook(
        lambda m, i: (i[0] + i[0].square(),)
    ),
    "prune": lambda owner, name: prune.l1_unstructured(getattr(owner, name), "weight", 0.5),
    "weight_norm": lambda owner, name: parametrizations.weight_norm(
        getattr(owner, name)
    ).parametrizations.weight.original0.data.mul_(1.5),
    "old_weight_norm": lambda owner, name: nn.utils.weight_norm(getattr(owner, name)).weight_g.data.mul_(1.5),
    "parametrization": lambda owner, name: parametrize.register_parametrization(
        getattr(owner, name), "weight", Doubled()
    ),
    "subclass": subclassed,
    "patched": patched,
    "call_patched": call_patched,
}
LAYERS = [
    f"stages.1.0.{name}"
    for name in ("mlp.fc1", "mlp.fc2", "token_mixer.pwconv1", "token_mixer.pwconv2", "token_mixer.reweight.fc1")
]
MODULES = (
    "stages.1.0.norm1",
    "stages.1.0.mlp",
    "stages.1.0.mlp.act",
    "stages.2.0.res_scale1",
    "stages.1.0",
    "head.fc1",
)
HONOURED = [
    *pairwise(content=list(CONTENTS), name=LAYERS)["argvalues"],
    *product(("hook", "pre_hook", "patched", "call_patched"), MODULES),
]


def responsive() -> nn.Module:
    """A model whose logits follow each of its layers."""
    model = trained()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("stages.1"):
                parameter.mul_(20 if "complex_weights" in name else 4 if parameter.ndim == 2 else 1)
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize(("content", "name"), HONOURED)
def test_what_lives_in_a_module_is_honoured(content: str, name: str) -> None:
    model, x = responsive(), images()
    plain = model(x)
    owner, _, child = name.rpartition(".")
    CONTENTS[content](model.get_submodule(owner), child)
    with_gradients = model(x)
    assert relative_error(with_gradients, plain) > 1e-4
    with torch.no_grad():
        assert relative_error(model(x), with_gradients) < 1e-5
    model(x)  # a pruned layer keeps the weight that it computed, with its graph
    served = optimize_for_inference(model)
    assert relative_error(served(x), with_gradients) < 1e-4
    assert name not in LAYERS or any(entry.name.startswith("stages.1.0") for entry in served.left_alone)


@pytest.mark.parametrize("attribute", ["forward", "__call__", "_call_impl"])
def test_what_is_patched_on_the_class_is_honoured(attribute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = trained(), images()
    plain, original = model(x), getattr(nn.Linear, attribute)
    monkeypatch.setattr(nn.Linear, attribute, lambda self, x: 2 * original(self, x))
    patched = model(x)
    assert relative_error(patched, plain) > 1e-3
    assert relative_error(optimize_for_inference(model)(x), patched) < 1e-4


@pytest.mark.parametrize(("kind", "method"), [(nn.Linear, "forward"), (nn.Module, "__call__")])
def test_what_was_patched_before_the_import_is_honoured(
    kind: type[nn.Module], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As programs do that patch torch when they start."""
    model, x = trained(), images()
    plain, original = model(x), getattr(kind, method)

    def patched(self: nn.Module, *args: Any) -> Any:
        return (2 if isinstance(self, nn.Linear) else 1) * original(self, *args)

    monkeypatch.setattr(kind, method, patched)
    monkeypatch.setattr(exact, "_FORWARDS", {**exact._FORWARDS})
    exact.fusible(nn.Linear)
    monkeypatch.setattr(exact, "_CALL", exact._original("__call__", nn.Module))
    expected = model(x)
    assert relative_error(expected, plain) > 1e-3
    with torch.no_grad():
        assert relative_error(model(x), expected) < 1e-5
    assert relative_error(optimize_for_inference(model)(x), expected) < 1e-4


@pytest.mark.parametrize("name", ["norm1", "norm2", "mlp.fc1", "token_mixer.pwconv1"])
def test_a_weight_that_is_a_buffer(name: str) -> None:
    """As in a hypernetwork, or a frozen copy."""
    model, x = responsive(), images()
    owner, _, child = f"stages.1.0.{name}".rpartition(".")
    weight_as_buffer(model.get_submodule(owner), child)
    assert relative_error(optimize_for_inference(model)(x), model(x)) < 1e-4


def test_a_bias_that_is_an_attribute() -> None:
    model, x = responsive(), images()
    plain = model(x)
    layers: list[Any] = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for layer in layers:
        if layer.bias is None:
            del layer.bias
            layer.bias = torch.full((layer.out_features,), 0.1)
    expected = model(x)
    assert relative_error(expected, plain) > 1e-3
    assert relative_error(optimize_for_inference(model)(x), expected) < 1e-4


def test_hooks_of_a_state_dict_are_kept() -> None:
    model = trained()
    layer: nn.Module = model.get_submodule("stages.1.0.mlp.fc1")
    layer.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({f"{prefix}rank": torch.ones(1)}))
    served = optimize_for_inference(model)
    assert "model.stages.1.0.mlp.fc1.rank" in served.state_dict()
    assert any(entry.name == "stages.1.0.mlp" and "hooks" in str(entry) for entry in served.left_alone)


@EVERY_COMPUTATION
def test_filters_that_are_computed_are_not_fixed(compute: Callable[[nn.Module], object]) -> None:
    model, x = responsive(), images(96, 96)
    compute(model.get_submodule("stages.1.0.token_mixer"))
    served = optimize_for_inference(model, img_size=96)
    assert relative_error(served(x), model(x)) < 1e-4
    reason = "stages.1.0.token_mixer: its filters are computed at each call"
    assert [str(entry) for entry in served.left_alone if "filters" in str(entry)] == [reason]


def test_global_hooks_see_every_module() -> None:
    model, x = trained(), images()
    seen: dict[bool, set[nn.Module]] = {True: set(), False: set()}
    for gradients, modules in seen.items():
        hook = register_module_forward_hook(lambda module, args, y, modules=modules: modules.add(module))
        with hook, torch.set_grad_enabled(gradients):
            model(x)
    assert seen[True] == seen[False] >= {m for m in model.modules() if isinstance(m, nn.Linear | StarReLU)}
