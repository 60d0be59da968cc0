"""What torch's flop counter makes of the operators: counts by hand, and those of eager operations."""

import itertools
import math
from collections.abc import Callable

import pytest
import timm
import torch
from providers import op as op_providers
from providers.op import BOTH, FORWARD
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from dfformer.utils.eager_baseline import eager_baseline
from dfformer_kernels import dynamic_filter, global_filter, linear, mlp, reference

B, H, W, C = SHAPE = (2, 6, 4, 3)
TRANSFORM = B * C * 2.5 * H * W * math.log2(H * W)
FREQUENCIES = B * C * H * (W // 2 + 1)  # kept, times channels
Step = Callable[..., Tensor]


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, device="meta")


def count(step: Step, inputs: list[Tensor], needs: tuple[bool, ...] = ()) -> int:
    """Flops of a step, and of the gradients of the inputs that are needed."""
    for t, need in zip(inputs, needs, strict=False):
        t.requires_grad_(need)
    with FlopCounterMode(display=False) as counter:
        y = step(*inputs)
        if any(needs):
            y.backward(torch.ones_like(y))
    return counter.get_total_flops()


def subsets(inputs: int) -> list[tuple[bool, ...]]:
    return [needs for needs in itertools.product((False, True), repeat=inputs) if any(needs)]


def test_every_operator_has_a_formula() -> None:
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("dfformer::")}
    assert {getattr(torch.ops.dfformer, name.partition(".")[0]) for name in names} <= flop_registry.keys()


@pytest.mark.parametrize("op", op_providers.OPS)
def test_filters_count_as_the_benchmark_does(op: str) -> None:
    steps: dict[str, tuple[Step, list[Tensor]]] = {
        "dynamic_filter": (
            dynamic_filter,
            [rand(*SHAPE), rand(B, op_providers.F, C), rand(H, W // 2 + 1, op_providers.F, 2)],
        ),
        "global_filter": (global_filter, [rand(*SHAPE), rand(H, W // 2 + 1, C, 2)]),
    }
    step, inputs = steps[op]
    assert count(step, inputs) == op_providers.flops(op, SHAPE, FORWARD)
    assert count(step, inputs, (True,) * len(inputs)) == pytest.approx(op_providers.flops(op, SHAPE, BOTH), abs=1)


# Transforms beside the forward's 2, and flops a frequency beside its 6 + 4 F, for gradients of x, logits, basis; F is 5
NEEDS: dict[tuple[bool, ...], tuple[int, int]] = {
    (True, False, False): (2, 4 * 5 + 6),
    (False, True, False): (2, 8 + 4 * 5),
    (False, False, True): (2, 8 + 4 * 5),
    (False, True, True): (2, 8 + 8 * 5),
    (True, False, True): (3, 4 * 5 + 6 + 8 + 4 * 5),
}


@pytest.mark.parametrize("needs", NEEDS)
def test_only_gradients_that_are_needed_count(needs: tuple[bool, ...]) -> None:
    transforms, spectral = NEEDS[needs]
    inputs = [rand(*SHAPE), rand(B, 5, C), rand(H, W // 2 + 1, 5, 2)]
    expected = (2 + transforms) * TRANSFORM + (6 + 4 * 5 + spectral) * FREQUENCIES
    assert count(dynamic_filter, inputs, needs) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("needs", subsets(5), ids=str)
def test_mlp_counts_as_its_products_do(needs: tuple[bool, ...]) -> None:
    def eager(x: Tensor, weight1: Tensor, scale: Tensor, bias: Tensor, weight2: Tensor) -> Tensor:
        return F.linear(reference.star_relu(F.linear(x, weight1), scale, bias), weight2)

    def fused(x: Tensor, weight1: Tensor, scale: Tensor, bias: Tensor, weight2: Tensor) -> Tensor:
        return mlp(x, weight1, (scale, bias), weight2)

    inputs = [rand(7, 3), rand(11, 3), rand(1), rand(1), rand(5, 11)]
    assert count(fused, inputs, needs) == count(eager, inputs, needs)


@pytest.mark.parametrize("needs", subsets(3), ids=str)
def test_linear_counts_as_torch_does(needs: tuple[bool, ...]) -> None:
    inputs = [torch.rand(2, 7, 3), torch.rand(5, 3), torch.rand(5)]
    assert count(linear, inputs, needs) == count(F.linear, inputs, needs)


@pytest.mark.parametrize("name", ["dfformer_s18", "cdfformer_s18", "gfformer_s18"])
@pytest.mark.parametrize("training", [False, True])
def test_models_count_as_the_eager_baseline(name: str, training: bool) -> None:
    """But for the filters, of which torch counts no transforms."""
    with torch.device("meta"):
        model, images = timm.create_model(name).train(training), rand(1, 3, 224, 224)

    def run(model: nn.Module) -> dict[str, int]:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            y = model(images)
            if training:
                y.backward(torch.ones_like(y))
        by_operator = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        return {"all": counter.get_total_flops(), "filters": sum(n for op, n in by_operator.items() if "filter" in op),
                "bmm": by_operator.get("aten.bmm", 0)}  # fmt: skip

    ours, eager = run(model), run(eager_baseline(model))
    assert ours["bmm"] == eager["filters"] == 0
    assert ours["filters"] > 0
    assert ours["all"] - ours["filters"] == eager["all"] - eager["bmm"]
