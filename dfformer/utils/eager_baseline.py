"""The authors' formulation, to compare with: every step a plain torch operation under torch's own autograd."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from torch import Tensor
from torch.nn import functional as F

from dfformer_kernels import reference


@contextmanager
def plain_torch() -> Iterator[None]:
    """Models run inside compute what the authors' code does, the way it does: torch.fft for the filter step, StarReLU
    as separate operations, ``F.linear``, nothing recomputed in backward. Process-wide."""
    with ExitStack() as replaced:
        for target, plain in _PLAIN.items():
            replaced.enter_context(patch(target, plain))
        yield


def _dynamic_filter(x: Tensor, logits: Tensor, basis: Tensor, star_relu: tuple[Tensor, Tensor] | None) -> Tensor:
    return reference.dynamic_filter(x, logits, basis, *(star_relu or (None, None)))


def _global_filter(x: Tensor, weight: Tensor, star_relu: tuple[Tensor, Tensor] | None) -> Tensor:
    return reference.global_filter(x, weight, *(star_relu or (None, None)))


def _mlp(x: Tensor, weight1: Tensor, star_relu: tuple[Tensor, Tensor], weight2: Tensor) -> Tensor:
    return F.linear(reference.star_relu(F.linear(x, weight1), *star_relu), weight2)


_PLAIN = {
    "dfformer.models.layers.convolution": F.conv2d,
    "dfformer.models.layers.dynamic_filter": _dynamic_filter,
    "dfformer.models.layers.global_filter": _global_filter,
    "dfformer.models.layers.star_relu": reference.star_relu,
    "dfformer.models.layers.linear": F.linear,
    "dfformer.models.layers.mlp": _mlp,
}
