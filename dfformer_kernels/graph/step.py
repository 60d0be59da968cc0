"""Replaces a chain by our step: how its tensors are laid out, the call of the operator, and the proof of equality."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from dfformer_kernels import reference
from dfformer_kernels.graph.chain import Chain, same
from dfformer_kernels.graph.compare import isolated
from dfformer_kernels.graph.trace import DifferentFormulaError, called_whole, first_line
from dfformer_kernels.graph.vocabulary import evaluate, example, shape_of, softmax_axis, value_of
from dfformer_kernels.ops import filter as ops
from dfformer_kernels.tolerance import relative_error

# The largest relative difference between two evaluations of the same formula in double precision.
_AGREEMENT = 1e-9

Call = Callable[..., Any]  # takes a function and its arguments; runs it, or adds a node that calls it
# For each kind of step, the function to call and its arguments after the tensors. If several kinds agree, the first one
# wins, because it has the least work before the operator.
Operators = Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]]


@called_whole  # for symbolic traces
def dynamic_filter(x: Tensor, logits: Tensor, basis: Tensor, softmax: bool = True) -> Tensor:
    """The public operator on a basis of any dtype, because autocast and ``half()`` change those of foreign code."""
    basis = basis.to(reference.compute_dtype(x.dtype))
    return ops.dynamic_filter(x, logits, basis, normalization="softmax" if softmax else None)


@called_whole
def global_filter(x: Tensor, weight: Tensor) -> Tensor:
    """The public operator on a weight of any dtype."""
    return ops.global_filter(x, weight.to(reference.compute_dtype(x.dtype)))


def _operators(dynamic: Callable[..., Any], global_: Callable[..., Any], *unused: None) -> Operators:
    return {"softmax": (dynamic, unused), "weights": (dynamic, (*unused, False)), "filters": (global_, unused)}


PYTHON = _operators(dynamic_filter, global_filter)
# For graphs of ATen operators, without StarReLU or the name of a backend.
_OPS = torch.ops.dfformer
ATEN = _operators(_OPS.dynamic_filter.default, _OPS.global_filter.default, None, None, None)
_REFERENCE = _operators(reference.dynamic_filter, reference.global_filter, None, None)


class StepMatch(NamedTuple):
    """How a chain's tensors become the operators' arguments.

    ``kind`` is a key of `Operators`. ``filters`` permutes the filters' axes to (H,K,F,2), (H,K,C,2) or (B,H,K,C,2).
    ``routing`` permutes the routing's axes to (B,F), (B,F,C) or (B,F,1), followed by axes of size 1; it is empty if
    filters are not mixed. The filters are cast to ``dtype``, unless it is None.
    """

    kind: str
    channels_first: bool
    filters: tuple[int, ...]
    is_complex: bool
    routing: tuple[int, ...]
    channels: int
    dtype: torch.dtype | None

    @property
    def cost(self) -> tuple[int, int, bool]:
        """The sort key, smallest preferred; complex filters come last, because they need a view as pairs."""
        return len(self.filters), [*PYTHON].index(self.kind), self.is_complex

    def basis(self, call: Call, filters: Any) -> Any:
        """The filters as the operators take them."""
        if self.is_complex:
            filters = call(torch.ops.aten.view_as_real.default, filters)
        if self.filters != tuple(range(len(self.filters))):
            filters = call(torch.ops.aten.permute.default, filters, list(self.filters))
        return filters

    def build(self, call: Call, operators: Operators, x: Any, routing: Any, filters: Any) -> Any:
        """Calls an operator and ATen's views; the result is contiguous, in x's layout, as irfft2's is."""
        aten = torch.ops.aten
        operator, rest = operators[self.kind]
        filters = self.basis(call, filters)
        if operators is ATEN and self.dtype is not None:
            filters = call(aten._to_copy.default, filters, dtype=self.dtype)
        if self.channels_first:
            x = call(aten.permute.default, x, [0, 2, 3, 1])
        if not self.routing:
            y = call(operator, x, filters, *rest)
        else:
            if self.routing != tuple(range(len(self.routing))):
                routing = call(aten.permute.default, routing, list(self.routing))
            for axis in reversed(range(3, len(self.routing))):
                routing = call(aten.squeeze.dim, routing, axis)
            if len(self.routing) == 2:
                routing = call(aten.unsqueeze.default, routing, 2)
            routing = call(aten.expand.default, routing, [-1, -1, self.channels])
            y = call(operator, x, routing, filters, *rest)
        if self.channels_first:
            y = call(aten.permute.default, y, [0, 3, 1, 2])
        return call(aten.contiguous.default, y)


def match(chains: list[Chain]) -> tuple[Chain, StepMatch]:
    """The chain that is a step at the lowest cost, and that step: outputs and gradients agree on random inputs.

    Raises DifferentFormulaError with the first reason against a chain if there is none.
    """
    fitting: list[tuple[Chain, StepMatch]] = []
    reasons: list[str] = []
    for chain in chains:
        try:
            fitting += [(chain, step) for step in _candidates(chain)]
        except DifferentFormulaError as error:
            reasons.append(str(error))
    for chain, step in sorted(fitting, key=lambda pair: pair[1].cost):
        reason = _difference(chain, step)
        if not reason:
            return chain, step
        reasons.append(reason)
    raise DifferentFormulaError(reasons[0] if reasons else _other_shape(chains[0]))


def _candidates(chain: Chain) -> Iterator[StepMatch]:
    """The steps whose shapes fit."""
    B, H, W, C = _map_shape(chain)
    _check_dtypes(chain)
    compute, dtype = reference.compute_dtype(value_of(chain.x).dtype), value_of(chain.filters).dtype
    cast = None if torch.empty(0, dtype=dtype).real.dtype == compute else compute
    shape = (*value_of(chain.filters).shape, *((2,) if dtype.is_complex else ()))
    routings = [("filters", C, ())] if chain.routing is None else list(_routings(chain, B, C))
    samples = (B,) if chain.routing is None and len(shape) == 5 else ()
    for (kind, filters, routing), order in itertools.product(routings, itertools.permutations(range(len(shape)))):
        expected = (*samples, H, W // 2 + 1, filters, 2)
        fits = len(shape) == len(expected) and all(map(same, [shape[axis] for axis in order], expected))
        if fits and (not dtype.is_complex or order[-1] == len(shape) - 1):
            if value_of(chain.filters).is_conj():
                raise DifferentFormulaError(
                    "its filters are a lazy conjugate, which has no view as pairs; conj_physical() has"
                )
            yield StepMatch(kind, chain.channels_first, order, dtype.is_complex, routing, example(C), cast)


def _map_shape(chain: Chain) -> tuple[int, int, int, int]:
    """B, H, W, C of the chain's input, which may be symbols."""
    B, *rest = value_of(chain.x).shape
    C, H, W = rest if chain.channels_first else (rest[2], *rest[:2])
    return B, H, W, C


def _other_shape(chain: Chain) -> str:
    _, H, W, C = _map_shape(chain)
    theirs = " and ".join(f"{n.name} of shape {shape_of(n)}" for n in (chain.filters, chain.routing) if n)
    return f"its filters, {theirs}, are not (H, K, C) = {example((H, W // 2 + 1, C))}"


def _check_dtypes(chain: Chain) -> None:
    x, routing = value_of(chain.x).dtype, chain.routing
    taken = any(_takes(n, x) for n in (routing, chain.logits) if n is not None)
    if not x.is_floating_point or value_of(chain.inverse).dtype != x:
        raise DifferentFormulaError(f"its output is {_name(value_of(chain.inverse).dtype)} for a {_name(x)} input")
    if routing is not None and not (value_of(routing).dtype.is_complex or taken):
        raise DifferentFormulaError(f"its weights are {_name(value_of(routing).dtype)}, its input {_name(x)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _takes(routing: fx.Node, x: torch.dtype) -> bool:
    """Whether the operators take weights or logits of this dtype beside ``x``."""
    dtype = value_of(routing).dtype
    return dtype.is_floating_point and reference.compute_dtype(dtype) in (torch.float32, reference.compute_dtype(x))


def _routings(chain: Chain, B: int, C: int) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """The kind of the step, F, and each permutation of the routing's axes to (B,F), (B,F,C,1..) or (B,F,1,1..)."""
    assert chain.routing is not None
    shape = value_of(chain.routing).shape
    if value_of(chain.routing).dtype.is_complex or len(shape) < 2 or not same(shape[0], B):
        return
    x, softmax = value_of(chain.x).dtype, None
    if chain.logits is not None and _takes(chain.logits, x):
        softmax = softmax_axis(chain.routing)
    for axis, *rest in itertools.permutations(range(1, len(shape))):
        if all(same(shape[a], 1) or (i == 0 and same(shape[a], C)) for i, a in enumerate(rest)):
            kind = "softmax" if softmax is not None and softmax % len(shape) == axis else "weights"
            if kind == "softmax" or _takes(chain.routing, x):  # a softmax in float64 of float32 logits is no weight
                yield kind, shape[axis], (0, axis, *rest)


def _difference(chain: Chain, step: StepMatch) -> str:
    """How the step differs from the chain on the same random inputs; "" if they agree.

    The weights are random inputs, even if they are a softmax's in the graph and the step computes it too.
    """
    if step.kind == "softmax":
        step = step._replace(kind="weights")
    nodes = [node for node in (chain.x, chain.routing, chain.filters) if node is not None]
    with isolated(torch.device("cpu")):
        inputs = [_random(node) for node in nodes]
        computed: dict[fx.Node, Any] = dict(zip(nodes, inputs, strict=True))
        try:
            for node in chain.nodes:
                if node not in computed:
                    computed[node] = evaluate(node, computed)
            theirs = computed[chain.inverse]
            grad_y = torch.randn_like(theirs)
            expected = _gradients(theirs, inputs, grad_y)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            return f"it cannot be tried ({first_line(error)})"
        x, *routing, filters = inputs
        ours = step.build(called, _REFERENCE, x, routing[0] if routing else None, filters)
        if reason := named_difference(ours.detach(), theirs.detach(), _AGREEMENT):
            return f"on random inputs its output {reason}"
        gradients = _gradients(ours, inputs, grad_y)
    names = ["input", "routing", "filters"] if routing else ["input", "filters"]
    for name, gradient, theirs in zip(names, gradients, expected, strict=True):
        if not relative_error(gradient, theirs) <= _AGREEMENT:
            return f"the gradient of its {name} differs from ours"
    return ""


def called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def named_difference(ours: Tensor, theirs: Tensor, bound: float) -> str:
    """How a result differs from ours, completing "its output"; "" if they agree to within ``bound``."""
    if ours.shape != theirs.shape:
        return f"has shape {tuple(theirs.shape)} where ours is {tuple(ours.shape)}"
    if relative_error(ours, theirs) <= bound:
        return ""
    gain = ((ours * theirs).sum() / ours.square().sum()).item()
    if relative_error(gain * ours, theirs) <= bound:
        return f"differs from ours by a factor, {gain:.6g} in the trial"
    return f"differs from ours by {relative_error(ours, theirs):.1e} relative"


def _gradients(y: Tensor, inputs: list[Tensor], grad_y: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad(y, inputs, grad_y, allow_unused=True)
    real = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, inputs, strict=True)]
    return [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in real]


def _random(node: fx.Node) -> Tensor:
    """A random input for the trial in place of a node's value."""
    dtype = torch.complex128 if value_of(node).dtype.is_complex else torch.float64
    return torch.randn(shape_of(node), dtype=dtype, device="cpu").requires_grad_()
