"""Drop-in replacement of the authors' DynamicFilter and GlobalFilter, and copies of them, in somebody else's model."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfformer.models.layers import DynamicFilter, GlobalFilter, SpectralFilter, StarReLU
from dfformer_kernels.tolerance import relative_error

# A look-alike must agree with its replacement to this relative error before it is swapped: float32 rounding through two
# projections and two transforms is 1e-6, any other formula is far away.
_AGREEMENT = 1e-4


class Replacement(NamedTuple):
    """One look-alike: its name in the model, its class, ours, and why it was left alone ("" if it was swapped)."""

    name: str
    original: str
    replacement: str
    refusal: str

    def __str__(self) -> str:
        outcome = f"left alone: {self.refusal}" if self.refusal else f"is now {self.replacement}"
        return f"{self.name} ({self.original}): {outcome}"


def replace_dynamic_filters(model: nn.Module) -> list[Replacement]:
    """Swaps every DynamicFilter or GlobalFilter look-alike in ``model`` for ours, in place, sharing its parameters.

    A look-alike is recognised by its parameters (``complex_weights``, ``pwconv1``, ``pwconv2`` and, for a dynamic
    filter, ``reweight.fc1``/``fc2``), whatever its class and module are called. It is swapped only if both give the
    same output on a random float32 input and nothing is hooked to it; StarReLU look-alikes inside it are fused.

    Returns:
        What was found, in the order of ``model.named_modules()``; empty if nothing was.

    Raises:
        ValueError: ``model`` itself is a look-alike, so there is no parent to swap it in.
    """
    found = [(name, module) for name, module in model.named_modules() if _kind(module) is not None]
    if any(name == "" for name, _ in found):
        raise ValueError(
            "model: got a single filter layer; build dfformer.DynamicFilter and load its state dict instead"
        )
    replacements = []
    for name, module in found:
        ours, refusal = _rebuild(module)
        if not refusal:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ours)
        replacements.append(Replacement(name, type(module).__qualname__, type(ours).__qualname__, refusal))
    return replacements


def _kind(module: nn.Module) -> type[SpectralFilter] | None:
    if isinstance(module, SpectralFilter):
        return None
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    weights, expand = shapes.get("complex_weights", ()), shapes.get("pwconv1.weight", ())
    if len(weights) != 4 or weights[3] != 2 or len(expand) != 2:
        return None
    if shapes.get("pwconv2.weight") != (expand[1], expand[0]):
        return None
    if {"reweight.fc1.weight", "reweight.fc2.weight"} <= shapes.keys():
        routes = (weights[2] * expand[0], shapes["reweight.fc1.weight"][0])
        return DynamicFilter if shapes["reweight.fc2.weight"] == routes else None
    return GlobalFilter if weights[2] == expand[0] else None


def _rebuild(module: nn.Module) -> tuple[DynamicFilter | GlobalFilter, str]:
    """Our layer on the same parameters, and why it must not be used ("" if it may)."""
    kind = _kind(module)
    assert kind is not None
    weights = module.get_parameter("complex_weights")
    H, K = weights.shape[:2]
    C, dim = module.get_parameter("pwconv1.weight").shape
    arguments: dict[str, Any] = {
        "dim": dim,
        "expansion_ratio": C / dim,
        "size": (H, 2 * (K - 1) or 1),  # the width is known up to its parity, which does not matter
        "weight_resize": bool(getattr(module, "weight_resize", False)),
    }
    ours: DynamicFilter | GlobalFilter
    with torch.device("meta"):
        if kind is DynamicFilter:
            ours = DynamicFilter(**arguments, num_filters=weights.shape[2])
        else:
            ours = GlobalFilter(**arguments)
    ours.complex_weights = weights
    for name in ("pwconv1", "pwconv2", *(["reweight"] if kind is DynamicFilter else [])):
        setattr(ours, name, module.get_submodule(name))
    for name in ("act1", "act2"):
        setattr(ours, name, _shared_activation(getattr(module, name, nn.Identity())))
    ours.train(module.training)
    return ours, _refusal(module, ours)


def _refusal(module: nn.Module, ours: DynamicFilter | GlobalFilter) -> str:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks, which the replacement would lose"
    H, W = ours.size
    x = torch.randn(2, H, W, ours.pwconv1.in_features, device=ours.pwconv1.weight.device)
    try:
        theirs, mine = _evaluate(module, x), _evaluate(ours, x)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"it cannot be tried on a {tuple(x.shape)} input ({str(error).splitlines()[0]})"
    error_ = relative_error(mine, theirs)
    return "" if error_ <= _AGREEMENT else f"its output differs from ours by {error_:.1e} relative"


def _evaluate(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` in eval mode and float32, by a copy: its formula is judged, not its rounding."""
    with torch.no_grad():
        return copy.deepcopy(module).float().eval()(x)


def _shared_activation(act: nn.Module) -> nn.Module:
    """Our StarReLU on the same scalars if ``act`` has two and computes it, else ``act``."""
    parameters = dict(act.named_parameters())
    if parameters.keys() != {"scale", "bias"} or any(p.numel() != 1 for p in parameters.values()):
        return act
    scale, bias = parameters["scale"], parameters["bias"]
    with torch.device("meta"):
        ours = StarReLU()
    ours.scale, ours.bias = scale, bias
    x = torch.linspace(-2, 2, 9, device=scale.device)
    return ours if relative_error(_evaluate(act, x), _evaluate(ours, x)) <= _AGREEMENT else act
