"""Models and programs that transform with matrix products, see `dfformer_kernels.dft_matmul`."""

import functools
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.export import ExportedProgram

from dfformer.models.spectral import AFNO2D
from dfformer.utils.eager_baseline import with_classes
from dfformer_kernels import afno, dft_matmul
from dfformer_kernels.ops.filter import MATMUL_DECOMPOSITIONS, MatmulTransforms

ModelT = TypeVar("ModelT", bound=nn.Module | ExportedProgram)


def with_dft_matmul(model: ModelT) -> ModelT:
    """``model`` with matrix products in place of this package's operators, for exporters that know only torch's.

    The products are real, and their matrices are constants of a trace; see `dfformer_kernels.dft_matmul`.

    Args:
        model: any module whose forward calls the operators, e.g. after `replace_dynamic_filters`, or a program from
            `torch.export`. It is not changed.

    Returns:
        A copy whose forward takes the same arguments and uses the products, or a new program. A copy can be traced,
        compiled, trained and deep-copied, but not pickled.

    Raises:
        ValueError: ``model``'s forward was set on the instance, so that a copy's would run the original's layers.
    """
    if isinstance(model, ExportedProgram):
        return model.run_decompositions(MATMUL_DECOMPOSITIONS)
    if "forward" in vars(model):
        raise ValueError("model: its forward was set on the instance, accepted are forwards of classes")
    dft_matmul.be_constants()
    copied = with_classes(model, {AFNO2D: _AFNO2D})
    kind = type(copied)

    @functools.wraps(kind.forward)  # exporters read its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with MatmulTransforms():
            return kind.forward(self, *args, **kwargs)

    copied.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return copied


class _AFNO2D(AFNO2D):
    def filter(self, x: Tensor) -> Tensor:
        fraction, threshold = self.hard_thresholding_fraction, self.sparsity_threshold
        return afno.filter_matmul(x, self.w1, self.b1, self.w2, self.b2, fraction, threshold)
