"""Models and programs that transform with matrix products, see `dfformer_kernels.dft_matmul`."""

import functools
from typing import Any, TypeVar

from torch import nn
from torch.export import ExportedProgram

from dfformer.models.exact import has_foreign_forward
from dfformer.models.spectral import AFNO2D
from dfformer.utils.copied import with_classes
from dfformer_kernels import MatmulTransforms, dft_matmul
from dfformer_kernels.ops import MATMUL_DECOMPOSITIONS

ModelT = TypeVar("ModelT", bound=nn.Module | ExportedProgram)


def with_dft_matmul(model: ModelT) -> ModelT:
    """``model`` with matrix products in place of this package's operators, for exporters that know only torch's.

    The products are real, and their matrices are constants of a trace; see `dfformer_kernels.dft_matmul`.

    Args:
        model: any module whose forward calls the operators, e.g. after `replace_dynamic_filters`, or a program from
            `torch.export`. It is not changed.

    Returns:
        A copy whose forward takes the same arguments and uses the products, or a new program. A copy can be traced,
        compiled, trained, also with checkpointed modules, and deep-copied, but not pickled.

    Raises:
        TypeError: ``model`` is neither.
        ValueError: ``model``'s forward was set on the instance, so that a copy's would run the original's layers.
    """
    if isinstance(model, ExportedProgram):
        return model.run_decompositions(MATMUL_DECOMPOSITIONS)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module or a program from torch.export, got {model!r}")
    if "forward" in vars(model):
        raise ValueError("model: expected the forward of its class, got one that was set on the instance")
    dft_matmul.mark_matrices_constant()
    # Not only the model's class: a checkpoint's backward calls the modules inside again, by themselves.
    kinds = {type(model)} | {type(module) for module in model.modules() if has_foreign_forward(module)}
    return with_classes(model, {kind: _with_products(kind) for kind in kinds})


def _with_products(kind: type[Any]) -> type[Any]:
    """A subclass of the same name that uses the products in its forward."""

    @functools.wraps(kind.forward)  # exporters read its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with MatmulTransforms():
            return kind.forward(self, *args, **kwargs)

    of_afno = {"matmul": True} if issubclass(kind, AFNO2D) else {}
    return type(kind.__name__, (kind,), {"forward": forward, **of_afno})
