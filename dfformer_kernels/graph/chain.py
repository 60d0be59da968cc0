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

from dfformer_kernels.graph.trace import DifferentCopyError, ancestors, reached
from dfformer_kernels.graph.vocabulary import (
    CASTS,
    FRESH,
    IN_PLACE,
    Transform,
    first_input,
    is_linear,
    is_mutating,
    is_softmax,
    is_tensor,
    name_of,
    shape_of,
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
    and, if filters are mixed, ``routing``: the logits of ``softmax``, or the weights if ``softmax`` is None.
    """

    nodes: list[fx.Node]
    forward: fx.Node
    inverse: fx.Node
    softmax: fx.Node | None
    x: fx.Node
    routing: fx.Node | None
    filters: fx.Node
    channels_first: bool


def inverse_transforms(graph: fx.Graph) -> list[fx.Node]:
    """The nodes where a chain may end: complex-to-real transforms, and inverse complex transforms that feed none."""
    inverse = {node: t.kind for node in graph.nodes if (t := transform_of(node)) and t.inverse}
    needed = {n for node, kind in inverse.items() if kind == "c2r" for n in ancestors(node)}
    return [node for node, kind in inverse.items() if kind == "c2r" or node not in needed]


def find(graph: fx.Graph, inverse: fx.Node) -> tuple[list[Chain], list[str]]:
    """The candidates for the chain that ends at ``inverse``, and the reasons why others were ruled out.

    Candidates differ in which tensors they take as filters and routing. These may be views of one another; those next
    to the multiplication come first. Candidates that include the softmax come before those that take its output as
    weights.

    Raises DifferentCopyError, with the first difference from a filter step, if there is no candidate.
    """
    transform = transform_of(inverse)
    if transform is None or transform.kind != "c2r":
        raise DifferentCopyError(f"{name_of(inverse)} takes a full spectrum, where rfft2 and irfft2 were looked for")
    chains: list[Chain] = []
    reasons: list[str] = []
    for with_softmax in (True, False):
        try:
            chains += _chains(graph, inverse, with_softmax)
        except DifferentCopyError as error:
            reasons.append(str(error))
    if not chains:
        raise DifferentCopyError(reasons[0])
    return chains, reasons


def _chains(graph: fx.Graph, inverse: fx.Node, with_softmax: bool) -> list[Chain]:
    passed = _passed(inverse, with_softmax)
    forward, softmax = _ends(inverse, passed)
    if with_softmax and softmax is None:
        return []
    order = {node: i for i, node in enumerate(graph.nodes)}
    nodes = _dependent(sorted(passed, key=order.__getitem__), forward, softmax)
    x = first_input(forward)
    channels_first = _check_transforms(nodes, forward, inverse)
    _check_use(nodes, forward, inverse, softmax)
    chains = []
    for outside, between in _outside(nodes, (forward, softmax), passed, order):
        replaced = sorted({*nodes, *between}, key=order.__getitem__)
        _check_in_place(replaced, set(nodes) - {softmax})
        _check_between(graph, replaced, [x, forward, *outside, *([first_input(softmax)] if softmax else [])])
        for filters in outside:
            routing = first_input(softmax) if softmax else next((n for n in outside if n is not filters), None)
            chains.append(Chain(replaced, forward, inverse, softmax, x, routing, filters, channels_first))
    return chains


def _passed(inverse: fx.Node, with_softmax: bool) -> set[fx.Node]:
    """The nodes passed on the way back from ``inverse``, up to forward transforms, softmaxes and non-linear nodes."""

    def is_end(node: fx.Node) -> bool:
        return _is_forward(node) or (with_softmax and is_softmax(node))

    def onward(node: fx.Node) -> list[fx.Node]:
        return [] if is_end(node) else [n for n in _tensors(node) if is_end(n) or is_linear(n)]

    return reached([inverse], onward)


def _is_forward(node: fx.Node) -> bool:
    transform = transform_of(node)
    return transform is not None and transform.kind == "r2c"


def _tensors(node: fx.Node) -> Iterator[fx.Node]:
    return (n for n in node.all_input_nodes if is_tensor(n))


def _ends(inverse: fx.Node, passed: set[fx.Node]) -> tuple[fx.Node, fx.Node | None]:
    """The forward transform, and the softmax or None."""
    forwards = [node for node in passed if _is_forward(node)]
    softmaxes = [node for node in passed if is_softmax(node)]
    if not forwards:
        raise DifferentCopyError(_obstacle(inverse, passed))
    if len(forwards) > 1:
        raise DifferentCopyError(f"its irfft2 takes {len(forwards)} spectra")
    if len(softmaxes) > 1:
        raise DifferentCopyError(f"its filters are mixed by {len(softmaxes)} softmaxes")
    return forwards[0], softmaxes[0] if softmaxes else None


def _obstacle(inverse: fx.Node, passed: set[fx.Node]) -> str:
    for node in sorted((n for p in passed for n in _tensors(p) if n not in passed), reverse=True):
        sources = [n for n in ancestors(node) if transform_of(n)]
        if any(_is_forward(n) for n in sources):
            return f"between rfft2 and irfft2 stands {_described(node)}"
        if sources:
            return f"its spectrum comes from {name_of(sources[0])}, where rfft2 was looked for"
    return "its irfft2 takes no rfft2's result"


def _described(node: fx.Node) -> str:
    numbers = [a for a in (*node.args, *node.kwargs.values()) if type(a) in (int, float, complex)]
    return f"{name_of(node)} by {numbers[0]}" if len(numbers) == 1 else name_of(node)


def _dependent(passed: list[fx.Node], forward: fx.Node, softmax: fx.Node | None) -> list[fx.Node]:
    """The passed nodes that depend on the spectrum or the softmax."""
    found = {forward, softmax}
    for node in passed:
        if node not in found and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return [node for node in passed if node in found]


def _outside(
    nodes: list[fx.Node],
    ends: tuple[fx.Node, fx.Node | None],
    passed: set[fx.Node],
    order: dict[fx.Node, int],
) -> Iterator[tuple[set[fx.Node], set[fx.Node]]]:
    """Each way to cut the chain off from the rest of the graph: the tensors it then takes, and the nodes between.

    The first cut is next to ``nodes``; every further one replaces a tensor by those that it is computed from. Only cuts
    are yielded that leave filters alone or, without a softmax, filters and weights.
    """
    inside, between = set(nodes), set[fx.Node]()
    outside = {n for node in nodes if node not in ends for n in _tensors(node)} - inside
    if not outside:
        raise DifferentCopyError("it multiplies its spectrum with no filters")
    names = ", ".join(sorted(_described(n) for n in outside))
    most = 2 if ends[1] is None else 1
    found = False
    while True:
        if len(outside) <= most:
            found = True
            yield set(outside), set(between)
        # A cast to complex belongs to the real weights, so it is replaced first.
        inner = [(name_of(n) in CASTS, order[n], n) for n in outside if n in passed]
        last = max(inner)[2] if inner else None
        if last is None:
            break
        between.add(last)
        outside = outside - {last} | set(_tensors(last))
    if not found:
        raise DifferentCopyError(f"its spectrum meets more than filters and their weights ({names})")


def _check_transforms(nodes: list[fx.Node], forward: fx.Node, inverse: fx.Node) -> bool:
    """Whether ``x`` is channels-first. Refuses other axes, norms that do not cancel, and other sizes."""
    x = first_input(forward)
    rank = len(shape_of(x))
    transforms = {node: t for node in nodes if (t := transform_of(node))}
    there = [t for t in transforms.values() if not t.inverse]
    back = [t for t in transforms.values() if t.inverse]
    axes = [tuple(sorted(a for t in side for a in t.axes)) for side in (there, back)]
    halved = transforms[forward].axes[-1], transforms[inverse].axes[-1]
    if rank != 4 or axes[0] not in ((1, 2), (2, 3)) or axes[0] != axes[1] or halved != (axes[0][1],) * 2:
        shown = " and ".join(f"{(*sorted(set(a) - {h}), h)}" for a, h in zip(axes, halved, strict=True))
        raise DifferentCopyError(f"it transforms axes {shown} of a {rank}-D tensor, ours (1, 2) or (2, 3) of a 4-D one")
    for axis in axes[0]:
        if sum(t.exponent for t in transforms.values() if axis in t.axes) != -1:
            norms = f"{transforms[forward].norm!r} and {transforms[inverse].norm!r}"
            raise DifferentCopyError(f"its norms, {norms}, do not cancel out")
    _check_plane(transforms, forward, inverse, axes[0])
    return axes[0] == (2, 3)


def _check_plane(
    transforms: dict[fx.Node, Transform], forward: fx.Node, inverse: fx.Node, axes: tuple[int, ...]
) -> None:
    before, after = value_of(first_input(forward)).shape, value_of(inverse).shape
    kept = (*(before[a] for a in axes[:1]), before[axes[1]] // 2 + 1)
    spectrum = value_of(forward).shape
    if not all(same(spectrum[a], n) for a, n in zip(axes, kept, strict=True)):
        raise DifferentCopyError("it crops or pads the plane before it transforms")
    if any(t.resizes for t in transforms.values() if t.kind == "c2c"):
        raise DifferentCopyError("it gives a size to a complex transform")
    if len(after) != 4 or not all(same(before[a], after[a]) for a in axes):
        theirs, ours = (" x ".join(str(shape[a]) for a in axes) for shape in (after, before))
        raise DifferentCopyError(f"it goes back to a plane of {theirs}, where the input has {ours}")


def same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for all values of their symbols."""
    equal = a == b
    if isinstance(equal, bool):
        return equal
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

    return bool(statically_known_true(equal))


def _check_use(nodes: list[fx.Node], forward: fx.Node, inverse: fx.Node, softmax: fx.Node | None) -> None:
    """Refuses a chain whose intermediate results are used outside of it, except for the spectrum and the softmax."""
    inside = set(nodes)
    shared = set() if any(name_of(node) in IN_PLACE for node in nodes) else {softmax, forward}
    for node in inside - {inverse}:
        for user in node.users:
            allowed = is_question(user) if node is forward else name_of(user) == _ASSERTION
            allowed |= node in shared and not is_mutating(user)
            if user not in inside and not allowed:
                what = "a result" if user.op == "output" else _described(user)
                raise DifferentCopyError(f"{node.name}, inside the chain, is also needed by {what}")


def is_question(node: fx.Node) -> bool:
    """Whether a node only asks a tensor for its shape, dtype or device, or asserts them."""
    return node.op in ("call_function", "call_method") and name_of(node) in (*_QUESTIONS, _ASSERTION)


def _check_in_place(nodes: list[fx.Node], own: set[fx.Node]) -> None:
    for node in nodes:
        if name_of(node) in IN_PLACE and node.args[0] not in own:
            raise DifferentCopyError(f"it writes into a tensor that is not its own ({name_of(node)})")


def _check_between(graph: fx.Graph, nodes: list[fx.Node], inputs: Iterable[fx.Node]) -> None:
    """Refuses a chain if its inputs may be overwritten, or gradients switched on or off, while it runs."""
    inside, inputs = set(nodes), list(inputs)
    from_first = itertools.dropwhile(lambda node: node is not nodes[0], graph.nodes)
    between = [n for n in itertools.takewhile(lambda node: node is not nodes[-1], from_first) if n not in inside]
    if any(node.op == "call_function" and name_of(node) in _GRADIENT_MODES for node in between):
        raise DifferentCopyError("gradients are switched on or off inside it")
    writing = [node for node in between if is_mutating(node)]
    read = _may_share_memory(inputs) if writing else set()
    for node in writing:
        if read & _may_share_memory(node.all_input_nodes):
            raise DifferentCopyError(f"one of its inputs may be overwritten in between ({name_of(node)})")


def _may_share_memory(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """``nodes``, and all nodes that they may be views of."""
    return reached(nodes, lambda n: () if n.op == "call_function" and name_of(n) in FRESH else n.all_input_nodes)
