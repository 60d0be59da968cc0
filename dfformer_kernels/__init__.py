"""The dynamic filter step as fused operators: correct, deterministic, and fast on devices that have a backend.

Imports torch and numpy, never dfformer. Public are the names below and the modules that CONTRIBUTING.md calls public.

>>> from dfformer_kernels import dynamic_filter
>>> y = dynamic_filter(x, logits, basis)  # x (B,H,W,C), logits (B,F,C), basis (H,W//2+1,F,2)
"""

__version__ = "0.1.0"

from dfformer_kernels.dispatch import backends, use_backend
from dfformer_kernels.graph.fuse import FusePass, fuse
from dfformer_kernels.ops.conv2d import convolution
from dfformer_kernels.ops.filter import (
    DynamicFilterFunction,
    MatmulTransforms,
    dynamic_filter,
    global_filter,
    star_relu,
)
from dfformer_kernels.ops.linear import linear
from dfformer_kernels.ops.mlp import mlp

__all__ = [
    "DynamicFilterFunction",
    "FusePass",
    "MatmulTransforms",
    "backends",
    "convolution",
    "dynamic_filter",
    "fuse",
    "global_filter",
    "linear",
    "mlp",
    "star_relu",
    "use_backend",
]
