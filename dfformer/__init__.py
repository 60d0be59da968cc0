"""The DFFormer family of vision models ("FFT-based Dynamic Token Mixer for Vision", AAAI 2024) for PyTorch and timm.

Imports models, inference, export and dfformer_kernels, and registers the models with timm.

>>> import timm, dfformer
>>> model = timm.create_model("dfformer_s18", num_classes=10)
"""

import dfformer_kernels.ops.flops  # noqa: F401 (registers what torch's flop counter counts)
from dfformer.export.dft_matmul import with_dft_matmul
from dfformer.inference.optimize import optimize_for_inference
from dfformer.models.checkpoint import load_checkpoint, load_model
from dfformer.models.drop_in import replace_dynamic_filters, restore_dynamic_filters
from dfformer.models.layers import SepConv, StarReLU
from dfformer.models.metaformer import DFFormer
from dfformer.models.registry import (
    VARIANTS,
    cdfformer_b36,
    cdfformer_m36,
    cdfformer_s18,
    cdfformer_s36,
    dfformer_b36,
    dfformer_m36,
    dfformer_s18,
    dfformer_s18_afno,
    dfformer_s18_d8,
    dfformer_s18_gelu,
    dfformer_s18_k2,
    dfformer_s18_relu,
    dfformer_s36,
    gfformer_s18,
    register_models,
)
from dfformer.models.spectral import AFNO2D, DynamicFilter, GlobalFilter
from dfformer_kernels import __version__

__all__ = [
    "AFNO2D",
    "VARIANTS",
    "DFFormer",
    "DynamicFilter",
    "GlobalFilter",
    "SepConv",
    "StarReLU",
    "__version__",
    "cdfformer_b36",
    "cdfformer_m36",
    "cdfformer_s18",
    "cdfformer_s36",
    "dfformer_b36",
    "dfformer_m36",
    "dfformer_s18",
    "dfformer_s18_afno",
    "dfformer_s18_d8",
    "dfformer_s18_gelu",
    "dfformer_s18_k2",
    "dfformer_s18_relu",
    "dfformer_s36",
    "gfformer_s18",
    "load_checkpoint",
    "load_model",
    "optimize_for_inference",
    "register_models",
    "replace_dynamic_filters",
    "restore_dynamic_filters",
    "with_dft_matmul",
]
