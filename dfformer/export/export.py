"""``dfformer export``: writes models as files for other programs; each is run and compared before it gets its name."""

import argparse
import importlib
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dfformer.export.formats import FORMATS, TRACED_BATCH, Format, Run, Source
from dfformer.inference.optimize import InferenceModel, blank_image, store_filters
from dfformer.models.checkpoint import chosen_model, read_checkpoint
from dfformer.models.description import is_ours
from dfformer.models.spectral import SpectralFilter
from dfformer.utils.accepted import PLANE, check_arguments
from dfformer.utils.copied import copied
from dfformer.utils.extras import extra
from dfformer.utils.text import echo
from dfformer_kernels.tolerance import relative_error

# The largest relative error of a file's outputs: it runs some fifty layers in float32, with sums in another order.
BOUND = 1e-4
# A file is checked with two batch sizes that it was not traced with; one is 1, which exporters often specialise.
CHECKED_BATCHES = (1, 3)
_DATA_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct")


class ExportError(RuntimeError):
    """An exported file does not compute what the model computes."""


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
        model: a model of `dfformer`, which may be made with ``features_only=True`` or by `optimize_for_inference` (not
            for safetensors), or any other model that contains this package's layers. It is float32, on any device, and
            is not changed.
        path: a name with the format's suffix. An existing file is replaced only if the new one passes.
        img_size: (H, W) of the images, or one number; filters are resized to it once.
        format: ``"pt2"`` (`torch.export`), ``"aoti"`` (compiled by AOTInductor for this processor or the model's GPU,
            also a ``.pt2``), ``"onnx"``, ``"openvino"`` (``.xml``, with a ``.bin`` beside it), ``"executorch"``
            (``.pte``, for at most MAX_IMAGES images at a time), ``"coreml"`` (``.mlpackage``, likewise),
            ``"safetensors"`` (weights, see `load_model`) or ``"hub"`` (a new folder for Hugging Face's hub). By
            default, the suffix of ``path`` decides.
        fused: for pt2 and aoti, keep this package's operators; ``import dfformer_kernels`` before loading.
        architecture, model_args, classes: as for `save_checkpoint`; required for safetensors and hub. All formats
            contain them and the data configuration as JSON, see docs/export.md.

    Returns:
        The largest relative error, ``||file - model|| / ||model||``; NaN if this platform cannot run the file (coreml
        outside of macOS).

    Raises:
        ValueError: a bad argument, by name. TypeError: ``model`` is not a module.
        RuntimeError: the format needs an extra.
        ExportError: the file's outputs differ from the model's by more than BOUND.
    """
    path = Path(path)
    chosen = _chosen_format(path, format, fused)
    _check(model, path, chosen, architecture)
    check_arguments(PLANE, img_size=img_size)
    H, W = to_2tuple(img_size)
    source = _source(model, (H, W), fused)
    data = {key: value for key, value in resolve_model_data_config(source.model).items() if key in _DATA_KEYS}
    source.description.update(
        architecture=architecture,
        model_args={**(model_args or {}), "img_size": (H, W)},
        classes=classes,
        data={**data, "input_size": tuple(source.images.shape[1:])},
    )
    return _write(source, path, chosen)


def _check(model: nn.Module, path: Path, chosen: Format, architecture: str | None) -> None:
    if path.is_dir() and chosen is not FORMATS["coreml"]:
        expected = f"a file name ending in {chosen.suffix}" if chosen.suffix else "a new folder"
        raise IsADirectoryError(f"path: expected {expected}, got the existing folder {path}")
    if not chosen.traced and not (architecture and is_ours(architecture)):
        raise ValueError(
            f"architecture: for safetensors and hub, expected a model of this package, e.g. 'dfformer_s18', "
            f"got {architecture!r}"
        )
    if not chosen.traced and isinstance(model, InferenceModel):
        raise ValueError("model: is optimised for inference; for safetensors and hub, pass the one it was made from")


def _write(source: Source, path: Path, chosen: Format) -> float:
    """Writes beside ``path``, compares, then moves the file or folder to its name; returns the error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    error = math.nan
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = Path(folder) / path.name
        chosen.write(source, written)
        if chosen.runs_here:
            error = _largest_error(source, chosen.load(written), any_size=not chosen.traced)
            if not error <= BOUND:
                raise ExportError(
                    f"{path}: not written, its outputs differ from the model's by {error:.1e}, not {BOUND}"
                )
        if path.is_dir():
            shutil.rmtree(path)
        for part in sorted(written.parent.iterdir()):  # in this order an .xml follows its .bin
            part.replace(path.parent / part.name)
    return error


def _chosen_format(path: Path, name: str | None, fused: bool) -> Format:
    by_suffix = {chosen.suffix: key for key, chosen in reversed(FORMATS.items()) if chosen.suffix}
    if name is None and path.suffix not in by_suffix:
        raise ValueError(f"path: expected a name ending in one of {', '.join(by_suffix)}, got {path}")
    name = name or by_suffix[path.suffix]
    if name not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(map(repr, FORMATS))}, got {name!r}")
    chosen = FORMATS[name]
    if chosen.suffix and path.suffix != chosen.suffix:
        raise ValueError(f"path: for format {name}, expected a name ending in {chosen.suffix}, got {path}")
    if fused and not chosen.takes_fused:
        raise ValueError(f"fused: is for {', '.join(n for n in FORMATS if FORMATS[n].takes_fused)}, not for {name}")
    with extra(chosen.extra):
        for module in chosen.needs:
            importlib.import_module(module)
    return chosen


@torch.no_grad()
def _source(model: nn.Module, img_size: tuple[int, int], fused: bool) -> Source:
    model = copied(model).eval()
    like = blank_image(model, img_size)
    if like.dtype != torch.float32:
        raise ValueError(f"model: expected float32 parameters, got {like.dtype}")
    source = Source(model, _random_images(TRACED_BATCH, like.shape[1:], like), fused, {})
    try:
        store_filters(model, source.images)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"img_size: expected one that this model accepts, got {img_size}: {error}") from error
    return source


def _random_images(batch: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch), device="cpu").to(like)


@torch.no_grad()
def _largest_error(source: Source, run: Run, any_size: bool) -> float:
    in_chans, H, W = source.images.shape[1:]
    cases = [(batch, (in_chans, H, W)) for batch in CHECKED_BATCHES]
    if any_size and all(m.weight_resize for m in source.model.modules() if isinstance(m, SpectralFilter)):
        cases.append((1, (in_chans, H + 32, W)))
    errors = []
    for batch, shape in cases:
        images = _random_images(batch, shape, source.images)
        actual, expected = (pytree.tree_leaves(outputs) for outputs in (run(images), source.model(images)))
        errors += [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    return max(errors)


def export_command(arguments: argparse.Namespace) -> int:
    """The command line's ``export``."""
    overrides = {"img_size": arguments.img_size} if arguments.img_size else {}
    description = read_checkpoint(arguments.checkpoint)[1] if arguments.checkpoint else {}
    model, classes = chosen_model(arguments.checkpoint, arguments.model, arguments.pretrained, **overrides)
    model_args = {**description.get("model_args", {}), "num_classes": model.num_classes, **overrides}
    error = export(
        model.to(arguments.device),
        arguments.output,
        model_args.get("img_size", resolve_model_data_config(model)["input_size"][1:]),
        arguments.format,
        fused=arguments.fused,
        architecture=arguments.model or description.get("architecture"),
        model_args=model_args,
        classes=classes,
    )
    fresh = "" if arguments.checkpoint or arguments.pretrained else " of fresh, untrained weights"
    checked = f"differs from the model by {error:.1g} at batches of {' and '.join(map(str, CHECKED_BATCHES))}"
    if math.isnan(error):
        checked = "was not run, because this platform has no runtime for it"
    beside = [arguments.output.with_suffix(".bin")] if arguments.output.suffix == ".xml" else []
    written = [arguments.output, *arguments.output.rglob("*"), *beside]
    size = sum(path.stat().st_size for path in written if path.is_file())
    echo(f"wrote {arguments.output}{fresh}: {size / 2**20:.1f} MiB, {checked}")
    return 0
