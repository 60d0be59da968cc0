"""Copies of models, also of those that torch's deepcopy refuses."""

from copy import deepcopy
from typing import TypeVar

from torch import Tensor, nn

from dfformer.utils.accepted import check_module

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def copied(model: ModuleT) -> ModuleT:
    """A deep copy of ``model``. Tensors that modules computed and keep, such as a pruned weight, become values.

    Raises TypeError if ``model`` is not a module.
    """
    check_module(model)
    tensors = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    return deepcopy(model, {id(t): t.detach().clone() for t in tensors if not t.is_leaf})


def with_classes(model: ModuleT, classes: dict[type[nn.Module], type[nn.Module]]) -> ModuleT:
    """A copy of ``model``. Modules whose class is a key of ``classes`` have the class that it maps to instead."""
    model = copied(model)
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    return model
