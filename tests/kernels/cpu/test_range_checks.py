"""Range checks of the compiled core's functions: nothing wrong reaches memory, and the message names the argument."""

from types import ModuleType
from typing import Any

import pytest
import torch

# The filter step. The buffer is as large as the good problem needs.

BUFFER = torch.zeros(16, dtype=torch.float64)
FORWARD = ("x", "logits", "filters", "y")
BACKWARD = ("grad_y", "x", "logits", "filters")
GOOD_PROBLEM = {"shape": (1, 1, 1, 1, 1), "dtype": 0, "star_relu": None, "threads": 1}
GOOD: dict[str, dict[str, Any]] = {
    "filter": GOOD_PROBLEM | dict.fromkeys(FORWARD, BUFFER.data_ptr()),
    "filter_backward": GOOD_PROBLEM
    | dict.fromkeys(BACKWARD, BUFFER.data_ptr())
    | dict.fromkeys(("grad_x", "grad_logits", "grad_filters"), 0)
    | {"need_scalars": False},
    "filter_workspace": {"shape": (1, 1, 1, 1, 1), "dtype": 0, "backward": True, "threads": 1},
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
BAD_PROBLEMS: list[tuple[dict[str, Any], str]] = [
    ({"dtype": 4}, "dtype: got code 4, accepted are 0 to 3"),
    ({"dtype": -1}, "dtype: got code -1"),
    ({"threads": 0}, "threads: got 0, accepted are 1 to 4096"),
    ({"threads": -1}, "threads: got -1"),
    ({"threads": 4097}, "threads: got 4097"),
    *(({"shape": shape}, "shape: ") for shape in BAD_SHAPES),
]


@pytest.mark.parametrize("function", GOOD)
@pytest.mark.parametrize(("bad", "message"), BAD_PROBLEMS, ids=lambda v: str(v).replace(str(HUGE), "huge"))
def test_bad_problems_raise_naming_the_argument(
    core: ModuleType, function: str, bad: dict[str, Any], message: str
) -> None:
    getattr(core, function)(**GOOD[function])
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(core, function)(**GOOD[function] | bad)


@pytest.mark.parametrize("F", [2**31, 2**32 + 1])
def test_more_filters_than_an_int_counts_raise(core: ModuleType, F: int) -> None:
    """In the function that reads no memory; the others check with it."""
    with pytest.raises(ValueError, match=r"^shape: "):
        core.filter_workspace(**GOOD["filter_workspace"] | {"shape": (1, 1, 1, 1, F)})


@pytest.mark.parametrize(
    ("function", "name"), [("filter", n) for n in FORWARD] + [("filter_backward", n) for n in BACKWARD]
)
def test_null_pointers_raise_naming_the_argument(core: ModuleType, function: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got a null pointer"):
        getattr(core, function)(**GOOD[function] | {name: 0})


@pytest.mark.parametrize("function", ["filter", "filter_backward"])
def test_a_global_filter_needs_no_logits(core: ModuleType, function: str) -> None:
    getattr(core, function)(**GOOD[function] | {"shape": (1, 1, 1, 1, 0), "logits": 0})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"need_scalars": True}, "need_scalars: got true, accepted without StarReLU is false"),
        (
            {"shape": (1, 1, 1, 1, 0), "grad_logits": BUFFER.data_ptr()},
            r"grad_logits: got an address",
        ),
    ],
    ids=["need_scalars", "grad_logits"],
)
def test_gradients_that_do_not_exist_raise(core: ModuleType, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        core.filter_backward(**GOOD["filter_backward"] | bad)


@pytest.mark.parametrize(
    "bad",
    [{"shape": (1, 1, 1, 1)}, {"shape": (1, 1, 1, 1, 2**63)}, {"shape": 1}, {"dtype": "float32"}, {"star_relu": 1.0}],
    ids=str,
)
def test_arguments_of_the_wrong_type_raise(core: ModuleType, bad: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        core.filter(**GOOD["filter"] | bad)


# StarReLU. No call gets as far as the address 1.

STAR_RELU: dict[str, dict[str, Any]] = {
    "star_relu": {"x": 1, "y": 1, "n": 0, "dtype": 0, "scale": 1.0, "bias": 0.0, "threads": 1},
    "star_relu_backward": {"grad_y": 1, "x": 1, "grad_x": 1, "n": 0, "dtype": 0, "scale": 1.0, "threads": 1},
}
BAD_ARGUMENTS = [
    ({"dtype": 4}, "dtype: got code 4, accepted are 0 to 3"),
    ({"dtype": -1}, "dtype: got code -1, accepted are 0 to 3"),
    ({"n": -1}, "n: got -1"),
    ({"n": 2**61, "dtype": 0}, f"n: got {2**61}"),  # whose bytes are more than an int64 counts
    ({"n": 2**60, "dtype": 1}, f"n: got {2**60}"),
    ({"n": 2**62, "dtype": 3}, f"n: got {2**62}"),
    ({"x": 0, "n": 1}, "x: got a null pointer"),
    ({"threads": 0}, "threads: got 0, accepted are 1 to 4096"),
    ({"threads": -1}, "threads: got -1"),
    ({"threads": 4097}, "threads: got 4097"),
]


@pytest.mark.parametrize("function", STAR_RELU)
@pytest.mark.parametrize(("bad", "message"), BAD_ARGUMENTS, ids=str)
def test_bad_arguments_never_reach_memory(core: ModuleType, function: str, bad: dict[str, int], message: str) -> None:
    getattr(core, function)(**STAR_RELU[function])
    with pytest.raises(ValueError, match=message):
        getattr(core, function)(**STAR_RELU[function] | bad)


@pytest.mark.parametrize(("function", "name"), [("star_relu", "y"), ("star_relu_backward", "grad_y")])
def test_null_pointers_of_star_relu_raise(core: ModuleType, function: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got a null pointer"):
        getattr(core, function)(**STAR_RELU[function] | {name: 0, "n": 1})


@pytest.mark.parametrize("bad", [{"n": 2**63}, {"x": -1}, {"x": 2**64}, {"n": 1.5}, {"dtype": "float32"}], ids=str)
def test_star_relu_arguments_of_the_wrong_type_raise(core: ModuleType, bad: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        core.star_relu(**STAR_RELU["star_relu"] | bad)
