"""The model table, and its registration with timm: after ``import dfformer``, ``timm.create_model("dfformer_s18")``."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.error import URLError

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from dfformer.models.layers import AFNO2D, DynamicFilter, GlobalFilter, SepConv
from dfformer.models.metaformer import MetaFormer

# depths and dims of the four sizes (paper, table 1)
_SIZES: dict[str, dict[str, Any]] = {
    "s18": {"depths": (3, 3, 9, 3), "dims": (64, 128, 320, 512)},
    "s36": {"depths": (3, 12, 18, 3), "dims": (64, 128, 320, 512)},
    "m36": {"depths": (3, 12, 18, 3), "dims": (96, 192, 384, 576)},
    "b36": {"depths": (3, 12, 18, 3), "dims": (128, 256, 512, 768)},
}
_CONV_THEN_DYNAMIC = (SepConv, SepConv, DynamicFilter, DynamicFilter)

# Arguments of MetaFormer by model name.
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"dfformer_{size}": {**args, "token_mixers": DynamicFilter} for size, args in _SIZES.items()},
    **{f"cdfformer_{size}": {**args, "token_mixers": _CONV_THEN_DYNAMIC} for size, args in _SIZES.items()},
    "gfformer_s18": {**_SIZES["s18"], "token_mixers": GlobalFilter},
    # the paper's ablations
    "dfformer_s18_gelu": {
        **_SIZES["s18"],
        "token_mixers": partial(DynamicFilter, act1_layer=nn.GELU),
        "mlp_act": nn.GELU,
    },
    "dfformer_s18_relu": {
        **_SIZES["s18"],
        "token_mixers": partial(DynamicFilter, act1_layer=nn.ReLU),
        "mlp_act": nn.ReLU,
    },
    "dfformer_s18_k2": {**_SIZES["s18"], "token_mixers": partial(DynamicFilter, num_filters=2)},
    "dfformer_s18_d8": {**_SIZES["s18"], "token_mixers": partial(DynamicFilter, reweight_expansion_ratio=0.125)},
    "dfformer_s18_afno": {**_SIZES["s18"], "token_mixers": AFNO2D},
}

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


default_cfgs = generate_default_cfgs({f"{name}.in1k": _cfg(name) for name in VARIANTS})

__all__ = ["VARIANTS"]


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    try:
        return build_model_with_cfg(
            MetaFormer,
            name,
            pretrained,
            feature_cfg={
                "out_indices": (0, 1, 2, 3),
                "feature_cls": "getter",
                "norm": kwargs.get("fork_feat", False),
            },
            **{**VARIANTS[name], **kwargs},
        )
    except (URLError, TimeoutError, ConnectionError) as error:
        url = _WEIGHTS.format(name)
        raise RuntimeError(
            f"the pretrained weights of {name} could not be downloaded ({error}): fetch {url} where there is a network "
            f"and pass the file with pretrained_cfg_overlay=dict(file='{name}.pth') next to pretrained=True"
        ) from error


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name}; keyword arguments are MetaFormer's and timm's."
    return create


for _name in VARIANTS:
    setattr(sys.modules[__name__], _name, register_model(_entry_point(_name)))
