"""The public entries: `fuse` for modules and exported programs, `FusePass` for torch.compile."""

from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from dfformer_kernels.graph.report import Finding, FuseReport


def fuse(program: nn.Module | ExportedProgram, *inputs: Any, **named: Any) -> FuseReport:
    """Replaces rfft2, multiplication with filters and irfft2 in ``program`` by `dynamic_filter` and `global_filter`.

    The filters may be mixed by a softmax or by other weights. Or each channel has one filter, the same for all images
    or one for each. The module may be of any class, and have any layout, norm or way to mix filters.

    A chain of calls is replaced if four things hold. Nothing else uses its intermediate results. Its axes, sizes and
    norms are those of the step. It is a polynomial of the signal, the filters and their weights. And its outputs and
    gradients agree with ours in double precision on random inputs. For every other chain the report says why it was
    left alone.

    Args:
        program: a module or an ExportedProgram, changed in place. A module keeps its parameters, names and submodules.
            Layers that contain a chain become instances of subclasses. These run the rewritten graph for inputs of the
            shapes seen here, with any batch size, and the original forward for others; call this function once for each
            size. Such layers can be copied, pickled and compiled. Python attributes that a forward reads become
            constants. If a forward switches autocast off, its rewritten graph does not.
        inputs, named: the arguments to call a module with. It is called once, for evaluation and without gradients. An
            ExportedProgram takes none.

    Returns:
        A finding for each inverse transform of the program, fused or left alone; ``print`` shows one line for each.

    Raises:
        TypeError: ``program`` is neither, or inputs are given for an exported program.
    """
    if isinstance(program, ExportedProgram):
        if inputs or named:
            raise TypeError("fuse: inputs must not be given with an ExportedProgram, which has its own")
        return FuseReport(_fuse_exported(program))
    if not isinstance(program, nn.Module):
        raise TypeError(f"fuse: program: expected a module or an ExportedProgram, got {type(program).__name__}")
    from dfformer_kernels.graph.module import fuse_module  # imported late, because most programs fuse nothing

    return FuseReport(fuse_module(program, inputs, named))


class FusePass:
    """`fuse` for torch.compile: ``torch.compile(model, options={"pre_grad_custom_pass": FusePass()})``.

    ``FusePass()`` takes no arguments. ``report`` holds the findings for all graphs that the pass was called with.

    Args:
        graph: of a call, what to rewrite in place, in the form that Dynamo passes to Inductor or another backend.
    """

    def __init__(self) -> None:
        self.report = FuseReport()

    def __call__(self, graph: fx.Graph) -> None:
        self.report.found += _rewritten(graph)


def _fuse_exported(program: ExportedProgram) -> list[Finding]:
    found = []
    for module in program.graph_module.modules():  # code under a mode of its own is a separate graph
        if isinstance(module, fx.GraphModule):
            found += _rewritten(module.graph)
            module.recompile()
    program.validate()
    return found


def _rewritten(graph: fx.Graph) -> list[Finding]:
    from dfformer_kernels.graph.rewrite import rewrite
    from dfformer_kernels.graph.step import ATEN

    return rewrite(graph, ATEN, _where)


def _where(node: fx.Node) -> str:
    """The innermost module that a node comes from, if its graph records one."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return node.name
    path, kind = stack[-1]
    return f"{path or 'the model'} ({str(getattr(kind, '__name__', kind)).rpartition('.')[2]})"
