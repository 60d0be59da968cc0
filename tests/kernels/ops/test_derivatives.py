"""torch.func, forward mode and batched gradients over all operators, against plain torch in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import OPS, Case, Inputs, make_inputs
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from dfformer_kernels import convolution, linear, mlp
from dfformer_kernels.tolerance import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
Function = Callable[..., Tensor]
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Operator:
    """A public function of tensors, its definition in plain torch, and inputs whose every size differs."""

    run: Function
    definition: Function
    inputs: Tensors


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _of_tensors(function: Callable[[Inputs], Tensor], names: tuple[str, ...]) -> Function:
    return lambda *tensors: function(dict(zip(names, tensors, strict=True)))


def operators() -> Iterator[tuple[str, Operator]]:
    for name, op in OPS.items():
        inputs = make_inputs(op, Case(2, 3, 4, 5, F=6), torch.float64, requires_grad=False)
        run, definition = (_of_tensors(f, tuple(inputs)) for f in (op.public, op.reference))
        yield name, Operator(run, definition, tuple(inputs.values()))
    scalars = (torch.tensor([0.9], dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))
    yield "linear", Operator(linear, F.linear, (normal(2, 3), normal(4, 3), normal(4)))
    yield (
        "mlp",
        Operator(
            lambda x, w1, s, b, w2: mlp(x, w1, (s, b), w2),
            lambda x, w1, s, b, w2: (s * (x @ w1.mT).relu().square() + b) @ w2.mT,
            (normal(2, 3), normal(5, 3), *scalars, normal(4, 5)),
        ),
    )
    yield "convolution", Operator(convolution, F.conv2d, (normal(2, 3, 4, 5), normal(6, 3, 2, 2), normal(6)))


OPERATORS = dict(operators())
ALL_OPERATORS = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def loss(f: Function) -> Function:
    return lambda *inputs: f(*inputs).square().sum()


def vmapped(f: Function, inputs: Tensors) -> list[Tensor]:
    """Over each argument in turn, and over all of them."""
    batched = tuple(torch.stack([t, 0.5 * t, t + 1]) for t in inputs)
    choices = [[i == argument for i in range(len(inputs))] for argument in range(len(inputs))]
    return [
        torch.func.vmap(f, tuple(0 if c else None for c in chosen))(
            *(b if c else t for b, t, c in zip(batched, inputs, chosen, strict=True))
        )
        for chosen in [*choices, [True] * len(inputs)]
    ]


def dual(f: Function, inputs: Tensors) -> Tensor:
    with forward_ad.dual_level():
        y = f(*(forward_ad.make_dual(t, t.cos()) for t in inputs))
        return forward_ad.unpack_dual(y).tangent


def batched_gradients(f: Function, inputs: Tensors) -> Tensors:
    leaves = tuple(t.clone().requires_grad_() for t in inputs)
    y = f(*leaves)
    gradients = torch.autograd.grad(y, leaves, normal(3, *y.shape), is_grads_batched=True)
    assert not any(g.requires_grad for g in gradients)
    return gradients


class Module(nn.Module):
    """The function of its parameters."""

    def __init__(self, f: Function, parameters: Tensors) -> None:
        super().__init__()
        self.f = f
        self.weights = nn.ParameterList([nn.Parameter(p) for p in parameters])

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, *self.weights)


def functional_call(f: Function, inputs: Tensors) -> Tensors:
    """The gradients of a module's parameters, for each of three batches."""
    module = Module(f, inputs[1:])

    def of_batch(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(of_batch), (None, 0))
    x = inputs[0]
    return tuple(gradients(dict(module.named_parameters()), torch.stack([x, x.sin(), x.cos()])).values())


TRANSFORMS: dict[str, Callable[[Function, Tensors], Any]] = {
    "vmap": vmapped,
    "jvp": lambda f, inputs: torch.func.jvp(f, inputs, tuple(t.cos() for t in inputs)),
    "grad": lambda f, inputs: torch.func.grad(loss(f), tuple(range(len(inputs))))(*inputs),
    "jacrev": lambda f, inputs: torch.func.jacrev(f, tuple(range(len(inputs))))(*inputs),
    "jacfwd": lambda f, inputs: torch.func.jacfwd(f, tuple(range(len(inputs))))(*inputs),
    "hessian": lambda f, inputs: torch.func.hessian(loss(f), (0, 1))(*inputs),
    "functional_call": functional_call,
    "forward_ad": dual,
    "batched_gradients": batched_gradients,
}
ALL_TRANSFORMS = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


def assert_same(actual: Any, wanted: Any) -> None:
    actual, wanted = (torch.utils._pytree.tree_leaves(results) for results in (actual, wanted))
    assert len(actual) == len(wanted)
    assert max(relative_error(a, w) for a, w in zip(actual, wanted, strict=True)) <= 1e-12


@ALL_TRANSFORMS
@ALL_OPERATORS
def test_transforms_equal_those_of_the_definition(
    operator: Operator, transform: Callable[[Function, Tensors], Any]
) -> None:
    assert_same(transform(operator.run, operator.inputs), transform(operator.definition, operator.inputs))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_transform() -> None:
    """Dynamo traces into a transform. It would put in an operator that loses tangents."""
    operator, transform = OPERATORS["dynamic_filter+star_relu"], TRANSFORMS["jvp"]
    compiled = torch.compile(lambda *inputs: transform(operator.run, inputs), backend="aot_eager")
    assert_same(compiled(*operator.inputs), transform(operator.definition, operator.inputs))


@pytest.mark.parametrize("name", ["dynamic_filter+star_relu", "global_filter", "mlp", "convolution"])
def test_gradcheck_of_batched_gradients(name: str) -> None:
    operator = OPERATORS[name]
    leaves = tuple(t.clone().requires_grad_() for t in operator.inputs)
    assert torch.autograd.gradcheck(operator.run, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(operator.run, leaves, check_batched_grad=True, fast_mode=True)


DIRECT: dict[str, tuple[str, tuple[Any, ...]]] = {
    **{name: (op.name, (None,) * (len(op.names) - len(op.parameters) - len(op.scalars))) for name, op in OPS.items()},
    "convolution": ("convolution", ([1, 1], [0, 0], 1)),
}


@pytest.mark.parametrize("name", DIRECT)
def test_an_operator_without_a_forward_derivative_says_so(name: str) -> None:
    """Called through torch.ops: the public functions have one."""
    op_name, others = DIRECT[name]
    inputs = OPERATORS[name].inputs
    if name == "convolution":
        inputs = (inputs[0].permute(0, 2, 3, 1), *inputs[1:])
    with forward_ad.dual_level():
        x = forward_ad.make_dual(inputs[0], inputs[0])
        with pytest.raises(NotImplementedError, match=rf"torch.ops.dfformer.{op_name} has no forward-mode derivative"):
            getattr(torch.ops.dfformer, op_name)(x, *inputs[1:], *others)
