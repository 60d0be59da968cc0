"""Copies of served models, and weights that are written to or loaded after packing."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import images, trained
from torch import Tensor, nn

from dfformer import optimize_for_inference
from dfformer.inference.packed import PackedLinear
from dfformer_kernels.tolerance import relative_error

HAS_ONEDNN = torch.backends.mkldnn.is_available()


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


def packed(served: nn.Module, name: str) -> PackedLinear:
    layer = served.get_submodule(name)
    assert isinstance(layer, PackedLinear)
    return layer


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "in_place": lambda served: scaled(served, lambda t: t.mul_(1.5)),
    "by_data": lambda served: scaled(served, lambda t: t.data.mul_(1.5)),
    "by_collective": lambda served: scaled(served, broadcast_from_another),
    "by_numpy": lambda served: scaled(served, write_by_numpy),
    "of_one_layer": lambda served: packed(served, "model.stages.2.0.mlp.fc1").weight.data.mul_(1.5),
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
