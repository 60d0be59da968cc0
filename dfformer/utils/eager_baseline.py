"""The authors' formulation, to compare with: every step a torch operation of its own under torch's own autograd."""

import copy
from typing import TypeVar

from torch import Tensor, nn

from dfformer.models.layers import StarReLU
from dfformer.models.spectral import DynamicFilter, GlobalFilter, Scalars
from dfformer_kernels import reference

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class _Linear(nn.Linear):
    """Not exactly ``nn.Linear``, so that nothing is fused with it: the result is ``F.linear``'s."""


class _Conv2d(nn.Conv2d):
    """Not exactly ``nn.Conv2d``, so that torch.compile sees torch's own."""


class _StarReLU(StarReLU):
    def forward(self, x: Tensor) -> Tensor:
        return reference.star_relu(x, self.scale, self.bias)


class _DynamicFilter(DynamicFilter):
    def filter(self, x: Tensor, logits: Tensor, basis: Tensor, star_relu: Scalars) -> Tensor:
        return reference.dynamic_filter(x, logits, basis, *(star_relu or (None, None)))


class _GlobalFilter(GlobalFilter):
    def filter(self, x: Tensor, weight: Tensor, star_relu: Scalars) -> Tensor:
        return reference.global_filter(x, weight, *(star_relu or (None, None)))


EAGER: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _Linear,
    nn.Conv2d: _Conv2d,
    StarReLU: _StarReLU,
    DynamicFilter: _DynamicFilter,
    GlobalFilter: _GlobalFilter,
}


def eager_baseline(model: ModuleT) -> ModuleT:
    """A copy of ``model`` in the authors' formulation: torch.fft for the filter step,
    StarReLU as separate operations, ``F.linear``, nothing recomputed in backward."""
    return with_classes(model, EAGER)


def with_classes(model: ModuleT, classes: dict[type[nn.Module], type[nn.Module]]) -> ModuleT:
    """A copy of ``model`` whose modules of exactly these classes are of those, subclasses with another forward."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    return model
