"""What reads a model as a graph or by its layers' classes: torch.fx, torch.jit, torchvision's extractors."""

from typing import Any

import pytest
import timm
import torch
from torchvision.models.feature_extraction import create_feature_extractor

from dfformer_kernels.tolerance import gradient_errors, relative_error

TINY: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "img_size": 32, "num_classes": 5}
EVERY_NAME = pytest.mark.parametrize(
    "name", ["dfformer_s18", "cdfformer_s18", "gfformer_s18", "dfformer_s18_gelu", "dfformer_s18_afno"]
)


@EVERY_NAME
def test_symbolic_traces_compute_the_same(name: str) -> None:
    model = timm.create_model(name, **TINY).eval()
    traced = torch.fx.symbolic_trace(model)
    for x in (torch.randn(2, 3, 32, 32), torch.randn(1, 3, 64, 48)):  # another plane: filters are resized
        assert relative_error(traced(x), model(x)) < 1e-5
    gradient, expected = (
        torch.autograd.grad(run(x).square().sum(), list(model.parameters())) for run in (traced, model)
    )
    assert max(gradient_errors(list(gradient), list(expected))) < 1e-4


@EVERY_NAME
def test_feature_extractors_of_torchvision(name: str) -> None:
    model, x = timm.create_model(name, **TINY).eval(), torch.randn(2, 3, 32, 32)
    extractor = create_feature_extractor(model, {"stages.1": "early", "stages.3": "late"})
    expected = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    features = extractor(x)
    assert relative_error(features["early"], expected[1]) < 1e-5
    assert relative_error(features["late"], expected[3]) < 1e-5


@EVERY_NAME
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("gradients", [False, True])
def test_traces_with_and_without_gradients(name: str, gradients: bool) -> None:
    model, x = timm.create_model(name, **TINY).eval(), torch.randn(2, 3, 32, 32)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, x)
    other = torch.randn(2, 3, 32, 32)
    assert relative_error(traced(other), model(other)) < 1e-5
