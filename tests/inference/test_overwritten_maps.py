"""Without gradients, layers overwrite the maps that they make, and nothing that somebody else may hold."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfformer import AFNO2D, DynamicFilter, GlobalFilter, SepConv, optimize_for_inference
from dfformer.models.registry import dfformer_s18

LAYERS = pytest.mark.parametrize("layer_class", [DynamicFilter, GlobalFilter, SepConv, AFNO2D])


@LAYERS
def test_without_gradients_nothing_that_somebody_holds_is_overwritten(layer_class: Callable[..., Any]) -> None:
    layer = layer_class(8, expansion_ratio=1, size=6)
    x = torch.randn(2, 6, 6, 8)
    expected = layer(x).detach()
    kept: list[Tensor] = []
    copies: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept.append(output)
        copies.append(output.clone())

    with torch.no_grad():
        for register in (layer.pwconv1.register_forward_hook, nn.modules.module.register_module_forward_hook):
            with register(keep):
                torch.testing.assert_close(layer(x), expected)
        assert all(map(torch.equal, kept, copies))
        layer.pwconv1 = nn.Identity()
        before = x.clone()
        layer(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("everywhere", [False, True])
@LAYERS
def test_a_hook_that_removes_itself_keeps_its_tensor(layer_class: Callable[..., Any], everywhere: bool) -> None:
    layer, x = layer_class(8, size=6), torch.randn(2, 6, 6, 8)
    kept: list[Tensor] = []

    def once(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module is layer.pwconv1:
            kept.append(output)
            handle.remove()

    register = nn.modules.module.register_module_forward_hook if everywhere else layer.pwconv1.register_forward_hook
    handle = register(once)
    with torch.no_grad():
        layer(x)
        torch.testing.assert_close(kept[0], layer.pwconv1(x))


class AddsInput(DynamicFilter):
    def filter(self, x: Tensor, *others: Any) -> Tensor:
        return super().filter(x, *others) + x


class KeepsInput(DynamicFilter):
    def step_input(self, x: Tensor) -> Any:
        self.kept, star_relu = super().step_input(x)
        return self.kept, star_relu


class IsNoLinear(nn.Linear):
    def is_linear(self) -> bool:
        return False

    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept


def test_methods_of_subclasses_and_instances_may_keep_maps() -> None:
    x = torch.randn(2, 6, 6, 8)
    adds, keeps = AddsInput(8, size=6), KeepsInput(8, size=6)
    own, replaced = (DynamicFilter(8, size=6) for _ in "ab")
    expected = adds(x).detach()
    kept: list[Tensor] = []

    def keeping(x: Tensor) -> Any:
        y, star_relu = DynamicFilter.step_input(own, x)
        kept.append(y)
        return y, star_relu

    vars(own)["step_input"] = keeping
    replaced.pwconv1 = IsNoLinear(8, 16, bias=False)
    with torch.no_grad():
        torch.testing.assert_close(adds(x), expected)
        keeps(x)
        torch.testing.assert_close(keeps.kept, keeps.pwconv1(x))
        own(x)
        torch.testing.assert_close(kept[0], own.pwconv1(x))
        replaced(x)
        torch.testing.assert_close(replaced.pwconv1.kept, replaced.pwconv1(x))


@LAYERS
def test_without_gradients_the_result_has_the_same_bits(layer_class: Callable[..., Any]) -> None:
    layer, x = layer_class(8, size=6), torch.randn(2, 6, 6, 8)
    with torch.no_grad():
        actual = layer(x)
    assert torch.equal(actual, layer(x).detach())


def test_a_served_layer_keeps_the_tensor_of_a_hook_that_removes_itself() -> None:
    served = optimize_for_inference(dfformer_s18(img_size=32, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)), img_size=32)
    layer: Any = served.get_submodule("model.stages.0.0.token_mixer.pwconv1")
    kept: list[Tensor] = []

    def once(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept.extend((inputs[0], output))
        handle.remove()

    handle = layer.register_forward_hook(once)
    served(torch.randn(1, 3, 32, 32))
    torch.testing.assert_close(kept[1], layer(kept[0]))


def test_a_layer_overwrites_what_it_made(monkeypatch: pytest.MonkeyPatch) -> None:
    overwritten: list[int] = []
    original = torch.ops.dfformer.dynamic_filter_

    def recording(*args: Any) -> None:
        overwritten.append(args[0].numel())
        original(*args)

    monkeypatch.setattr(torch.ops.dfformer, "dynamic_filter_", recording)
    layer, x = DynamicFilter(8, size=6), torch.randn(2, 6, 6, 8)
    layer(x)
    assert overwritten == []
    with torch.no_grad():
        layer(x)
        optimize_for_inference(layer)(x)
    assert overwritten == [2 * 6 * 6 * 16] * 2
