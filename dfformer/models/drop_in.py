"""Replaces the authors' DynamicFilter and GlobalFilter, and copies of them, in a third-party model."""

import copy
import functools
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dfformer.models.copies.authors import is_authors, is_star_relu
from dfformer.models.copies.match import is_filter_shape
from dfformer.models.copies.trial import Trial, device_of, difference, find, formula_of
from dfformer.models.exact import has_foreign_forward
from dfformer.models.layers import StarReLU
from dfformer.models.spectral import DynamicFilter, GlobalFilter, SpectralFilter
from dfformer.utils.accepted import check_module
from dfformer_kernels.graph.toolkit import (
    ONE_AT_A_TIME,
    DifferentFormulaError,
    FusedModule,
    NotFusableError,
    check_names,
    first_line,
    fused_class,
    has_hooks,
    is_fused_class,
    isolated,
)

_NAME = "complex_weight"  # the name of the filters in the authors' layers and most copies
_LOOKED_FOR = (
    "modules with filters of their own, a parameter (H, W//2 + 1, F, 2) or complex (H, W//2 + 1, F), "
    "whose forward multiplies them with torch.fft.rfft2's result and calls irfft2"
)
# Attributes of nn.Module that an official layer may define without a loss, and special methods that it may not.
_KEPT = {"forward", "extra_repr", "call_super_init", "dump_patches"}
_SPECIAL = {"__call__", "__setattr__", "__getattr__", "__delattr__", "__getstate__", "__setstate__"}
# The public names of the authors' layers and of their activation. Somebody may use others, so a layer with such keeps
# its class.
_NAMES = """complex_weights pwconv1 act1 reweight act2 pwconv2 size filter_size num_filters dim med_channels
    weight_resize"""
_OFFICIAL = {*_NAMES.split()}
_STAR_RELU = {"scale", "bias", "relu", "inplace"}

_INHERITED = frozenset(vars(nn.Module()))

_Replace = Callable[[nn.Module], nn.Module]  # fuses a module by a change of its class, and returns it
# By path in a layer: a class, its own attributes, and the names of the submodules that it needs.
_Original = dict[str, tuple[type[nn.Module], dict[str, Any], set[str]]]


class Replacement(NamedTuple):
    """A look-alike: its name in the model, its class, the replacement's class, and why it was left alone, or ""."""

    name: str
    original: str
    replacement: str
    reason: str

    def __str__(self) -> str:
        outcome = f"left alone: {self.reason}" if self.reason else f"is now {self.replacement}"
        return f"{self.name} ({self.original}): {outcome}"


class ReplacementReport(list[Replacement]):
    """What `replace_dynamic_filters` found: one `Replacement` for each name; ``print`` shows one line for each."""

    def __init__(self, model: nn.Module, found: list[Replacement], originals: dict[str, _Original]) -> None:
        super().__init__(found)
        self.model = model
        self.originals = originals

    def undo(self) -> None:
        """Gives the layers their original classes, with the parameters, buffers and submodules that they have now.

        Raises:
            ValueError: a replacement is no longer where it was put; nothing is changed.
        """
        restore_dynamic_filters(self.model, self)

    def __str__(self) -> str:
        if not self:
            count = sum(1 for _ in self.model.modules())
            name = type(self.model).__name__
            fused = sum(isinstance(module, SpectralFilter | FusedModule) for module in self.model.modules())
            already = f", {fused} of them fused already" if fused else ""
            return f"nothing to replace among the {count} modules of {name}{already}: looked for {_LOOKED_FOR}"
        return "\n".join([f"replaced {len(self.originals)} of {len(self)}", *map(str, self)])


def replace_dynamic_filters(model: nn.Module) -> ReplacementReport:
    """Fuses every look-alike of DynamicFilter or GlobalFilter in ``model``, in place.

    A look-alike is a module with filters of its own, ``(H, W//2 + 1, F, 2)`` or complex ``(H, W//2 + 1, F)``. Its
    forward calls torch.fft.rfft2, multiplies the result with the filters, mixed by weights or one per channel, and
    calls irfft2. The name of its class, the layout of its maps, and what it does before and after do not matter. The
    authors' own layers become instances of `DynamicFilter` and `GlobalFilter`. Any other becomes one of a subclass of
    its class. Each stays the same object, with its parameters and submodules. The subclass runs the original's forward
    with the fused step in place of that chain, for all values of the required inputs. It runs the original if an
    optional input is given, or a tensor of another rank or of integers.

    Each formula is first compared with a copy of the layer on random inputs and weights: outputs, gradients, buffers
    and use of random numbers, in evaluation and training, on the plane of its filters and on others that it runs on.
    A layer is left alone if it differs. After replacement, filters are resized to the plane of the input, even if the
    original had a fixed size.

    Returns:
        The report, with an entry for each name of each layer. If it is empty, its ``str`` says what the search looked
        for. ``report.undo()`` restores the originals.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_module(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _may_be_copy(module):
            names.setdefault(module, []).append(name)
    known: dict[Hashable, _Replace] = {}
    replace = {module: _replacement(module, known) for module in names}
    report: list[Replacement] = []
    originals: dict[str, _Original] = {}
    for module, outcome in replace.items():
        if not outcome:
            continue
        kind, reason = type(module).__qualname__, ""
        if isinstance(outcome, str):
            reason = outcome
        else:
            original = {path: (type(m), _own_attributes(m), {*m._modules}) for path, m in module.named_modules()}
            originals |= dict.fromkeys(names[module], original)
            outcome(module)
        report += [Replacement(name or "the model", kind, type(module).__name__, reason) for name in names[module]]
    return ReplacementReport(model, report, originals)


def restore_dynamic_filters(model: nn.Module, report: ReplacementReport) -> None:
    """Undoes `replace_dynamic_filters` in ``model``, which is the report's model or a copy of it, such as an EMA.

    The layers keep the parameters, buffers and submodules that they have now.

    Raises:
        ValueError: a replacement is no longer where it was put; nothing is changed. TypeError: ``report`` is no report.
    """
    if not isinstance(report, ReplacementReport):
        raise TypeError(f"report: expected what replace_dynamic_filters returned, got {type(report).__name__}")
    layers: dict[str, nn.Module] = {}
    for name in report.originals:
        try:
            layers[name] = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"model: expected the report's or a copy, got one without a module {name!r}") from None
        kind = type(layers[name])
        if not (issubclass(kind, SpectralFilter) or is_fused_class(kind)):
            raise ValueError(f"model: expected the layer that was put at {name!r}, got {kind.__name__}")
    for name, layer in layers.items():
        if isinstance(layer, FusedModule):
            layer.restore()
            continue
        parts = dict(layer.named_modules())
        for path, (kind, attributes, needed) in report.originals[name].items():
            part = parts.get(path)
            # A StarReLU that was put in later stays if it lacks the submodules of theirs.
            if isinstance(part, SpectralFilter | StarReLU) and needed <= part._modules.keys():
                _become(part, kind, attributes if model is report.model else copy.deepcopy(attributes))


def _may_be_copy(module: nn.Module) -> bool:
    if isinstance(module, SpectralFilter | FusedModule) or not has_foreign_forward(module):
        return False
    return any(is_filter_shape(t) or _NAME in name for name, t in _own_tensors(module).items())


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    if parametrize.is_parametrized(module):
        parametrised = module.get_submodule("parametrizations")
        tensors |= {name: getattr(module, name) for name, _ in parametrised.named_children()}
    return tensors


def _replacement(module: nn.Module, known: dict[Hashable, _Replace]) -> _Replace | str:
    """What fuses ``module``, or the reason why nothing does; "" if it is no look-alike.

    ``known`` says how modules of each formula were fused; this one's is added.
    """
    try:
        _check_tensors(module)
        with ONE_AT_A_TIME, isolated(device_of(module)):
            official = _only_computes(module, _OFFICIAL)
            formula = official, formula_of(module)
            if formula not in known:
                known[formula] = _tried(module, official)
            return known[formula]
    except DifferentFormulaError as error:
        return str(error)
    except NotFusableError as error:
        used = _transforms_of(type(module))
        if used - {"rfft2", "rfftn"} and not used & {"irfft2", "irfftn"}:
            return f"expected torch.fft.rfft2 and irfft2, got {', '.join(sorted(used))}"
        return str(error) if used or any(_NAME in name for name in _own_tensors(module)) else ""
    except Exception as error:  # foreign code may raise anything
        return f"it cannot be tried ({first_line(error)})"


def _transforms_of(kind: type) -> set[str]:
    """The names of torch.fft functions that occur in a class's methods, and in functions that these call by name."""
    methods = [m for base in kind.__mro__ for m in vars(base).values() if isinstance(m, FunctionType)]
    called = [m.__globals__.get(name) for m in methods for name in m.__code__.co_names]
    functions = [*methods, *(f for f in called if isinstance(f, FunctionType))]
    names = {name for f in functions for name in f.__code__.co_names}
    return {name for name in names if "fft" in name and name != "fft" and hasattr(torch.fft, name)}


def _tried(module: nn.Module, official: bool) -> _Replace:
    """A function that fuses ``module`` and others of its formula, compared with it; ``official`` layers if possible."""
    check_names(module)
    trial = Trial(module)
    hypothesis, resize, graph = find(trial)
    ranks = tuple(
        (name, len(layout)) for name, layout in zip(trial.names, hypothesis.layouts, strict=True) if len(layout) > 1
    )
    kind = fused_class(type(module), graph, trial.names, trial.optional, ranks)

    def with_graph(original: nn.Module) -> nn.Module:
        original.__class__ = kind
        return original

    if official and hypothesis.layouts == ("BHWC",) and is_authors(graph):
        replace = functools.partial(_make_ours, size=hypothesis.size, resize=resize)
        if not difference(trial, hypothesis, replace):
            return replace
    if reason := difference(trial, hypothesis, with_graph):
        raise DifferentFormulaError(reason)
    return with_graph


def _check_tensors(module: nn.Module) -> None:
    tensors = [*module.parameters(), *module.buffers()]
    foreign = {type(t).__name__ for t in tensors} - {"Parameter", "Tensor"}
    if parametrize.is_parametrized(module):
        raise NotFusableError("it has parametrisations, which compute its filters")
    if foreign or any(t.is_meta for t in tensors):
        raise NotFusableError(f"its parameters are {', '.join(sorted(foreign)) or 'on the meta device'}")


def _only_computes(module: nn.Module, public: set[str]) -> bool:
    """Whether a module has no hooks, and only ``public`` and nn.Module's methods and attributes but private ones.

    It has no methods in place of nn.Module's either, such as to load its state.
    """
    kind = type(module)
    defined = {name for base in kind.__mro__[: kind.__mro__.index(nn.Module)] for name in vars(base)}
    methods = {name for name in vars(nn.Module) if not name.startswith("__")} - _KEPT | _SPECIAL
    own = {name for name in {*dir(module), *vars(module)} - {*dir(nn.Module), "training"} if not name.startswith("_")}
    return not has_hooks(module) and defined.isdisjoint(methods) and own <= public


def _make_ours(module: nn.Module, size: tuple[int, int], resize: str) -> nn.Module:
    """Makes an authors' layer one of ours, and its StarReLUs too."""
    dim = module.get_parameter("pwconv1.weight").shape[1]
    arguments: dict[str, Any] = {"size": size, "weight_resize": True, "resize": resize}
    like: DynamicFilter | GlobalFilter
    with torch.device("meta"):
        if hasattr(module, "reweight"):
            like = DynamicFilter(dim, num_filters=module.get_parameter("complex_weights").shape[2], **arguments)
        else:
            like = GlobalFilter(dim, **arguments)
    for act in (module.get_submodule("act1"), module.get_submodule("act2")):
        if _only_computes(act, _STAR_RELU) and is_star_relu(act):
            _become(act, StarReLU, {})
    _become(module, type(like), _own_attributes(like))
    return module


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are not nn.Module's: neither parameters, buffers and submodules, nor hooks."""
    return {name: value for name, value in vars(module).items() if name not in _INHERITED}


def _become(module: nn.Module, kind: type[nn.Module], attributes: dict[str, Any]) -> None:
    """Gives a module another class and other `_own_attributes`."""
    for name in _own_attributes(module):
        del vars(module)[name]
    vars(module).update(attributes)
    module.__class__ = kind
