"""The layers and models against tensors computed once from the authors' published implementation."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from paths import GOLDEN
from safetensors.torch import load_file
from small_models import on_meta
from torch import Tensor, nn

from dfformer import AFNO2D, VARIANTS, DFFormer, DynamicFilter, GlobalFilter, SepConv, StarReLU
from dfformer_kernels.tolerance import gradient_errors, relative_error

BOUND = 2e-5  # two float32 implementations that sum in different orders


def tiny(img_size: int | tuple[int, int], token_mixers: Any, **kwargs: Any) -> DFFormer:
    return DFFormer(
        img_size=img_size,
        depths=[1, 1, 2, 1],
        dims=[8, 16, 24, 32],
        num_classes=10,
        token_mixers=token_mixers,
        **kwargs,
    )


MODULES: dict[str, Callable[[], nn.Module]] = {
    "afno_14": lambda: AFNO2D(16),
    "dynamic_filter_14": lambda: DynamicFilter(24, size=14),
    "dynamic_filter_7": lambda: DynamicFilter(16, size=7),
    "dynamic_filter_gelu_r8_16": lambda: DynamicFilter(32, size=16, act1_layer=nn.GELU, reweight_expansion_ratio=0.125),
    "dynamic_filter_odd_9x5_k2": lambda: DynamicFilter(8, size=(9, 5), num_filters=2),
    "dynamic_filter_rect_6x10": lambda: DynamicFilter(8, size=(6, 10)),
    "dynamic_filter_resize_14_to_12x20": lambda: DynamicFilter(8, size=14, weight_resize=True),
    "global_filter_14": lambda: GlobalFilter(12, size=14),
    "global_filter_rect_6x9": lambda: GlobalFilter(8, size=(6, 9)),
    "metaformer_tiny_cdf_64": lambda: tiny(64, [SepConv, SepConv, DynamicFilter, DynamicFilter]),
    "metaformer_tiny_df_64": lambda: tiny(64, DynamicFilter),
    "metaformer_tiny_df_feat_64": lambda: tiny(64, DynamicFilter, fork_feat=True),
    "metaformer_tiny_df_rect_96x64": lambda: tiny((96, 64), DynamicFilter),
    "metaformer_tiny_gf_64": lambda: tiny(64, GlobalFilter),
    "sepconv": lambda: SepConv(12),
    "star_relu": StarReLU,
}
MANIFEST: dict[str, dict[str, Any]] = json.loads((GOLDEN / "state_dict_manifest.json").read_text())


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with ``prefix``, by the rest of the name."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def feature_maps(module: Any, x: Tensor) -> list[Tensor]:
    """What the authors' models for dense prediction return."""
    return module.forward_intermediates(x, norm=True, intermediates_only=True)


def too_large(errors: Iterable[float]) -> list[float]:
    return [error for error in errors if not error < BOUND]  # NaN is


def test_every_golden_file_is_used() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.safetensors")) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_outputs_and_gradients(name: str) -> None:
    golden = load_file(GOLDEN / f"{name}.safetensors")
    module = MODULES[name]()
    module.load_state_dict(with_prefix(golden, "param."), strict=True)
    x = golden["x"].requires_grad_()

    y = feature_maps(module, x) if name.endswith("feat_64") else module(x)
    outputs = {f"y.{i}": output for i, output in enumerate(y)} if isinstance(y, list) else {"y": y}
    torch.autograd.backward(list(outputs.values()), [golden[f"grad_{output}"] for output in outputs])
    gradients = {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}

    assert outputs.keys() == {tensor for tensor in golden if tensor.split(".")[0] == "y"}
    assert too_large(relative_error(outputs[output], golden[output]) for output in outputs) == []
    # Gradients of one element are compared together. They are sums of thousands of terms that nearly cancel, so one
    # alone can be badly conditioned: the golden values of dynamic_filter_rect_6x10's reweight.act.bias and
    # metaformer_tiny_df_64's stages.3.0.mlp.act.scale are 8e-5 and 2e-4 away from the same gradients in float64.
    expected = {"x": golden["grad_x"], **with_prefix(golden, "grad.")}
    assert gradients.keys() == expected.keys()
    assert too_large(gradient_errors([gradients[key] for key in expected], list(expected.values()))) == []


def test_manifest_lists_every_model() -> None:
    assert set(MANIFEST) == set(VARIANTS)


@pytest.mark.parametrize("name", MANIFEST)
def test_names_and_shapes_of_parameters(name: str) -> None:
    model = on_meta(name)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == MANIFEST[name]["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == MANIFEST[name]["num_parameters"]
