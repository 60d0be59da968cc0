"""The store of constant tensors: what it keeps, and for how long."""

import copy

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dfformer_kernels.kept import kept


@kept(2)
def ones(size: int) -> tuple[Tensor, ...]:
    return (torch.ones(size),)


def test_equal_arguments_give_the_same_tensors() -> None:
    assert ones(3)[0] is ones(3)[0]
    assert len(ones(4)[0]) == 4


def test_number_of_results_is_bounded() -> None:
    first = ones(1)[0]
    for size in (2, 3):
        ones(size)
    assert ones(1)[0] is not first


def test_fake_tensors_are_not_kept() -> None:
    with FakeTensorMode():
        assert type(ones(5)[0]) is not Tensor
    assert type(ones(5)[0]) is Tensor


def test_tensors_of_functionalize_are_not_kept() -> None:
    torch.func.functionalize(lambda x: x + ones(7)[0])(torch.ones(7))
    assert torch.equal(copy.deepcopy(ones(7)[0]), torch.ones(7))


def test_tensors_made_in_inference_mode_work_in_training() -> None:
    with torch.inference_mode():
        assert not ones(6)[0].is_inference()
