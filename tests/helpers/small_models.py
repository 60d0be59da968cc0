"""Narrow models with a block a stage, and a training step, for the tests of whole models."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from extent import FULL
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from dfformer import VARIANTS, StarReLU
from dfformer.models.layers import Scale
from dfformer_kernels.tolerance import BOUND

DIMS, CLASSES = [16, 24, 32, 40], 7
# Reduced depth and width leave the token mixers as the difference between the models: one of each, and one activation
# that the filter step does not compute; with DFFORMER_TEST_FULL=1 the other activations and sizes too.
KINDS = (
    [name for name in VARIANTS if "s18" in name]
    if FULL
    else ["dfformer_s18", "cdfformer_s18", "gfformer_s18", "dfformer_s18_gelu", "dfformer_s18_afno"]
)
EVERY_KIND = pytest.mark.parametrize("name", KINDS)
# float32 models round some fifty times in a row, in an order that layouts and compilers change
ERROR = 20 * BOUND[torch.float32]


def small(name: str = "dfformer_s18", **kwargs: Any) -> Any:
    shape = {"depths": (1, 1, 1, 1), "dims": DIMS, "img_size": 64, "num_classes": CLASSES}
    return timm.create_model(name, **{**shape, **kwargs}).eval()


@functools.cache
def on_meta(name: str) -> Any:
    """The whole model without data, built once; not to be changed."""
    with torch.device("meta"):
        return timm.create_model(name)


def images(H: int = 64, W: int = 64, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, H, W, generator=torch.Generator().manual_seed(1))


def trained(name: str = "dfformer_s18", **kwargs: Any) -> nn.Module:
    """A small model whose norms, scales and activations are not those of initialisation."""
    torch.manual_seed(0)
    model = small(name, **({"num_classes": 10} | kwargs))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | Scale | StarReLU):
                for parameter in module.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
            elif isinstance(module, nn.Linear):  # at initialisation, blocks hardly change what comes in
                module.weight *= 2
    return model


class Malicious:
    """Unpickled freely, this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Halved(nn.Module):
    def forward(self, filters: Tensor) -> Tensor:
        return filters / 2

    def right_inverse(self, filters: Tensor) -> Tensor:
        return 2 * filters


# What makes a layer compute its filters at each call.
COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    "prune": lambda mixer: prune.l1_unstructured(mixer, "complex_weights", 0.5),
    "parametrization": lambda mixer: parametrize.register_parametrization(mixer, "complex_weights", Halved()),
}
EVERY_COMPUTATION = pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model: Callable[[Tensor], Tensor], parameters_of: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and parameter gradients of a training step, starting from the same random state each time."""
    parameters_of.zero_grad()
    torch.manual_seed(1)
    y = model(x)
    y.square().sum().backward()
    return y.detach(), gradients(parameters_of)
