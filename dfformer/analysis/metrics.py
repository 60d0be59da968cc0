"""What happens inside a model: filters and their responses, spectra, receptive fields, similarity of layers.

These functions take models in eval mode and preprocessed images (B,in_chans,H,W), and return tensors on the CPU, which
``dfformer show`` (`dfformer.analysis.show`) draws. The inner steps of a token mixer are recomputed from its input and
parameters, so the results do not depend on how its forward is fused.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dfformer.models.layers import channels_last
from dfformer.models.spectral import DynamicFilter, SpectralFilter

Layer = TypeVar("Layer", bound=nn.Module)


def spectral_layers(model: nn.Module, pattern: str = "*") -> dict[str, SpectralFilter]:
    """Dynamic and global filters by name, in the model's order.

    Args:
        pattern: a shell pattern of names: ``"stages.2.*"``.

    Raises:
        ValueError: no layer matches; the message names all layers.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SpectralFilter)}
    if not layers:
        mixers = [f"{n} ({type(m).__name__})" for n, m in model.named_modules() if n.endswith("token_mixer")]
        raise ValueError(f"model: has no DynamicFilter or GlobalFilter among its token mixers {', '.join(mixers)}")
    return _matching(layers, pattern)


def blocks(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Module]:
    """All blocks by name (``stages.2.0``), or the modules whose names match ``pattern``, see `spectral_layers`."""
    if pattern is not None:
        return _matching({name: m for name, m in model.named_modules() if name}, pattern)
    stages: Iterable[nn.Sequential] = model.stages  # type: ignore[assignment]
    return {f"stages.{i}.{j}": block for i, stage in enumerate(stages) for j, block in enumerate(stage)}


def _matching(layers: Mapping[str, Layer], pattern: str) -> dict[str, Layer]:
    chosen = {name: layer for name, layer in layers.items() if fnmatchcase(name, pattern)}
    if not chosen:
        raise ValueError(f"layer: expected a pattern of {', '.join(layers)}, got {pattern!r}")
    return chosen


def capture(
    model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor, inputs: bool = False
) -> dict[str, Tensor]:
    """The outputs of ``layers``, or their inputs (``inputs``), in a forward of ``model`` without gradients.

    Raises:
        ValueError: a layer did not run, or its output is not a tensor.
    """
    seen: dict[str, Any] = {}

    def note(name: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        seen[name] = given[0] if inputs else output

    with ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(note, name)))
        model(images)
    if lost := [name for name in layers if not isinstance(seen.get(name), Tensor)]:
        raise ValueError(f"layer: {', '.join(lost)} did not run, or returned something other than a tensor")
    return {name: seen[name] for name in layers}


# Filters. A half spectrum is complex (H,K,...), K = W//2 + 1, with rows in FFT order, as in `dfformer_kernels`.


def stored_filters(layer: SpectralFilter, plane: tuple[int, int]) -> Tensor:
    """The basis (H,K,F) of a dynamic filter, or the filters (H,K,C) of a global one, for planes of ``plane`` (H,W)."""
    return torch.view_as_complex(layer.filters_for(plane).detach().contiguous()).cpu()


@torch.no_grad()
def routing(layer: DynamicFilter, x: Tensor) -> Tensor:
    """Shares (B,F,C), summing to 1, of the basis in each channel's filter, for the layer's input ``x`` (B,H,W,dim)."""
    return layer.logits(channels_last(x, layer.data_format)).float().softmax(dim=1).cpu()


def mix(shares: Tensor, basis: Tensor) -> Tensor:
    """The filters (B,H,K,C) that are the mixture of a basis (H,K,F) by shares (B,F,C)."""
    return torch.einsum("bfc,hkf->bhkc", shares.to(basis.dtype), basis)


def applied_filters(layer: SpectralFilter, x: Tensor) -> Tensor:
    """The filters (B,H,K,C) that ``layer`` applies to its expanded input, for its input ``x`` (B,H,W,dim)."""
    filters = stored_filters(layer, layer.plane_of(x))
    return mix(routing(layer, x), filters) if isinstance(layer, DynamicFilter) else filters.expand(len(x), -1, -1, -1)


def most_different(filters: Tensor, count: int) -> list[int]:
    """The ``count`` channels whose filters (B,H,K,C) differ most between images, relative to their magnitude."""
    dims = (0, 1, 2)
    spread = (filters - filters.mean(0)).abs().square().mean(dims) / filters.abs().square().mean(dims)
    return spread.topk(min(count, len(spread))).indices.tolist()


@torch.no_grad()
def expanded(layer: SpectralFilter, x: Tensor) -> Tensor:
    """The input of the filter step: ``act1(pwconv1(x))``, (B,H,W,C) for the layer's input ``x`` (B,H,W,dim)."""
    return layer.act1(layer.pwconv1(channels_last(x, layer.data_format))).float().cpu()


def filtered(u: Tensor, filters: Tensor) -> Tensor:
    """``irfft2(rfft2(u) * filters)``: planes ``u`` (...,H,W,C) and half spectra (...,H,K,C), which may broadcast."""
    spectrum = torch.fft.rfft2(u, dim=(-3, -2), norm="ortho") * filters
    return torch.fft.irfft2(spectrum, s=u.shape[-3:-1], dim=(-3, -2), norm="ortho")


def entropy(shares: Tensor) -> Tensor:
    """The entropy (B,C) in bits of shares (B,F,C) over F: 0 for a single filter, log2(F) for equal shares."""
    return -torch.xlogy(shares, shares).sum(1) / torch.log(torch.tensor(2.0))


# Spectra of feature maps


class Spectrum(NamedTuple):
    """``frequency`` (n,) from 0 to at most 1, in units of pi per pixel, and ``amplitude`` (n,), log of it (natural)."""

    frequency: Tensor
    amplitude: Tensor


def log_amplitude(features: Tensor) -> Spectrum:
    """Log amplitude on the diagonal of the spectra of ``features`` (B,H,W,C), averaged over B and C.

    As in "How Do Vision Transformers Work?" (arXiv:2202.06709). On a rectangle, the diagonal has equal
    frequencies along both sides: those of the shorter side, and the nearest ones of the longer side.
    """
    _, H, W, _ = features.shape
    shorter = min(H, W)
    step = torch.arange(shorter // 2 + 1) * (2 / shorter)
    rows, columns = ((step * side / 2).round().long().clamp(max=side // 2) for side in (H, W))
    spectrum = torch.fft.rfft2(features.float().cpu(), dim=(1, 2), norm="ortho")[:, rows, columns]
    floor = torch.finfo(torch.float32).tiny  # an amplitude of exactly 0 has no logarithm
    return Spectrum(step, spectrum.abs().clamp(min=floor).log().mean(dim=(0, 2)))


def spectra(model: nn.Module, batches: Iterable[Tensor], layers: Mapping[str, nn.Module]) -> dict[str, Spectrum]:
    """Relative log amplitudes of each layer's output (B,H,W,C): 0 at frequency 0, averaged over all images."""
    sums: dict[str, Spectrum] = {}
    count = 0
    for images in batches:
        count += len(images)
        for name, features in capture(model, layers, images).items():
            if features.dim() != 4:
                raise ValueError(f"layer: {name} returns {tuple(features.shape)}, a spectrum needs (B,H,W,C)")
            frequency, amplitude = log_amplitude(features)
            before = sums[name].amplitude if name in sums else 0
            sums[name] = Spectrum(frequency, before + len(images) * amplitude)
    return {name: Spectrum(s.frequency, (s.amplitude - s.amplitude[0]) / count) for name, s in sums.items()}


# Receptive fields


def receptive_field(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """How much each pixel contributes to the middle of the last feature map, (H,W), float64, summing to 1.

    The effective receptive field (Luo et al., arXiv:1701.04128): ``|d features[:, H'//2, W'//2].sum() / d image|``,
    summed over image channels and averaged over images, all of one size.

    Args:
        model: with ``forward_features`` that returns (B,H',W',C).
    """
    field = torch.zeros((), dtype=torch.float64)
    for images in batches:
        images = images.detach().requires_grad_()
        features = model.forward_features(images)  # type: ignore[operator]
        middle = features[:, features.shape[1] // 2, features.shape[2] // 2].sum()
        [gradient] = torch.autograd.grad(middle, images)
        field = field + gradient.abs().sum(dim=(0, 1)).double().cpu()
    return field / field.sum()


# Similarity of layers


def hsic(K: Tensor, L: Tensor) -> Tensor:
    """The unbiased estimate of HSIC (Song et al. 2012) of each pair of Gram matrices (a,n,n), (b,n,n): (a,b).

    Raises:
        ValueError: n is below 4, where there is none.
    """
    n = K.shape[-1]
    if n < 4:
        raise ValueError(f"images: expected 4 or more in a batch, to estimate similarity, got {n}")
    K, L = (gram * (1 - torch.eye(n, dtype=gram.dtype)) for gram in (K, L))
    trace = K.flatten(1) @ L.flatten(1).T
    sums = K.sum((1, 2))[:, None] * L.sum((1, 2)) / ((n - 1) * (n - 2))
    rows = K.sum(1) @ L.sum(1).T * (2 / (n - 2))
    return (trace + sums - rows) / (n * (n - 3))


def similarity(
    models: Sequence[nn.Module],
    batches: Iterable[Sequence[Tensor]],
    layers: Sequence[Mapping[str, nn.Module]],
) -> Tensor:
    """Linear CKA (a,b), float64, between the outputs of the layers of one model or two, from minibatches.

    Each HSIC is averaged over the batches before they are divided (Nguyen et al., arXiv:2010.15327), so the result
    does not depend on the batch size, except for noise. Features are compared over images: (B,...) is B vectors.
    NaN where a layer's output is the same for every image.

    Args:
        models: one, to compare its layers with each other, or two.
        batches: for each batch one tensor per model: the same images in the same order, at least 4.
        layers: one mapping per model.
    """
    sums: list[Tensor | float] = [0.0, 0.0, 0.0]
    for batch in batches:
        grams = [
            torch.stack([_gram(features) for features in capture(model, chosen, images).values()])
            for model, chosen, images in zip(models, layers, batch, strict=True)
        ]
        first, last = grams[0], grams[-1]
        terms = hsic(first, last), hsic(first, first).diag(), hsic(last, last).diag()
        sums = [old + new for old, new in zip(sums, terms, strict=True)]
    cross, own_first, own_last = (torch.as_tensor(s) for s in sums)
    return cross / (own_first[:, None] * own_last).sqrt()


def _gram(features: Tensor) -> Tensor:
    """(n,n), float64, of (n,...). The mean is subtracted: the unbiased HSIC ignores it, but rounding does not."""
    x = features.flatten(1).double()
    x = x - x.mean(0)
    return (x @ x.T).cpu()
