"""What the nodes of a graph compute: one name for each of torch's functions and methods and ATen's operators."""

import inspect
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

# These are linear in each tensor argument, so with sums and products they only compute polynomials of their inputs.
_VIEWS = """view reshape _unsafe_view permute transpose t T mT movedim moveaxis swapaxes swapdims flatten unflatten
    unsqueeze squeeze expand expand_as view_as broadcast_to contiguous clone alias select slice narrow stack cat
    rearrange real imag complex view_as_complex view_as_real"""
VIEWS = {*_VIEWS.split()}
CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "cfloat", "_to_copy", "convert_element_type"}
_PRODUCTS = "einsum matmul bmm mm tensordot sum"
_COMPLEX_TRANSFORMS = "fft fft2 fftn ifft ifft2 ifftn _fft_c2c"
_LINEAR = {*VIEWS, *CASTS, *_PRODUCTS.split(), *_COMPLEX_TRANSFORMS.split()}
# Sums and products that write into their first argument.
IN_PLACE = {"imul", "mul_", "iadd", "add_", "isub", "sub_"}
_ARITHMETIC = {"mul", "multiply", "add", "sub", *IN_PLACE}
# The results of these never share memory with an input. Other operators may return views.
_LAYERS = """linear addmm baddbmm conv1d conv2d convolution mean amax amin adaptive_avg_pool2d adaptive_max_pool2d
    softmax batch_norm layer_norm group_norm native_layer_norm _native_batch_norm_legit_functional"""
FRESH = {*_LAYERS.split(), *_PRODUCTS.split()}

VALUES = ("val", "example_value")  # where export and Dynamo keep a node's value; our own traces do as export
_WIDE_METHODS = {"float": "double", "half": "double", "bfloat16": "double", "cfloat": "cdouble"}


class Transform(NamedTuple):
    """A discrete Fourier transform.

    ``kind`` is "r2c", "c2c" or "c2r", and ``norm`` is torch's name. ``resizes`` tells whether the call gives a size.
    """

    kind: str
    inverse: bool
    axes: tuple[int, ...]
    resizes: bool
    norm: str


def name_of(node: fx.Node) -> str:
    """The name in torch of what a node calls: "mul" for ``*``, `torch.mul`, ``.mul()`` and ``aten.mul.Tensor``.

    Names of functions outside torch are prefixed with their module's name.
    """
    target: Any = node.target
    if node.op != "call_function":
        return str(target)
    if target is getattr:
        return str(node.args[1])
    packet = getattr(target, "overloadpacket", target)
    name = str(getattr(packet, "__name__", packet))
    origin = str(getattr(target, "namespace", getattr(target, "__module__", None)))
    known = origin.split(".")[0] in ("None", "torch", "aten", "prims", "_operator", "einops", "builtins")
    return name.removeprefix("fft_") if known else f"{origin}.{name}"


def is_linear(node: fx.Node) -> bool:
    """Whether a node is linear in each of its tensors, or adds or multiplies a number."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_of(node)
    if name in _ARITHMETIC:
        tensors = [a for a in node.args if not isinstance(a, int | float | complex)]
        return not node.kwargs and all(map(is_tensor, tensors))
    if name == "getitem":
        return is_tensor(node.args[0])
    return name in _LINEAR


def is_mutating(node: fx.Node) -> bool:
    """Whether a node is known to write into a tensor."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_of(node)
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    given = _named_arguments(node)
    inplace = given.get("inplace", False) is not False or "out" in given
    operators = ("iadd", "imul", "isub", "itruediv", "ifloordiv", "ipow", "imatmul", "setitem")
    return inplace or name.strip("_") in operators or (name.endswith("_") and not name.endswith("__"))


def _named_arguments(node: fx.Node) -> Mapping[str, Any]:
    """The arguments of a call by name; positional ones are included if the function's signature is known."""
    if isinstance(node.target, str | types.BuiltinFunctionType):  # has no signature, which takes long to find out
        return node.kwargs
    try:
        return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):
        return node.kwargs


def softmax_axis(node: fx.Node) -> int | None:
    """The axis of a softmax; None if the node is none, or does not give it as a number."""
    if node.op not in ("call_function", "call_method") or name_of(node) not in ("softmax", "_softmax"):
        return None
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return dim if type(dim) is int else None


def transform_of(node: fx.Node) -> Transform | None:
    """The transform that a node computes, with axes counted from the front; None if it computes no transform."""
    name = name_of(node)
    stem = name.rstrip("2n")
    is_aten = name in ("_fft_r2c", "_fft_c2r", "_fft_c2c")
    if node.op != "call_function" or not (is_aten or stem in ("rfft", "irfft", "fft", "ifft")):
        return None
    given = node.normalized_arguments(nn.Module(), normalize_to_only_use_kwargs=True)
    if given is None or "out" in given.kwargs or not is_tensor(given.kwargs["input"]):
        return None
    return (_aten_transform if is_aten else _torch_transform)(name, **given.kwargs)


def _torch_transform(name: str, input: fx.Node, dim: Any, norm: str | None, s: Any = None, n: Any = None) -> Transform:
    inverse = name.startswith("i")
    kind = "c2c" if "r" not in name else "c2r" if inverse else "r2c"
    resizes = s is not None or n is not None
    return Transform(kind, inverse, _from_front(input, dim), resizes, norm or "backward")


def _aten_transform(
    name: str, input: fx.Node, dim: Any, normalization: int, forward: bool = True, onesided: bool = True, **size: Any
) -> Transform | None:
    kind = name.removeprefix("_fft_")
    inverse = kind == "c2r" or not forward
    # 0 does not scale, 1 scales by the root of the length and 2 by the length.
    norm = "ortho" if normalization == 1 else "backward" if (normalization == 2) is inverse else "forward"
    return Transform(kind, inverse, _from_front(input, dim), kind == "c2r", norm) if onesided else None


def _from_front(input: fx.Node, axes: Any) -> tuple[int, ...]:
    rank = len(shape_of(input))
    if axes is None:
        return tuple(range(rank))
    return tuple(axis % rank for axis in ([axes] if isinstance(axes, int) else axes))


def first_input(node: fx.Node) -> Any:
    """A node's first argument, by position or by name."""
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))


def value_of(node: fx.Node) -> Any:
    """What is known of a node's value: a real or fake tensor, or a number, which may be symbolic."""
    return next((node.meta[key] for key in VALUES if key in node.meta), None)


def is_tensor(argument: Any) -> bool:
    """Whether an argument of a node is a node whose value is known to be a tensor."""
    return isinstance(argument, fx.Node) and isinstance(value_of(argument), Tensor)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's value; symbolic sizes are those of the example that the graph was made with."""
    value = value_of(node)
    return example(tuple(value.shape)) if isinstance(value, Tensor) else ()


def example(value: Any) -> Any:
    """The value of a symbolic number in the example that the graph was made with. Adds no guard.

    Raises ValueError if the number depends on data, as the count of non-zero elements does.
    """
    if isinstance(value, tuple | list):
        return tuple(example(v) for v in value)
    if not isinstance(value, torch.SymInt):
        return value
    hint = value.node.hint
    if hint is None:
        raise ValueError("its shapes depend on data")
    return int(hint)


def evaluate(node: fx.Node, computed: Mapping[fx.Node, Any]) -> Any:
    """The value of a node in double precision on the CPU, even if the graph asks for another dtype or device."""

    def of_node(argument: fx.Node) -> Any:
        return computed[argument] if argument in computed else example(value_of(argument))

    args, kwargs = fx.node.map_aggregate(fx.map_arg((node.args, dict(node.kwargs)), of_node), _widened)
    if node.op == "call_method":
        method = _WIDE_METHODS.get(str(node.target), str(node.target))
        return getattr(args[0], method)(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _widened(argument: Any) -> Any:
    if isinstance(argument, torch.device):
        return torch.device("cpu")
    is_number = isinstance(argument, torch.dtype) and (argument.is_floating_point or argument.is_complex)
    return torch.promote_types(argument, torch.float64) if is_number else argument
