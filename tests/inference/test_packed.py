"""Served models under other people's tools, copied, and with weights that are written to or loaded after packing."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from export_models import spread
from small_models import ERROR, images, small, trained
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from dfformer import optimize_for_inference
from dfformer.inference import packed as packed_module
from dfformer.inference.optimize import InferenceModel
from dfformer.inference.packed import PackedLinear
from dfformer.models.checkpoint import save_checkpoint
from dfformer_kernels.ops import by_onednn, is_large
from dfformer_kernels.tolerance import BOUND, relative_error

HAS_ONEDNN = torch.backends.mkldnn.is_available()


@pytest.fixture
def served() -> InferenceModel:
    return optimize_for_inference(spread(small("cdfformer_s18")))


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


@pytest.mark.parametrize(
    ("rows", "dtype", "uses_packed"),
    [(1, torch.float32, False), (2, torch.float32, True), (1, torch.bfloat16, True)],
    ids=str,
)
@torch.no_grad()
def test_thin_float32_products_do_without_the_packed_weight(
    rows: int, dtype: torch.dtype, uses_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row, as the routing of one image has, takes oneDNN up to seven times as long."""
    monkeypatch.setattr(packed_module, "is_large", is_large)
    layer, spy = PackedLinear(torch.randn(1024, 512, dtype=dtype)), Mock(wraps=by_onednn)
    if layer._packed is None:
        pytest.skip(f"this build of torch cannot pack {dtype} for this processor")
    monkeypatch.setattr(packed_module, "by_onednn", spy)
    x = torch.randn(rows, 512, dtype=dtype)
    y = layer(x)
    assert relative_error(y, x.double() @ layer._weight.double().T) <= BOUND[dtype]
    assert spy.called == uses_packed


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


# Copies, and weights that are written to or loaded after packing


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_copies_serve_the_same(dtype: torch.dtype | None, copied: Any) -> None:
    served, x = optimize_for_inference(trained(), dtype), images()
    y = served(x)  # packs weights, which the copy must do by itself
    assert torch.equal(copied(served)(x), y)


def scaled(served: nn.Module, write: Callable[[Tensor], object]) -> None:
    for t in served.state_dict().values():
        write(t)


def broadcast_from_another(t: Tensor) -> None:
    """What a collective operation does on a process that receives: it writes past autograd."""
    t.data.copy_(t * 1.5)


def write_by_numpy(t: Tensor) -> None:
    values = t.numpy()
    values *= 1.5


WRITES: dict[str, Callable[[Any], object]] = {
    "in_place": lambda served: scaled(served, lambda t: t.mul_(1.5)),
    "by_data": lambda served: scaled(served, lambda t: t.data.mul_(1.5)),
    "by_collective": lambda served: scaled(served, broadcast_from_another),
    "by_numpy": lambda served: scaled(served, write_by_numpy),
    "of_one_layer": lambda served: served.get_submodule("model.stages.2.0.mlp.fc1").weight.data.mul_(1.5),
    "load_state_dict": lambda served: served.load_state_dict({k: 1.5 * t for k, t in served.state_dict().items()}),
}


@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_weights_that_are_written_to_are_what_is_multiplied_by(write: str) -> None:
    served, x = optimize_for_inference(trained()), images()
    before = served(x)
    WRITES[write](served)
    after = served(x)
    assert relative_error(after, before) > 1e-3
    assert relative_error(copy.deepcopy(served)(x), after) < 1e-5  # which packs anew


@pytest.mark.parametrize("assign", [False, True])
@torch.no_grad()
def test_weights_are_loaded_and_packed(assign: bool) -> None:
    other, x = optimize_for_inference(trained()), images()
    state = {name: nn.Buffer(1.5 * t) for name, t in other.state_dict().items()}
    other.load_state_dict(state)
    served = optimize_for_inference(trained())
    served.load_state_dict(state, assign=assign)
    layers = [m for m in served.modules() if isinstance(m, PackedLinear)]
    assert all(layer._packed is not None for layer in layers) or not HAS_ONEDNN
    own = {t.data_ptr() for t in state.values()}
    assert not any(layer._weight.data_ptr() in own for layer in layers)
    assert relative_error(served(x), other(x)) < 1e-5


def test_a_state_dict_that_does_not_fit_is_refused() -> None:
    served = optimize_for_inference(trained())
    name = "model.stages.2.0.mlp.fc1.weight"
    state = served.state_dict()
    with pytest.raises(RuntimeError, match=rf"size mismatch for {name}: .*\[2, 2\]"):
        served.load_state_dict({**state, name: torch.ones(2, 2)})
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        served.load_state_dict({key: t for key, t in state.items() if key != name})


@torch.no_grad()
def test_a_bias_of_any_strides_is_read_as_it_is() -> None:
    weight, bias, x = torch.randn(5, 4), torch.randn(10)[::2], torch.randn(6, 4)
    layer = PackedLinear(weight, torch.zeros(5))
    layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    assert relative_error(layer(x), nn.functional.linear(x, weight, bias)) < 1e-6
