"""What timm asks of its own models, asked of these and of timm's convformer_s18, which has to pass it all too.

By default on one model for each token mixer, with a narrow block a stage; with DFFORMER_TEST_FULL=1 (``make
test-timm``) on all models whole, at the image sizes of timm's tests.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from extent import FULL
from timm.data import create_transform, resolve_model_data_config
from timm.layers import create_feature_extractor, get_graph_node_names
from timm.models import FeatureDictNet, build_model_with_cfg, save_for_hf
from timm.models import metaformer as timm_metaformer
from torch import Tensor, nn
from torchvision.models import feature_extraction

from dfformer import VARIANTS, DFFormer
from dfformer_kernels.tolerance import gradient_errors, relative_error

CONVFORMER = "convformer_s18"
NAMES = list(VARIANTS) if FULL else ["dfformer_s18", "cdfformer_s18", "gfformer_s18", "dfformer_s18_afno"]
EVERY_MODEL = pytest.mark.parametrize("name", [*NAMES, CONVFORMER])
# The narrow convformer is not in timm's registry: it can be created, but not by name.
EVERY_NAMED_MODEL = pytest.mark.parametrize("name", [*NAMES, CONVFORMER] if FULL else NAMES)
SMALL: dict[str, Any] = {} if FULL else {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)}
SIZE, BATCH = (128, 2) if FULL else (64, 2)
CLASSES = 42
ERROR = 1e-4  # of float32 models whose sums are taken in another order

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")


def create(name: str, **kwargs: Any) -> Any:
    if name == CONVFORMER and not FULL:  # its entry point has no room for depths and dims
        return build_model_with_cfg(
            timm_metaformer.MetaFormer,
            name,
            False,
            feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
            token_mixers=timm_metaformer.SepConv,
            norm_layers=timm_metaformer.LayerNorm2dNoBias,
            **{**SMALL, **kwargs},
        ).eval()
    return timm.create_model(name, **{**SMALL, **kwargs}).eval()


def images(size: int = SIZE, batch: int = BATCH, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size)


def planes(maps: list[Tensor], model: Any) -> list[tuple[int, ...]]:
    """(C, H, W) of feature maps, whichever layout the model says they are in."""
    channels_first = getattr(model, "output_fmt", "NCHW") == "NCHW"
    return [tuple(m.shape[1:]) if channels_first else (m.shape[3], m.shape[1], m.shape[2]) for m in maps]


# Forward and backward


@EVERY_MODEL
@torch.no_grad()
def test_forward_at_the_size_of_its_weights(name: str) -> None:
    model = create(name)
    y = model(torch.randn(1, *model.default_cfg["input_size"]))
    assert y.shape == (1, 1000)
    assert y.isfinite().all()


@EVERY_MODEL
@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_reaches_every_parameter(name: str, checkpointing: bool) -> None:
    model = create(name, num_classes=CLASSES).train()
    model.set_grad_checkpointing(checkpointing)
    y = model(images())
    y.mean().backward()
    assert y.shape == (BATCH, CLASSES)
    assert y.isfinite().all()
    assert [key for key, p in model.named_parameters() if p.grad is None or p.grad.shape != p.shape] == []


# The description of the weights, and the head


@EVERY_MODEL
def test_default_cfg_names_its_layers(name: str) -> None:
    model = create(name)
    assert f"{model.default_cfg['first_conv']}.weight" in model.state_dict()
    classifier = model.get_submodule(model.default_cfg["classifier"])
    assert [layer.out_features for layer in classifier.modules() if isinstance(layer, nn.Linear)][-1] == 1000


@EVERY_MODEL
@torch.no_grad()
def test_without_classifier_and_without_pooling(name: str) -> None:
    model = create(name)
    pool_size = model.default_cfg["pool_size"]
    x = torch.randn(1, *model.default_cfg["input_size"])
    features = model.forward_features(x)
    assert planes([features], model) == [(model.num_features, *pool_size)]
    assert model.forward_head(features, pre_logits=True).shape == (1, model.num_features)
    model.reset_classifier(0)
    assert model(x).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert planes([model(x)], model) == [(model.num_features, *pool_size)]
    assert planes([create(name, num_classes=0, global_pool="")(x)], model) == [(model.num_features, *pool_size)]


@EVERY_MODEL
@torch.no_grad()
def test_classifier_and_pooling_come_back(name: str) -> None:
    model = create(name, num_classes=0)
    assert isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(CLASSES, "max")
    assert not isinstance(model.get_classifier(), nn.Identity)
    assert model.num_classes == CLASSES
    assert model(images()).shape == (BATCH, CLASSES)


# Features


@EVERY_MODEL
@pytest.mark.parametrize("feature_cls", [None, "getter", "hook", "list", "dict", "fx", FeatureDictNet], ids=str)
@torch.no_grad()
def test_every_kind_of_feature_extractor(name: str, feature_cls: Any) -> None:
    model = create(name, features_only=True, **({} if feature_cls is None else {"feature_cls": feature_cls}))
    maps = model(images())
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    channels, strides = model.feature_info.channels(), model.feature_info.reduction()
    assert strides == [4, 8, 16, 32]
    assert planes(maps, model) == [(C, SIZE // s, SIZE // s) for C, s in zip(channels, strides, strict=True)]
    assert channels == list(SMALL.get("dims", channels))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("feature_cls", ["hook", "list", "dict", "fx"])
@torch.no_grad()
def test_extractors_return_what_the_model_computes(name: str, feature_cls: str) -> None:
    torch.manual_seed(1)
    expected = create(name).forward_intermediates(x := images(), intermediates_only=True, output_fmt="NHWC")
    torch.manual_seed(1)
    maps = create(name, features_only=True, feature_cls=feature_cls)(x)
    maps = maps.values() if feature_cls == "dict" else maps
    assert all(relative_error(a, b) < ERROR for a, b in zip(maps, expected, strict=True))


@EVERY_MODEL
@pytest.mark.parametrize(
    ("feature_cls", "out_indices"),
    [("getter", (0, 2)), ("getter", 2), ("hook", (-2, -1)), ("list", (1,)), ("dict", (0, 3))],
    ids=str,
)
@torch.no_grad()
def test_out_indices(name: str, feature_cls: str, out_indices: Any) -> None:
    model = create(name, features_only=True, feature_cls=feature_cls, out_indices=out_indices)
    every = create(name, features_only=True)
    wanted = range(-out_indices, 0) if isinstance(out_indices, int) else out_indices
    assert model.feature_info.channels() == [every.feature_info.channels()[i] for i in wanted]
    maps = model(images())
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    assert [C for C, _, _ in planes(maps, model)] == model.feature_info.channels()


def test_stage_norms_come_from_the_getter_alone() -> None:
    assert len(create("dfformer_s18", features_only=True, fork_feat=True)(images())) == 4
    for feature_cls in ("hook", "list", "dict", "fx"):
        with pytest.raises(ValueError, match="feature_cls: with fork_feat=True, expected 'getter', got"):
            create("dfformer_s18", features_only=True, fork_feat=True, feature_cls=feature_cls)


def test_feature_cls_without_features_only_is_an_unknown_argument() -> None:
    with pytest.raises(TypeError, match="'feature_cls'"):
        create("dfformer_s18", feature_cls="hook")


@EVERY_MODEL
@torch.no_grad()
def test_forward_intermediates(name: str) -> None:
    model, x = create(name), images()
    last, maps = model.forward_intermediates(x)
    assert len(maps) == len(model.feature_info)
    assert torch.equal(last, model.forward_features(x))
    only = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True, stop_early=True)
    assert all(torch.equal(a, b) for a, b in zip(only, (maps[0], maps[2]), strict=True))
    taken = model.prune_intermediate_layers([0, 2])
    pruned = model.forward_intermediates(x, taken, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, only, strict=True))


# Graphs


GRAPHS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.fx": torch.fx.symbolic_trace,
    "timm": lambda model: create_feature_extractor(model, [get_graph_node_names(model)[1][-1]]),
    "torchvision": lambda model: feature_extraction.create_feature_extractor(
        model, [feature_extraction.get_graph_node_names(model)[1][-1]]
    ),
}


def logits(y: Any) -> Tensor:
    """Feature extractors return mappings."""
    return next(iter(y.values())) if isinstance(y, dict) else y


@EVERY_MODEL
@pytest.mark.parametrize("graph", GRAPHS)
def test_symbolic_trace(name: str, graph: str) -> None:
    model = create(name, num_classes=CLASSES)
    traced = GRAPHS[graph](model)
    for x in (images(), torch.randn(1, 3, SIZE + 32, SIZE)):  # another plane: filters are resized
        with torch.no_grad():
            assert relative_error(logits(traced(x)), model(x)) < ERROR
    # In float32 an input beside a kink of AFNO's ReLU or softshrink may have either of two gradients.
    traced.double(), model.double()
    results = (logits(traced(x.double())), model(x.double()))
    gradients, wanted = (torch.autograd.grad(y.square().sum(), [*model.parameters()]) for y in results)
    assert max(gradient_errors(list(gradients), list(wanted))) < 1e-9


def scripted(model: nn.Module) -> Any:
    return torch.jit.script(model)


def scripted_graph(model: nn.Module) -> Any:
    return torch.jit.script(GRAPHS["torchvision"](model))


@EVERY_MODEL
@pytest.mark.parametrize("script", [scripted, scripted_graph])
@torch.no_grad()
def test_torchscript(name: str, script: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    model = create(name, num_classes=CLASSES)
    module = script(model)
    module.save(tmp_path / "model.pt")
    for compiled in (module, torch.jit.load(tmp_path / "model.pt")):
        x = images()
        assert relative_error(logits(compiled(x)), model(x)) < ERROR


@torch.no_grad()
def test_torchscript_resizes_by_the_models_rule() -> None:
    model = create("dfformer_s18", num_classes=CLASSES, resize="fourier")
    x = images(SIZE + 32)
    assert relative_error(torch.jit.script(model)(x), model(x)) < ERROR
    layer = model.stages[0][0].token_mixer
    layer.weight_resize = False
    with pytest.raises(torch.jit.Error, match="pass weight_resize=True"):
        torch.jit.script(layer)(torch.randn(1, 9, 8, layer.pwconv1.in_features))


# Weights, and the images they are for


@EVERY_NAMED_MODEL
def test_weights_adapt_to_channels_and_classes(name: str) -> None:
    weights: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": create(name).state_dict()}}
    for classes in (5, 0):
        model = create(name, in_chans=1, num_classes=classes, **weights)
        assert model(images(channels=1)).shape == (BATCH, classes or model.num_features)
    features = create(name, features_only=True, **weights)
    stored = weights["pretrained_cfg_overlay"]["state_dict"]
    first = next(p for p in features.parameters() if p.dim() == 4)
    assert torch.equal(first, stored[f"{create(name).default_cfg['first_conv']}.weight"])


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize(
    ("arguments", "input_size"),
    [
        ({}, (3, 224, 224)),
        ({"img_size": 64}, (3, 64, 64)),
        ({"img_size": (96, 70), "in_chans": 1}, (1, 96, 70)),
        ({"in_chans": 4}, (4, 224, 224)),
        ({"img_size": 64, "pretrained_cfg_overlay": {"input_size": (3, 80, 80)}}, (3, 80, 80)),
    ],
    ids=str,
)
def test_timm_data_prepares_images_for_the_model(
    arguments: dict[str, Any], input_size: tuple[int, ...], features_only: bool
) -> None:
    model = create("dfformer_s18", features_only=features_only, **arguments)
    config = resolve_model_data_config(model)
    assert config["input_size"] == input_size
    assert len(config["mean"]) == len(config["std"]) == input_size[0]
    if input_size[0] == 1:
        assert config["mean"] == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert create_transform(**config, is_training=False)


def test_statistics_that_were_given_stay() -> None:
    given = {"mean": (0.1,), "std": (0.2,)}
    model = create("dfformer_s18", in_chans=1, pretrained_cfg_overlay=given)
    assert {key: resolve_model_data_config(model)[key] for key in given} == given
    assert resolve_model_data_config(create("dfformer_s18"))["input_size"] == (3, 224, 224)  # no other model's


@EVERY_NAMED_MODEL
@torch.no_grad()
def test_saved_for_the_hub_and_read_again(name: str, tmp_path: Path) -> None:
    ours = {} if name == CONVFORMER else {"img_size": (64, 96)}
    model = create(name, num_classes=5, in_chans=1, **ours)
    save_for_hf(model, tmp_path)
    restored = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **SMALL).eval()
    x = images(channels=1)
    assert torch.equal(restored(x), model(x))
    if ours:
        assert resolve_model_data_config(restored)["input_size"] == (1, 64, 96)


# Arguments


@EVERY_MODEL
@pytest.mark.parametrize(
    ("device", "dtype"), [("meta", None), (None, torch.bfloat16), ("cpu", torch.float64), ("meta", torch.float16)]
)
def test_device_and_dtype(name: str, device: Any, dtype: Any) -> None:
    model = create(name, device=device, dtype=dtype)
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {device or "cpu"}
    assert {t.dtype for t in tensors} == {dtype or torch.float32}
    model.reset_classifier(3)
    head = next(model.get_classifier().parameters())
    assert (head.device.type, head.dtype) == (device or "cpu", dtype or torch.float32)


def test_takes_every_argument_of_timms_metaformer() -> None:
    wanted = inspect.signature(timm_metaformer.MetaFormer).parameters.keys() - {"kwargs"}
    assert wanted - inspect.signature(DFFormer).parameters.keys() == set()
