"""The DFFormer family of vision models ("FFT-based Dynamic Token Mixer for Vision", AAAI 2024) for PyTorch and timm.

>>> import timm, dfformer
>>> model = timm.create_model("dfformer_s18", num_classes=10)
"""

from dfformer.layers import AFNO2D, DynamicFilter, GlobalFilter, SepConv, StarReLU
from dfformer.model import MetaFormer
from dfformer.registry import VARIANTS
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
]
