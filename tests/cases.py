"""What the operator tests run over, as data: operators, problem shapes, dtypes and memory layouts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dfformer_kernels
from dfformer_kernels import reference
from dfformer_kernels.dispatch import TABLE, Backend
from dfformer_kernels.ops import filter as ops
from dfformer_kernels.tolerance import BOUND, relative_error

Inputs = dict[str, Tensor]  # by argument name, in schema order; an absent optional argument is not in it


@dataclass(frozen=True)
class Op:
    """One operator with or without StarReLU on load, callable through each of its entry points."""

    name: str
    parameters: tuple[str, ...]  # its tensor arguments after x
    scalars: tuple[str, ...] = ()  # scale and bias where StarReLU is part of it
    function: Any = None  # the autograd Function of ops.py
    optional_scalars: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        return ("x", *self.parameters, "scale", "bias")

    def public(self, inputs: Inputs, backend: str | None = None, **options: Any) -> Tensor:
        """Through the package's public function."""
        if not self.optional_scalars:
            return getattr(dfformer_kernels, self.name)(*self.schema_order(inputs), backend=backend, **options)
        tensors = [inputs[name] for name in ("x", *self.parameters)]
        pair = (inputs.get("scale"), inputs.get("bias"))
        star_relu = pair if any(t is not None for t in pair) else None  # older Dynamos cannot compare tensors
        return getattr(dfformer_kernels, self.name)(*tensors, star_relu=star_relu, backend=backend, **options)

    def apply(self, inputs: Inputs, backend: str | None = None) -> Tensor:
        """Through the autograd Function."""
        return self.function.apply(*self.schema_order(inputs), backend)

    def custom_op(self, inputs: Inputs, backend: str | None = None) -> Tensor:
        """Through ``torch.ops``."""
        return getattr(torch.ops.dfformer, self.name)(*self.schema_order(inputs), backend)

    def backward(
        self, grad_y: Tensor, inputs: Inputs, needs: Sequence[bool] | None = None, backend: str | None = None
    ) -> list[Tensor]:
        """The registered backward operator; by default every gradient there is."""
        needs = [name in inputs for name in self.names] if needs is None else list(needs)
        backward = getattr(torch.ops.dfformer, f"{self.name}_backward")
        return backward(grad_y, *self.schema_order(inputs), needs, backend)

    def reference(self, inputs: Inputs) -> Tensor:
        return getattr(reference, self.name)(*self.schema_order(inputs))

    def schema_order(self, inputs: Inputs) -> list[Tensor | None]:
        return [inputs.get(name) for name in self.names]


SCALARS = ("scale", "bias")
DYNAMIC = ("dynamic_filter", ("logits", "basis"))
GLOBAL = ("global_filter", ("weight",))
OPS = {
    "star_relu": Op("star_relu", (), SCALARS, ops.StarReLUFunction, optional_scalars=False),
    "dynamic_filter": Op(*DYNAMIC, (), ops.DynamicFilterFunction),
    "dynamic_filter+star_relu": Op(*DYNAMIC, SCALARS, ops.DynamicFilterFunction),
    "global_filter": Op(*GLOBAL, (), ops.GlobalFilterFunction),
    "global_filter+star_relu": Op(*GLOBAL, SCALARS, ops.GlobalFilterFunction),
}

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """An operator on a backend on a device."""

    op_name: str
    backend: str
    device: str

    @property
    def op(self) -> Op:
        return OPS[self.op_name]

    def __str__(self) -> str:
        suffix = "" if self.device == "cpu" else f"-{self.device}"
        return f"{self.op_name}-{self.backend}{suffix}"


TARGETS = [
    Target(op_name, backend.name, device)
    for op_name, op in OPS.items()
    for backend in TABLE
    for device in ("cpu", "cuda")
    if op.name in backend.kernels and backend.device in (None, device)
]


@dataclass(frozen=True)
class Case:
    """A problem shape."""

    B: int
    H: int
    W: int
    C: int
    F: int = 4

    def __str__(self) -> str:
        return f"B{self.B}-{self.H}x{self.W}-C{self.C}-F{self.F}"


CASES = [
    # the planes of the models' four stages
    Case(2, 7, 7, 16),
    Case(2, 14, 14, 8),
    Case(2, 28, 28, 4),
    Case(1, 56, 56, 3),
    # powers of two, as larger images and dense prediction give them
    Case(2, 64, 64, 3),
    Case(1, 128, 128, 1),
    # odd and prime sides: no column k = W/2, and no small factor to split the transform by
    Case(2, 9, 15, 5),
    Case(2, 13, 13, 3),
    Case(1, 31, 31, 2),
    # rectangles, either way round, even beside odd
    Case(2, 6, 10, 7),
    Case(2, 12, 5, 3),
    Case(1, 5, 12, 3),
    # one row or one column: one of the two transforms is the identity
    Case(2, 1, 12, 3),
    Case(2, 1, 7, 3),
    Case(2, 12, 1, 3),
    # the smallest planes: K = 1 and a single column with D = 1; K = 2 with no column that counts twice
    Case(3, 1, 1, 5),
    Case(2, 2, 2, 3),
    # channels that leave SIMD lanes empty: a single one, fewer than any register has, one more than a register has
    Case(2, 8, 8, 1),
    Case(1, 8, 6, 17),
    Case(1, 4, 4, 65),
    # filters: softmax over one is constant 1; none of 1, 2 and 5 is the usual 4
    Case(2, 8, 8, 3, F=1),
    Case(2, 8, 8, 3, F=2),
    Case(2, 7, 8, 3, F=5),
]
EMPTY_CASES = [Case(0, 4, 6, 3), Case(2, 4, 6, 0)]
SMALL = Case(2, 4, 6, 3)


def make_inputs(
    op: Op,
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    parameter_dtype: torch.dtype | None = None,
    requires_grad: bool = True,
) -> Inputs:
    """Inputs of ``op`` with x of ``dtype``, and logits, scale and bias of ``parameter_dtype`` (dtype if not given).

    Outputs are of order one, so that float16 stays clear of its subnormals.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    K = case.W // 2 + 1
    spectral = reference.compute_dtype(dtype)
    parameter_dtype = parameter_dtype or dtype
    recipes: dict[str, tuple[Callable[[], Tensor], torch.dtype]] = {
        "x": (lambda: normal(case.B, case.H, case.W, case.C), dtype),
        # far from saturation: the gradient of a softmax near one is the difference of two large numbers, whose rounding
        # in float32 is more than a bound for transforms allows
        "logits": (lambda: 0.5 * normal(case.B, case.F, case.C), parameter_dtype),
        "basis": (lambda: 0.7 * normal(case.H, K, case.F, 2), spectral),
        # real parts around one: the sum of an output, bias' gradient, is its zero frequency alone and must not be small
        "weight": (lambda: 0.7 * normal(case.H, K, case.C, 2) + torch.tensor([1.0, 0.0]), spectral),
        # one element each, in the two shapes that models keep them in
        "scale": (lambda: torch.tensor([0.9]), parameter_dtype),
        "bias": (lambda: torch.tensor(0.3), parameter_dtype),
    }
    inputs = {}
    for name in ("x", *op.parameters, *op.scalars):
        make, stored_as = recipes[name]
        inputs[name] = make().to(device, stored_as).requires_grad_(requires_grad)
    return inputs


def make_grad(op: Op, inputs: Inputs) -> Tensor:
    """A gradient that leans towards the result, as a loss's does.

    Independent of it, the sums over pixels that make up a parameter's gradient would cancel, and relative errors would
    tell how unlucky the numbers are.
    """
    with torch.no_grad():
        y = op.reference(inputs)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (y + 0.5 * noise.to(y.device)).to(y.dtype)


def gradients(y: Tensor, inputs: Inputs, grad_y: Tensor) -> Inputs:
    """Of every input that requires one, by name."""
    wanted = {name: t for name, t in inputs.items() if t.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad_y), strict=True))


def expected(op: Op, inputs: Inputs, grad_y: Tensor) -> tuple[Tensor, Inputs]:
    """Result and gradients of the same inputs in float64, by autograd through the reference."""
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in inputs.items()}
    y = op.reference(exact)
    return y.detach(), gradients(y, exact, grad_y.double())


def assert_within_bound(name: str, actual: Tensor, wanted: Tensor) -> None:
    """The bound is that of the dtype ``actual`` is stored in."""
    error = relative_error(actual, wanted)
    assert error <= BOUND[actual.dtype], f"{name}: relative error {error:.2e}, allowed {BOUND[actual.dtype]:.2e}"


def assert_all_within_bound(y: Tensor, actual: Inputs, wanted: tuple[Tensor, Inputs]) -> None:
    wanted_y, wanted_gradients = wanted
    assert_within_bound("y", y, wanted_y)
    assert actual.keys() == wanted_gradients.keys()
    for name, gradient in actual.items():
        assert_within_bound(f"grad_{name}", gradient, wanted_gradients[name])


def assert_same_bits(actual: tuple[Tensor, Inputs], wanted: tuple[Tensor, Inputs]) -> None:
    assert torch.equal(actual[0], wanted[0])
    assert actual[1].keys() == wanted[1].keys()
    for name, gradient in actual[1].items():
        assert torch.equal(gradient, wanted[1][name]), name


def _sliced(t: Tensor) -> Tensor:
    """Every second element of a larger tensor that holds NaN in between."""
    larger = t.new_full((*t.shape, 2), float("nan"))
    larger[..., 0] = t.detach()
    return larger[..., 0]


def _channels_first(t: Tensor) -> Tensor:
    return t.detach().movedim(-1, 1).contiguous().movedim(1, -1)


# The same shape and (but for `expanded`) values, in memory that is not contiguous.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_first": _channels_first,
    "sliced": _sliced,
    "transposed_plane": lambda t: t.detach().transpose(1, 2).contiguous().transpose(1, 2),
    "expanded_batch": lambda t: t.detach()[:1].expand_as(t),
    "expanded_all": lambda t: t.detach().flatten()[0].expand_as(t),
    # memory holds the negative and a flag says so, as in the imaginary part of a conjugate
    "negated": lambda t: torch._neg_view(-t.detach()),
}


class Operators(TorchDispatchMode):
    """The names of the operators that run inside, with their namespaces."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **kwargs or {})


@contextmanager
def saved_for_backward() -> Iterator[list[Tensor]]:
    """The tensors that autograd saves inside, in a list that grows."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield saved


def counting(name: str, calls: list[str], device: str | None = None, reasons: tuple[str, ...] = ()) -> Backend:
    """The reference, telling ``calls`` when it runs."""

    def counted(op: str) -> Callable[..., Tensor | list[Tensor]]:
        def kernel(*args: object) -> Tensor | list[Tensor]:
            calls.append(f"{name} {op}")
            return TABLE[-1].kernels[op](*args)

        return kernel

    return Backend(name, device, {op: counted(op) for op in TABLE[-1].kernels}, lambda: list(reasons))
