"""Other people's tools on served models: right, or refused with a sentence that says what to use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import ERROR, images, small
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from dfformer import optimize_for_inference
from dfformer.inference.optimize import InferenceModel
from dfformer.inference.packed import PackedLinear
from dfformer.models.checkpoint import save_checkpoint
from dfformer_kernels.tolerance import relative_error


@pytest.fixture
def served() -> InferenceModel:
    torch.manual_seed(0)
    model = small("cdfformer_s18")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return optimize_for_inference(model)


def packed(model: nn.Module) -> tuple[str, PackedLinear]:
    return next((name, m) for name, m in model.named_modules() if isinstance(m, PackedLinear))


def test_a_symbolic_trace_reads_the_weights(served: InferenceModel) -> None:
    x = images()
    traced = torch.fx.symbolic_trace(served.model)
    assert relative_error(traced(x), served(x)) < ERROR
    _, layer = packed(served)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert relative_error(traced(x), served(x)) < ERROR


def test_products_with_packed_weights_are_counted(served: InferenceModel) -> None:
    layer, x = packed(served)[1], torch.randn(3, 5, packed(served)[1].in_features)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 15 * layer.in_features * layer.out_features


@pytest.mark.parametrize("part", ["fc1", "act", "fc2"])
def test_a_hook_sees_the_whole_of_a_call(part: str, served: InferenceModel) -> None:
    """Not the few rows that are computed at a time."""
    shapes: list[tuple[int, ...]] = []
    layer = served.get_submodule(f"model.stages.0.0.mlp.{part}")
    layer.register_forward_hook(lambda module, args, y: shapes.append(tuple(y.shape)))
    served(images())
    [shape] = shapes
    assert len(shape) == 4


def test_a_layer_may_be_replaced(served: InferenceModel) -> None:
    x, mlp = images(), served.get_submodule("model.stages.0.0.mlp")
    y = served(x)
    assert isinstance(mlp.fc1, PackedLinear)
    layer = nn.Linear(mlp.fc1.in_features, mlp.fc1.out_features, bias=False)
    layer.weight = nn.Parameter(mlp.fc1.weight, requires_grad=False)
    mlp.fc1 = layer
    assert relative_error(served(x), y) < ERROR


def _other_weight(model: InferenceModel, layer: PackedLinear, name: str) -> Any:
    return torch.func.functional_call(model, {f"{name}.weight": torch.zeros_like(layer.weight)}, (images(),))


REFUSED: dict[str, Callable[[InferenceModel, PackedLinear, str], Any]] = {
    "functional_call": _other_weight,
    "assignment": lambda model, layer, name: setattr(layer, "weight", nn.Parameter(layer.weight)),
    "prune": lambda model, layer, name: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_would_not_reach_the_packed_weight_is_refused(change: str, served: InferenceModel) -> None:
    x: Tensor = images()
    name, layer = packed(served)
    y = served(x)
    with pytest.raises((AttributeError, TypeError), match="a served layer's weights change by load_state_dict alone"):
        REFUSED[change](served, layer, name)
    assert relative_error(served(x), y) < ERROR


@pytest.mark.parametrize("part", ["whole", "model"])
def test_no_checkpoint_holds_a_served_model(part: str, served: InferenceModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: is optimised for inference; pass the one it was made from"):
        save_checkpoint(served if part == "whole" else served.model, tmp_path / "m.safetensors", "cdfformer_s18")
    assert not list(tmp_path.iterdir())
