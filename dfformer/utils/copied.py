"""Copies of models, also of those that torch's deepcopy refuses."""

from copy import deepcopy
from typing import TypeVar

from torch import Tensor, nn

from dfformer.utils.accepted import check_module

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def read_by(model: nn.Module) -> tuple[int, nn.Parameter]:
    """The channels of the images that ``model`` reads, and its first parameter; ValueError without a convolution."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels, next(model.parameters())
    raise ValueError(f"model: got {type(model).__name__} without a Conv2d, accepted are models of images")


def copied(model: ModuleT) -> ModuleT:
    """A deep copy of ``model``. Tensors that modules computed and keep, such as a pruned weight, become values.

    Raises TypeError if ``model`` is not a module.
    """
    check_module(model)
    tensors = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    return deepcopy(model, {id(t): t.detach().clone() for t in tensors if not t.is_leaf})
