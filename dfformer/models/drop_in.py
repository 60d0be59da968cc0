"""Replaces the authors' DynamicFilter and GlobalFilter, and copies of them, in somebody else's model."""

import copy
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dfformer.models.copies.match import is_filter_shape
from dfformer.models.copies.module import FusedCopy
from dfformer.models.copies.trial import Trial, device_of, difference, find, formula_of
from dfformer.models.layers import StarReLU
from dfformer.models.spectral import DynamicFilter, GlobalFilter, SpectralFilter
from dfformer_kernels.graph.compare import AGREEMENT, undisturbed
from dfformer_kernels.graph.trace import DifferentCopyError, UnsupportedCopyError, has_hooks
from dfformer_kernels.tolerance import relative_error

_NAME = "complex_weight"  # the name of the filters in the authors' layers and most copies
_LOOKED_FOR = (
    "modules with filters of their own, a parameter (H, W//2 + 1, F, 2) or complex (H, W//2 + 1, F), "
    "whose forward multiplies them with torch.fft.rfft2's result and calls irfft2"
)
# Attributes of nn.Module that a replaced class may define without a loss, and special methods that it may not.
_KEPT = {"forward", "extra_repr", "call_super_init", "dump_patches"}
_SPECIAL = {"__call__", "__setattr__", "__getattr__", "__delattr__", "__getstate__", "__setstate__"}

_Build = Callable[[nn.Module], nn.Module]  # builds a replacement from a module's own parts


class Replacement(NamedTuple):
    """A look-alike: its name in the model, its class, the replacement's class, and why it was left alone, or ""."""

    name: str
    original: str
    replacement: str
    refusal: str

    def __str__(self) -> str:
        outcome = f"left alone: {self.refusal}" if self.refusal else f"is now {self.replacement}"
        return f"{self.name} ({self.original}): {outcome}"


class ReplacementReport(list[Replacement]):
    """What `replace_dynamic_filters` found: one `Replacement` for each name. ``print`` shows a table."""

    def __init__(self, model: nn.Module, found: list[Replacement], originals: dict[str, nn.Module]) -> None:
        super().__init__(found)
        self.model = model
        self.originals = originals

    def undo(self) -> None:
        """Puts the original layers back, with the parameters, buffers and submodules the replacements have now.

        Raises:
            ValueError: a replacement is no longer where it was put; nothing is changed.
        """
        restore_dynamic_filters(self.model, self)

    def __str__(self) -> str:
        if not self:
            count = sum(1 for _ in self.model.modules())
            name = type(self.model).__name__
            return f"nothing to replace among the {count} modules of {name}: looked for {_LOOKED_FOR}"
        rows = [(r.name, r.original, f"left alone: {r.refusal}" if r.refusal else r.replacement) for r in self]
        rows.insert(0, ("name", "class", f"replaced by ({len(self.originals)} of {len(self)})"))
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        return "\n".join(f"{name:{widths[0]}}  {kind:{widths[1]}}  {outcome}" for name, kind, outcome in rows)


def replace_dynamic_filters(model: nn.Module) -> ReplacementReport:
    """Replaces every look-alike of DynamicFilter or GlobalFilter in ``model`` by ours, in place, with its parameters.

    A look-alike is a module with filters of its own, ``(H, W//2 + 1, F, 2)`` or complex ``(H, W//2 + 1, F)``. Its
    forward calls torch.fft.rfft2, multiplies the result with the filters, mixed by a softmax or one per channel, and
    calls irfft2. The name of its class, the layout of its maps, and what it does before and after do not matter. The
    authors' own layers become `DynamicFilter` and `GlobalFilter`. Any other becomes a `FusedCopy`, which keeps its
    forward except for that chain.

    Each formula is first compared with a copy of the layer on random inputs and weights: outputs, gradients, buffers
    and use of random numbers, in evaluation and training, on the plane of its filters and on others that it runs on.
    A layer is left alone if it differs, or has hooks, parametrisations or methods that the replacement would lose.
    After replacement, filters are resized to the plane of the input, even if the original had a fixed size.

    Returns:
        The report, with an entry for each name of each layer. If it is empty, its ``str`` says what the search looked
        for. ``report.undo()`` restores the originals.

    Raises:
        ValueError: ``model`` itself is a look-alike, so it has no parent in which to replace it.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _may_be_copy(module):
            names.setdefault(module, []).append(name)
    found: list[tuple[nn.Module, nn.Module | None, str]] = []
    known: dict[Hashable, _Build] = {}
    for module in names:
        ours, reason = _replacement(module, known)
        if ours is not None or reason:
            found.append((module, ours, reason))
    if any("" in names[module] for module, *_ in found):
        raise ValueError("model: got a single filter layer, accepted are models that contain one; wrap it in one")
    report, originals = [], {}
    for module, ours, reason in found:
        kind = type(ours if ours is not None else module).__name__
        for name in names[module]:
            report.append(Replacement(name, type(module).__qualname__, kind, reason))
            if ours is not None:
                _set(model, name, ours)
                originals[name] = module
    return ReplacementReport(model, report, originals)


def restore_dynamic_filters(model: nn.Module, report: ReplacementReport) -> None:
    """Undoes `replace_dynamic_filters` in ``model``, which is the report's model or a copy of it, such as an EMA.

    The original layers get the parameters, buffers and submodules that the replacements have now.

    Raises:
        ValueError: a replacement is no longer where it was put; nothing is changed.
    """
    ours: dict[str, nn.Module] = {}
    for name in report.originals:
        try:
            ours[name] = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"model: got one without a module {name!r}, accepted is the report's or a copy") from None
        if not isinstance(ours[name], DynamicFilter | GlobalFilter | FusedCopy):
            kind = type(ours[name]).__name__
            raise ValueError(f"model: got {kind} at {name!r}, accepted is the layer that was put there")
    restored: dict[nn.Module, nn.Module] = {}
    for name, replacement in ours.items():
        if replacement not in restored:
            original = report.originals[name]
            if model is not report.model:
                original = copy.deepcopy(original)
            restored[replacement] = _give_back(replacement, original)
        _set(model, name, restored[replacement])


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _may_be_copy(module: nn.Module) -> bool:
    if isinstance(module, SpectralFilter | FusedCopy):
        return False
    if str(type(module).forward.__module__).startswith("torch."):  # torch's own, or without a forward
        return False
    return any(is_filter_shape(t) or _NAME in name for name, t in _own_tensors(module).items())


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    if parametrize.is_parametrized(module):
        parametrised = module.get_submodule("parametrizations")
        tensors |= {name: getattr(module, name) for name, _ in parametrised.named_children()}
    return tensors


def _replacement(module: nn.Module, known: dict[Hashable, _Build]) -> tuple[nn.Module | None, str]:
    """The replacement of ``module``, or the reason why there is none; (None, "") if it is no look-alike.

    ``known`` says how modules of each formula were replaced; this one's is added.
    """
    try:
        _check_replaceable(module)
        with undisturbed(device_of(module)):
            formula = formula_of(module)
            if formula not in known:
                known[formula] = _tried(module)
            return known[formula](module), ""
    except DifferentCopyError as error:
        return None, str(error)
    except UnsupportedCopyError as error:
        used = _transforms_of(type(module))
        named = any(_NAME in name for name in _own_tensors(module))
        if used and not used & {"irfft2", "irfftn"}:
            return None, f"it uses {', '.join(sorted(used))}, where torch.fft.rfft2 and irfft2 were looked for"
        return None, str(error) if used or named else ""


def _transforms_of(kind: type) -> set[str]:
    """The names of torch.fft functions that occur in a class's methods."""
    methods = [m for base in kind.__mro__ for m in vars(base).values() if isinstance(m, FunctionType)]
    return {name for m in methods for name in m.__code__.co_names if hasattr(torch.fft, name) and "fft" in name} - {
        "fft"
    }


def _tried(module: nn.Module) -> _Build:
    """A function that builds the replacement of ``module`` and others of its formula, compared with it."""
    trial = Trial(module)
    hypothesis, resize, fused = find(trial)

    def official(original: nn.Module) -> nn.Module:
        return _build_official(original, hypothesis.size, resize)

    def fused_copy(original: nn.Module) -> nn.Module:
        return FusedCopy.of(original, fused.graph, fused.steps())

    may_be_official = hypothesis.layouts == ("(B,H,W,C)",) and _has_official_parts(module)
    if may_be_official and not difference(trial, hypothesis, official):
        return official
    if reason := difference(trial, hypothesis, fused_copy):
        raise DifferentCopyError(reason)
    return fused_copy


def _check_replaceable(module: nn.Module) -> None:
    """Raises UnsupportedCopyError if a replacement would lose something that no trial shows."""
    kind = type(module)
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    defined = {name for base in bases for name in vars(base)}
    methods = defined & ({name for name in vars(nn.Module) if not name.startswith("__")} - _KEPT | _SPECIAL)
    tensors = [*module.parameters(), *module.buffers()]
    foreign = {type(t).__name__ for t in tensors} - {"Parameter", "Tensor"}
    lost = {
        "it has hooks": has_hooks(module),
        "hooks on all modules are registered": has_hooks(nn.modules.module),
        "its forward was set on the instance": "forward" in vars(module),
        "it has parametrisations": parametrize.is_parametrized(module),
        f"it defines {', '.join(sorted(methods))}": bool(methods),
    }
    for what, is_so in lost.items():
        if is_so:
            raise UnsupportedCopyError(f"{what}, which the replacement would lose")
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedCopyError("it is a script, whose forward cannot be read")
    if foreign or any(t.is_meta for t in tensors):
        raise UnsupportedCopyError(f"its parameters are {', '.join(sorted(foreign)) or 'on the meta device'}")


def _has_official_parts(module: nn.Module) -> bool:
    """Whether it has the parameters of a DynamicFilter or GlobalFilter by name and shape, and nothing else."""
    own = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    children = dict(module.named_children())
    required = {"pwconv1", "act1", "pwconv2"}
    if own != ["complex_weights"] or not required <= children.keys() <= required | {"act2", "reweight"}:
        return False
    weights = module.get_parameter("complex_weights")
    projections = [children["pwconv1"], children["pwconv2"]]
    if weights.dim() != 4 or weights.is_complex() or any(type(p) is not nn.Linear for p in projections):
        return False
    shapes = {name: p.shape for name, p in module.named_parameters()}
    C, dim = shapes["pwconv1.weight"]
    if shapes["pwconv2.weight"] != (dim, C):
        return False
    if "reweight" not in children:
        return weights.shape[2] == C
    return shapes.get("reweight.fc2.weight", (0,))[0] == weights.shape[2] * C


def _build_official(module: nn.Module, size: tuple[int, int], resize: str) -> DynamicFilter | GlobalFilter:
    weights = module.get_parameter("complex_weights")
    C, dim = module.get_parameter("pwconv1.weight").shape
    arguments: dict[str, Any] = {"expansion_ratio": C / dim, "size": size, "weight_resize": True, "resize": resize}
    ours: DynamicFilter | GlobalFilter
    with torch.device("meta"):
        if hasattr(module, "reweight"):
            ours = DynamicFilter(dim, num_filters=weights.shape[2], **arguments)
        else:
            ours = GlobalFilter(dim, **arguments)
    ours.complex_weights = weights
    for name, child in module.named_children():  # in the original's order, which is that of its state dict
        if hasattr(ours, name):
            delattr(ours, name)
        setattr(ours, name, _shared_activation(child) if name in ("act1", "act2") else child)
    if not hasattr(module, "act2"):
        ours.act2 = nn.Identity()
    ours.training = module.training
    return ours


def _shared_activation(act: nn.Module) -> nn.Module:
    """Our StarReLU with the same scalars if ``act`` has two and computes StarReLU, else ``act``."""
    parameters = dict(act.named_parameters())
    if parameters.keys() != {"scale", "bias"} or any(p.numel() != 1 for p in parameters.values()):
        return act
    try:
        _check_replaceable(act)
        trial = Trial(act)
    except UnsupportedCopyError:
        return act
    with torch.device("meta"):
        ours = StarReLU()
    ours.scale, ours.bias = parameters["scale"], parameters["bias"]
    ours.training = act.training
    x = torch.linspace(-2, 2, 9, device=trial.device)
    scale, bias = (trial.module.get_parameter(name) for name in ("scale", "bias"))
    expected = scale * x.relu().square() + bias
    same = all(relative_error(trial.copy(training)(x), expected) <= AGREEMENT for training in (False, True))
    return ours if same else act


def _give_back(replacement: nn.Module, original: nn.Module) -> nn.Module:
    """``original`` with the parameters, buffers and submodules that ``replacement`` has under the same names."""
    for name, child in list(original.named_children()):
        ours = getattr(replacement, name, child)
        if type(ours) is StarReLU and type(child) is not StarReLU:
            ours = _give_back(ours, child)
        setattr(original, name, ours)
    for name, _ in [*original.named_parameters(recurse=False), *original.named_buffers(recurse=False)]:
        setattr(original, name, getattr(replacement, name))
    original.training = replacement.training
    return original
