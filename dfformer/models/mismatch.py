"""Compares the weights of a checkpoint with a model, and names the most likely cause of a difference."""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from dfformer.models.registry import VARIANTS
from dfformer.models.spectral import SpectralFilter
from dfformer.utils.text import abbreviate

_BLOCK = re.compile(r"\bstages[._](\d+)\.(\d+)\.")
_CHANNELS = re.compile(r"\bstages[._](\d+)\.0\.norm1\.weight$")
# Parts of tensor names that tell a block's token mixer; the first match counts.
_MIXERS = {
    "token_mixer.reweight.": "DynamicFilter",
    "token_mixer.complex_weights": "GlobalFilter",
    "token_mixer.dwconv.": "SepConv",
    "token_mixer.w1": "AFNO2D",
}
# A tensor name that only such models have.
_FAMILIES = {
    "fpn.encoder.": "a segmentation model",
    "backbone.encoder.": "a detection model",
    "layer1.0.conv1.weight": "a ResNet",
    "stages.0.blocks.0.conv_dw.weight": "a ConvNeXt of timm",
    "stages.0.blocks.0.norm1.": "a MetaFormer of timm, not of dfformer",
    "layers.0.blocks.0.attn.qkv.weight": "a Swin transformer",
    "blocks.0.attn.qkv.weight": "a vision transformer",
    "norm0.weight": "a model with fork_feat=True",
}


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


def _layout(weights: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    """What the names and shapes of weights tell about a MetaFormer, by stage."""
    depths: dict[int, int] = {}
    dims: dict[int, int] = {}
    mixers: dict[int, str] = {}
    for name, tensor in weights.items():
        if found := _BLOCK.search(name):
            stage, block = (min(int(number[:6]), 10**6) for number in found.groups())
            depths[stage] = max(depths.get(stage, 0), block + 1)
            mixer = next((mixer for part, mixer in _MIXERS.items() if part in name), None)
            if mixer and mixers.get(stage) != "DynamicFilter":
                mixers[stage] = mixer
        if (found := _CHANNELS.search(name)) and tensor.ndim:
            dims[int(found[1][:6])] = len(tensor)
    return {"token mixers": mixers, "depths": depths, "dims": dims}


def causes(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Sentences on why the weights ``given`` do not fit a model with weights ``own``, the most certain first."""
    family = next((f for part, f in _FAMILIES.items() if _has(given, part) and not _has(own, part)), None)
    if family:
        return [f"the checkpoint is of {family}"]
    if not own.keys() & given.keys():
        return ["the checkpoint is of another kind of model: no name is the same"]
    model, checkpoint = _layout(own), _layout(given)
    found = []
    for what, unit in (("token mixers", ""), ("depths", " blocks"), ("dims", " channels")):
        theirs, ours = checkpoint[what], model[what]
        differing = [stage for stage in theirs.keys() | ours.keys() if theirs.get(stage) != ours.get(stage)]
        if differing:
            stage = min(differing)
            has = f"has {theirs.get(stage, 'no')}{unit} in stage {stage}"
            found.append(f"{what} differ: the checkpoint {has}, the model {ours.get(stage, 'no')}")
    if found and (name := _variant(checkpoint)):
        found.append(f"the checkpoint looks like {name}")
    return found or [*_by_tensor(own, given)]


def _by_tensor(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Iterable[str]:
    """Causes that show in single tensors."""
    for ending, dimension, what in (
        ("downsample_layers.0.conv.weight", 1, "in_chans: the checkpoint has {}, the model {}"),
        ("token_mixer.complex_weights", 2, "num_filters: the checkpoint has {}, the model {}"),
    ):
        name = next((name for name in own if name.endswith(ending)), "")
        if name in given and own[name].ndim == given[name].ndim == 4:
            theirs, ours = given[name].shape[dimension], own[name].shape[dimension]
            if theirs != ours:
                yield what.format(theirs, ours)
    if _has(own, ".mlp.act.scale") != _has(given, ".mlp.act.scale"):  # routings have StarReLU in every variant
        with_star, without = ("model", "checkpoint") if _has(own, ".mlp.act.scale") else ("checkpoint", "model")
        yield f"activations differ: the {with_star} has StarReLU, the {without} does not"
    if _has(own, "head.") != _has(given, "head."):
        yield f"only the {'model' if _has(own, 'head.') else 'checkpoint'} has a classifier"


def _has(weights: Mapping[str, Tensor], part: str) -> bool:
    return any(part in name for name in weights)


def _variant(layout: dict[str, dict[int, Any]]) -> str | None:
    """The model of this package that has this layout."""
    for name, args in VARIANTS.items():
        mixers = args["token_mixers"]
        mixers = mixers if isinstance(mixers, tuple) else (mixers,) * len(args["depths"])
        names = [(mixer.func if isinstance(mixer, partial) else mixer).__name__ for mixer in mixers]
        own = {"token mixers": names, "depths": args["depths"], "dims": args["dims"]}
        if layout == {what: dict(enumerate(values)) for what, values in own.items()}:
            return name
    return None
