"""``dfformer show filters`` and ``response``: the filters of spectral layers, and what they do."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfformer.analysis import figures
from dfformer.analysis import metrics as analysis
from dfformer.analysis.output import Output
from dfformer.analysis.shown import ShownImages, ShownModel
from dfformer.models.spectral import DynamicFilter, SpectralFilter

DRAWN_IMAGES, DRAWN_CLASSES, DRAWN_CHANNELS, DRAWN_FILTERS = 3, 10, 4, 6


class _Shown(NamedTuple):
    """A layer's filters (H,K,F) for ``plane`` (H,W), the title of its figures, and the start of its files' names."""

    filters: Tensor
    plane: tuple[int, int]
    title: str
    files: str


def show_filters(models: list[ShownModel], images: ShownImages, output: Output, pattern: str | None) -> None:
    """The stored filters, their weights by the routing, and the mixed filters of images and classes."""
    [model] = models
    layers = chosen_layers(model.network, pattern)
    shares: dict[str, list[Tensor]] = {name: [] for name in layers}
    planes: dict[str, tuple[int, int]] = {}
    for batch in images.batches(model):
        for name, x in analysis.capture(model.network, layers, batch, inputs=True).items():
            layer = layers[name]
            planes[name] = layer.plane_of(x)
            if isinstance(layer, DynamicFilter):
                shares[name].append(analysis.routing(layer, x))
    examples = images.examples[:DRAWN_CLASSES]
    explored: dict[str, tuple[Tensor, Tensor | None, tuple[int, int]]] = {}
    for name, layer in layers.items():
        routed = torch.cat(shares[name]) if shares[name] else None
        basis = analysis.stored_filters(layer, planes[name])
        explored[name] = basis, None if routed is None else routed[examples], planes[name]
        shown = _Shown(basis, planes[name], f"{model.name}: {name}", f"filters.{name}")
        _show_basis(shown, layer, output)
        if routed is not None:
            _show_routing(shown, routed, images, output)
            _show_mixed(shown, routed, model, images, output)
    output.filters({images.members[i].name: images.pixels(i, model) for i in examples}, explored)


def _show_basis(shown: _Shown, layer: SpectralFilter, output: Output) -> None:
    basis, (H, W), count = shown.filters, shown.plane, shown.filters.shape[2]
    if isinstance(layer, DynamicFilter):
        kind, what, drawn = "filter", "filter basis", list(range(count))
        of = f"The {count} filters that every channel's filter is mixed from"
    else:
        kind, what = "channel", "global filters"
        drawn = np.unique(np.linspace(0, count - 1, DRAWN_FILTERS).astype(int)).tolist()
        of = f"The filters of {len(drawn)} of {count} channels"
    caption = (
        f"{of}, for planes of {H}x{W}. Frequency 0, which belongs to the plane's mean, is in the "
        "middle. The filters act on real-valued maps, so the left half mirrors the right half."
    )
    names = [f"{kind} {i}" for i in drawn]
    figure = figures.filter_basis(basis[..., drawn], W, names)
    output.figure(f"{shown.files}.basis", figure, f"{shown.title}, {what}", caption)
    header = (kind, "vertical_cycles", "horizontal_cycles", "real", "imaginary")
    rows = ((i, *row) for i in range(count) for row in _half_spectrum(basis[..., i]))
    output.table(f"{shown.files}.basis", header, rows)


def _half_spectrum(filters: Tensor) -> Iterator[tuple[int, int, float, float]]:
    """Rows (vertical frequency, horizontal frequency, real part, imaginary part), in cycles a plane, of (H,K)."""
    H = len(filters)
    for (h, k), value in np.ndenumerate(filters.numpy().astype(np.complex128)):
        yield (h if h < (H + 1) // 2 else h - H), k, value.real, value.imag


def _show_routing(shown: _Shown, shares: Tensor, images: ShownImages, output: Output) -> None:
    groups, bits = images.groups, analysis.entropy(shares)
    by_class = len(groups) > 1
    rows = groups if by_class else {image.name: [n] for n, image in enumerate(images.members)}
    labels = list(rows)[:DRAWN_CLASSES]
    drawn, drawn_bits = (torch.stack([values[rows[label]].mean(0) for label in labels]) for values in (shares, bits))
    averaged = "averaged over the images of a class, " if by_class and len(groups) < len(images.members) else ""
    caption = (
        f"The routing's softmax weight of each filter in each of {shares.shape[2]} channels, {averaged}"
        f"on {images.description}. Right: their entropy (quartiles over channels)."
    )
    figure = figures.routing(drawn, drawn_bits, labels, "class" if by_class else "image")
    output.figure(f"{shown.files}.routing", figure, f"{shown.title}, routing", caption)
    filters = range(shares.shape[1])
    strongest = F.one_hot(shares.argmax(1), shares.shape[1]).float().mean(1)
    output.table(
        f"{shown.files}.routing_images",
        ("image", "class", "entropy_bits", *(f"share_{f}" for f in filters), *(f"strongest_{f}" for f in filters)),
        (
            (s.name, s.group, float(bits[n].mean()), *shares[n].mean(1).tolist(), *strongest[n].tolist())
            for n, s in enumerate(images.members)
        ),
    )
    output.table(
        f"{shown.files}.routing_classes",
        ("class", "channel", "entropy_bits", *(f"share_{f}" for f in filters)),
        (
            (group, c, own_bits, *own_shares)
            for group, own in groups.items()
            for c, (own_bits, own_shares) in enumerate(
                zip(bits[own].mean(0).tolist(), shares[own].mean(0).T.tolist(), strict=True)
            )
        ),
    )


def _show_mixed(shown: _Shown, shares: Tensor, model: ShownModel, images: ShownImages, output: Output) -> None:
    basis, (H, W) = shown.filters, shown.plane
    examples, groups = images.examples[:DRAWN_CLASSES], images.groups
    channels = analysis.most_different(analysis.mix(shares[examples], basis), DRAWN_CHANNELS)
    parts = {"images": ([images.members[i].name for i in examples], [[i] for i in examples])}
    if 1 < len(groups) < len(images.members):
        parts["classes"] = (list(groups)[:DRAWN_CLASSES], list(groups.values())[:DRAWN_CLASSES])
    for part, (labels, members) in parts.items():
        filters = analysis.mix(torch.stack([shares[i].mean(0) for i in members])[..., channels], basis)
        inputs = [torch.stack([images.pixels(i, model) for i in own]).mean(0).permute(1, 2, 0) for own in members]
        what = f"{len(labels)} of {images.description} and the filters they make"
        if part == "classes":
            what = f"{len(labels)} classes of {images.description}, averages of images and of the filters they make"
        caption = (
            f"{what}, in the {len(channels)} of {shares.shape[2]} channels that differ most between images. "
            f"Planes of {H}x{W}, frequency 0 in the middle."
        )
        figure = figures.mixed_filters([pixels.numpy() for pixels in inputs], labels, filters, channels, W)
        output.figure(f"{shown.files}.mixed_{part}", figure, f"{shown.title}, mixed filters", caption)
        output.table(
            f"{shown.files}.mixed_{part}",
            (part, "channel", "vertical_cycles", "horizontal_cycles", "real", "imaginary"),
            (
                (label, channel, *row)
                for n, label in enumerate(labels)
                for c, channel in enumerate(channels)
                for row in _half_spectrum(filters[n, ..., c])
            ),
        )


def show_response(models: list[ShownModel], images: ShownImages, output: Output, pattern: str | None) -> None:
    """Responses of each filter of the basis and of the mixed filter to the image and to the layer's own input."""
    [model] = models
    layers = chosen_layers(model.network, pattern)
    for i in images.examples[:DRAWN_IMAGES]:
        batch = images.prepared(i, model)[None]
        for name, x in analysis.capture(model.network, layers, batch, inputs=True).items():
            _show_response(model, name, layers[name], x, images, i, output)


def _show_response(
    model: ShownModel, name: str, layer: SpectralFilter, x: Tensor, images: ShownImages, index: int, output: Output
) -> None:
    image, plane = images.members[index], layer.plane_of(x)
    u, applied = analysis.expanded(layer, x)[0], analysis.applied_filters(layer, x)[0]
    basis = analysis.stored_filters(layer, plane) if isinstance(layer, DynamicFilter) else applied[..., :0]
    channels = (
        analysis.filtered(u, applied)
        .std(dim=(0, 1), correction=0)
        .topk(min(DRAWN_CHANNELS - 1, u.shape[2]))
        .indices.tolist()
    )
    grey = images.pixels(index, model).mean(0)
    reduced = F.interpolate(grey[None, None], plane, mode="bilinear", antialias=True)[0, 0]
    inputs = {"image": (reduced, channels[0])} | {f"channel {c}": (u[..., c], c) for c in channels}
    columns = ["input", *(f"filter {f}" for f in range(basis.shape[2])), "applied filter"]
    maps = []
    for plane_in, channel in inputs.values():
        filters = torch.cat([basis, applied[..., channel : channel + 1]], dim=2)
        maps.append([plane_in, *analysis.filtered(plane_in[..., None], filters).unbind(-1)])
    caption = (
        f"{image.name}, grey and reduced to the layer's plane of {plane[0]}x{plane[1]}, and the layer's own input in "
        f"the {len(channels)} of {u.shape[2]} channels with the strongest response. The applied filter is the "
        f"channel's own (for the image, that of channel {channels[0]}). Gains in dB are ratios of standard deviations."
    )
    drawn = f"response.{name}.{image.name}"
    title = f"{model.name}: {name}, responses"
    output.figure(drawn, figures.responses(maps, list(inputs), columns), title, caption)
    output.table(
        drawn,
        ("input", "filter", "row", "column", "value"),
        (
            (source, column, *pixel, value)
            for source, planes in zip(inputs, maps, strict=True)
            for column, plane in zip(columns, planes, strict=True)
            for pixel, value in np.ndenumerate(plane.double().numpy())
        ),
    )


def chosen_layers(model: nn.Module, pattern: str | None) -> dict[str, SpectralFilter]:
    """Spectral layers that match ``pattern``, by default the last one of every stage."""
    layers = analysis.spectral_layers(model, pattern or "*")
    if pattern:
        return layers
    last = {name.split(".")[1]: name for name in layers}  # stages.2.0.token_mixer
    return {name: layers[name] for name in last.values()}
