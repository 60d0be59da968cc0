"""Finds the chain rfft2 -> multiplication -> irfft2 in a graph, or the reason why a graph has no filter step.

The search walks back from the inverse transform through nodes that are linear in each tensor. It ends at the input of
the forward transform, at the filters, and at the input of a softmax or the weights that mix the filters. The nodes
passed therefore compute a polynomial of these tensors (and of the softmax). So agreement with our step on random
inputs (`step.match`) proves that the two are the same.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import fx

from dfformer_kernels.graph.trace import DifferentFormulaError, ancestors, reached
from dfformer_kernels.graph.vocabulary import (
    CASTS,
    FRESH,
    IN_PLACE,
    first_input,
    is_linear,
    is_mutating,
    is_tensor,
    name_of,
    softmax_axis,
    transform_of,
    value_of,
)

# A program may ask these of a spectrum, because its input and the graph hold the answers.
_QUESTIONS = ("shape", "size", "dtype", "device")
_ASSERTION = "_assert_tensor_metadata"
_GRADIENT_MODES = ("_set_grad_enabled", "set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")


class Chain(NamedTuple):
    """A candidate for the filter step in a graph.

    ``nodes`` are the nodes to replace, in the graph's order, with ``inverse`` last. Their inputs are ``x``, ``filters``
    and, if filters are mixed, the weights ``routing``. If these are a softmax that the step may compute too, ``logits``
    is its input.
    """

    nodes: list[fx.Node]
    forward: fx.Node
    inverse: fx.Node
    x: fx.Node
    routing: fx.Node | None
    logits: fx.Node | None
    filters: fx.Node
    channels_first: bool


def inverse_transforms(graph: fx.Graph) -> list[fx.Node]:
    """The nodes where a chain may end: complex-to-real transforms, and inverse complex transforms that feed none."""
    inverse = {node: t.kind for node in graph.nodes if (t := transform_of(node)) and t.inverse}
    needed = {n for node, kind in inverse.items() if kind == "c2r" for n in ancestors(node)}
    return [node for node, kind in inverse.items() if kind == "c2r" or node not in needed]


def find(graph: fx.Graph, inverse: fx.Node) -> list[Chain]:
    """The candidates for the chain that ends at ``inverse``.

    Candidates differ in which tensors they take as filters and routing. These may be views of one another; those next
    to the multiplication come first.

    Raises DifferentFormulaError, with the first difference from a filter step, if there is no candidate.
    """
    transform = transform_of(inverse)
    if transform is None or transform.kind != "c2r":
        raise DifferentFormulaError(f"{name_of(inverse)} takes a full spectrum; expected rfft2 and irfft2")
    passed = sorted(_passed(inverse))
    forward = _forward(passed)
    nodes = _dependent(passed, {forward})
    softmaxes = {n for node in passed for n in _tensors(node) if softmax_axis(n) is not None}
    x = first_input(forward)
    channels_first = _check_transforms(nodes)
    _check_use(nodes, forward)
    chains = []
    for outside, between in _cuts(nodes, passed, _dependent(passed, softmaxes)):
        replaced = sorted({*nodes, *between})
        _check_in_place(replaced, nodes)
        if reason := _disturbance(graph, replaced, [x, forward, *outside]):
            raise DifferentFormulaError(reason)
        for filters in sorted(outside):
            routing = next((n for n in outside if n is not filters), None)
            logits = first_input(routing) if routing in softmaxes else None
            if routing and logits and _disturbance(graph, sorted([routing, *replaced]), [routing, logits]):
                logits = None
            chains.append(Chain(replaced, forward, inverse, x, routing, logits, filters, channels_first))
    return chains


def _passed(inverse: fx.Node) -> set[fx.Node]:
    """The nodes that the search back from ``inverse`` passes, up to forward transforms and non-linear nodes."""

    def onward(node: fx.Node) -> list[fx.Node]:
        return [] if _is_forward(node) else [n for n in _tensors(node) if _is_forward(n) or is_linear(n)]

    return reached([inverse], onward)


def _is_forward(node: fx.Node) -> bool:
    transform = transform_of(node)
    return transform is not None and transform.kind == "r2c"


def _tensors(node: fx.Node) -> Iterator[fx.Node]:
    return (n for n in node.all_input_nodes if is_tensor(n))


def _forward(passed: list[fx.Node]) -> fx.Node:
    """The only forward transform among the passed nodes."""
    forwards = [node for node in passed if _is_forward(node)]
    if not forwards:
        raise DifferentFormulaError(_obstacle(passed))
    if len(forwards) > 1:
        raise DifferentFormulaError(f"its irfft2 takes {len(forwards)} spectra")
    return forwards[0]


def _obstacle(passed: list[fx.Node]) -> str:
    for node in sorted((n for p in passed for n in _tensors(p) if n not in passed), reverse=True):
        sources = [n for n in ancestors(node) if transform_of(n)]
        if any(_is_forward(n) for n in sources):
            return f"{_described(node)} lies between rfft2 and irfft2"
        if sources:
            return f"its spectrum comes from {name_of(sources[0])}; expected rfft2"
    return "its irfft2 takes no rfft2's result"


def _described(node: fx.Node) -> str:
    numbers = [a for a in (*node.args, *node.kwargs.values()) if type(a) in (int, float, complex)]
    return f"{name_of(node)} by {numbers[0]}" if len(numbers) == 1 else name_of(node)


def _dependent(passed: list[fx.Node], sources: set[fx.Node]) -> list[fx.Node]:
    """The passed nodes that are among ``sources`` or depend on them."""
    found = set(sources)
    for node in passed:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return [node for node in passed if node in found]


def _cuts(
    nodes: list[fx.Node], passed: list[fx.Node], weights: list[fx.Node]
) -> list[tuple[set[fx.Node], set[fx.Node]]]:
    """Each way to cut the chain off from the rest of the graph: the tensors it then takes, and the nodes between.

    The first cut is next to ``nodes``; every further one replaces a tensor by those that it is computed from. The first
    to go are ``weights``, which depend on a softmax. Only cuts count that leave filters alone, or filters and weights.
    """
    outside, between = {n for node in nodes[1:] for n in _tensors(node)} - {*nodes}, set[fx.Node]()
    if not outside:
        raise DifferentFormulaError("it multiplies its spectrum by no filters")
    names = ", ".join(sorted(_described(n) for n in outside))
    cuts = []
    while True:
        if len(outside) <= 2:
            cuts.append((outside, between))
        # A cast to complex belongs to the real weights, so it is replaced first.
        last = max(outside.intersection(passed), key=lambda n: (n in weights, name_of(n) in CASTS, n), default=None)
        if last is None:
            break
        outside, between = outside - {last} | {*_tensors(last)}, between | {last}
    if not cuts:
        raise DifferentFormulaError(f"its spectrum is multiplied by more than filters and their weights ({names})")
    return cuts


def _check_transforms(nodes: list[fx.Node]) -> bool:
    """Whether a chain is channels-first. Refuses other axes, norms that do not cancel, and other sizes."""
    before, spectrum, after = (value_of(node).shape for node in (first_input(nodes[0]), nodes[0], nodes[-1]))
    transforms = [t for node in nodes if (t := transform_of(node))]
    forward, inverse = transforms[0], transforms[-1]
    sides = [[t for t in transforms if t.inverse is back] for back in (False, True)]
    axes = [tuple(sorted(a for t in side for a in t.axes)) for side in sides]
    norms = [{a: t.norm for t in side for a in t.axes} for side in sides]
    halved = forward.axes[-1], inverse.axes[-1]
    if len(before) != 4 or axes[0] not in ((1, 2), (2, 3)) or axes[0] != axes[1] or halved != (axes[0][1],) * 2:
        shown = " and ".join(f"{(*sorted(set(a) - {h}), h)}" for a, h in zip(axes, halved, strict=True))
        raise DifferentFormulaError(
            f"it transforms axes {shown} of a {len(before)}-D tensor, ours (1, 2) or (2, 3) of a 4-D one"
        )
    if norms[0] != norms[1]:
        raise DifferentFormulaError(f"its norms, {forward.norm!r} and {inverse.norm!r}, do not cancel out")
    H, W = axes[0]
    if not (same(spectrum[H], before[H]) and same(spectrum[W], before[W] // 2 + 1)):
        raise DifferentFormulaError("it crops or pads the plane before it transforms")
    if any(t.resizes for t in transforms if t.kind == "c2c"):
        raise DifferentFormulaError("it gives a size to a complex transform")
    if len(after) != 4 or not all(same(before[a], after[a]) for a in (H, W)):
        theirs, ours = (f"{shape[H]} x {shape[W]}" for shape in (after, before))
        raise DifferentFormulaError(f"its inverse transform returns a plane of {theirs}, the input has {ours}")
    return (H, W) == (2, 3)


def same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for all values of their symbols."""
    equal = a == b
    if isinstance(equal, bool):
        return equal
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

    return bool(statically_known_true(equal))


def _check_use(nodes: list[fx.Node], forward: fx.Node) -> None:
    """Refuses a chain whose intermediate results are used outside of it, except for the spectrum."""
    is_overwritten = any(name_of(node) in IN_PLACE for node in nodes)
    for node in nodes[:-1]:
        for user in node.users:
            allowed = name_of(user) == _ASSERTION
            if node is forward:
                allowed = is_question(user) or not (is_overwritten or is_mutating(user))
            if user not in nodes and not allowed:
                what = "a result" if user.op == "output" else _described(user)
                raise DifferentFormulaError(f"{node.name}, inside the chain, is also needed by {what}")


def is_question(node: fx.Node) -> bool:
    """Whether a node only asks a tensor for its shape, dtype or device, or asserts them."""
    return node.op in ("call_function", "call_method") and name_of(node) in (*_QUESTIONS, _ASSERTION)


def _check_in_place(nodes: list[fx.Node], own: list[fx.Node]) -> None:
    for node in nodes:
        if name_of(node) in IN_PLACE and node.args[0] not in own:
            raise DifferentFormulaError(f"it writes into a tensor that is not its own ({name_of(node)})")


def _disturbance(graph: fx.Graph, nodes: list[fx.Node], inputs: list[fx.Node]) -> str:
    """What may overwrite ``inputs``, or switch gradients on or off, while the nodes run; "" if nothing does."""
    from_first = itertools.dropwhile(lambda node: node is not nodes[0], graph.nodes)
    between = [n for n in itertools.takewhile(lambda node: node is not nodes[-1], from_first) if n not in nodes]
    if any(node.op == "call_function" and name_of(node) in _GRADIENT_MODES for node in between):
        return "gradients are switched on or off inside it"
    writing = [node for node in between if is_mutating(node)]
    read = _may_share_memory(inputs) if writing else set()
    for node in writing:
        if read & _may_share_memory(node.all_input_nodes):
            return f"one of its inputs may be overwritten in between ({name_of(node)})"
    return ""


def _may_share_memory(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """``nodes``, and all nodes that they may be views of."""
    return reached(nodes, lambda n: () if n.op == "call_function" and name_of(n) in FRESH else n.all_input_nodes)
