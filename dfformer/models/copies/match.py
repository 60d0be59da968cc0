"""Replaces the dynamic filter's chain in the trace of a copy by our step on the stored filters, at any plane."""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dfformer.models.filter_resize import resize_filter
from dfformer_kernels.dft_matmul import as_pairs
from dfformer_kernels.graph.toolkit import (
    AGREEMENT,
    CASTS,
    PYTHON,
    VIEWS,
    Chain,
    DifferentFormulaError,
    NotFusableError,
    StepMatch,
    add_call,
    ancestors,
    called,
    called_whole,
    first_input,
    is_mutating,
    is_tensor,
    name_of,
    named_difference,
    reached,
    rewrite,
    transform_of,
    value_of,
)
from dfformer_kernels.ops import without_autocast

# The orders of axes that filters are stored in, and the permutation of each to (H,K,F,2).
STORAGE: dict[str, tuple[int, ...]] = {"(H,K,F,2)": (0, 1, 2, 3), "(F,H,K,2)": (1, 2, 0, 3)}
_MOVING = {*VIEWS, *CASTS, "getitem"}


class CopyLimitError(Exception):
    """The copy cannot run a plane that our step runs."""


class Expected(NamedTuple):
    """What the trial inputs tell about the transforms.

    In order: the batch, the plane, the plane of the stored filters, the rule that resizes them, and whether the step
    also has to run in a model of 16-bit parameters, in which the original cannot.
    """

    batch: int
    plane: tuple[int, int]
    size: tuple[int, int]
    resize: str
    in_half: bool


def is_filter_shape(weight: Any) -> bool:
    """Whether a parameter is (H,K,F,2), or complex (H,K,F), in any of the known orders of axes."""
    if not isinstance(weight, Tensor):
        return False
    return weight.dim() == 3 if weight.is_complex() else weight.dim() == 4 and weight.shape[3] == 2


def as_basis(weight: Tensor, storage: str) -> Tensor:
    """Stored filters, real with a last axis of 2 or complex, as (H,K,F,2)."""
    return as_pairs(weight).permute(STORAGE[storage])


@called_whole
def cast_signal(x: Tensor, weight: Tensor, *, in_half: bool) -> Tensor:
    """x as the original's cast to float32 leaves it, so that the result has the same dtype.

    Filters in float64 make the result float64. With 16-bit filters, x keeps its dtype if the original does not run.
    """
    if in_half and weight.dtype in (torch.float16, torch.bfloat16):
        return x
    return x.double() if weight.dtype in (torch.float64, torch.complex128) else x.float()


@called_whole
def stored_basis(
    weight: Tensor, x: Tensor, *, channels_first: bool, size: tuple[int, int], storage: str, resize: str
) -> Tensor:
    """Filters stored for planes of ``size``, as (H,K,F,2) for the plane of x: (B,H,W,C) or (B,C,H,W)."""
    H, W = x.shape[2:] if channels_first else x.shape[1:3]
    basis = as_basis(weight, storage)
    if tuple(basis.shape[:2]) == (H, W // 2 + 1):
        return basis
    with without_autocast(x.device):
        return resize_filter(basis.contiguous(), size, (H, W), resize)


@called_whole
def authors_resize(weight: Tensor, H: int, K: int) -> Tensor:
    """What copies call to resize their filters and never define."""
    old = (weight.shape[0], 2 * (weight.shape[1] - 1) or 1)
    return resize_filter(weight, old, (H, 2 * (K - 1) or 1))


_RESIZING = (F.interpolate, authors_resize)


def fuse(traced: fx.Graph, expected: Expected) -> fx.Graph:
    """Replaces every chain of ``traced``, the forward of a copy, by our step, and returns it.

    Raises:
        CopyLimitError: the copy does not accept this plane.
        NotFusableError: there is no chain, or one computes something else; the message has the difference.
    """
    back = [t for node in traced.nodes if (t := transform_of(node)) and t.kind == "c2r"]
    if not back:
        raise NotFusableError("its forward calls no torch.fft.irfft2")
    if expected.plane != expected.size and expected.plane[1] % 2 and not all(t.resizes for t in back):
        raise CopyLimitError("irfft2 without s returns even widths only")

    def with_stored_filters(graph: fx.Graph, chain: Chain, step: StepMatch) -> tuple[Chain, StepMatch]:
        _check_plane(chain, expected)
        weight, arguments = _stored_filters(graph, chain, step, expected)
        x = chain.x
        if name_of(x) in CASTS and value_of(x).dtype == torch.float32:
            next(n for n in graph.nodes if n.op != "placeholder").prepend(weight)  # so that the signal may need it
            with graph.inserting_before(chain.forward):
                x = add_call(graph, x, cast_signal, first_input(x), weight, in_half=expected.in_half)
        with graph.inserting_before(chain.inverse):
            filters = add_call(graph, x, stored_basis, weight, x, **arguments)
        return chain._replace(x=x, filters=filters), step._replace(filters=(0, 1, 2, 3), is_complex=False)

    for finding in rewrite(traced, PYTHON, str, with_stored_filters):
        if finding.reason:
            raise DifferentFormulaError(finding.reason)
    return traced


def _check_plane(chain: Chain, expected: Expected) -> None:
    """Refuses a chain that filters something else than the whole plane of the module's input."""
    batch, *sizes = value_of(chain.x).shape
    plane = tuple(sizes[1:] if chain.channels_first else sizes[:2])
    if plane != expected.plane:
        raise DifferentFormulaError(
            f"it filters {_by(plane)} windows of a {_by(expected.plane)} plane, ours the whole plane"
        )
    if batch != expected.batch:
        raise DifferentFormulaError(f"it transforms a batch of {batch} for an input of {expected.batch}")
    for node in ancestors(chain.x):
        if name_of(node) in ("view", "reshape"):
            _check_view(value_of(node.all_input_nodes[0]).shape, value_of(node).shape, plane)


def _check_view(before: torch.Size, after: torch.Size, plane: tuple[int, ...]) -> None:
    """Refuses ``view`` where ``permute`` was meant."""
    if len(before) not in (3, 4) or len(after) != 4:
        return
    layouts = {"(B,C,H,W)": (1, after[2:]), "(B,H,W,C)": (3, after[1:3])}
    for (theirs, (old, _)), (ours, (new, viewed)) in itertools.permutations(layouts.items(), 2):
        old = min(old, len(before) - 1)
        if before[old] == after[new] != before[len(before) - 1 if old == 1 else 1] and viewed == plane:
            raise DifferentFormulaError(f"it views {theirs} data as {ours}, which mixes channels with positions")


def _stored_filters(
    graph: fx.Graph, chain: Chain, step: StepMatch, expected: Expected
) -> tuple[fx.Node, dict[str, Any]]:
    """The parameter that the chain's filters are, after resizing, and the other arguments of `stored_basis`."""
    theirs = step.basis(called, value_of(chain.filters))
    sources = {chain.filters} | ancestors(chain.filters)
    stored = [n for n in graph.nodes if n in sources and n.op == "get_attr" and "." not in str(n.target)]
    reasons = []
    for node, storage in itertools.product(stored, STORAGE):
        arguments = {"channels_first": chain.channels_first, "storage": storage}
        arguments |= {"size": expected.size, "resize": expected.resize}
        try:
            ours = stored_basis(value_of(node), value_of(chain.x), **arguments)
        except (ValueError, RuntimeError):  # no filters, or filters of another plane
            continue
        reason = named_difference(ours, theirs, AGREEMENT)
        if not reason:
            _check_path(graph, node, chain.filters)
            return node, arguments
        reasons.append(f"what it makes of its filters ({name_of(chain.filters)}) {reason}")
    raise DifferentFormulaError(reasons[0] if reasons else "its spectrum is multiplied by no parameter of the layer")


def _check_path(graph: fx.Graph, stored: fx.Node, filters: fx.Node) -> None:
    """Refuses what does more between the parameter and the product than move, cast or resize the values.

    A mask of ones, for example, changes nothing in a trial, but may be another mask later.
    """
    path = reached([filters], lambda n: () if n is stored else filter(is_tensor, n.all_input_nodes))
    for node in reversed([n for n in graph.nodes if n in path - {stored}]):
        is_moving = node.target in _RESIZING or name_of(node) in _MOVING
        if not (is_moving and node.op in ("call_function", "call_method")):
            raise DifferentFormulaError(f"{name_of(node)} lies between its stored filters and their product")
    for node in filter(is_mutating, graph.nodes):
        written = node.kwargs.get("out", first_input(node))
        while isinstance(written, fx.Node) and written not in path and name_of(written) in _MOVING:
            written = first_input(written)
        if written in path:
            raise DifferentFormulaError(f"it writes into its filters ({name_of(node)})")


def _by(plane: tuple[int, ...]) -> str:
    return "x".join(map(str, plane))
