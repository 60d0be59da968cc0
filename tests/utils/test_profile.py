"""What `dfformer.utils.profile` counts."""

from typing import Any

import pytest
import timm
import torch
from extent import slow

import dfformer  # noqa: F401 (registers the models)
from dfformer.utils.profile import profile, saved_for_backward

SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "img_size": 32, "num_classes": 3}
# Linear and convolution multiply-adds at 224, as counted independently from the layer shapes (the paper's FLOPs).
GMACS = {"dfformer_s18": 3.79, "dfformer_s36": 7.35, "dfformer_m36": 12.45, "dfformer_b36": 22.10}
GMACS |= {"cdfformer_s18": 3.88, "cdfformer_s36": 7.53, "cdfformer_m36": 12.71, "cdfformer_b36": 22.46}
GMACS |= {"gfformer_s18": 3.79}
USUAL = ("dfformer_s18", "cdfformer_b36", "gfformer_s18")


@pytest.mark.parametrize("name", [*USUAL, *slow(*(name for name in GMACS if name not in USUAL))])
def test_macs_without_the_spectral_part_are_the_papers(name: str) -> None:
    counted = profile(lambda: timm.create_model(name), (224, 224))
    assert round((counted.macs - counted.spectral_macs) / 1e9, 2) == GMACS[name]
    assert counted.spectral_macs > 0


def test_saved_bytes_are_the_same_on_meta_and_for_real() -> None:
    def make() -> torch.nn.Module:
        return timm.create_model("cdfformer_s18", **SMALL)

    measured = saved_for_backward(make().train(), torch.randn(1, 3, 32, 32))
    assert profile(make, (32, 32)).saved_bytes == measured


def test_attention_is_not_spectral() -> None:
    found = profile(lambda: timm.create_model("vit_tiny_patch16_224", depth=1), (224, 224))
    assert found.spectral_macs == 0 < found.macs
