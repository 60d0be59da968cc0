"""Models made ready to serve: same results, original untouched, and everything a served model goes through."""

import copy
import io
import pickle
from typing import Any

import pytest
import timm
import torch
from conftest import require_compiler
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import dfformer
from dfformer import StarReLU, optimize_for_inference
from dfformer.inference.optimize import PackedLinear, PackedMlp
from dfformer.models.layers import Scale
from dfformer_kernels.tolerance import relative_error

# As promised, relative to the logits; bfloat16 rounds every activation of every block.
ERROR = {None: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2}
KINDS = ("dfformer_s18", "cdfformer_s18", "gfformer_s18", "dfformer_s18_afno", "dfformer_s18_gelu")
EVERY_KIND = pytest.mark.parametrize("name", KINDS)
SHAPE: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40), "img_size": 64, "num_classes": 10}


def trained(name: str = "dfformer_s18", **kwargs: Any) -> nn.Module:
    """A small model whose norms, scales and activations are not those of initialisation."""
    torch.manual_seed(0)
    model = timm.create_model(name, **(SHAPE | kwargs)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | Scale | StarReLU):
                for parameter in module.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
            elif isinstance(module, nn.Linear):  # at initialisation, blocks hardly change what comes in
                module.weight *= 2
    return model


def images(H: int = 64, W: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, H, W, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("size", [(64, 64), (96, 70)], ids=str)
@EVERY_KIND
def test_serves_the_same_results(name: str, size: tuple[int, int], dtype: torch.dtype | None) -> None:
    model, x = trained(name), images(*size)
    before = copy.deepcopy(model.state_dict())
    for img_size in (None, size):
        y = optimize_for_inference(model, dtype, img_size)(x)
        assert y.dtype == x.dtype
        assert relative_error(y, model(x)) < ERROR[dtype]
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_optimised() -> None:
    served = optimize_for_inference(trained(), img_size=96)
    layers = list(served.modules())
    assert not any(isinstance(m, nn.Linear) for m in layers)
    block: Any = served.model.get_submodule("stages.2.0")
    assert isinstance(block.mlp, PackedMlp)
    assert isinstance(block.token_mixer.pwconv1, PackedLinear)
    assert block.norm1.weight is None
    assert block.token_mixer.size == (6, 6)


def test_images_are_prepared_as_for_the_model() -> None:
    model = trained(pretrained_cfg_overlay={"mean": (0.5, 0.4, 0.3), "crop_pct": 0.9})
    config = resolve_model_data_config(optimize_for_inference(model))
    assert config == resolve_model_data_config(model)
    assert config["mean"] == (0.5, 0.4, 0.3)


def test_fixed_filters_refuse_another_size() -> None:
    served = optimize_for_inference(trained(), img_size=(96, 64))
    served(images(96, 64))
    with pytest.raises(ValueError, match=r"x: got a plane of .* this layer was built for size"):
        served(images(64, 64))


def test_filters_stay_float32_in_bfloat16() -> None:
    served = optimize_for_inference(trained(), torch.bfloat16)
    dtypes = {name.rpartition(".")[2]: t.dtype for name, t in served.state_dict().items()}
    assert dtypes.pop("complex_weights") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_feature_maps_and_other_methods() -> None:
    model, x = trained(), images()
    served = optimize_for_inference(model)
    features: Any = served.model
    assert relative_error(features.forward_features(x), model.forward_features(x)) < 1e-4  # type: ignore[operator]
    maps = timm.create_model("dfformer_s18", features_only=True, depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)).eval()
    for y, expected in zip(optimize_for_inference(maps, torch.bfloat16)(x), maps(x), strict=True):
        assert y.dtype == torch.float32
        assert relative_error(y, expected) < ERROR[torch.bfloat16]


def test_layers_with_hooks_or_replaced_are_left_alone() -> None:
    model: Any = trained()
    mlp = model.stages[0][0].mlp
    mlp.act = nn.GELU()
    served: Any = optimize_for_inference(model)
    assert type(served.model.stages[0][0].mlp.act) is nn.GELU
    assert relative_error(served(images()), model(images())) < 1e-4


def test_cannot_be_trained() -> None:
    served = optimize_for_inference(trained())
    assert served.eval() is served
    with pytest.raises(RuntimeError, match="cannot be trained; train the one it was made from"):
        served.train()
    assert not served(images()).requires_grad
    assert not any(p.requires_grad for p in served.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, "bfloat16"])
def test_unknown_dtype(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype: got .*, accepted are None, torch.float32, torch.bfloat16"):
        optimize_for_inference(trained(), dtype)


# What happens to a served model


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_copies_serve_the_same(dtype: torch.dtype | None, copied: Any) -> None:
    served, x = optimize_for_inference(trained(), dtype), images()
    y = served(x)  # packs weights, which the copy must do by itself
    assert torch.equal(copied(served)(x), y)


def test_new_weights_are_packed_again() -> None:
    served, other, x = optimize_for_inference(trained()), optimize_for_inference(trained(img_size=64)), images()
    with torch.no_grad():
        for t in other.state_dict().values():
            t.mul_(1.5)
    served(x)
    served.load_state_dict(other.state_dict())
    assert torch.equal(served(x), other(x))


@EVERY_KIND
def test_export_with_any_batch(name: str) -> None:
    served = optimize_for_inference(trained(name), img_size=64)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(served, (images(),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 5):
        x = images(batch=size)
        assert relative_error(program(x), served(x)) < 1e-5


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled() -> None:
    require_compiler()
    model = dfformer.DFFormer(32, depths=(1, 1), dims=(16, 24), strides=(4, 2), res_scale_init_values=(None, 1.0))
    served = optimize_for_inference(model)
    compiled = torch.compile(served, fullgraph=True)
    assert relative_error(compiled(images()), served(images())) < 1e-5
