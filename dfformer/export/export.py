"""``dfformer export``: models as files that other programs run, each checked before it is said to be there.

Everything but ``safetensors`` is one `torch.export` of the model, for images of one size and batches of any. It is
traced with transforms as matrix products (`dfformer.export.dft_matmul`), so that the file needs nothing of this
package; or, ``fused``, with this package's operators, which are faster and must be importable where the file is loaded.
"""

import argparse
import copy
import importlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dfformer.export.dft_matmul import with_dft_matmul
from dfformer.export.hub import load_hub, save_hub
from dfformer.inference.optimize import InferenceModel
from dfformer.models.checkpoint import load_model, read_checkpoint, save_checkpoint
from dfformer.models.filter_resize import resize_filter
from dfformer.models.spectral import SpectralFilter
from dfformer_kernels.tolerance import relative_error

# Largest relative error of an exported file's outputs: some fifty layers in float32, in another order of additions.
BOUND = 1e-4
# A file is traced with one batch size and checked with two others, the one that programs like to specialise among them.
TRACED_BATCH, CHECKED_BATCHES = 2, (1, 3)
# Where a file keeps its description: a key of ONNX's and AOTInductor's metadata, a file in a .pt2.
DESCRIPTION = "dfformer"
_DATA_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct")


class ExportError(RuntimeError):
    """A file was written, but does not compute what the model computes."""


class _Source(NamedTuple):
    """What is exported."""

    model: nn.Module  # in eval mode, its filters stored for the images' planes
    images: Tensor  # (TRACED_BATCH, in_chans, H, W)
    fused: bool
    description: dict[str, Any]


class _Format(NamedTuple):
    suffix: str  # "": a folder
    needs: tuple[str, ...]  # modules of the extra
    takes_fused: bool
    write: Callable[[_Source, Path], None]
    load: Callable[[Path], Callable[[Tensor], Any]]  # a function of images, anew from the file
    traced: bool = True  # or weights with what they are of


def export(
    model: nn.Module,
    path: str | Path,
    img_size: int | tuple[int, int],
    format: str | None = None,
    *,
    fused: bool = False,
    architecture: str | None = None,
    model_args: dict[str, Any] | None = None,
    classes: list[str] | None = None,
) -> float:
    """Writes ``model`` in inference mode to ``path``, loads the file, and compares it at two batch sizes.

    Args:
        model: of `dfformer`, also one made with ``features_only=True`` or by `optimize_for_inference` (not for
            safetensors); float32, on any device. It is not changed.
        path: ends in ``.pt2``, ``.onnx`` or ``.safetensors``, or is a new folder (``"hub"``). Replaced only by a file
            that passed.
        img_size: (H, W) of the images, or one number; filters are resized to it once, here.
        format: ``"pt2"`` (`torch.export`), ``"onnx"``, ``"safetensors"`` (weights, see `load_model`), ``"aoti"``
            (compiled by AOTInductor for this processor or the model's GPU; a ``.pt2`` too), or ``"hub"`` (a folder for
            Hugging Face's hub). Default: by path's suffix.
        fused: for pt2 and aoti, keep this package's operators; ``import dfformer_kernels`` before loading.
        architecture, model_args, classes: as for `save_checkpoint`; required for safetensors and hub, and written with
            the data configuration into all formats as JSON, see docs/export.md.

    Returns:
        The largest relative error, ``||file - model|| / ||model||``.

    Raises:
        ValueError: a bad argument, by name. ModuleNotFoundError: the format needs the ``export`` extra.
        ExportError: the file's outputs differ from the model's by more than BOUND.
    """
    path = Path(path)
    chosen = _chosen_format(path, format, fused)
    if path.is_dir():
        accepted = f"a file name ending in {chosen.suffix}" if chosen.suffix else "a new folder"
        raise IsADirectoryError(f"path: {path} is a directory, accepted is {accepted}")
    if not chosen.traced and architecture is None:
        raise ValueError("architecture: required for safetensors and hub, e.g. 'dfformer_s18'")
    if not chosen.traced and isinstance(model, InferenceModel):
        raise ValueError("model: is optimised for inference; safetensors and hub accept the one it was made from")
    H, W = to_2tuple(img_size)
    source = _prepared(model, (H, W), fused)
    data = {key: value for key, value in resolve_model_data_config(source.model).items() if key in _DATA_KEYS}
    source.description.update(
        architecture=architecture,
        model_args={**(model_args or {}), "img_size": (H, W)},
        classes=classes,
        data={**data, "input_size": tuple(source.images.shape[1:])},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = Path(folder) / path.name
        chosen.write(source, written)
        error = _largest_error(source, chosen.load(written))
        if not error <= BOUND:
            raise ExportError(f"{path}: not written, its outputs differ from the model's by {error:.1e}, not {BOUND}")
        written.replace(path)
    return error


def _chosen_format(path: Path, name: str | None, fused: bool) -> _Format:
    by_suffix = {chosen.suffix: key for key, chosen in reversed(FORMATS.items()) if chosen.suffix}
    if name is None and path.suffix not in by_suffix:
        raise ValueError(f"path: got {path}, accepted are names ending in {', '.join(by_suffix)}")
    name = name or by_suffix[path.suffix]
    if name not in FORMATS:
        raise ValueError(f"format: got {name!r}, accepted are {', '.join(map(repr, FORMATS))}")
    chosen = FORMATS[name]
    if chosen.suffix and path.suffix != chosen.suffix:
        raise ValueError(f"path: got {path}, format {name} takes names ending in {chosen.suffix}")
    if fused and not chosen.takes_fused:
        raise ValueError(f"fused: is for {', '.join(n for n in FORMATS if FORMATS[n].takes_fused)}, not for {name}")
    for module in chosen.needs:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"format: {name} needs {module}, which is not installed: pip install 'dfformer[export]'"
            ) from error
    return chosen


@torch.no_grad()
def _prepared(model: nn.Module, img_size: tuple[int, int], fused: bool) -> _Source:
    model = copy.deepcopy(model).eval()
    parameter = next(model.parameters())
    if parameter.dtype != torch.float32:
        raise ValueError(f"model: got {parameter.dtype} parameters, accepted are float32")
    in_chans = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    source = _Source(model, _random_images(TRACED_BATCH, (in_chans, *img_size), parameter.device), fused, {})

    def store(module: Any, inputs: tuple[Tensor, ...]) -> None:
        plane = module.plane_of(inputs[0])
        if plane != module.size and module.weight_resize:
            resized = resize_filter(module.complex_weights, module.size, plane, module.resize)
            module.complex_weights, module.size = nn.Parameter(resized), plane

    handles = [m.register_forward_pre_hook(store) for m in model.modules() if isinstance(m, SpectralFilter)]
    try:
        model(source.images)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"img_size: got {img_size}, which this model cannot take: {error}") from error
    for handle in handles:
        handle.remove()
    return source


def _random_images(batch: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch)).to(device)


@torch.no_grad()
def _largest_error(source: _Source, run: Callable[[Tensor], Any]) -> float:
    errors = []
    for batch in CHECKED_BATCHES:
        images = _random_images(batch, tuple(source.images.shape[1:]), source.images.device)
        actual, expected = (pytree.tree_leaves(outputs) for outputs in (run(images), source.model(images)))
        errors += [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    return max(errors)


@torch.no_grad()
def _traced(source: _Source) -> torch.export.ExportedProgram:
    model = source.model if source.fused else with_dft_matmul(source.model)
    model(source.images)  # makes the matrices that the trace takes for constants
    return torch.export.export(model, (source.images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _write_pt2(source: _Source, path: Path) -> None:
    torch.export.save(_traced(source), path, extra_files={DESCRIPTION: json.dumps(source.description)})


def _load_pt2(path: Path) -> Callable[[Tensor], Any]:
    return torch.export.load(path).module()


def _write_onnx(source: _Source, path: Path) -> None:
    outputs = pytree.tree_leaves(source.model(source.images))
    names = ["logits"] if len(outputs) == 1 else [f"features_{i}" for i in range(len(outputs))]
    program = torch.onnx.export(_traced(source), dynamo=True, verbose=False, input_names=["images"], output_names=names)
    assert program is not None
    program.model.metadata_props[DESCRIPTION] = json.dumps(source.description)
    program.save(path)


def _load_onnx(path: Path) -> Callable[[Tensor], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(y) for y in session.run(None, {"images": images.cpu().numpy()})]


def _write_aoti(source: _Source, path: Path) -> None:
    configs = {
        "aot_inductor.metadata": {DESCRIPTION: json.dumps(source.description)},
        "layout_optimization": False,  # it takes (B,H,W,C) for (B,C,H,W) (dfformer_kernels/ops/conv2d.py)
    }
    torch._inductor.aoti_compile_and_package(_traced(source), package_path=str(path), inductor_configs=configs)


def _load_aoti(path: Path) -> Callable[[Tensor], Any]:
    return torch._inductor.aoti_load_package(str(path))


def _write_safetensors(source: _Source, path: Path) -> None:
    save_checkpoint(source.model, path, **source.description)


def _load_safetensors(path: Path) -> Callable[[Tensor], Any]:
    model, _ = load_model(path)
    return lambda images: model.to(images.device)(images)


def _write_hub(source: _Source, path: Path) -> None:
    save_hub(source.model, path, source.description)


def _load_hub(path: Path) -> Callable[[Tensor], Any]:
    model = load_hub(path)
    return lambda images: model.to(images.device)(images)


FORMATS = {
    "pt2": _Format(".pt2", (), True, _write_pt2, _load_pt2),
    "onnx": _Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), False, _write_onnx, _load_onnx),
    "safetensors": _Format(".safetensors", (), False, _write_safetensors, _load_safetensors, traced=False),
    "aoti": _Format(".pt2", (), True, _write_aoti, _load_aoti),
    "hub": _Format("", (), False, _write_hub, _load_hub, traced=False),
}


def export_command(arguments: argparse.Namespace) -> int:
    """The command line's ``export``."""
    overrides = {"img_size": arguments.img_size} if arguments.img_size else {}
    metadata: dict[str, Any] = {}
    classes = None
    if arguments.checkpoint:
        _, metadata = read_checkpoint(arguments.checkpoint)
        model, classes = load_model(arguments.checkpoint, arguments.model, **overrides)
    elif arguments.model:
        model = timm.create_model(arguments.model, pretrained=arguments.pretrained, **overrides)
    else:
        raise ValueError("pass --checkpoint FILE or --model NAME")
    model_args = {**metadata.get("model_args", {}), "num_classes": model.num_classes, **overrides}
    error = export(
        model.to(arguments.device),
        arguments.output,
        model_args.get("img_size", resolve_model_data_config(model)["input_size"][1:]),
        arguments.format,
        fused=arguments.fused,
        architecture=arguments.model or metadata.get("architecture"),
        model_args=model_args,
        classes=classes,
    )
    fresh = "" if arguments.checkpoint or arguments.pretrained else " of fresh, untrained weights"
    written = [arguments.output, *arguments.output.rglob("*")]
    size = sum(path.stat().st_size for path in written if path.is_file())
    print(
        f"wrote {arguments.output}{fresh}: {size / 2**20:.1f} MiB, "
        f"differs from the model by {error:.1g} at batches of {' and '.join(map(str, CHECKED_BATCHES))}"
    )
    return 0
