"""``dfformer show``: what happens inside a model, as figures (PNG), tables (CSV) and a page (HTML).

See `dfformer.analysis.metrics`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from dfformer.analysis import figures
from dfformer.analysis import metrics as analysis
from dfformer.analysis.output import Output
from dfformer.analysis.show_filters import show_filters, show_response
from dfformer.analysis.shown import ShownImages, ShownModel, shown_images
from dfformer.models.checkpoint import chosen_model, read_checkpoint, read_task
from dfformer.models.metaformer import DFFormer
from dfformer.tasks.table import task_part

SIMILARITY_BATCH = 64  # images in a minibatch of CKA: it needs n x n matrices, and its noise decreases with n


def show_command(arguments: argparse.Namespace) -> int:
    """The command line's ``show``: writes into ``arguments.output``, and prints the files' names."""
    show, most = ANALYSES[arguments.what]
    models = load_models(arguments)
    if len(models) > most:
        raise ValueError(f"--checkpoint, --model: for {arguments.what}, expected at most {most}, got {len(models)}")
    channels = {model.config["input_size"][0] for model in models}
    images = shown_images(arguments.inputs, channels)
    output = Output(arguments.output)
    show(models, images, output, getattr(arguments, "layer", None))
    names = ", ".join(model.name for model in models)
    output.report(f"{arguments.what}: {names}", [f"Shown on {images.description}."], f"{arguments.what}.report")
    return 0


def load_models(arguments: argparse.Namespace) -> list[ShownModel]:
    """The models of ``--checkpoint`` and ``--model``; with ``--untrained`` each once more with fresh weights."""
    checkpoints, names = arguments.checkpoint or [], arguments.model or []
    if not checkpoints and not names:
        raise ValueError("pass --checkpoint FILE, or --model NAME (with --pretrained, or its fresh weights are shown)")
    if checkpoints and len(names) not in (0, 1, len(checkpoints)):
        raise ValueError(
            f"--model: expected one for all {len(checkpoints)} checkpoints, or one for each, got {len(names)}"
        )
    count = max(len(checkpoints), len(names))
    paths = checkpoints or [None] * count
    names = names * (count // len(names)) if names else [None] * count
    same_names = len({path.name for path in checkpoints}) < len(checkpoints)  # a/last and b/last
    overrides = {"img_size": arguments.img_size} if arguments.img_size else {}
    has_weights = bool(checkpoints) or arguments.pretrained
    shown = []
    torch.manual_seed(0)
    for path, name in zip(paths, names, strict=True):
        title = name if path is None else str(path) if same_names else path.name
        if has_weights:
            shown.append(ShownModel(title, _trained(path, name, **overrides)))
        if getattr(arguments, "untrained", False) or not has_weights:
            shown.append(ShownModel(f"{title}, untrained", _untrained(path, name, **overrides)))
    for name, model, _ in shown:
        if not isinstance(model, DFFormer):
            raise ValueError(f"--model: {name}: is a {type(model).__name__} and not one of dfformer's models")
    return [ShownModel(name, model.eval().to(arguments.device), arguments.img_size) for name, model, _ in shown]


def _trained(path: Path | None, name: str | None, **overrides: Any) -> nn.Module:
    """The model of a checkpoint, or a pretrained one; for a dense task, its encoder.

    The encoder has the image preprocessing of the whole model.
    """
    if path is None or (task := read_task(path)) == "classify":
        return chosen_model(path, name, pretrained=True, **overrides)[0]
    if name:
        raise ValueError(f"--model: expected none with {path}, which says its model, got {name}")
    model, description = task_part(task, "loading")(path)
    encoder: Any = next((module for module in model.modules() if isinstance(module, DFFormer)), None)
    if encoder is None:
        raise ValueError(f"{path}: its encoder {description['architecture']} is not one of dfformer's models")
    if encoder.in_chans != len(description["data"]["mean"]):
        raise ValueError(f"{path}: expected a model of images, got an encoder of maps of {encoder.in_chans} channels")
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, **description["data"]}
    return encoder


def _untrained(path: Path | None, name: str | None, **overrides: Any) -> nn.Module:
    """A fresh model called ``name``, or like that of a checkpoint."""
    description = read_checkpoint(path)[1] if path else {}
    model_args = {**description.get("model_args", {}), **overrides}
    data = description.get("data", {})
    return timm.create_model(name or description["architecture"], pretrained_cfg_overlay=data, **model_args)


def show_spectrum(models: list[ShownModel], images: ShownImages, output: Output, pattern: str | None) -> None:
    """Relative log amplitude of feature maps by depth."""
    [model] = models
    layers = analysis.blocks(model.network, pattern)
    spectra = analysis.spectra(model.network, images.batches(model), layers)
    caption = (
        f"Natural log of the amplitude on the diagonal of the feature maps' spectra, less its value at frequency 0, "
        f"averaged over channels and {images.description}. Lower at high frequencies: smoother maps."
    )
    title = f"{model.name}: spectra of feature maps"
    output.figure("spectrum", figures.spectra_by_depth(spectra), title, caption)
    output.table(
        "spectrum",
        ("depth", "layer", "frequency_pi", "relative_log_amplitude"),
        (
            (depth, name, frequency, amplitude)
            for depth, (name, spectrum) in enumerate(spectra.items(), 1)
            for frequency, amplitude in zip(spectrum.frequency.tolist(), spectrum.amplitude.tolist(), strict=True)
        ),
    )


def show_receptive_field(models: list[ShownModel], images: ShownImages, output: Output, pattern: str | None) -> None:
    """Effective receptive fields, side by side."""
    fields = {model.name: analysis.receptive_field(model.network, images.batches(model)) for model in models}
    if len(fields) < len(models):
        raise ValueError(f"--checkpoint, --model: expected each once, got {', '.join(model.name for model in models)}")
    caption = (
        "Sum over image channels of |d feature / d pixel| for the middle of the last feature map, averaged over "
        f"{images.description}."
    )
    output.figure("receptive_field", figures.receptive_fields(fields), "Effective receptive fields", caption)
    output.table(
        "receptive_field",
        ("model", "row", "column", "contribution"),
        ((name, *pixel, value) for name, field in fields.items() for pixel, value in np.ndenumerate(field.numpy())),
    )


def show_similarity(models: list[ShownModel], images: ShownImages, output: Output, pattern: str | None) -> None:
    """CKA between the layers of one model or of two."""
    layers = [analysis.blocks(model.network, pattern) for model in models]
    # Folders are read class by class, and a batch of a single class would not show how layers separate classes.
    order = torch.randperm(len(images.members), generator=torch.Generator().manual_seed(0))
    shuffled = ShownImages(images.description, [images.members[i] for i in order.tolist()])
    batches = zip(*(shuffled.batches(model, SIMILARITY_BATCH) for model in models), strict=True)
    cka = analysis.similarity([model.network for model in models], batches, layers)
    names = [list(layers[0]), list(layers[-1])]
    caption = (
        f"Linear CKA of layers' outputs for {images.description}: 1 if two layers distinguish these images in the "
        "same way, up to rotation and scale. Unbiased estimate from minibatches."
    )
    labels = [models[0].name, models[-1].name]
    output.figure("similarity", figures.similarity_matrix(cka, names, labels), "Similarity of layers", caption)
    output.table(
        "similarity",
        ("model", "layer", "other_model", "other_layer", "cka"),
        ((labels[0], names[0][a], labels[1], names[1][b], value) for (a, b), value in np.ndenumerate(cka.numpy())),
    )


# The analyses, and the largest number of models that each compares.
ANALYSES: dict[str, tuple[Callable[[list[ShownModel], ShownImages, Output, str | None], None], int]] = {
    "filters": (show_filters, 1),
    "response": (show_response, 1),
    "spectrum": (show_spectrum, 1),
    "receptive-field": (show_receptive_field, 6),
    "similarity": (show_similarity, 2),
}
