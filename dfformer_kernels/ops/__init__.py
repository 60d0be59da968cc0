"""The operators: public functions, custom ops, fakes and autograd, each defined once for all backends.

Imports problem, dispatch, reference and dft_matmul, never a backend. Layers may import the names below, and flops.
"""

from dfformer_kernels.ops.filter import MATMUL_DECOMPOSITIONS
from dfformer_kernels.ops.linear import by_onednn, is_large, pack_for_onednn
from dfformer_kernels.ops.mlp import in_chunks
from dfformer_kernels.ops.registration import is_under_functorch, without_autocast

__all__ = [
    "MATMUL_DECOMPOSITIONS",
    "by_onednn",
    "in_chunks",
    "is_large",
    "is_under_functorch",
    "pack_for_onednn",
    "without_autocast",
]
