"""Argument checks of the operators: bad input raises at once, naming the argument, what was expected and what given."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfformer_kernels.reference import compute_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LOWER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_star_relu(x: Tensor, scale: Tensor, bias: Tensor) -> None:
    _check_x("star_relu", x)
    _check_scalars("star_relu", x, scale, bias)


def check_dynamic_filter(
    x: Tensor, logits: Tensor, basis: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> None:
    op = "dynamic_filter"
    B, H, W, C = _check_plane(op, x)
    K = W // 2 + 1
    routing = logits.shape
    if len(routing) != 3 or routing[0] != B or routing[1] < 1 or routing[2] != C:
        _fail(op, "logits", f"shape (B,F,C) = ({B}, F >= 1, {C}) for x of shape {_shape(x)}", _shape(logits))
    F = routing[1]
    _check_companion(op, "logits", x, logits)
    _check_spectral(op, "basis", x, basis, (H, K, F, 2), "(H,K,F,2), K = W//2 + 1,")
    _check_scalars(op, x, scale, bias)


def check_global_filter(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> None:
    B, H, W, C = _check_plane("global_filter", x)
    samples, batch = ((B,), "B,") if weight.dim() == 5 else ((), "")
    shape = (*samples, H, W // 2 + 1, C, 2)
    _check_spectral("global_filter", "weight", x, weight, shape, f"({batch}H,K,C,2), K = W//2 + 1,")
    _check_scalars("global_filter", x, scale, bias)


def check_mlp(x: Tensor, weight1: Tensor, scale: Tensor, bias: Tensor, weight2: Tensor) -> None:
    op = "mlp"
    _check_x(op, x)
    _check_matrix(op, "x", x, "weight1", weight1, x)
    _check_matrix(op, "weight1.T", weight1.t(), "weight2", weight2, x)
    _check_scalars(op, x, scale, bias)


def check_choice(op: str, name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        _fail(op, name, " or ".join(map(repr, choices)), repr(value))


def check_groups(op: str, logits: Tensor, basis: Tensor) -> None:
    """Checks a grouped basis (G,H,K,F,2), because groups are merged before the operator's own checks."""
    G, _, _, F, _ = basis.shape
    if G < 1:
        _fail(op, "basis", "G >= 1 groups of channels", f"shape {_shape(basis)}")
    if logits.dim() != 3 or logits.shape[1] != F or logits.shape[2] % G:
        expected = f"shape (B,F,C), F = {F}, C a multiple of G = {G} groups of the basis"
        _fail(op, "logits", expected, _shape(logits))


def check_channels_first(op: str, x: Tensor) -> None:
    if x.dim() != 4:
        _fail(op, "x", "shape (B,C,H,W) with H, W >= 1", _shape(x))


def check_tensors(op: str, **arguments: object) -> None:
    for name, argument in arguments.items():
        if not isinstance(argument, Tensor):
            _fail(op, name, "a tensor", type(argument).__name__, TypeError)


def check_pair(op: str, pair: object, expected: str = "a pair (scale, bias) of tensors") -> None:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        _fail(op, "star_relu", expected, type(pair).__name__, TypeError)


def check_backward(op: str, grad_y: Tensor, x: Tensor, needs: Sequence[bool], inputs: int) -> None:
    if grad_y.shape != x.shape:
        _fail(op, "grad_y", f"shape {_shape(x)}, that of x", _shape(grad_y))
    _check_companion(op, "grad_y", x, grad_y)
    if len(needs) != inputs:
        _fail(op, "needs", f"{inputs} flags, one for each input", list(needs))


def _check_x(op: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        _fail(op, "x", f"dtype {_names(DTYPES)}", _names([x.dtype]), TypeError)
    _check_layout(op, "x", x)


def _check_layout(op: str, name: str, t: Tensor) -> None:
    if not torch.compiler.is_compiling() and t.layout != torch.strided:  # Dynamo cannot ask for it in a backward
        _fail(op, name, "a strided tensor", f"a {t.layout} one", TypeError)


def _check_plane(op: str, x: Tensor) -> torch.Size:
    _check_x(op, x)
    shape = x.shape
    if len(shape) != 4 or shape[1] < 1 or shape[2] < 1:
        _fail(op, "x", "shape (B,H,W,C) with H, W >= 1", _shape(x))
    return shape


def _check_companion(op: str, name: str, x: Tensor, t: Tensor) -> None:
    """Checks a tensor whose dtype may differ from x's, except that float64 requires float64 ``x``."""
    _check_kind(op, name, x, t, DTYPES if x.dtype == torch.float64 else _LOWER_DTYPES)


def _check_matrix(op: str, name: str, factor: Tensor, weight_name: str, weight: Tensor, x: Tensor) -> None:
    """Checks a weight (N,K) for a factor (...,K), of x's dtype and device."""
    if factor.dim() < 1:
        _fail(op, name, "shape (...,K)", _shape(factor))
    _check_kind(op, weight_name, x, weight, (x.dtype,))
    if weight.dim() != 2 or weight.shape[1] != factor.shape[-1]:
        _fail(op, weight_name, f"shape (N, {factor.shape[-1]}) for {name} of shape {_shape(factor)}", _shape(weight))


def _check_spectral(op: str, name: str, x: Tensor, t: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if t.shape != shape:
        _fail(op, name, f"shape {meaning} = {shape} for x of shape {_shape(x)}", _shape(t))
    _check_kind(op, name, x, t, (compute_dtype(x.dtype),))


def _check_scalars(op: str, x: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    if (scale is None) != (bias is None):
        _fail(op, "star_relu", "both scale and bias, or neither", "one of them")
    for name, t in (("scale", scale), ("bias", bias)):
        if t is None:
            continue
        if t.numel() != 1:
            _fail(op, name, "one element", f"shape {_shape(t)}")
        _check_companion(op, name, x, t)


def _check_kind(op: str, name: str, x: Tensor, t: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if t.device != x.device:
        _fail(op, name, f"a tensor on {x.device}, where x is", f"one on {t.device}")
    if t.dtype not in dtypes:
        _fail(op, name, f"dtype {_names(dtypes)} beside {_names([x.dtype])} x", _names([t.dtype]), TypeError)
    _check_layout(op, name, t)


def _fail(op: str, name: str, expected: str, given: object, error: type[Exception] = ValueError) -> None:
    raise error(f"{op}: {name}: expected {expected}, got {given}")


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
