"""Range checks of the compiled core's functions: nothing wrong reaches memory, and the message names the argument."""

from types import ModuleType
from typing import Any

import pytest
import torch

# The filter step. The buffer is as large as the good problem needs.

BUFFER = torch.zeros(16, dtype=torch.float64)
INPUTS = ("x", "logits", "filters")
GOOD_PROBLEM = {"shape": (1, 1, 1, 1, 1), "dtype": 0, "star_relu": None, "form": (True, False, False), "threads": 1}
GOOD: dict[str, dict[str, Any]] = {
    "forward": GOOD_PROBLEM | dict.fromkeys((*INPUTS, "y"), BUFFER.data_ptr()),
    "backward": GOOD_PROBLEM | dict.fromkeys((*INPUTS, "grad_y", "grad_x"), BUFFER.data_ptr()),
}
HUGE = 2**63 - 1
BAD_SHAPES = [
    *(tuple(size if i == place else 1 for i in range(5)) for place in range(4) for size in (0, -1, HUGE, -HUGE)),
    (1, 1, 1, 1, -1),
    (1, 1, 1, 1, HUGE),
    (1, 2**15 + 1, 1, 1, 1),
    (1, 1, 2**15 + 1, 1, 1),
    # each size is possible, the product of them is not
    (2**20, 2**15, 2**15, 2**10, 1),
    (2**31, 1, 1, 2**31, 1),
    (2**31, 1, 1, 1, 2**31),
    (1, 2**15, 2**15, 1, 2**31),
]
BAD_CODES_AND_THREADS: list[tuple[dict[str, Any], str]] = [
    *(({"dtype": code}, f"dtype: expected code 0 to 3, got {code}") for code in (4, -1)),
    *(({"threads": threads}, f"threads: expected 1 to 4096, got {threads}") for threads in (0, -1, 4097)),
]
BAD_PROBLEMS = [
    *BAD_CODES_AND_THREADS,
    *(({"shape": shape}, "shape: ") for shape in BAD_SHAPES),
]


@pytest.mark.parametrize("function", ["filter", "filter_workspace"])
@pytest.mark.parametrize("step", GOOD)
@pytest.mark.parametrize(("bad", "message"), BAD_PROBLEMS, ids=lambda v: str(v).replace(str(HUGE), "huge"))
def test_bad_problems_raise_naming_the_argument(
    core: ModuleType, function: str, step: str, bad: dict[str, Any], message: str
) -> None:
    getattr(core, function)(**GOOD[step])
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(core, function)(**GOOD[step] | bad)


@pytest.mark.parametrize("F", [2**31, 2**32 + 1])
def test_more_filters_than_an_int_counts_raise(core: ModuleType, F: int) -> None:
    """In the function that reads no memory; the other has the same checks."""
    with pytest.raises(ValueError, match=r"^shape: "):
        core.filter_workspace(**GOOD["backward"] | {"shape": (1, 1, 1, 1, F)})


@pytest.mark.parametrize(
    ("step", "name"),
    [*(("forward", name) for name in (*INPUTS, "y")), *(("backward", name) for name in (*INPUTS, "grad_y"))],
)
def test_null_pointers_raise_naming_the_argument(core: ModuleType, step: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor's address, got a null"):
        core.filter(**GOOD[step] | {name: 0})


@pytest.mark.parametrize("name", ["grad_x", "grad_logits", "grad_filters"])
def test_gradients_without_grad_y_raise(core: ModuleType, name: str) -> None:
    with pytest.raises(ValueError, match=r"^grad_y: expected a tensor's address, got a null"):
        core.filter(**GOOD["forward"] | {name: BUFFER.data_ptr()})


@pytest.mark.parametrize("step", GOOD)
def test_a_global_filter_needs_no_logits(core: ModuleType, step: str) -> None:
    x, weight, result = torch.tensor(3.0), torch.tensor([5.0, 0.0]), torch.tensor(0.0)
    tensors = {"filters": weight, **({"x": x, "y": result} if step == "forward" else {"grad_y": x, "grad_x": result})}
    addresses = {name: t.data_ptr() for name, t in tensors.items()}
    core.filter(**GOOD[step] | {"shape": (1, 1, 1, 1, 0), "logits": 0} | addresses)
    assert result == 15


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"need_scalars": True}, "need_scalars: expected false without StarReLU, got true"),
        ({"shape": (1, 1, 1, 1, 0), "grad_logits": BUFFER.data_ptr()}, "grad_logits: expected 0 .*, got an address"),
    ],
    ids=["need_scalars", "grad_logits"],
)
def test_gradients_that_do_not_exist_raise(core: ModuleType, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        core.filter(**GOOD["backward"] | bad)


@pytest.mark.parametrize(
    "bad",
    [{"shape": (1, 1, 1, 1)}, {"shape": (1, 1, 1, 1, 2**63)}, {"shape": 1}, {"dtype": "float32"}, {"star_relu": 1.0}],
    ids=str,
)
def test_arguments_of_the_wrong_type_raise(core: ModuleType, bad: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        core.filter(**GOOD["forward"] | bad)


# StarReLU. No call gets as far as the address 1.

STAR_RELU: dict[str, Any] = {"n": 0, "dtype": 0, "threads": 1, "scale": 1.0, "bias": 0.0, "x": 1}
STAR_RELU_STEPS = {"forward": STAR_RELU | {"y": 1}, "backward": STAR_RELU | {"grad_y": 1, "grad_x": 1}}
BAD_ARGUMENTS = [
    *BAD_CODES_AND_THREADS,
    ({"n": -1}, "n: expected 0 to .*, got -1"),
    # whose bytes are more than an int64 counts
    *(({"n": n, "dtype": dtype}, f"n: expected 0 to .*, got {n}") for n, dtype in ((2**61, 0), (2**60, 1), (2**62, 3))),
    ({"x": 0, "n": 1}, "x: expected a tensor's address, got a null pointer"),
]


@pytest.mark.parametrize("step", STAR_RELU_STEPS)
@pytest.mark.parametrize(("bad", "message"), BAD_ARGUMENTS, ids=str)
def test_bad_arguments_never_reach_memory(core: ModuleType, step: str, bad: dict[str, int], message: str) -> None:
    core.star_relu(**STAR_RELU_STEPS[step])
    with pytest.raises(ValueError, match=message):
        core.star_relu(**STAR_RELU_STEPS[step] | bad)


@pytest.mark.parametrize(("step", "name"), [("forward", "y"), ("backward", "grad_y")])
def test_null_pointers_of_star_relu_raise(core: ModuleType, step: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a tensor's address, got a null"):
        core.star_relu(**STAR_RELU_STEPS[step] | {name: 0, "n": 1})


@pytest.mark.parametrize("bad", [{"n": 2**63}, {"x": -1}, {"x": 2**64}, {"n": 1.5}, {"dtype": "float32"}], ids=str)
def test_star_relu_arguments_of_the_wrong_type_raise(core: ModuleType, bad: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        core.star_relu(**STAR_RELU_STEPS["forward"] | bad)
