"""Resizing spectral filters to another plane: two rules, each two small matrix products along H and K.

A stored filter is (H, K, ...), ``K = W//2 + 1``: rows in FFT order (frequencies 0, 1, .., then the negative ones), and
the non-negative half of the columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

RULES = ("bicubic", "fourier")

# The matrices are the same for all layers of a stage and from step to step. A full cache is emptied: a training run
# with random crops sees a few hundred sizes.
_MAX_CACHED = 256
_cached: dict[tuple[object, ...], Tensor] = {}


def resize_filter(weight: Tensor, size: tuple[int, int], new_size: tuple[int, int], rule: str = "bicubic") -> Tensor:
    """Resizes filters stored for planes of ``size`` (H, W) to ``new_size``. Differentiable and deterministic.

    Args:
        weight: (H, W//2 + 1, ...), any trailing dimensions.
        size, new_size: the planes, in pixels.
        rule: one of

            ``"bicubic"``: the authors' rule (``resize_complex_weight``). The array is treated as an image and resized
            with ``align_corners=True``. The filter keeps its shape over the range of frequencies in *cycles per pixel*.
            Official checkpoints are adapted by this rule. It is right if objects keep their size in pixels, e.g. when
            training on crops and testing on larger or wider images. It ignores that rows wrap around, so the two sides
            of the highest frequency along H are blended.

            ``"fourier"``: the array is treated as a spectrum. Frequencies in *cycles per image* keep their gain, rows
            wrap around, new frequencies get gain 0 and lost ones are dropped. It is right if the same scene is sampled
            more finely or coarsely: it filters a band-limited image exactly as before. Enlarging removes all detail
            above the stored band, so fine-tune after a large step.

    Returns:
        (new_H, new_W//2 + 1, ...), in weight's dtype.

    Raises:
        ValueError: the rule is unknown, or ``size`` is not the weight's.
    """
    check_rule(rule)
    (H, W), (new_H, new_W) = size, new_size
    if tuple(weight.shape[:2]) != (H, W // 2 + 1):
        raise ValueError(f"size: got {(H, W)}, but weight of shape {tuple(weight.shape)} is not (H, W//2 + 1, ...)")
    values = weight if weight.dtype == torch.float64 else weight.float()
    rows = _cached_matrix(rule, "H", H, new_H, values)
    columns = _cached_matrix(rule, "K", W // 2 + 1, new_W // 2 + 1, values)
    return _along_H_and_K(values, rows, columns).to(weight.dtype)


def scriptable_resize(weight: Tensor, size: tuple[int, int], new_size: tuple[int, int], rule: str) -> Tensor:
    """`resize_filter` for torch.jit.script: checks nothing, and computes its matrices at every call."""
    values = weight if weight.dtype == torch.float64 else weight.float()
    rows = _matrix(rule, "H", size[0], new_size[0])
    columns = _matrix(rule, "K", size[1] // 2 + 1, new_size[1] // 2 + 1)
    return _along_H_and_K(values, rows.to(values), columns.to(values)).to(weight.dtype)


def _along_H_and_K(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:  # noqa: N802 (the dimensions' names)
    resized = (rows @ values.flatten(1)).unflatten(1, (values.shape[1], -1))
    return (columns @ resized).unflatten(2, values.shape[2:])


def check_rule(rule: str) -> None:
    """Raises ValueError for an unknown rule."""
    if rule not in RULES:
        raise ValueError(f"resize: got {rule!r}, accepted are {', '.join(map(repr, RULES))}")


def _cached_matrix(rule: str, axis: str, old: int, new: int, like: Tensor) -> Tensor:
    """`_matrix` on like's device and in its dtype."""
    device, dtype = like.device, like.dtype
    if torch.compiler.is_compiling() or type(like) not in (Tensor, Parameter):  # traced, or a fake tensor
        return _matrix(rule, axis, old, new).to(device, dtype)
    key = (rule, axis, old, new, device, dtype)
    if key not in _cached:
        if len(_cached) >= _MAX_CACHED:
            _cached.clear()
        with torch.inference_mode(False), _untraced():  # cached matrices must also work in training
            _cached[key] = _matrix(rule, axis, old, new).to(device, dtype)
    return _cached[key]


@contextmanager
def _untraced() -> Iterator[None]:
    """Keeps the code inside out of a graph that torch.jit.trace may be recording, because the result is cached."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined] # absent from torch's stubs
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def _matrix(rule: str, axis: str, old: int, new: int) -> Tensor:
    """The matrix (new, old), float64, on the CPU, that resizes the axis "H" or "K" of a filter."""
    if rule == "bicubic":  # separable, so the matrix is what becomes of the identity's columns
        identity = torch.eye(old, dtype=torch.float64, device="cpu")
        return F.interpolate(identity[None, None], [new, old], mode="bicubic", align_corners=True)[0, 0]
    if axis == "K":  # the first min(old, new) frequencies keep their gain, the others get gain 0
        return torch.eye(new, old, dtype=torch.float64, device="cpu")
    # Frequencies keep their gain; the highest of an even plane counts for both signs.
    return _folded_frequencies(new, old) if new < old else _folded_frequencies(old, new).sign().T


def _folded_frequencies(small: int, large: int) -> Tensor:
    """(small, large): frequencies of the small plane; its highest, if shared by both signs, is their average."""
    signed = torch.arange(large, device="cpu")
    signed = torch.where(signed > large // 2, signed - large, signed)  # an even large's highest counts as positive
    index = torch.arange(small, device="cpu")[:, None]
    taken = ((signed % small) == index) & (2 * signed.abs() <= small)
    weight = taken.to(torch.float64)
    return weight / weight.sum(1, keepdim=True)
