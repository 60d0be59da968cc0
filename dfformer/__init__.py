"""The DFFormer family of vision models ("FFT-based Dynamic Token Mixer for Vision", AAAI 2024) for PyTorch and timm.

>>> import timm, dfformer
>>> model = timm.create_model("dfformer_s18", num_classes=10)
"""

import dfformer_kernels.ops.flops  # noqa: F401 (registers what torch's flop counter counts)
from dfformer.inference.optimize import optimize_for_inference
from dfformer.models.checkpoint import load_checkpoint, load_model
from dfformer.models.drop_in import replace_dynamic_filters
from dfformer.models.layers import AFNO2D, DynamicFilter, GlobalFilter, SepConv, StarReLU
from dfformer.models.metaformer import MetaFormer
from dfformer.models.registry import VARIANTS
from dfformer_kernels import __version__

__all__ = [
    "AFNO2D",
    "VARIANTS",
    "DynamicFilter",
    "GlobalFilter",
    "MetaFormer",
    "SepConv",
    "StarReLU",
    "__version__",
    "load_checkpoint",
    "load_model",
    "optimize_for_inference",
    "replace_dynamic_filters",
]
