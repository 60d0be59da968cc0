"""`fuse` on exported programs and `FusePass` on Dynamo's graphs."""

import copy
import io
from collections.abc import Callable
from typing import Any

import filter_copies as copies
import pytest
import torch
from conftest import require_compiler
from extent import FULL
from filter_chains import OTHER, SAME, images, network
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export

from dfformer_kernels import FusePass, fuse
from dfformer_kernels.tolerance import gradient_errors, relative_error

pytestmark = pytest.mark.usefixtures("fresh_compiler")
MIXED = ["einsum", "broadcast and sum", "pairs", "in place", "sigmoid"]
EXPORTED = [*MIXED, "a filter a channel, channels-first", "a permuted view", "between writes"]


def exported(model: nn.Module, x: Tensor) -> ExportedProgram:
    return export(model, (x,), dynamic_shapes=({0: Dim("batch")},))


def calls(program: ExportedProgram) -> str:
    return " ".join(str(node.target) for node in program.graph.nodes)


# Every second one decomposed.
PROGRAMS = [(n, d) for i, n in enumerate(EXPORTED) for d in (False, True) if FULL or d == bool(i % 2)]


@pytest.mark.parametrize(("name", "decomposed"), PROGRAMS)
def test_exported_programs(name: str, decomposed: bool) -> None:
    step, channels_first, mixed = SAME[name]
    model = network(step, channels_first, 3 if mixed else 6).eval()
    program = exported(model, images(channels_first))
    if decomposed:
        program = program.run_decompositions()
    names = list(program.state_dict)
    assert "fft" in calls(program)
    report = fuse(program)
    assert str(report).endswith(f"is now {'dynamic' if mixed else 'global'}_filter"), report
    assert "fft" not in calls(program)
    assert list(program.state_dict) == names
    x = images(channels_first, batch=5)
    assert relative_error(program.module()(x), model(x)) < 2e-6


def test_an_exported_program_trains_saves_and_decomposes() -> None:
    model = network(SAME["einsum"][0]).eval()
    fused = exported(model, images())
    fuse(fused)
    x = images(batch=3)
    module = fused.module()
    ours = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    assert max(gradient_errors(ours, torch.autograd.grad(model(x).square().sum(), list(model.parameters())))) < 1e-5
    buffer = io.BytesIO()
    torch.export.save(fused, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    assert torch.equal(loaded.module()(x), module(x))
    assert "dfformer.dynamic_filter" in calls(fused.run_decompositions())
    with pytest.raises(TypeError, match="inputs must not be given"):
        fuse(fused, x)


def test_a_graph_under_a_mode_of_its_own() -> None:
    """Gradients off around the chain: Dynamo and export put it into a graph of its own."""

    class NoGradients(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 5, 6, 2))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = torch.fft.irfft2(torch.fft.rfft2(x, dim=(1, 2)) * torch.view_as_complex(self.weight), dim=(1, 2))
            return y + x

    model = NoGradients()
    program = exported(model, images())
    assert len(fuse(program).fused) == 1
    x = images()
    assert relative_error(program.module()(x), model(x)) < 2e-6


def test_an_exported_program_of_filters_cut_to_the_batch() -> None:
    """They are all of them for the example, but the program is for smaller batches too."""

    class OfEachSample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8, 5, 6, 2))

        def forward(self, x: Tensor) -> Tensor:
            filters = torch.view_as_complex(self.weight)[: x.shape[0]]
            return torch.fft.irfft2(torch.fft.rfft2(x, dim=(1, 2)) * filters, dim=(1, 2))

    model = OfEachSample()
    program = export(model, (images(batch=4),), dynamic_shapes=({0: Dim("batch", max=4)},))
    assert len(fuse(program).fused) == 1
    x = images(batch=3)
    assert relative_error(program.module()(x), model(x)) < 2e-6


@pytest.mark.parametrize("name", ["one image's filters", "overwritten input", "squared", "enlarged", "norms"])
def test_exported_programs_of_something_else(name: str) -> None:
    model = network(OTHER[name][0]).eval()
    program = exported(model, images())
    for there in (program, program.run_decompositions()):
        if name == "overwritten input" and there is not program:
            continue  # a decomposed program overwrites nothing
        before = calls(there)
        report = fuse(there)
        assert len(report.left_alone) == 1, report
        assert calls(there) == before


def eager(fuse_pass: FusePass) -> Callable[..., Any]:
    """A compiler's backend that rewrites and runs."""

    def backend(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        fuse_pass(module.graph)
        module.recompile()
        return module.forward

    return backend


@pytest.mark.parametrize(
    "name", ["einsum", "tensordot", "one-dimensional transforms", "windows", "a filter a channel", "between writes"]
)
def test_compiled_graphs(name: str) -> None:
    step, channels_first, mixed = SAME[name]
    model = network(step, channels_first, 3 if mixed else 6).eval()
    fuse_pass = FusePass()
    compiled = torch.compile(model, backend=eager(fuse_pass))
    for batch in (2, 3, 5):
        x = images(channels_first, batch).requires_grad_()
        ours, theirs = compiled(x), model(x)
        assert relative_error(ours, theirs) < 2e-6
        leaves = [x, *model.parameters()]
        gradients, expected = (torch.autograd.grad(y.square().sum(), leaves, allow_unused=True) for y in (ours, theirs))
        pairs = [(a, b) for a, b in zip(gradients, expected, strict=True) if a is not None and b is not None]
        assert [a is None for a in gradients] == [b is None for b in expected]
        assert max(gradient_errors([a for a, _ in pairs], [b for _, b in pairs])) < 1e-5
    assert len(fuse_pass.report.fused) == 2, fuse_pass.report  # for a batch of two, then for any
    assert not fuse_pass.report.left_alone


def test_transforms_of_values_that_a_graph_does_not_tell_are_left_alone() -> None:
    fuse_pass, graph = FusePass(), fx.symbolic_trace(copies.Authors(6)).graph
    before = str(graph)
    fuse_pass(graph)
    assert str(graph) == before
    assert fuse_pass.report.found == []


def softmax_without_gradient(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    with torch.no_grad():
        routing = logits.softmax(1)
    M = torch.einsum("bfc,hkf->bhkc", routing.to(torch.complex64), torch.view_as_complex(basis))
    return torch.fft.irfft2(torch.fft.rfft2(x, dim=(1, 2)) * M, dim=(1, 2))


def test_a_softmax_without_gradient_stays_one() -> None:
    model, fuse_pass, x = network(softmax_without_gradient).eval(), FusePass(), images()
    y = torch.compile(model, backend=eager(fuse_pass))(x)
    assert len(fuse_pass.report.fused) == 1
    assert relative_error(y, model(x)) < 2e-6
    y.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["layers.0.basis"]


def overwritten_softmax(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    """Nothing takes what the call that writes returns."""
    routing = torch.softmax(logits, 1)
    routing[:, 0].zero_()
    M = torch.einsum("bfc,hkf->bhkc", routing.to(torch.complex64), torch.view_as_complex(basis))
    return torch.fft.irfft2(torch.fft.rfft2(x, dim=(1, 2)) * M, dim=(1, 2))


def test_an_overwritten_softmax_is_not_computed_again() -> None:
    model, fuse_pass, x = network(overwritten_softmax).eval(), FusePass(), images()
    program = exported(model, x)
    fuse(program)
    for fused in (torch.compile(model, backend=eager(fuse_pass)), program.module()):
        assert relative_error(fused(x), model(x)) < 2e-6
    assert len(fuse_pass.report.fused) == 1


def product_without_gradient(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    X = torch.fft.rfft2(x, dim=(1, 2))
    with torch.no_grad():
        Y = X * torch.view_as_complex(basis).sum(2, keepdim=True).expand(-1, -1, 6)
    return torch.fft.irfft2(Y, dim=(1, 2)) + x


def test_compiled_graphs_of_something_else() -> None:
    for step, reason in (
        (product_without_gradient, "gradients are switched on or off inside it"),
        (OTHER["rows of a spectrum in place"][0], "also needed by getitem"),
        (OTHER["divided"][0], "truediv by 8 lies between"),
        (OTHER["overwritten by an activation"][0], "may be overwritten in between (relu)"),
        (OTHER["overwritten by another name"][0], "may be overwritten in between (__imul__)"),
    ):
        torch.compiler.reset()
        model, fuse_pass = network(step).eval(), FusePass()
        x = images()
        expected = model(x)
        result = torch.compile(model, backend=eager(fuse_pass))(x)
        assert reason in str(fuse_pass.report)
        assert not fuse_pass.report.fused
        first, second = (y[0] if isinstance(y, tuple) else y for y in (result, expected))
        assert torch.equal(first, second)


def test_compiled_graphs_of_any_plane() -> None:
    model, fuse_pass = copies.Authors(6).eval(), FusePass()
    compiled = torch.compile(model, backend=eager(fuse_pass), dynamic=True)
    for plane in ((8, 8), (9, 14), (12, 7)):
        x = torch.randn(2, *plane, 6)
        assert relative_error(compiled(x), model(x)) < 2e-6
    assert fuse_pass.report.fused
    assert not fuse_pass.report.left_alone


@pytest.mark.slow
def test_inductor() -> None:
    require_compiler()
    model, fuse_pass = network(SAME["einsum"][0]).eval(), FusePass()
    original = copy.deepcopy(model)
    compiled = torch.compile(model, options={"pre_grad_custom_pass": fuse_pass})
    x = images(batch=3)
    assert relative_error(compiled(x), original(x)) < 2e-6
    assert len(fuse_pass.report.fused) == 1
