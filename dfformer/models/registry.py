"""The models by name: one function for each, registered with timm when ``dfformer`` is imported.

A name belongs to the code that registered it last. If the authors' code has already registered these names, importing
``dfformer`` takes them over, with one warning. If the authors' code is imported later, it takes them over, with timm's
warnings, and `register_models` takes them back. The functions here always build this package's models.
"""

import pickle
import warnings
from functools import partial
from typing import Any
from urllib.error import URLError

import timm.models
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from torch import nn

from dfformer.models.layers import SepConv
from dfformer.models.metaformer import DFFormer
from dfformer.models.spectral import AFNO2D, DynamicFilter, GlobalFilter
from dfformer.utils.text import reason, without_advice

# depths and dims of the four sizes (paper, table 1)
_SIZES: dict[str, dict[str, Any]] = {
    "s18": {"depths": (3, 3, 9, 3), "dims": (64, 128, 320, 512)},
    "s36": {"depths": (3, 12, 18, 3), "dims": (64, 128, 320, 512)},
    "m36": {"depths": (3, 12, 18, 3), "dims": (96, 192, 384, 576)},
    "b36": {"depths": (3, 12, 18, 3), "dims": (128, 256, 512, 768)},
}
_S18 = _SIZES["s18"]
_CONV_THEN_DYNAMIC = (SepConv, SepConv, DynamicFilter, DynamicFilter)

VARIANTS: dict[str, dict[str, Any]] = {
    **{f"dfformer_{size}": {**args, "token_mixers": DynamicFilter} for size, args in _SIZES.items()},
    **{f"cdfformer_{size}": {**args, "token_mixers": _CONV_THEN_DYNAMIC} for size, args in _SIZES.items()},
    "gfformer_s18": {**_S18, "token_mixers": GlobalFilter},
    # the paper's ablations
    "dfformer_s18_gelu": {**_S18, "token_mixers": partial(DynamicFilter, act1_layer=nn.GELU), "mlp_act": nn.GELU},
    "dfformer_s18_relu": {**_S18, "token_mixers": partial(DynamicFilter, act1_layer=nn.ReLU), "mlp_act": nn.ReLU},
    "dfformer_s18_k2": {**_S18, "token_mixers": partial(DynamicFilter, num_filters=2)},
    "dfformer_s18_d8": {**_S18, "token_mixers": partial(DynamicFilter, reweight_expansion_ratio=0.125)},
    "dfformer_s18_afno": {**_S18, "token_mixers": AFNO2D},
}
"""DFFormer's arguments by model name.

The functions of these names are for timm and IDEs: ``pretrained`` downloads the authors' weights, and a RuntimeError
says where to fetch them if that fails; ``kwargs`` replace these arguments.
"""

_WEIGHTS = "https://github.com/okojoalg/dfformer/releases/download/weights/{}.pth"
# The authors published weights for these; the files carry no hash.
_PUBLISHED = tuple(f"{family}_{size}" for family in ("dfformer", "cdfformer") for size in _SIZES)


def _cfg(name: str) -> dict[str, Any]:
    return {
        "url": _WEIGHTS.format(name) if name in _PUBLISHED else "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "downsample_layers.0.conv",
        "classifier": "head.fc2",
        "license": "mit",
        "paper_ids": "arXiv:2303.03932",
        "origin_url": "https://github.com/okojoalg/dfformer",
    }


default_cfgs = timm.models.generate_default_cfgs({f"{name}.in1k": _cfg(name) for name in VARIANTS})


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    arguments = {**VARIANTS[name], **kwargs}
    depths = arguments["depths"]
    stages = len(depths) if isinstance(depths, list | tuple) else 0  # the model refuses others
    feature_cfg = {"out_indices": tuple(range(stages)), **_feature_class(arguments)}
    try:
        model = timm.models.build_model_with_cfg(DFFormer, name, pretrained, feature_cfg=feature_cfg, **arguments)
    except (URLError, TimeoutError, ConnectionError) as error:
        url = _WEIGHTS.format(name)
        raise RuntimeError(
            f"the pretrained weights of {name} could not be downloaded ({error}): fetch {url} where there is a network "
            f"and pass the file with pretrained_cfg_overlay=dict(file='{name}.pth') next to pretrained=True"
        ) from error
    except (RuntimeError, pickle.UnpicklingError) as error:
        if without_advice(str(error)) == str(error):
            raise
        raise RuntimeError(f"the pretrained weights of {name} were refused: {reason(error)}") from None
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **_images(model.pretrained_cfg, arguments)}
    return model


def _images(cfg: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Entries of pretrained_cfg for the images that a model was created for; timm.data looks for them there.

    Height and width follow ``img_size``, unless ``pretrained_cfg_overlay`` or the saved model's configuration gives
    them. Statistics follow ``in_chans`` as timm's adapted first convolution does: a single channel has the mean of the
    three colours, other numbers of channels repeat them.
    """
    channels, *size = cfg["input_size"]
    in_chans, img_size = arguments.get("in_chans", channels), arguments.get("img_size")
    saved = (arguments.get("pretrained_model_args") or {}).get("img_size")
    if img_size not in (None, saved) and "input_size" not in (arguments.get("pretrained_cfg_overlay") or {}):
        size = to_2tuple(img_size)
    statistics = {key: cfg[key] for key in ("mean", "std") if cfg.get(key) and len(cfg[key]) != in_chans}
    for key, v in statistics.items():
        statistics[key] = (sum(v) / len(v),) if in_chans == 1 else tuple(v[i % len(v)] for i in range(in_chans))
    return {"input_size": (in_chans, *size), **statistics}


def _feature_class(arguments: dict[str, Any]) -> dict[str, Any]:
    """The feature extractor for ``features_only``, and its arguments; removes ``feature_cls`` from ``arguments``."""
    if not arguments.get("features_only"):
        return {}
    fork_feat = arguments.get("fork_feat", False)
    feature_cls = arguments.pop("feature_cls", "getter")
    if isinstance(feature_cls, str):
        feature_cls = feature_cls.lower()
    if feature_cls == "getter":
        return {"feature_cls": feature_cls, "norm": fork_feat}
    if fork_feat:
        raise ValueError(f"feature_cls: with fork_feat=True, expected 'getter', got {feature_cls!r}")
    rewriting = {"list": timm.models.FeatureListNet, "dict": timm.models.FeatureDictNet}.get(feature_cls, feature_cls)
    if rewriting in (timm.models.FeatureListNet, timm.models.FeatureDictNet):
        return {"feature_cls": lambda model, **cfg: rewriting(_in_order_of_execution(model), **cfg)}
    return {"feature_cls": feature_cls}


def _in_order_of_execution(model: DFFormer) -> nn.Module:
    """The stages' modules as children in the order of execution, which these two extractors of timm rely on."""
    flat = nn.Module()
    for i, (downsample, stage) in enumerate(zip(model.downsample_layers, model.stages, strict=True)):
        flat.add_module(f"downsample_layers_{i}", downsample)
        flat.add_module(f"stages_{i}", stage)
    flat.feature_info = [{**info, "module": f"stages_{i}"} for i, info in enumerate(model.feature_info)]  # type: ignore[assignment]
    return flat


def dfformer_s18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DFFormer-S18: dynamic filters in all four stages."""
    return _create("dfformer_s18", pretrained, **kwargs)


def dfformer_s36(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DFFormer-S36: dynamic filters in all four stages."""
    return _create("dfformer_s36", pretrained, **kwargs)


def dfformer_m36(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DFFormer-M36: dynamic filters in all four stages."""
    return _create("dfformer_m36", pretrained, **kwargs)


def dfformer_b36(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DFFormer-B36: dynamic filters in all four stages."""
    return _create("dfformer_b36", pretrained, **kwargs)


def cdfformer_s18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CDFFormer-S18: separable convolutions in the first two stages, dynamic filters in the last two."""
    return _create("cdfformer_s18", pretrained, **kwargs)


def cdfformer_s36(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CDFFormer-S36: separable convolutions in the first two stages, dynamic filters in the last two."""
    return _create("cdfformer_s36", pretrained, **kwargs)


def cdfformer_m36(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CDFFormer-M36: separable convolutions in the first two stages, dynamic filters in the last two."""
    return _create("cdfformer_m36", pretrained, **kwargs)


def cdfformer_b36(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CDFFormer-B36: separable convolutions in the first two stages, dynamic filters in the last two."""
    return _create("cdfformer_b36", pretrained, **kwargs)


def gfformer_s18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GFFormer-S18: global filters, one learned filter per channel."""
    return _create("gfformer_s18", pretrained, **kwargs)


def dfformer_s18_gelu(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DFFormer-S18 with GELU instead of StarReLU."""
    return _create("dfformer_s18_gelu", pretrained, **kwargs)


def dfformer_s18_relu(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DFFormer-S18 with ReLU instead of StarReLU."""
    return _create("dfformer_s18_relu", pretrained, **kwargs)


def dfformer_s18_k2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DFFormer-S18 with a basis of two filters."""
    return _create("dfformer_s18_k2", pretrained, **kwargs)


def dfformer_s18_d8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DFFormer-S18 with a routing MLP of half the width."""
    return _create("dfformer_s18_d8", pretrained, **kwargs)


def dfformer_s18_afno(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DFFormer-S18 with adaptive Fourier neural operators instead of dynamic filters."""
    return _create("dfformer_s18_afno", pretrained, **kwargs)


def register_models() -> None:
    """Registers every model of `VARIANTS` with timm; importing ``dfformer`` calls it.

    Call it again to take the names back from other code that registered them. One warning names that code.
    """
    registered = {name: timm.models.model_entrypoint(name) for name in VARIANTS if timm.models.is_model(name)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm warns for each name
        for name in VARIANTS:
            own = globals()[name]  # the function of this name
            if registered.get(name) is not own:
                timm.models.register_model(own)
    others = {name: f.__module__ for name, f in registered.items() if f.__module__ != __name__}
    if others:
        warnings.warn(
            f"timm.create_model now builds dfformer's {', '.join(others)}, not those registered by "
            f"{', '.join(sorted(set(others.values())))}",
            stacklevel=2,
        )


register_models()
