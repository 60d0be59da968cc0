"""The public entries: `fuse` for modules and exported programs, `FusePass` for torch.compile."""

from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from dfformer_kernels.graph.report import Finding, FuseReport


def fuse(program: nn.Module | ExportedProgram, *inputs: Any, **named: Any) -> FuseReport:
    """Puts `dynamic_filter` and `global_filter` where ``program`` computes them by torch.fft: rfft2, multiplication
    with filters, and irfft2. The filters are mixed by a softmax or by other weights, or there is one a channel, for all
    images or for each. Any layout, norm and way of mixing; any class.

    A chain of calls is replaced if nothing else needs its intermediate results, if its axes, sizes and norms are those
    of the step, if it is a polynomial of the signal, the filters and their weights, and if outputs and gradients agree
    with ours in double precision on random inputs. Of anything else the report says why it was left alone.

    Args:
        program: a module or an ExportedProgram, changed in place. A module's parameters, names and submodules stay. Its
            layers with a chain become instances of subclasses that run the rewritten graph for inputs of the shapes
            seen here, of any batch, and the original for others; call this once for each size. They are copied and
            compiled like others, but not pickled: save the state dict. Plain attributes that a forward reads count as
            constants, and autocast that it switches off inside is not.
        inputs, named: what to call a module with, once, for evaluation and without gradients. None for an
            ExportedProgram.

    Raises:
        TypeError: ``program`` is neither, or inputs are given for an exported program.
    """
    if isinstance(program, ExportedProgram):
        if inputs or named:
            raise TypeError("fuse: inputs must not be given with an ExportedProgram, which has its own")
        return FuseReport(_fuse_exported(program))
    if not isinstance(program, nn.Module):
        raise TypeError(f"fuse: program must be a module or an ExportedProgram, got {type(program).__name__}")
    from dfformer_kernels.graph.module import fuse_module  # not on import: most programs fuse nothing

    return FuseReport(fuse_module(program, inputs, named))


class FusePass:
    """`fuse` for torch.compile: ``torch.compile(model, options={"pre_grad_custom_pass": FusePass()})``.

    It rewrites, in place, the graphs it is called with, as Dynamo gives them to inductor and to any other backend.
    ``report`` has the findings of all of them.
    """

    def __init__(self) -> None:
        self.report = FuseReport()

    def __call__(self, graph: fx.Graph) -> None:
        self.report.found += _rewritten(graph)


def _fuse_exported(program: ExportedProgram) -> list[Finding]:
    found = []
    for module in program.graph_module.modules():  # what runs under a mode of its own is a graph of its own
        if isinstance(module, fx.GraphModule):
            found += _rewritten(module.graph)
            module.recompile()
    program.validate()
    return found


def _rewritten(graph: fx.Graph) -> list[Finding]:
    from dfformer_kernels.graph.rewrite import rewrite
    from dfformer_kernels.graph.step import ATEN
    from dfformer_kernels.graph.vocabulary import Values

    return rewrite(graph, Values(), ATEN, _where)


def _where(node: fx.Node) -> str:
    """The innermost module that a node comes from, as far as its graph tells."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return node.name
    path, kind = stack[-1]
    return f"{path or 'the model'} ({str(getattr(kind, '__name__', kind)).rpartition('.')[2]})"
