"""The authors' formulation as a baseline: every step is a separate torch operation under torch's own autograd."""

from typing import TypeVar

from torch import Tensor, nn

from dfformer.models.layers import StarReLU
from dfformer.models.spectral import DynamicFilter, GlobalFilter, Scalars
from dfformer.utils.copied import with_classes
from dfformer_kernels import reference

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class _Linear(nn.Linear):
    """Not exactly ``nn.Linear``, so it is never fused and always calls ``F.linear``."""


class _Conv2d(nn.Conv2d):
    """Not exactly ``nn.Conv2d``, so torch.compile sees torch's own convolution."""


class _StarReLU(StarReLU):
    def forward(self, x: Tensor) -> Tensor:
        return reference.star_relu(x, self.scale, self.bias)


class _DynamicFilter(DynamicFilter):
    def filter(self, x: Tensor, logits: Tensor | None, filters: Tensor, star_relu: Scalars) -> Tensor:
        assert logits is not None
        return reference.dynamic_filter(x, logits, filters, *(star_relu or (None, None)))


class _GlobalFilter(GlobalFilter):
    def filter(self, x: Tensor, logits: Tensor | None, filters: Tensor, star_relu: Scalars) -> Tensor:
        return reference.global_filter(x, filters, *(star_relu or (None, None)))


EAGER: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _Linear,
    nn.Conv2d: _Conv2d,
    StarReLU: _StarReLU,
    DynamicFilter: _DynamicFilter,
    GlobalFilter: _GlobalFilter,
}


def eager_baseline(model: ModuleT) -> ModuleT:
    """A copy of ``model`` in the authors' formulation: torch.fft for the filter step,
    separate operations for StarReLU, ``F.linear``, and no recomputation in backward."""
    return with_classes(model, EAGER)
