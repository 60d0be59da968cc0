"""The DFFormer family of vision models ("FFT-based Dynamic Token Mixer for Vision", AAAI 2024) for PyTorch and timm.

>>> import timm, dfformer
>>> model = timm.create_model("dfformer_s18", num_classes=10)
"""

import dfformer_kernels.flops  # noqa: F401 (registers what torch's flop counter counts)
from dfformer.checkpoint import load_checkpoint, load_model
from dfformer.inference import optimize_for_inference
from dfformer.layers import AFNO2D, DynamicFilter, GlobalFilter, SepConv, StarReLU
from dfformer.model import MetaFormer
from dfformer.registry import VARIANTS
from dfformer.replace import replace_dynamic_filters
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
