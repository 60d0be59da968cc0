"""Fuses the chains of a module: finds them while the module runs, then rewrites the forward that contains each.

That is the forward of the innermost module that runs both transforms. This module's class becomes a subclass
of its own. For inputs of the shapes that were tried, with any batch size, the subclass runs the rewritten graph;
otherwise it runs the original forward. Nothing else changes.
"""

import copy
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from dfformer_kernels.graph import compare
from dfformer_kernels.graph.report import Finding
from dfformer_kernels.graph.rewrite import rewrite
from dfformer_kernels.graph.step import PYTHON
from dfformer_kernels.graph.subclass import batched_inputs, check_names, fused_class
from dfformer_kernels.graph.trace import (
    ONE_AT_A_TIME,
    NotFusableError,
    common_graph,
    first_line,
    has_hooks,
    inputs_of,
    make_traceable,
    trace,
)

_FORWARD = {getattr(torch.fft, name) for name in ("rfft", "rfft2", "rfftn", "fft", "fft2", "fftn")}
_INVERSE = {getattr(torch.fft, name) for name in ("irfft", "irfft2", "irfftn", "ifft", "ifft2", "ifftn")}
_CONSTANTS = (int, float, str, type(None))


@dataclass
class _Call:
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    has_spectrum: bool = False


class _Recorder(TorchFunctionMode):
    """Records which modules transform, or take or return spectra.

    ``owners`` holds the innermost calls that run both transforms.
    """

    def __init__(self) -> None:
        super().__init__()
        self.owners: dict[nn.Module, _Call] = {}
        self.spectral: set[nn.Module] = set()
        self._active: list[_Call] = []

    def record(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Runs the model once, in evaluation mode."""
        with ExitStack() as stack:
            for module in model.modules():
                stack.callback(setattr, module, "training", module.training)
                stack.enter_context(module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
                stack.enter_context(module.register_forward_hook(self._leave, always_call=True))
            model.eval()
            with self, torch.no_grad():
                model(*args, **kwargs)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._active.append(_Call(module, args, kwargs))

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        call = self._active.pop()
        if any(isinstance(t, Tensor) and t.is_complex() for t in (*call.args, *call.kwargs.values(), result)):
            self.spectral.add(module)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FORWARD or func in _INVERSE:
            self.spectral |= {call.module for call in self._active}
        if func in _FORWARD:
            for call in self._active:
                call.has_spectrum = True
        if func in _INVERSE:
            owner = next((call for call in reversed(self._active) if call.has_spectrum), self._active[-1])
            self.owners.setdefault(owner.module, owner)
        return func(*args, **(kwargs or {}))


def fuse_module(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Finding]:
    """Calls ``model`` with these arguments, and fuses in place the chains that run."""
    recorder = _Recorder()
    recorder.record(model, args, kwargs)
    names = {module: name or "the model" for name, module in model.named_modules()}
    found = []
    for owner, call in recorder.owners.items():
        where = f"{names[owner]} ({type(owner).__name__})"
        try:
            found += _fuse_call(call, where, recorder.spectral)
        except NotFusableError as error:
            found.append(Finding(where, reason=str(error)))
        except Exception as error:  # foreign code may raise anything
            found.append(Finding(where, reason=f"it cannot be tried ({first_line(error)})"))
    return found


def _fuse_call(call: _Call, where: str, spectral: Collection[nn.Module]) -> list[Finding]:
    module = call.module
    check_names(module)
    given = _given(call)
    for name, inner in module.named_modules():
        if inner in spectral and parametrize.is_parametrized(inner):
            raise NotFusableError(
                f"{name or 'it'} has parametrisations; removing them later would not update the rewritten graph"
            )
        if inner in spectral and name and has_hooks(inner):
            raise NotFusableError(f"{name} has hooks, which the graph would not call")
    device = next((t.device for t in given.values() if isinstance(t, Tensor)), torch.device("cpu"))
    with ONE_AT_A_TIME, compare.isolated(device):
        found, graph = _rewritten(module, given, where, spectral)
        if graph is None:
            return found
        tensors = tuple(name for name, value in given.items() if isinstance(value, Tensor))
        kind = fused_class(type(module), graph, tensors, given)
        for training in (False, True):
            inputs = list(_trial_inputs(given, 2).values())
            original, fused = (copy.deepcopy(module).train(training) for _ in range(2))
            fused.__class__ = kind
            if reason := compare.difference(compare.results(original, inputs), compare.results(fused, inputs)):
                raise NotFusableError(reason)
    module.__class__ = kind
    return found


def _given(call: _Call) -> dict[str, Any]:
    """All inputs by name, including those left at their defaults."""
    given = inputs_of(call.module)
    given |= dict(zip(given, call.args, strict=False)) | dict(call.kwargs)
    other = [name for name, value in given.items() if not isinstance(value, (Tensor, *_CONSTANTS))]
    if other:
        raise NotFusableError(f"its input {other[0]} is neither a tensor nor a number")
    return given


def _trial_inputs(given: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Random inputs of the same shapes, with ``times`` the batch size."""
    batched, inputs = batched_inputs(given), {}
    for name, value in given.items():
        if name in batched:
            value = value.detach().repeat(times, *(1 for _ in value.shape[1:]))
        if isinstance(value, Tensor) and value.is_floating_point():
            value = torch.randn_like(value)
        inputs[name] = value
    return inputs


def _rewritten(
    module: nn.Module, given: Mapping[str, Any], where: str, spectral: Collection[nn.Module]
) -> tuple[list[Finding], fx.Graph | None]:
    """The findings, and the graph if something was fused.

    The graph is the same for training and evaluation, and for two batch sizes.
    """
    graphs: list[tuple[str, fx.Graph, list[Any] | None]] = []
    found: list[Finding] = []
    for case, times, training in (("", 2, False), ("in training", 2, True), ("with another batch", 3, False)):
        inputs = _trial_inputs(given, times)
        traced = copy.deepcopy(module).train(training)
        make_traceable(traced)
        names = [name for name, m in module.named_modules(remove_duplicate=False) if m in spectral]
        through = {traced.get_submodule(name) for name in names}
        constants = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
        program = trace(traced, [x for x in inputs.values() if isinstance(x, Tensor)], constants, through)
        here = rewrite(program.graph, PYTHON, lambda node: where)
        if not any(finding.operator for finding in here):
            return here, None
        graphs.append((case, program.graph, program.seen))
        found = found or here
    return found, common_graph(graphs)
