"""Compares a foreign module with its replacement on trial inputs: outputs, gradients, both modes, several planes."""

import copy
import inspect
import itertools
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from dfformer.models.copies import match
from dfformer.models.filter_resize import RULES
from dfformer_kernels.graph import toolkit
from dfformer_kernels.graph.toolkit import DifferentFormulaError, NotFusableError, first_line

Plane = tuple[int, int]

_MAX_CHANNELS = 8  # numbers of channels tried for an input
_MAX_DOUBLED = 40 * 40  # pixels; a smaller plane is also tried at twice its height and width
_NUMBERS = {"h": "H", "height": "H", "w": "W", "width": "W"}  # names of inputs that take numbers, as some on tokens do


class OtherPlaneError(DifferentFormulaError):
    """The modules differ on another plane than that of the filters, so another resizing rule may fit."""


class Hypothesis(NamedTuple):
    """An assumption about a copy: the plane of its filters, and the layouts and channels of its inputs.

    A layout has a letter for each dimension: BHWC, BCHW, BNC (N = H*W) or BC. H or W alone is that number.
    """

    size: Plane
    layouts: tuple[str, ...]
    channels: tuple[int, ...]

    def inputs(
        self, plane: Plane, batch: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> list[Any]:
        given: list[Any] = []
        for layout, C in zip(self.layouts, self.channels, strict=True):
            sizes = {"B": batch, "H": plane[0], "W": plane[1], "N": plane[0] * plane[1], "C": C}
            shape = [sizes[letter] for letter in layout]
            given.append(torch.randn(shape, device=device, dtype=dtype) if len(shape) > 1 else shape[0])
        return given

    def indistinguishable(self) -> list["Hypothesis"]:
        """This hypothesis, and that of the other map layout if its inputs have the same shape on the stored plane."""
        other = {"BHWC": "BCHW", "BCHW": "BHWC"}
        swapped = self._replace(layouts=tuple(other.get(layout, layout) for layout in self.layouts))
        shapes = [[getattr(x, "shape", x) for x in h.inputs(self.size, 2)] for h in (self, swapped)]
        return [self, swapped] if swapped != self and shapes[0] == shapes[1] else [self]


class Case(NamedTuple):
    """One trial: inputs for a plane, in a mode."""

    inputs: list[Any]
    plane: Plane
    training: bool


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter or buffer."""
    return next(itertools.chain(module.parameters(), module.buffers())).device


class Trial:
    """A float32 copy of a module with random weights: its formula is compared, and zero weights would hide it."""

    def __init__(self, module: nn.Module) -> None:
        try:
            self.module = copy.deepcopy(module).float()
        except Exception as error:  # foreign code may raise anything
            raise NotFusableError(f"it cannot be copied for a trial ({first_line(error)})") from error
        inputs = toolkit.inputs_of(module)
        self.names = tuple(name for name, default in inputs.items() if default is inspect.Parameter.empty)
        self.optional = {name: default for name, default in inputs.items() if name not in self.names}
        if not self.names or any(not isinstance(v, int | float | str | None) for v in self.optional.values()):
            raise NotFusableError(f"its forward has optional inputs ({', '.join(self.optional)})")
        toolkit.make_traceable(self.module)
        self.device = device_of(module)
        self._probe: nn.Module | None = None
        with torch.no_grad():
            for tensor in itertools.chain(self.module.parameters(), self.module.buffers(), _unregistered(self.module)):
                _randomise(tensor)

    def copy(self, training: bool) -> nn.Module:
        return copy.deepcopy(self.module).train(training)

    def hypotheses(self) -> Iterator[Hypothesis]:
        """The hypotheses under which the module runs, most likely first.

        Raises NotFusableError if there are none.
        """
        failures: list[str] = []
        found = False
        for hypothesis in self._guesses():
            error = self._error_on(hypothesis)
            if error is not None and self._define(error):
                error = self._error_on(hypothesis)
            if error is None:
                found = True
                yield hypothesis
            else:
                shapes = ", ".join(str(tuple(getattr(x, "shape", [x]))) for x in hypothesis.inputs(hypothesis.size, 2))
                failures.append(f"{shapes} first: {first_line(error)}")
        if not found:
            tried = f"{len(failures)} were tried, {failures[0]}" if failures else "its filters have no known shape"
            raise NotFusableError(f"it runs on no trial input ({tried})")

    def _error_on(self, hypothesis: Hypothesis) -> Exception | None:
        self._probe = self._probe or self.copy(training=False)
        return _error_of(self._probe, hypothesis.inputs(hypothesis.size, 2, device=self.device))

    def runs(self, case: Case) -> bool:
        return _error_of(self.copy(case.training), case.inputs) is None

    def runs_in_half(self, hypothesis: Hypothesis) -> bool:
        """Whether the module runs after ``half`` or ``bfloat16``, on inputs of that dtype."""
        for dtype, cast in ((torch.float16, nn.Module.half), (torch.bfloat16, nn.Module.bfloat16)):
            inputs = hypothesis.inputs(hypothesis.size, 1, device=self.device, dtype=dtype)
            if _error_of(cast(self.copy(training=False)), inputs) is None:
                return True
        return False

    def _define(self, error: Exception) -> bool:
        """Some copies resize their filters by a function that they never define; this defines it as the authors do."""
        if isinstance(error, NameError) and error.name:
            toolkit.with_function(self.module, error.name, match.authors_resize)
        elif isinstance(error, AttributeError) and (missing := re.search(r"has no attribute '(\w+)'$", str(error))):
            attributes = {missing[1]: staticmethod(match.authors_resize)}
            self.module.__class__ = type(type(self.module).__name__, (type(self.module),), attributes)
        else:
            return False
        self._probe = None
        return True

    def _guesses(self) -> Iterator[Hypothesis]:
        own = [*self.module.parameters(recurse=False), *self.module.buffers(recurse=False)]
        weights = [w for w in own if match.is_filter_shape(w)]
        for weight, storage, odd in itertools.product(weights, match.STORAGE, (0, 1)):
            H, K = match.as_basis(weight, storage).shape[:2]
            size = (H, 2 * (K - 1) + odd)
            if min(size) < 1:
                continue
            channels = _channels(self.module, match.as_basis(weight, storage).shape[2])
            for layouts in self._layouts():
                maps = [layout not in _NUMBERS.values() for layout in layouts]
                same = [tuple(C * is_map for is_map in maps) for C in channels]
                choices = [channels if is_map else [0] for is_map in maps]
                for cs in dict.fromkeys([*same, *itertools.islice(itertools.product(*choices), _MAX_CHANNELS**2)]):
                    yield Hypothesis(size, layouts, cs)

    def _layouts(self) -> Iterator[tuple[str, ...]]:
        """Layouts of the inputs: first all like the first input, then vectors for the others."""
        for first, other in itertools.product(("BHWC", "BCHW", "BNC"), ("", "BC")):
            rest = [_NUMBERS.get(name.lower(), other or first) for name in self.names[1:]]
            if not other or "BC" in rest:
                yield (first, *rest)


def _error_of(module: nn.Module, inputs: Sequence[Any]) -> Exception | None:
    """The error of ``module`` on such inputs; None if it runs.

    Raises NotFusableError if the result is something else than tensors.
    """
    try:
        with torch.no_grad():
            result = module.forward(*inputs)
    except Exception as error:  # foreign code may raise anything
        return error
    try:
        toolkit.tensors(result)
    except TypeError as error:
        raise NotFusableError(str(error)) from None
    return None


def _unregistered(module: nn.Module) -> list[Tensor]:
    """The tensors that are attributes, but neither parameters nor buffers."""
    return [value for m in module.modules() for value in vars(m).values() if isinstance(value, Tensor)]


def _randomise(t: Tensor) -> None:
    """Fills ``t`` with values that no formula treats specially: positive for vectors and buffers (variances, masks)."""
    if not (t.is_floating_point() or t.is_complex()):
        return
    if match.is_filter_shape(t):
        t.copy_(torch.randn_like(t))
    elif t.dim() < 2 or not isinstance(t, nn.Parameter):
        t.copy_(torch.rand_like(t) + 0.5)
    else:
        t.copy_(torch.randn_like(t) / (t.numel() / max(len(t), 1)) ** 0.5)


def _channels(module: nn.Module, filters: int) -> list[int]:
    """The numbers of channels that an input may have, most likely first."""
    names = ("in_features", "in_channels", "num_features", "num_channels", "dim", "channels", "normalized_shape")
    values: list[Any] = [getattr(m, name, None) for m in module.modules() for name in names]
    values = [v[-1] if isinstance(v, tuple) and v else v for v in values]
    values += [size for p in module.parameters() for size in p.shape[:2]] + [filters]
    return list(dict.fromkeys(v for v in values if type(v) is int and v > 0))[:_MAX_CHANNELS]


def cases(trial: Trial, hypothesis: Hypothesis) -> Iterator[Case]:
    """The stored plane, in both modes and for two batch sizes; then about half and twice its size, if the copy runs."""
    H, W = hypothesis.size
    for batch, training in ((2, False), (2, True), (3, False)):
        yield Case(hypothesis.inputs((H, W), batch, device=trial.device), (H, W), training)
    planes = [(H // 2 + 1, W // 4 * 2 + 3)] + ([(2 * H, 2 * W)] if H * W <= _MAX_DOUBLED else [])
    for plane, same in itertools.product(planes, hypothesis.indistinguishable()):
        case = Case(same.inputs(plane, 1, device=trial.device), plane, False)
        if trial.runs(case):
            yield case


def _graphs(trial: Trial, hypothesis: Hypothesis, resize: str) -> Iterator[tuple[str, fx.Graph, list[Any] | None]]:
    """The trial module's forward with our step, where it was traced, and the numbers it saw there, for all `cases`.

    Raises NotFusableError if one computes something else; the message has the difference.
    """
    in_half = not trial.runs_in_half(hypothesis)
    limits: list[float] = []
    for case in cases(trial, hypothesis):
        native = case.plane == hypothesis.size
        module = trial.copy(case.training)
        expected = match.Expected(len(case.inputs[0]), case.plane, hypothesis.size, resize, in_half)
        where = "in training" if case.training else "with another batch"
        where = where if native else f"on a {case.plane[0]}x{case.plane[1]} plane"
        try:
            traced = toolkit.trace(module, case.inputs, trial.optional)
            limits += traced.limits
            yield where, match.fuse(traced.graph, expected), traced.seen if native else None
        except match.CopyLimitError:
            continue
        except DifferentFormulaError as error:
            raise (error if native else OtherPlaneError(f"{where} {error}")) from None
    if limits:
        raise NotFusableError(f"its forward branches on whether a size is beyond {limits[0]}")


def difference(trial: Trial, hypothesis: Hypothesis, replace: Callable[[nn.Module], nn.Module]) -> str:
    """How the trial module and its replacement differ in outputs, gradients or buffers; "" if they agree."""
    # Python code can hide a branch on one image from a trace, by isinstance for example.
    single = Case(hypothesis.inputs(hypothesis.size, 1, device=trial.device), hypothesis.size, False)
    for case in (*cases(trial, hypothesis), *([single] if trial.runs(single) else [])):
        try:
            theirs = toolkit.results(trial.copy(case.training), case.inputs)
            ours = toolkit.results(replace(trial.copy(case.training)).train(case.training), case.inputs)
        except Exception as error:  # foreign code may raise anything
            return f"it cannot be tried ({first_line(error)})"
        if case.plane[1] % 2 and theirs["output 0"].shape != ours["output 0"].shape:
            continue  # irfft2 without s returns even widths only
        if reason := toolkit.difference(theirs, ours):
            return f"{reason} on a {case.plane[0]}x{case.plane[1]} plane{' in training' * case.training}"
    return ""


def formula_of(module: nn.Module) -> Hashable:
    """A key that is equal for modules that compute the same function of their inputs and parameters.

    Such modules and all their submodules have the same classes, simple attributes and shapes, and no hooks. A module
    with hooks, or with attributes of other kinds, has a key of its own.
    """
    inherited = vars(nn.Module())
    parts: list[Hashable] = []
    for name, child in module.named_modules():
        own = {k: v for k, v in vars(child).items() if k not in inherited or k == "_non_persistent_buffers_set"}
        tensors = itertools.chain(child.named_parameters(recurse=False), child.named_buffers(recurse=False))
        parts.extend((name, child.__class__, tuple((k, _frozen(v)) for k, v in own.items())))
        parts.append(object() if name and toolkit.has_hooks(child) else None)
        parts.append(tuple((k, type(t), t.shape, t.dtype, t.device, t.requires_grad) for k, t in tensors))
    return tuple(parts)


def _frozen(value: Any) -> Hashable:
    if isinstance(value, tuple | list | set):
        return type(value), tuple(_frozen(v) for v in value)
    is_simple = isinstance(value, int | float | str | type | FunctionType | torch.dtype | torch.device | None)
    return (type(value), value) if is_simple else object()


def find(trial: Trial) -> tuple[Hypothesis, str, fx.Graph]:
    """How our step fits into the trial module: the hypothesis, the rule that resizes its filters, and the graph.

    Raises NotFusableError with the first difference that remained.
    """
    errors: list[NotFusableError] = []
    for hypothesis in itertools.islice(trial.hypotheses(), 4):
        for resize in RULES:
            try:
                return hypothesis, resize, toolkit.common_graph(_graphs(trial, hypothesis, resize))
            except NotFusableError as error:
                errors.append(error)
                if not isinstance(error, OtherPlaneError):  # then another rule changes nothing
                    break
    raise errors[0]
