"""Transforms as matrix products: against the operators, and in the ONNX that torch makes of any model with them."""

import copy
import warnings
from collections.abc import Callable
from inspect import unwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import ERROR, MIXERS, Detector, detector, images, mixed, spread, tiny
from filter_copies import FiltersFirst
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import dfformer
from dfformer.utils.eager_baseline import eager_baseline
from dfformer_kernels import MatmulTransforms, dft_matmul, dynamic_filter, global_filter
from dfformer_kernels.kept import kept
from dfformer_kernels.tolerance import BOUND, relative_error

# Even and odd sides, wide and tall ones, and the smallest.
PLANES = [(8, 8), (7, 5), (4, 9), (12, 6), (1, 2), (1, 1)]
# Of what TensorRT 8.4 runs (docs/operators.md of onnx-tensorrt, which has no DFT and no Shrink), what models need; and
# LayerNormalization, which came with opset 17.
TENSORRT = {
    "Add", "BatchNormalization", "Cast", "Clip", "Concat", "Constant", "Conv", "Div", "Einsum", "Erf", "Expand",
    "Flatten", "Gather", "Gemm", "GlobalAveragePool", "Identity", "LayerNormalization", "MatMul", "Mul", "Neg",
    "Pad", "Pow", "ReduceMean", "Relu", "Reshape", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt",
    "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


@pytest.mark.parametrize("plane", PLANES, ids=str)
@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_matrix_products_are_the_transforms(mixer: str, plane: tuple[int, int]) -> None:
    """In float64 to its rounding, on spectra that are not Hermitian where the convention matters."""
    layer = spread(MIXERS[mixer](dim=8, size=plane).double())
    x = torch.randn(3, *plane, 8, dtype=torch.float64)
    assert relative_error(dfformer.with_dft_matmul(layer)(x), eager_baseline(layer)(x)) < 1e-14


class OwnAFNO(dfformer.AFNO2D):
    """Somebody's subclass, which changes nothing."""


def test_subclasses_of_afno_and_autocast() -> None:
    layer, x = spread(OwnAFNO(8)), torch.randn(2, 6, 5, 8)
    copied = dfformer.with_dft_matmul(layer)
    program = torch.export.export(copied, (x,))
    assert not [node for node in program.graph.nodes if "fft" in str(node.target)]
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(copied(x), layer(x)) < BOUND[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, logits, basis = torch.randn(2, 6, 5, 8).to(dtype), torch.randn(2, 3, 8).to(dtype), torch.randn(6, 3, 3, 2)
    with MatmulTransforms():
        y = dynamic_filter(x, logits, basis)
    assert y.dtype == dtype
    assert relative_error(y, dynamic_filter(x.double(), logits.double(), basis.double())) < BOUND[dtype]


@pytest.mark.parametrize("kind", ["routing", "grouped", "given", "channels_first"])
def test_general_steps(kind: str) -> None:
    x, logits, basis = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 8), torch.randn(6, 3, 3, 2)
    weight = torch.randn(2, 6, 3, 8, 2)
    step: Callable[[], Tensor] = {
        "routing": lambda: dynamic_filter(x, logits, basis, normalization=None),
        "grouped": lambda: dynamic_filter(x, logits, torch.stack([basis, -basis])),
        "given": lambda: global_filter(x, weight),
        "channels_first": lambda: global_filter(x.permute(0, 3, 1, 2), weight, data_format="channels_first"),
    }[kind]
    with MatmulTransforms():
        y = step()
    assert relative_error(y, step()) < BOUND[torch.float32]


def test_bad_arguments_are_named() -> None:
    with MatmulTransforms(), pytest.raises(ValueError, match="logits"):
        dynamic_filter(torch.randn(2, 6, 5, 8), torch.randn(2, 3, 7), torch.randn(6, 3, 3, 2))


def test_copy_is_the_model() -> None:
    """Of its class, with its names and gradients; the model goes on with the operators."""
    model, x = mixed(), images(2)
    copied = dfformer.with_dft_matmul(model)
    assert isinstance(copied, dfformer.DFFormer)
    assert copied.state_dict().keys() == model.state_dict().keys()
    gradients = []
    for each in (model, copied, copy.deepcopy(copied)):
        each(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]))
    assert relative_error(gradients[1], gradients[0]) < ERROR
    assert relative_error(gradients[2], gradients[0]) < ERROR
    assert _operators(torch.export.export(model, (x,)))
    assert not _operators(torch.export.export(copied, (x,)))


def test_program() -> None:
    """What torch.export made of a model, too; its matrices are constants, once for each plane."""
    model = tiny()
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    converted = dfformer.with_dft_matmul(program)
    assert _operators(program)
    assert not _operators(converted)
    x = images(5)
    assert relative_error(converted.module()(x), model(x)) < ERROR
    shapes = sorted(tuple(constant.shape) for constant in converted.constants.values())
    assert shapes == [(9, 10), (10, 9), (22, 22), (22, 22)]  # of an 11x9 plane


def _operators(program: torch.export.ExportedProgram) -> bool:
    return any(str(node.target).startswith("dfformer.") for node in program.graph.nodes)


def test_a_pruned_model() -> None:
    """It keeps the weights that it computed, with their graph."""
    model, x = tiny(), images(2)
    prune.l1_unstructured(model.stages[0][0].token_mixer, "complex_weights", 0.5)
    assert relative_error(dfformer.with_dft_matmul(model)(x), model(x)) < ERROR


def test_checkpointed_modules_recompute_with_the_products() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(detector().mixer)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layers, x, use_reentrant=False)

    model, x = Checkpointed(), images(2, 8, 8, 8).requires_grad_()
    dfformer.replace_dynamic_filters(model)
    gradients = []
    for each in (model, dfformer.with_dft_matmul(model)):
        each(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]))
    assert relative_error(gradients[1], gradients[0]) < ERROR


def test_torch_traces_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compares two traces; in a new process only the first makes the matrices."""
    monkeypatch.setattr(dft_matmul, "_matrices_on", kept(64)(unwrap(dft_matmul._matrices_on)))
    model, x = tiny(), images(2)
    copied = dfformer.with_dft_matmul(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sizes become constants
        traced = torch.jit.trace(copied, x)
    assert relative_error(traced(x), model(x)) < ERROR


def test_other_things_than_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module or a program from torch\.export, got 3"):
        dfformer.with_dft_matmul(3)  # type: ignore[type-var]


def test_forward_on_the_instance_is_refused() -> None:
    model = tiny()
    model.forward = model.forward_features
    with pytest.raises(ValueError, match="model: expected the forward of its class, got one that was set"):
        dfformer.with_dft_matmul(model)


# torch.onnx.export by itself


@pytest.fixture(scope="module")
def swapped() -> Detector:
    model = detector()
    report = dfformer.replace_dynamic_filters(model)
    assert [row.reason for row in report] == [""]
    return model


def to_onnx(model: nn.Module, x: Tensor, path: Path, dynamo: bool, **options: Any) -> Any:
    """An onnxruntime session of ``model``, for batches of any size, as anybody would export it."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, and that the older exporter is deprecated
        if dynamo:
            shapes = ({0: torch.export.Dim("batch")},)
            torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, dynamic_shapes=shapes, **options)
        else:
            axes = {"images": {0: "batch"}}
            torch.onnx.export(model, (x,), path, dynamo=False, input_names=["images"], dynamic_axes=axes)
    return onnxruntime.InferenceSession(path)


class Step(nn.Module):
    """A step on 6x5 planes of 8 channels, with logits of each image."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        shape, dtype, self.step = STEPS[kind]
        self.filters = nn.Parameter(torch.randn(shape, dtype=dtype))

    def forward(self, images: Tensor) -> Tensor:
        return self.step(images, images[:, 0, :3], self.filters)


STEPS: dict[str, tuple[tuple[int, ...], torch.dtype, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "grouped": ((2, 6, 3, 3, 2), torch.float32, dynamic_filter),
    "complex": ((2, 6, 3, 3), torch.complex64, dynamic_filter),
    "complex, one a channel": ((6, 3, 8), torch.complex64, lambda x, logits, weight: global_filter(x, weight)),
    "given": (
        (6, 3, 8, 2),
        torch.float32,
        lambda x, logits, weight: global_filter(x, logits.sum((1, 2))[:, None, None, None, None] * weight),
    ),
    "computed": ((6, 3, 3), torch.complex64, lambda x, logits, basis: dynamic_filter(x, logits, 2 * basis)),
}


@pytest.mark.parametrize("kind", ["grouped", "complex", "complex, one a channel", "given", "swapped"])
def test_every_kind_of_filters_in_the_older_exporter(kind: str, tmp_path: Path) -> None:
    model, shape = (FiltersFirst(8), (8, 8, 8)) if kind == "swapped" else (Step(kind), (6, 5, 8))
    if kind == "swapped":
        assert len(dfformer.replace_dynamic_filters(model)) == 1
    session = to_onnx(model, images(2, *shape), tmp_path / "model.onnx", dynamo=False)
    x = images(3, *shape)
    (y,) = session.run(None, {"images": x.numpy()})
    assert relative_error(torch.from_numpy(y), model(x)) < ERROR


def test_complex_filters_that_the_older_exporter_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="or dynamo=True"):
        to_onnx(Step("computed"), images(2, 6, 5, 8), tmp_path / "model.onnx", dynamo=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mixer", MIXERS)
def test_onnx_before_any_matrices_are_kept(mixer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a new process: the matrices are made while torch.export traces with fake tensors."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    monkeypatch.setattr(dft_matmul, "_matrices_on", kept(64)(unwrap(dft_matmul._matrices_on)))
    layer, x = MIXERS[mixer](dim=8, size=(6, 5)).eval(), torch.randn(2, 6, 5, 8)
    torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(torch.from_numpy(y), layer(x)) < ERROR


@pytest.mark.parametrize(
    ("kind", "dynamo"), [("detector", True), ("detector", False), ("classifier", False)]
)  # test_formats.py has a classifier of the newer exporter
def test_onnx_of_torch(kind: str, dynamo: bool, swapped: Detector, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    model, shape = (swapped, (3, 32, 32)) if kind == "detector" else (mixed(), (1, 24, 20))
    path = tmp_path / "model.onnx"
    session = to_onnx(model, images(2, *shape), path, dynamo)
    for batch in (1, 3):
        x = images(batch, *shape)
        outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        expected = torch.utils._pytree.tree_leaves(model(x))
        for actual, wanted in zip(outputs, expected, strict=True):
            assert relative_error(torch.from_numpy(actual), wanted) < ERROR
    if dynamo:
        used = {node.op_type for node in onnx.load(path).graph.node}
        assert used <= TENSORRT
        assert [(entry.domain, entry.version >= 17) for entry in onnx.load(path).opset_import] == [("", True)]


def test_filters_of_another_plane_in_onnx_of_torch(tmp_path: Path) -> None:
    """The file resizes them itself, and in double precision too: not folded, it has no constant that torch rounds."""
    layer = spread(dfformer.GlobalFilter(8, size=(9, 8), weight_resize=True, dtype=torch.float64))
    x = torch.randn(2, 6, 11, 8, dtype=torch.float64)
    session = to_onnx(layer, x, tmp_path / "model.onnx", dynamo=True, optimize=False)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(torch.from_numpy(y), layer(x)) < BOUND[torch.float64]
