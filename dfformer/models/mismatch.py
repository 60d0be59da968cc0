"""Compares the weights of a checkpoint with a model, and names the most likely cause of a difference."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from dfformer.models.spectral import SpectralFilter
from dfformer.utils.text import abbreviate

_BLOCK = re.compile(r"\bstages[._](\d+)\.(\d+)\.")
_CHANNELS = re.compile(r"\bstages[._](\d+)\.0\.norm1\.weight$")


class Mismatch(NamedTuple):
    """How a state dict differs from a model: names, with both shapes of ``wrong_shape`` and types of ``wrong_type``."""

    missing: list[str]
    unexpected: list[str]
    wrong_shape: dict[str, str]
    wrong_type: dict[str, str]  # integers or complex numbers for the model's real ones, or vice versa
    reinitialised: list[str]  # the classifier, left as initialised because the number of classes differs

    def __str__(self) -> str:
        parts = {
            "left as initialised": self.reinitialised,
            "missing": self.missing,
            "unexpected": [name[:200] for name in self.unexpected],  # names in the file may be anything
            "wrongly shaped": [f"{name} ({shapes})" for name, shapes in self.wrong_shape.items()],
            "with another number type": [f"{name} ({types})" for name, types in self.wrong_type.items()],
        }
        return "\n".join(f"{title} ({len(names)}): {abbreviate(names, 10)}" for title, names in parts.items() if names)


def compare(model: nn.Module, state_dict: Mapping[str, Tensor], exactly: bool = False) -> Mismatch:
    """How ``state_dict`` differs from ``model``.

    Unless ``exactly``, filters stored for another image size do not count as a difference, and a classifier's last
    layer for another number of classes is `reinitialised`, not of the wrong shape.
    """
    own = model.state_dict()
    shared = sorted(own.keys() & state_dict.keys())
    wrong = {
        name
        for name in shared
        if own[name].shape != state_dict[name].shape and (exactly or not _is_resized(model, name, state_dict[name]))
    }
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier", "head.fc2")
    weight, bias = f"{classifier}.weight", f"{classifier}.bias"
    fits = {weight, bias} <= wrong and own[weight].shape[1:] == state_dict[weight].shape[1:]  # but for the classes
    reinitialised = {weight, bias} if fits and not exactly else set()
    other_kind = [n for n in shared if own[n].is_floating_point() != state_dict[n].is_floating_point()]

    def both(names: Iterable[str], of: Callable[[Tensor], str]) -> dict[str, str]:
        return {name: f"checkpoint {of(state_dict[name])}, model {of(own[name])}" for name in names}

    return Mismatch(
        missing=sorted(own.keys() - state_dict.keys()),
        unexpected=sorted(state_dict.keys() - own.keys()),
        wrong_shape=both(sorted(wrong - reinitialised), lambda t: str(tuple(t.shape))),
        wrong_type=both(other_kind, lambda t: str(t.dtype).removeprefix("torch.")),
        reinitialised=sorted(reinitialised),
    )


def _is_resized(model: nn.Module, name: str, stored: Tensor) -> bool:
    """Whether the parameter ``name`` has the filters of a layer that resizes ``stored`` when it loads them."""
    path, _, own_name = name.rpartition(".")
    layer = dict(model.named_modules(remove_duplicate=False)).get(path)
    return own_name == "complex_weights" and isinstance(layer, SpectralFilter) and layer.accepts(stored)


def _layout(weights: Mapping[str, Tensor]) -> dict[str, dict[int, int]]:
    """What the names and shapes of weights tell about a MetaFormer, by stage."""
    depths: dict[int, int] = {}
    dims: dict[int, int] = {}
    for name, tensor in weights.items():
        if found := _BLOCK.search(name):
            stage, block = (min(int(number[:6]), 10**6) for number in found.groups())
            depths[stage] = max(depths.get(stage, 0), block + 1)
        if (found := _CHANNELS.search(name)) and tensor.ndim:
            dims[int(found[1][:6])] = len(tensor)
    return {"depths": depths, "dims": dims}


def causes(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Sentences on why the weights ``given`` do not fit a model with weights ``own``."""
    model, checkpoint = _layout(own), _layout(given)
    if not own.keys() & given.keys() or not checkpoint["depths"]:
        return ["the checkpoint is of another kind of model"]
    found = []
    for what, unit in (("depths", "blocks"), ("dims", "channels")):
        theirs, ours = checkpoint[what], model[what]
        differing = [stage for stage in theirs.keys() | ours.keys() if theirs.get(stage) != ours.get(stage)]
        if differing:
            stage = min(differing)
            has = f"has {theirs.get(stage, 'no')} {unit} in stage {stage}"
            found.append(f"{what} differ: the checkpoint {has}, the model {ours.get(stage, 'no')}")
    return found
