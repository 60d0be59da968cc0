"""The formats of `dfformer.export.export`: how each is written, and how its runtime loads and runs it.

All formats except ``safetensors`` and ``hub`` begin with one `torch.export` of the model, for images of one size. By
default it is traced with transforms as matrix products (`dfformer.export.dft_matmul`), so that the file does not need
this package. If ``fused``, it is traced with this package's operators.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dfformer.export.dft_matmul import with_dft_matmul
from dfformer.export.hub import load_hub, save_hub
from dfformer.models.checkpoint import load_model, save_checkpoint

Run = Callable[[Tensor], Any]  # takes images

# Programs are traced with this batch size, and checked with others.
TRACED_BATCH = 2
# The largest batch in formats that plan their memory ahead.
MAX_IMAGES = 8
# The name of a file's description: a key of the format's metadata, a file in a .pt2, a method of a .pte.
DESCRIPTION = "dfformer"


class Source(NamedTuple):
    """The model to export, with example images and a description."""

    model: nn.Module  # in eval mode, its filters stored for the images' planes
    images: Tensor  # (TRACED_BATCH, in_chans, H, W)
    fused: bool
    description: dict[str, Any]

    def output_names(self) -> list[str]:
        count = len(pytree.tree_leaves(self.model(self.images)))
        return ["logits"] if count == 1 else [f"features_{i}" for i in range(count)]

    def description_text(self) -> str:
        return json.dumps(self.description)

    @torch.no_grad()
    def traced(self, most_images: int | None = None) -> torch.export.ExportedProgram:
        model = self.model if self.fused else with_dft_matmul(self.model)
        model(self.images)  # creates the matrices that become constants of the trace
        batch = torch.export.Dim("batch", max=most_images)
        return torch.export.export(model, (self.images,), dynamic_shapes=({0: batch},))


class Format(NamedTuple):
    """A format. ``write`` writes the file, and others that belong to it, into the path's folder.

    ``load`` returns a function of images.
    """

    suffix: str  # "": a folder
    write: Callable[[Source, Path], None]
    load: Callable[[Path], Run]
    needs: tuple[str, ...] = ()  # modules of the extra
    extra: str = "export"
    takes_fused: bool = False
    runs_here: bool = True  # this platform has a runtime for it
    traced: bool = True  # otherwise it holds weights and their description, for images of any size


def _write_pt2(source: Source, path: Path) -> None:
    torch.export.save(source.traced(), path, extra_files={DESCRIPTION: source.description_text()})


def _write_aoti(source: Source, path: Path) -> None:
    configs = {
        "aot_inductor.metadata": {DESCRIPTION: source.description_text()},
        "layout_optimization": False,  # it would take (B,H,W,C) for (B,C,H,W) (dfformer_kernels/ops/conv2d.py)
    }
    torch._inductor.aoti_compile_and_package(source.traced(), package_path=str(path), inductor_configs=configs)


def _write_onnx(source: Source, path: Path) -> None:
    names = source.output_names()
    program = torch.onnx.export(source.traced(), dynamo=True, verbose=False, input_names=["images"], output_names=names)
    assert program is not None
    program.model.metadata_props[DESCRIPTION] = source.description_text()
    program.save(path)


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(y) for y in session.run(None, {"images": images.cpu().numpy()})]


def _write_openvino(source: Source, path: Path) -> None:
    import openvino

    model = openvino.convert_model(source.traced())
    model.reshape([-1, *source.images.shape[1:]])
    for port, name in zip([*model.inputs, *model.outputs], ["images", *source.output_names()], strict=True):
        port.get_tensor().set_names({name})
    model.set_rt_info(source.description_text(), [DESCRIPTION])
    openvino.save_model(model, path, compress_to_fp16=False)


def _load_openvino(path: Path) -> Run:
    import openvino

    # Without this hint, some processors compute in bfloat16.
    model = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: [torch.from_numpy(y) for y in model([images.cpu().numpy()]).to_tuple()]


def _write_executorch(source: Source, path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = source.traced(MAX_IMAGES)
    for node in program.graph.nodes:
        if "memory_format" in node.kwargs:  # ExecuTorch's kernels support a single layout
            node.update_kwarg("memory_format", torch.contiguous_format)
    described = {DESCRIPTION: source.description_text()}
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=described)
    lowered.to_executorch().save(str(path))


def _load_executorch(path: Path) -> Run:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    forward = program.load_method("forward")
    # Cloned, because the next call overwrites the memory of the outputs.
    return lambda images: [y.clone() for y in forward.execute([images.cpu().contiguous()])]


def _write_coreml(source: Source, path: Path) -> None:
    import coremltools

    program = source.traced(MAX_IMAGES).run_decompositions({})
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
        node.replace_all_uses_with(node.args[0])  # the converter does not support every alias
    program.graph.eliminate_dead_code()
    model = coremltools.convert(
        program,
        inputs=[coremltools.TensorType(name="images")],
        outputs=[coremltools.TensorType(name=name) for name in source.output_names()],
        compute_precision=coremltools.precision.FLOAT32,
        minimum_deployment_target=coremltools.target.iOS17,
        skip_model_load=True,
    )
    model.user_defined_metadata[DESCRIPTION] = source.description_text()
    model.save(str(path))


def _load_coreml(path: Path) -> Run:
    import coremltools

    model = coremltools.models.MLModel(str(path))
    return lambda images: [torch.from_numpy(y) for y in model.predict({"images": images.cpu().numpy()}).values()]


def _on_images_device(model: nn.Module) -> Run:
    return lambda images: model.to(images.device)(images)


# The first of the formats with the same suffix is the default.
FORMATS = {
    "pt2": Format(".pt2", _write_pt2, lambda path: torch.export.load(path).module(), takes_fused=True),
    "aoti": Format(".pt2", _write_aoti, lambda path: torch._inductor.aoti_load_package(str(path)), takes_fused=True),
    "onnx": Format(".onnx", _write_onnx, _load_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "openvino": Format(".xml", _write_openvino, _load_openvino, ("openvino",), "openvino"),
    "executorch": Format(".pte", _write_executorch, _load_executorch, ("executorch.runtime",), "executorch"),
    "coreml": Format(
        ".mlpackage", _write_coreml, _load_coreml, ("coremltools",), "coreml", runs_here=sys.platform == "darwin"
    ),
    "safetensors": Format(
        ".safetensors",
        lambda source, path: save_checkpoint(source.model, path, **source.description),
        lambda path: _on_images_device(load_model(path)[0]),
        traced=False,
    ),
    "hub": Format(
        "",
        lambda source, folder: save_hub(source.model, folder, source.description),
        lambda folder: _on_images_device(load_hub(folder)),
        traced=False,
    ),
}
