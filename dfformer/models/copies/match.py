"""Finds the dynamic filter's chain, rfft2 -> mixed filters -> irfft2, in the graph of somebody's forward."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfformer.models.copies.step import STORAGE, Form, filter_step
from dfformer_kernels.graph.compare import AGREEMENT, INVERSE_TRANSFORMS
from dfformer_kernels.graph.trace import DifferentCopyError, Trace, UnsupportedCopyError, ancestors
from dfformer_kernels.graph.vocabulary import is_mutating, name_of
from dfformer_kernels.tolerance import relative_error

FORWARD_TRANSFORMS = (torch.fft.rfft2, torch.fft.rfftn)
_FFT = ("input", "s", "dim", "norm")
_CASTS = ("to", "float", "type", "contiguous")
_VIEWS = ("view", "reshape", torch.reshape)


class CopyLimitError(Exception):
    """The copy cannot run a plane that our step runs."""


class Expected(NamedTuple):
    """What the trial inputs tell about the transforms.

    In order: the batch, the plane, the plane of the stored filters, how they are stored, and the rule that resizes
    them.
    """

    batch: int
    plane: tuple[int, int]
    size: tuple[int, int]
    storage: str
    resize: str


def fuse(traced: Trace, module: nn.Module, expected: Expected) -> fx.Graph:
    """Replaces every chain of ``traced``, the forward of ``module``, by a call of `filter_step`.

    Raises:
        CopyLimitError: the copy does not accept this plane.
        UnsupportedCopyError: there is no chain, or one computes something else; the message has the difference.
    """
    inverses = [node for node in traced.graph.nodes if node.target in INVERSE_TRANSFORMS]
    if not inverses:
        raise UnsupportedCopyError("its forward calls no torch.fft.irfft2")
    for inverse in inverses:
        form, *tensors = _chain(traced, module, expected, inverse)
        with traced.graph.inserting_before(inverse):
            ours = traced.graph.call_function(filter_step, tuple(tensors), form._asdict())
        inverse.replace_all_uses_with(ours)
        traced.values[ours] = traced.values[inverse]
        _erase(traced.graph, {inverse} | ancestors(inverse))
    return traced.graph


def _erase(graph: fx.Graph, replaced: set[fx.Node]) -> None:
    """Erases unused nodes: all of ``replaced``, and others that have no side effects."""
    for node in reversed(graph.nodes):
        pure = node.op not in ("placeholder", "output", "call_module") and not is_mutating(node)
        if not node.users and (pure or (node in replaced and node.op != "placeholder")):
            graph.erase_node(node)


def _chain(
    traced: Trace, module: nn.Module, expected: Expected, inverse: fx.Node
) -> tuple[Form, fx.Node, fx.Node, fx.Node | None]:
    """The form of the step that computes ``inverse``, and the nodes of its input, weight and logits."""
    sources = ancestors(inverse)
    forwards = [node for node in traced.graph.nodes if node in sources and node.target in FORWARD_TRANSFORMS]
    weights = [node for node in traced.graph.nodes if node in sources and _is_stored_filter(node, module)]
    writing = [user for node in forwards for user in node.users if is_mutating(user) and not user.users]
    if writing:
        raise DifferentCopyError(f"it overwrites its spectrum in place ({name_of(writing[0])}) and ignores the result")
    if not forwards or not weights:
        missing = "torch.fft.rfft2" if weights else "filters of its own"
        raise DifferentCopyError(f"what goes into its irfft2 comes from no {missing}")
    reasons = []
    for forward, weight in itertools.product(forwards, weights):
        try:
            layout, x = _layout(traced, expected, forward, inverse)
        except DifferentCopyError as error:
            reasons.append(str(error))
            continue
        for form, logits in _routings(traced, module, sources, layout, weight):
            reason = _difference(traced, form, expected, inverse, (x, weight, logits))
            if not reason:
                return form, x, weight, logits
            reasons.append(reason)
    raise DifferentCopyError(reasons[0])


def _is_stored_filter(node: fx.Node, module: nn.Module) -> bool:
    if node.op != "get_attr" or "." in str(node.target):
        return False
    return is_filter_shape(getattr(module, str(node.target)))


def is_filter_shape(weight: Any) -> bool:
    """Whether a parameter is (H,K,F,2), or complex (H,K,F), in any of the known orders of axes."""
    if not isinstance(weight, Tensor):
        return False
    return weight.dim() == 3 if weight.is_complex() else weight.dim() == 4 and weight.shape[3] == 2


def _layout(traced: Trace, expected: Expected, forward: fx.Node, inverse: fx.Node) -> tuple[Form, fx.Node]:
    """The form of a pair of transforms, without its routing, and the node that they transform."""
    there, back = _arguments(forward, _FFT), _arguments(inverse, _FFT)
    x = there["input"]
    value = traced.values[x]
    axes = [tuple(d % 4 for d in (pair["dim"] or (-2, -1))) for pair in (there, back)]
    if value.dim() != 4 or axes[0] not in ((1, 2), (2, 3)) or axes[0] != axes[1]:
        dims = " and ".join(str(a) for a in dict.fromkeys(axes))
        raise DifferentCopyError(f"it transforms axes {dims} of a {value.dim()}-D tensor")
    channels_first = axes[0] == (2, 3)
    plane = tuple(value.shape[2:] if channels_first else value.shape[1:3])
    if plane != expected.plane:
        raise DifferentCopyError(
            f"it filters {_by(plane)} windows of a {_by(expected.plane)} plane, ours the whole plane"
        )
    if len(value) != expected.batch:
        raise DifferentCopyError(f"it transforms a batch of {len(value)} for an input of {expected.batch}")
    if there["s"] is not None and tuple(traced.values.get(s, s) for s in there["s"]) != plane:
        raise DifferentCopyError("it crops or pads the plane before it transforms")
    for node in ancestors(x):
        if node.target in _VIEWS:
            _check_view(traced.values[node.all_input_nodes[0]].shape, traced.values[node].shape, plane)
    while x.op == "call_method" and x.target in _CASTS and value.dtype == torch.float32:
        x = x.args[0]  # our step accepts any dtype and computes in float32
    return Form(channels_first, expected.size, expected.storage, expected.resize), x


def _check_view(before: torch.Size, after: torch.Size, plane: tuple[int, int]) -> None:
    """Refuses ``view`` where ``permute`` was meant."""
    if len(before) not in (3, 4) or len(after) != 4:
        return
    layouts = {"(B,C,H,W)": (1, after[2:]), "(B,H,W,C)": (3, after[1:3])}
    for (theirs, (old, _)), (ours, (new, viewed)) in itertools.permutations(layouts.items(), 2):
        old = min(old, len(before) - 1)
        if before[old] == after[new] != before[len(before) - 1 if old == 1 else 1] and viewed == plane:
            raise DifferentCopyError(f"it views {theirs} data as {ours}, which mixes channels with positions")


def _routings(
    traced: Trace, module: nn.Module, ancestors: set[fx.Node], form: Form, weight: fx.Node
) -> Iterator[tuple[Form, fx.Node | None]]:
    """The possible forms with their logits.

    Logits may be the inputs of softmaxes over F, or the logarithm of another tensor that sums to 1 over F. There are
    none if each channel has one filter.
    """
    filters = traced.values[weight].shape[STORAGE[form.storage][2]]
    candidates = []
    for node in traced.graph.nodes:
        value = traced.values.get(node)
        if node not in ancestors or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        for axis in range(1, value.dim()):
            total = value.sum(axis)
            if value.shape[axis] == filters and torch.allclose(total, torch.ones_like(total), atol=1e-4):
                softmax = _is_softmax(node, module)
                source = node.all_input_nodes[0] if softmax else node
                candidates.append((form._replace(filter_axis=axis, normalised=not softmax), source))
    yield from sorted(candidates, key=lambda candidate: candidate[0].normalised)
    if not candidates:
        yield form, None


def _is_softmax(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) is nn.Softmax
    return node.target in ("softmax", torch.softmax, F.softmax)


def _difference(
    traced: Trace, form: Form, expected: Expected, inverse: fx.Node, nodes: tuple[fx.Node, fx.Node, fx.Node | None]
) -> str:
    """How the copy's filtered signal differs from our step's on the same tensors; "" if they agree."""
    theirs = traced.values[inverse]
    x, weight = traced.values[nodes[0]], traced.values[nodes[1]]
    logits = None if nodes[2] is None else traced.values[nodes[2]]
    filters, channels = weight.shape[STORAGE[form.storage][2]], x.shape[1 if form.channels_first else 3]
    if logits is None and filters != channels:
        return f"its {filters} filters are mixed by no softmax over them"
    try:
        ours = filter_step(x, weight, logits, **form._asdict())
    except (RuntimeError, ValueError, TypeError) as error:
        return f"its filters or routing do not fit ours ({str(error).splitlines()[0]})"
    if ours.shape != theirs.shape:
        if expected.plane[1] % 2 and _arguments(inverse, _FFT)["s"] is None:
            raise CopyLimitError("irfft2 without s returns even widths only")
        return f"it returns {tuple(theirs.shape)} where ours is {tuple(ours.shape)}"
    if relative_error(ours, theirs) <= AGREEMENT:
        return ""
    gain = ((ours * theirs).sum() / ours.square().sum()).item()
    if relative_error(gain * ours, theirs) <= AGREEMENT:
        return f"its output differs from ours by a factor, {gain:.4g} in the trial"
    H, W = expected.plane
    if expected.size not in ((H, W), (H, W ^ 1)):  # an even width and the next one have equally many frequencies
        return _other_resizing(traced, expected)
    after = [n for n in traced.graph.nodes if n in ancestors(inverse) and nodes[1] in ancestors(n)]
    calls = ", ".join(dict.fromkeys(name_of(n) for n in after if isinstance(traced.values.get(n), Tensor)))
    return f"its output differs from ours, a product of spectrum and mixed filters; its filters go through {calls}"


def _other_resizing(traced: Trace, expected: Expected) -> str:
    for node in traced.graph.nodes:
        if node.target is F.interpolate:
            given = _arguments(node, tuple(inspect.signature(F.interpolate).parameters))
            mode, corners = given["mode"] or "nearest", bool(given["align_corners"])
            return (
                f"it resizes its filters with mode={mode!r}, align_corners={corners}, "
                "where ours are 'bicubic' with align_corners=True, or 'fourier'"
            )
    return f"on a {_by(expected.plane)} plane it resizes its filters by another rule than ours"


def _arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    given: dict[str, Any] = dict.fromkeys(names)
    given.update(zip(names, node.args, strict=False))
    given.update(node.kwargs)
    return given


def _by(plane: tuple[int, ...]) -> str:
    return "x".join(map(str, plane))
