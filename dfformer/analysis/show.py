"""``dfformer show``: what is inside a model, as pictures (PNG) and numbers (CSV). See `dfformer.analysis.metrics`."""

import argparse
import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits, load_sample_images

    from dfformer.analysis import figures
except ModuleNotFoundError as error:
    raise RuntimeError(f"{error}: pip install 'dfformer[demo]'") from error

from dfformer.analysis import metrics as analysis
from dfformer.models.checkpoint import load_model, read_checkpoint, read_task
from dfformer.models.layers import DynamicFilter, SpectralFilter
from dfformer.models.metaformer import DFFormer
from dfformer.tasks.predict import image_files
from dfformer.tasks.table import task_part

BATCH_SIZE = 16
SIMILARITY_BATCH = 64  # images a minibatch of CKA: its terms are n x n and its noise falls with n
DRAWN_IMAGES, DRAWN_CLASSES, DRAWN_CHANNELS, DRAWN_FILTERS = 3, 10, 4, 6
SQUARES = (0.5, 0.9)  # of a receptive field, drawn


class Loaded(NamedTuple):
    """A model in eval mode, what to call it, and the size (H,W) of images it is shown; None for its own."""

    name: str
    model: nn.Module
    img_size: tuple[int, int] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """How it wants images, in timm's terms."""
        config = resolve_model_data_config(self.model)
        if self.img_size is not None:
            config["input_size"] = (config["input_size"][0], *self.img_size)
        return config


class Sample(NamedTuple):
    """An image that is opened when it is needed, its name and its class."""

    name: str
    group: str
    open: Callable[[], Image.Image]


class Samples(NamedTuple):
    """Images, and in words what they are."""

    description: str
    samples: list[Sample]

    @property
    def groups(self) -> dict[str, list[int]]:
        """The images of each class, classes sorted by name."""
        groups: dict[str, list[int]] = {}
        for i, sample in enumerate(self.samples):
            groups.setdefault(sample.group, []).append(i)
        return dict(sorted(groups.items()))

    @property
    def examples(self) -> list[int]:
        """An image of each class, or the first ones where all are of one class."""
        groups = list(self.groups.values())
        return [group[0] for group in groups] if len(groups) > 1 else groups[0]

    def batches(self, loaded: Loaded, size: int = BATCH_SIZE) -> Iterator[Tensor]:
        """The images as ``loaded`` wants them, (B,in_chans,H,W), B nearly the same in all batches and at most size."""
        count = len(self.samples)
        for part in torch.arange(count).chunk(-(-count // size)):
            yield torch.stack([self.prepared(i, loaded) for i in part.tolist()]).to(_device(loaded.model))

    def prepared(self, index: int, loaded: Loaded) -> Tensor:
        """An image as ``loaded`` wants it, (in_chans,H,W)."""
        transform = create_transform(**loaded.config, is_training=False)
        sample = self.samples[index]
        try:
            with sample.open() as image:
                return transform(image.convert("L" if loaded.config["input_size"][0] == 1 else "RGB"))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{sample.name}: cannot be read ({error})") from error

    def pixels(self, index: int, loaded: Loaded) -> Tensor:
        """What ``loaded`` sees of an image, (in_chans,H,W) from 0 to 1."""
        mean, std = (torch.tensor(loaded.config[key]).view(-1, 1, 1) for key in ("mean", "std"))
        return (self.prepared(index, loaded) * std + mean).clamp(0, 1)


def show_command(arguments: argparse.Namespace) -> int:
    """The command line's ``show``: writes into ``arguments.output`` and prints what."""
    show, most = ANALYSES[arguments.what]
    models = load_models(arguments)
    if len(models) > most:
        raise ValueError(f"--checkpoint, --model: got {len(models)} models, {arguments.what} takes {most}")
    channels = {loaded.config["input_size"][0] for loaded in models}
    samples = load_samples(arguments.inputs, channels, crops=arguments.what == "similarity")
    output = Output(arguments.output)
    show(models, samples, output, getattr(arguments, "layer", None))
    return 0


class Output:
    """A folder to write to; says what it has written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def figure(self, name: str, figure: Figure) -> None:
        figure.savefig(self.folder / f"{name}.png", dpi=110)
        print(f"wrote {self.folder / name}.png")

    def table(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Floats with nine digits, which give a float32 back exactly."""
        with (self.folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows([f"{v:.9g}" if isinstance(v, float) else v for v in row] for row in rows)
        print(f"wrote {self.folder / name}.csv")


def load_models(arguments: argparse.Namespace) -> list[Loaded]:
    """The models of ``--checkpoint`` and ``--model``; with ``--untrained`` each once more with fresh weights."""
    checkpoints, names = arguments.checkpoint or [], arguments.model or []
    overrides = {"img_size": arguments.img_size} if arguments.img_size else {}
    untrained = getattr(arguments, "untrained", False)
    loaded = []
    torch.manual_seed(0)
    if checkpoints and arguments.pretrained:
        raise ValueError("--pretrained: is for --model by itself, a checkpoint brings its weights")
    if checkpoints:
        if len(names) not in (0, 1, len(checkpoints)):
            raise ValueError(f"--model: got {len(names)} for {len(checkpoints)} checkpoints; one each, or one for all")
        names = [None] * len(checkpoints) if not names else names * (len(checkpoints) // len(names))
        same_names = len({path.name for path in checkpoints}) < len(checkpoints)  # a/last and b/last
        for path, name in zip(checkpoints, names, strict=True):
            title = str(path) if same_names else path.name
            loaded.append(Loaded(title, _trained(path, name, **overrides)))
            if untrained:
                loaded.append(Loaded(f"{title}, untrained", _untrained(path, name, **overrides)))
    elif names:
        for name in names:
            if arguments.pretrained:
                loaded.append(Loaded(name, timm.create_model(name, pretrained=True, **overrides)))
            if untrained or not arguments.pretrained:
                loaded.append(Loaded(f"{name}, untrained", timm.create_model(name, **overrides)))
    else:
        raise ValueError("pass --checkpoint FILE, or --model NAME (with --pretrained, or its fresh weights are shown)")
    for name, model, _ in loaded:
        if not isinstance(model, DFFormer):
            raise ValueError(f"--model: {name}: is a {type(model).__name__} and not one of dfformer's models")
    return [Loaded(name, model.eval().to(arguments.device), arguments.img_size) for name, model, _ in loaded]


def _trained(path: Path, name: str | None, **overrides: Any) -> nn.Module:
    """The model of a checkpoint; of one for dense prediction its encoder, which wants images as the whole does."""
    task = read_task(path)
    if task == "classify":
        return load_model(path, name, **overrides)[0]
    if name:
        raise ValueError(f"--model: got {name}, but {path} says its model")
    model, about = task_part(task, "loading")(path)
    encoder: Any = next((module for module in model.modules() if isinstance(module, DFFormer)), None)
    if encoder is None:
        raise ValueError(f"{path}: its encoder {about['architecture']} is not one of dfformer's models")
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, **about["data"]}
    return encoder


def _untrained(path: Path, name: str | None, **overrides: Any) -> nn.Module:
    """A fresh model like that of a checkpoint."""
    _, metadata = read_checkpoint(path)
    model_args = {**metadata.get("model_args", {}), **overrides}
    data = metadata.get("data", {})
    return timm.create_model(name or metadata["architecture"], pretrained_cfg_overlay=data, **model_args)


def load_samples(inputs: Sequence[Path], channels: set[int], crops: bool = False) -> Samples:
    """Image files and folders; the class of an image in a folder is the name of the folder it lies in.

    Without inputs, what comes with scikit-learn: for models of grey images 360 of its handwritten digits, for models of
    colour images its two photographs, or 64 overlapping ``crops`` of them.
    """
    if inputs:
        given = {path for path in inputs if not path.is_dir()}
        files = list(dict.fromkeys(image_files(inputs)))
        if not files:
            raise ValueError(f"no images in {', '.join(map(str, inputs))}")
        samples = [
            Sample(name, name if path in given else path.parent.name, partial(Image.open, path))
            for name, path in zip(_short_names(files), files, strict=True)
        ]
        return Samples(f"{len(samples)} image{'s'[: len(samples) > 1]}", samples)
    if channels == {1}:
        return _digits()
    if not channels <= {1, 3}:
        raise ValueError(f"in_chans: got {channels}, scikit-learn's images and image files have 1 channel or 3")
    return _photograph_crops() if crops else _photographs()


def _short_names(paths: list[Path]) -> list[str]:
    """Different names of different files: as few trailing parts of their paths as tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        for own in ([path.with_suffix("") for path in paths], paths):
            names = ["_".join(path.parts[-depth:]) for path in own]
            if len(set(names)) == len(names):
                return names
    return [str(path).replace("/", "_") for path in paths]


def _digits() -> Samples:
    data = load_digits()
    samples = [
        _in_memory(f"{data.target[i]}_{i}", str(data.target[i]), (data.images[i] * (255 / 16)).round())
        for i in range(0, len(data.images), 5)
    ]
    return Samples(f"{len(samples)} handwritten digits of scikit-learn", samples)


def _photographs() -> Samples:
    data = load_sample_images()
    names = [Path(name).stem for name in data.filenames]
    samples = [_in_memory(name, name, pixels) for name, pixels in zip(names, data.images, strict=True)]
    return Samples("scikit-learn's two photographs", samples)


def _photograph_crops(rows: int = 4, columns: int = 8) -> Samples:
    samples = []
    for photograph in _photographs().samples:
        pixels = np.asarray(photograph.open())
        H, W, _ = pixels.shape
        side = H // 2
        tops, lefts = (np.linspace(0, n - side, k).astype(int) for n, k in ((H, rows), (W, columns)))
        samples += [
            _in_memory(f"{photograph.name} {top},{left}", photograph.name, pixels[top : top + side, left : left + side])
            for top, left in product(tops, lefts)
        ]
    return Samples(f"{len(samples)} overlapping crops of scikit-learn's two photographs", samples)


def _in_memory(name: str, group: str, pixels: np.ndarray) -> Sample:
    return Sample(name, group, lambda: Image.fromarray(pixels.astype(np.uint8)))


def show_filters(models: list[Loaded], samples: Samples, output: Output, pattern: str | None) -> None:
    """The stored filters, which of them the routing picks, and the mixed filters of images and classes."""
    [loaded] = models
    layers = chosen_layers(loaded.model, pattern)
    shares: dict[str, list[Tensor]] = {name: [] for name in layers}
    planes: dict[str, tuple[int, int]] = {}
    for images in samples.batches(loaded):
        for name, x in analysis.capture(loaded.model, layers, images, inputs=True).items():
            planes[name] = (x.shape[1], x.shape[2])
            layer = layers[name]
            if isinstance(layer, DynamicFilter):
                shares[name].append(analysis.routing(layer, x))
    for name, layer in layers.items():
        basis = analysis.stored_filters(layer, planes[name])
        _show_basis(f"{loaded.name}: {name}", layer, basis, planes[name], f"filters.{name}", output)
        if shares[name]:
            routed = torch.cat(shares[name])
            _show_routing(f"{loaded.name}: {name}", routed, samples, f"filters.{name}", output)
            _show_mixed(loaded, name, routed, basis, planes[name], samples, output)


def _show_basis(
    title: str, layer: SpectralFilter, basis: Tensor, plane: tuple[int, int], name: str, output: Output
) -> None:
    count = basis.shape[2]
    if isinstance(layer, DynamicFilter):
        kind, what, drawn = "filter", "filter basis", list(range(count))
        of = f"The {count} filters that every channel's filter is mixed from"
    else:
        kind, what = "channel", "global filters"
        drawn = np.unique(np.linspace(0, count - 1, DRAWN_FILTERS).astype(int)).tolist()
        of = f"The filters of {len(drawn)} of {count} channels"
    caption = (
        f"{of}, for planes of {plane[0]}x{plane[1]}. Frequency 0, what the plane's mean is multiplied by, is in the "
        "middle; the filters are of real images, so the left half mirrors the right one."
    )
    names = [f"{kind} {i}" for i in drawn]
    output.figure(
        f"{name}.basis", figures.filter_basis(basis[..., drawn], plane[1], names, f"{title}, {what}", caption)
    )
    header = (kind, "vertical_cycles", "horizontal_cycles", "real", "imaginary")
    output.table(f"{name}.basis", header, ((i, *row) for i in range(count) for row in _half_spectrum(basis[..., i])))


def _half_spectrum(filters: Tensor) -> Iterator[tuple[int, int, float, float]]:
    """Rows (vertical frequency, horizontal frequency, real part, imaginary part), in cycles a plane, of (H,K)."""
    H = len(filters)
    for h, row in enumerate(filters.tolist()):
        vertical = h if h < (H + 1) // 2 else h - H
        for k, value in enumerate(row):
            yield vertical, k, value.real, value.imag


def _show_routing(title: str, shares: Tensor, samples: Samples, name: str, output: Output) -> None:
    groups = samples.groups
    bits = analysis.entropy(shares)
    class_shares = torch.stack([shares[members].mean(0) for members in groups.values()])
    class_bits = torch.stack([bits[members].mean(0) for members in groups.values()])
    if len(groups) > 1:
        labels, drawn, drawn_bits = list(groups), class_shares, class_bits
    else:
        labels, drawn, drawn_bits = [sample.name for sample in samples.samples], shares, bits
    labels, drawn, drawn_bits = labels[:DRAWN_CLASSES], drawn[:DRAWN_CLASSES], drawn_bits[:DRAWN_CLASSES]
    caption = (
        f"What the softmax of the routing gives each filter in each of {shares.shape[2]} channels, averaged over the "
        f"images of a class, on {samples.description}. Right: how evenly, as entropy (quartiles over channels)."
    )
    output.figure(f"{name}.routing", figures.routing(drawn, drawn_bits, labels, f"{title}, routing", caption))
    filters = range(shares.shape[1])
    strongest = F.one_hot(shares.argmax(1), shares.shape[1]).float().mean(1)
    output.table(
        f"{name}.routing_images",
        ("image", "class", "entropy_bits", *(f"share_{f}" for f in filters), *(f"strongest_{f}" for f in filters)),
        (
            (s.name, s.group, float(bits[n].mean()), *shares[n].mean(1).tolist(), *strongest[n].tolist())
            for n, s in enumerate(samples.samples)
        ),
    )
    output.table(
        f"{name}.routing_classes",
        ("class", "channel", "entropy_bits", *(f"share_{f}" for f in filters)),
        (
            (group, c, own_bits, *own_shares)
            for group, of_class, bits_of_class in zip(groups, class_shares, class_bits, strict=True)
            for c, (own_bits, own_shares) in enumerate(zip(bits_of_class.tolist(), of_class.T.tolist(), strict=True))
        ),
    )


def _show_mixed(
    loaded: Loaded,
    layer: str,
    shares: Tensor,
    basis: Tensor,
    plane: tuple[int, int],
    samples: Samples,
    output: Output,
) -> None:
    examples, groups = samples.examples[:DRAWN_CLASSES], samples.groups
    channels = analysis.most_different(analysis.mix(shares[examples], basis), DRAWN_CHANNELS)
    parts = {"images": ([samples.samples[i].name for i in examples], [[i] for i in examples])}
    if 1 < len(groups) < len(samples.samples):
        parts["classes"] = (list(groups)[:DRAWN_CLASSES], list(groups.values())[:DRAWN_CLASSES])
    for part, (labels, members) in parts.items():
        filters = analysis.mix(torch.stack([shares[i].mean(0) for i in members])[..., channels], basis)
        pictures = [torch.stack([samples.pixels(i, loaded) for i in own]).mean(0) for own in members]
        what = {
            "images": f"{len(labels)} of {samples.description} and the filters they make",
            "classes": f"{len(labels)} classes of {samples.description}, averages of images and of the filters "
            "they make",
        }[part]
        caption = (
            f"{what}, in the {len(channels)} of {shares.shape[2]} channels that differ most between images. "
            f"Planes of {plane[0]}x{plane[1]}, frequency 0 in the middle."
        )
        title = f"{loaded.name}: {layer}, mixed filters"
        picture = figures.mixed_filters(
            [_for_imshow(p) for p in pictures], labels, filters, channels, plane[1], title, caption
        )
        output.figure(f"filters.{layer}.mixed_{part}", picture)
        output.table(
            f"filters.{layer}.mixed_{part}",
            (part, "channel", "vertical_cycles", "horizontal_cycles", "real", "imaginary"),
            (
                (label, channel, *row)
                for n, label in enumerate(labels)
                for c, channel in enumerate(channels)
                for row in _half_spectrum(filters[n, ..., c])
            ),
        )


def _for_imshow(picture: Tensor) -> np.ndarray:
    return picture[0].numpy() if len(picture) == 1 else picture.permute(1, 2, 0).numpy()


def show_response(models: list[Loaded], samples: Samples, output: Output, pattern: str | None) -> None:
    """What each filter of the basis and the mixed filter make of the image itself and of the layer's own input."""
    [loaded] = models
    layers = chosen_layers(loaded.model, pattern)
    for i in samples.examples[:DRAWN_IMAGES]:
        images = samples.prepared(i, loaded)[None].to(_device(loaded.model))
        for name, x in analysis.capture(loaded.model, layers, images, inputs=True).items():
            _show_response(loaded, name, layers[name], x, samples, i, output)


def _show_response(
    loaded: Loaded, name: str, layer: SpectralFilter, x: Tensor, samples: Samples, index: int, output: Output
) -> None:
    sample, plane = samples.samples[index], (x.shape[1], x.shape[2])
    u, applied = analysis.expanded(layer, x)[0], analysis.applied_filters(layer, x)[0]
    basis = analysis.stored_filters(layer, plane) if isinstance(layer, DynamicFilter) else applied[..., :0]
    channels = (
        analysis.filtered(u, applied)
        .std(dim=(0, 1), correction=0)
        .topk(min(DRAWN_CHANNELS - 1, u.shape[2]))
        .indices.tolist()
    )
    grey = samples.pixels(index, loaded).mean(0)
    photograph = F.interpolate(grey[None, None], plane, mode="bilinear", antialias=True)[0, 0]
    inputs = {"image": (photograph, channels[0])} | {f"channel {c}": (u[..., c], c) for c in channels}
    columns = ["input", *(f"filter {f}" for f in range(basis.shape[2])), "applied filter"]
    maps = []
    for plane_in, channel in inputs.values():
        filters = torch.cat([basis, applied[..., channel : channel + 1]], dim=2)
        maps.append([plane_in, *analysis.filtered(plane_in[..., None], filters).unbind(-1)])
    caption = (
        f"{sample.name}, grey and reduced to the layer's plane of {plane[0]}x{plane[1]}, and the layer's own input in "
        f"the {len(channels)} of {u.shape[2]} channels with the strongest response. Applied is what the channel's own "
        f"filter makes of it (of the image: channel {channels[0]}'s). Gains in dB are ratios of standard deviations."
    )
    drawn = f"response.{name}.{sample.name}"
    output.figure(drawn, figures.responses(maps, list(inputs), columns, f"{loaded.name}: {name}, responses", caption))
    output.table(
        drawn,
        ("input", "filter", "row", "column", "value"),
        (
            (source, column, r, c, value)
            for source, planes in zip(inputs, maps, strict=True)
            for column, values in zip(columns, planes, strict=True)
            for r, line in enumerate(values.tolist())
            for c, value in enumerate(line)
        ),
    )


def show_spectrum(models: list[Loaded], samples: Samples, output: Output, pattern: str | None) -> None:
    """Relative log amplitude of feature maps by depth."""
    [loaded] = models
    layers = analysis.blocks(loaded.model, pattern)
    spectra = analysis.spectra(loaded.model, samples.batches(loaded), layers)
    caption = (
        f"Natural log of the amplitude on the diagonal of the feature maps' spectra, less its value at frequency 0, "
        f"averaged over channels and {samples.description}. Lower at high frequencies: smoother maps."
    )
    output.figure("spectrum", figures.spectra_by_depth(spectra, f"{loaded.name}: spectra of feature maps", caption))
    output.table(
        "spectrum",
        ("depth", "layer", "frequency_pi", "relative_log_amplitude"),
        (
            (depth, name, frequency, amplitude)
            for depth, (name, spectrum) in enumerate(spectra.items(), 1)
            for frequency, amplitude in zip(spectrum.frequency.tolist(), spectrum.amplitude.tolist(), strict=True)
        ),
    )


def show_receptive_field(models: list[Loaded], samples: Samples, output: Output, pattern: str | None) -> None:
    """Effective receptive fields, side by side."""
    fields = {loaded.name: analysis.receptive_field(loaded.model, samples.batches(loaded)) for loaded in models}
    if len(fields) < len(models):
        raise ValueError(f"--checkpoint, --model: got one twice: {', '.join(loaded.name for loaded in models)}")
    planes = [(field.shape[0], field.shape[1]) for field in fields.values()]
    centres = [analysis.receptive_centre(loaded.model, plane) for loaded, plane in zip(models, planes, strict=True)]
    areas = [analysis.contribution_areas(f, centre) for f, centre in zip(fields.values(), centres, strict=True)]
    squares = [[area for area in own if area.share in SQUARES] for own in areas]
    caption = (
        "Sum over image channels of |d feature / d pixel| for the middle of the last feature map, averaged over "
        f"{samples.description}. Squares around the feature's centre hold {' and '.join(f'{s:.0%}' for s in SQUARES)}."
    )
    picture = figures.receptive_fields(fields, centres, squares, "Effective receptive fields", caption)
    output.figure("receptive_field", picture)
    output.table(
        "receptive_field_areas",
        ("model", "height", "width", "share", "pixels", "fraction_of_image", "square_side"),
        (
            (name, H, W, area.share, area.pixels, area.pixels / (H * W), area.side)
            for name, (H, W), own in zip(fields, planes, areas, strict=True)
            for area in own
        ),
    )
    output.table(
        "receptive_field",
        ("model", "row", "column", "contribution"),
        (
            (name, r, c, value)
            for name, field in fields.items()
            for r, line in enumerate(field.tolist())
            for c, value in enumerate(line)
        ),
    )


def show_similarity(models: list[Loaded], samples: Samples, output: Output, pattern: str | None) -> None:
    """CKA between the layers of one model or of two."""
    layers = [analysis.blocks(loaded.model, pattern) for loaded in models]
    # Folders come class by class, and in a batch of one class the classes could not be told apart.
    order = torch.randperm(len(samples.samples), generator=torch.Generator().manual_seed(0))
    shuffled = Samples(samples.description, [samples.samples[i] for i in order.tolist()])
    batches = zip(*(shuffled.batches(loaded, SIMILARITY_BATCH) for loaded in models), strict=True)
    cka = analysis.similarity([loaded.model for loaded in models], batches, layers)
    names = [list(layers[0]), list(layers[-1])]
    caption = (
        f"Linear CKA of what layers put out for {samples.description}: 1 where two layers tell these images apart in "
        "the same way, up to rotation and scale. Unbiased estimate from minibatches."
    )
    labels = [models[0].name, models[-1].name]
    picture = figures.similarity_matrix(cka, names, labels, "Similarity of layers", caption)
    output.figure("similarity", picture)
    output.table(
        "similarity",
        ("model", "layer", "other_model", "other_layer", "cka"),
        (
            (labels[0], row, labels[1], column, float(cka[a, b]))
            for a, row in enumerate(names[0])
            for b, column in enumerate(names[1])
        ),
    )


def chosen_layers(model: nn.Module, pattern: str | None) -> dict[str, SpectralFilter]:
    """Spectral layers that match ``pattern``, by default the last one of every stage."""
    layers = analysis.spectral_layers(model, pattern or "*")
    if pattern:
        return layers
    last = {name.split(".")[1]: name for name in layers}  # stages.2.0.token_mixer
    return {name: layers[name] for name in last.values()}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# What there is to show, and of how many models at most.
ANALYSES: dict[str, tuple[Callable[[list[Loaded], Samples, Output, str | None], None], int]] = {
    "filters": (show_filters, 1),
    "response": (show_response, 1),
    "spectrum": (show_spectrum, 1),
    "receptive-field": (show_receptive_field, 6),
    "similarity": (show_similarity, 2),
}
