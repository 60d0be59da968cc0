"""What is computed from a model's insides, against definitions written out."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from dfformer import DynamicFilter, GlobalFilter
from dfformer.analysis import metrics as analysis
from dfformer.models.spectral import SpectralFilter

SMALL: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16), "img_size": 32, "num_classes": 3}


def small(name: str = "dfformer_s18", **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs}).eval()


def spectral(kind: type[SpectralFilter], **kwargs: Any) -> SpectralFilter:
    """A layer of 4 channels for planes of 6x9 whose filters and routing are far from uniform."""
    torch.manual_seed(0)
    layer = kind(dim=4, size=(6, 9), **kwargs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.eval()


# Filters


@pytest.mark.parametrize("kind", [DynamicFilter, GlobalFilter])
@pytest.mark.parametrize("plane", [(6, 9), (7, 4)], ids=str)
@pytest.mark.parametrize("act1_layer", [None, nn.GELU], ids=["starrelu", "gelu"])
def test_shown_filters_reproduce_the_layer(
    kind: type[SpectralFilter], plane: tuple[int, int], act1_layer: type[nn.Module] | None
) -> None:
    layer: Any = spectral(kind, weight_resize=True, **({"act1_layer": act1_layer} if act1_layer else {}))
    x = torch.randn(3, *plane, 4)
    shown = analysis.filtered(analysis.expanded(layer, x), analysis.applied_filters(layer, x))
    with torch.no_grad():
        torch.testing.assert_close(layer.pwconv2(layer.act2(shown)), layer(x), rtol=1e-4, atol=1e-4)


def test_routing_and_its_entropy() -> None:
    layer = spectral(DynamicFilter)
    assert isinstance(layer, DynamicFilter)
    shares = analysis.routing(layer, torch.randn(3, 6, 9, 4))
    assert shares.shape == (3, 4, 8)
    torch.testing.assert_close(shares.sum(1), torch.ones(3, 8))
    assert shares.std() > 0.1, "the layer of this test does route"
    known = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4]).T[None]
    torch.testing.assert_close(analysis.entropy(known), torch.tensor([[0.0, 1.0, 2.0]]))


def test_most_different_channels() -> None:
    filters = torch.ones(5, 4, 3, 6, dtype=torch.complex64)
    filters[:, 1, 2, 4] = torch.arange(5) * 1j
    filters[:, :, :, 2] *= 1 + 0.1 * torch.arange(5).view(5, 1, 1)
    assert analysis.most_different(filters, 2) == [4, 2]


def test_capture_is_what_layers_put_out_and_are_given() -> None:
    model = small()
    layers = analysis.blocks(model)
    assert list(layers) == ["stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1", "stages.3.0"]
    images = torch.randn(2, 3, 32, 32)
    out = analysis.capture(model, layers, images)
    given = analysis.capture(model, layers, images, inputs=True)
    torch.testing.assert_close(given["stages.2.1"], out["stages.2.0"])
    with torch.no_grad():
        x = images
        for i, (downsampling, stage) in enumerate(zip(model.downsample_layers, model.stages, strict=True)):  # type: ignore[arg-type]
            x = downsampling(x)
            for j, block in enumerate(stage):
                x = block(x)
                torch.testing.assert_close(out[f"stages.{i}.{j}"], x)
    assert not any(layer._forward_hooks for layer in layers.values()), "hooks are removed"


MISSES: dict[str, tuple[Callable[[], object], str]] = {
    "no-spectral": (lambda: analysis.spectral_layers(small("dfformer_s18_afno")), r"stages.0.0.token_mixer \(AFNO2D\)"),
    "no-such": (
        lambda: analysis.spectral_layers(small("cdfformer_s18"), "stages.0.*"),
        "pattern of stages.2.0.token_mix",
    ),
    "does-not-run": (
        lambda: analysis.capture(small(), analysis.blocks(small(), "head"), torch.randn(1, 3, 32, 32)),
        "head did not run",
    ),
    "vector": (lambda: spectra_of_head(), r"head returns \(1, 3\)"),
    "three-images": (lambda: analysis.hsic(torch.eye(3)[None], torch.eye(3)[None]), "expected 4 or more .*got 3"),
}


def spectra_of_head() -> object:
    model = small()
    return analysis.spectra(model, [torch.randn(1, 3, 32, 32)], analysis.blocks(model, "head"))


@pytest.mark.parametrize(("call", "message"), MISSES.values(), ids=MISSES.keys())
def test_misuse(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# Spectra


@pytest.mark.parametrize("plane", [(8, 8), (7, 7), (6, 11), (9, 4), (1, 1)], ids=str)
def test_noise_has_a_flat_spectrum(plane: tuple[int, int]) -> None:
    """But where it is real: the mean log of a real normal number is lower than of a complex one, by log(2)/2."""
    H, W = plane
    frequency, amplitude = analysis.log_amplitude(
        torch.randn(64, H, W, 128, generator=torch.Generator().manual_seed(0))
    )
    shorter = min(plane)
    torch.testing.assert_close(frequency, 2 / shorter * torch.arange(shorter // 2 + 1))
    complex_mean = -0.5772157 / 2  # -Euler's constant / 2
    rows = [round(float(f) * H / 2) for f in frequency]
    columns = [min(round(float(f) * W / 2), W // 2) for f in frequency]
    real = [2 * r % H == 0 and 2 * c % W == 0 for r, c in zip(rows, columns, strict=True)]
    expected = torch.tensor([complex_mean - math.log(2) / 2 if own else complex_mean for own in real])
    torch.testing.assert_close(amplitude, expected, rtol=0, atol=0.05)


def test_a_wave_is_where_its_frequency_is() -> None:
    h, w = torch.arange(12)[:, None], torch.arange(12)
    wave = torch.cos(2 * torch.pi * 3 * (h + w) / 12)
    frequency, amplitude = analysis.log_amplitude((10 + wave)[None, :, :, None])
    assert float(frequency[1 + int(amplitude[1:].argmax())]) == pytest.approx(3 / 6)
    assert float(amplitude[3] - amplitude[0]) == pytest.approx(math.log(0.5 / 10), abs=1e-4)


def test_a_constant_image_is_finite() -> None:
    _, amplitude = analysis.log_amplitude(torch.ones(1, 8, 8, 1))
    assert amplitude.isfinite().all()
    assert (amplitude[1:] < amplitude[0] - 10).all()


def test_spectra_do_not_depend_on_batches() -> None:
    model, images = small(), torch.randn(5, 3, 32, 32)
    layers = analysis.blocks(model)
    whole = analysis.spectra(model, [images], layers)
    parts = analysis.spectra(model, images.split([2, 3]), layers)
    outputs = analysis.capture(model, layers, images)
    for name, features in outputs.items():
        torch.testing.assert_close(parts[name].amplitude, whole[name].amplitude, rtol=0, atol=1e-4)
        logs = torch.fft.fft2(features, dim=(1, 2)).abs().log().mean((0, 3))
        diagonal = torch.stack([logs[k, k] - logs[0, 0] for k in range(len(logs) // 2 + 1)])
        torch.testing.assert_close(whole[name].amplitude, diagonal, rtol=0, atol=1e-3)


# Receptive fields


class Convolutions(nn.Module):
    """Without activations: the receptive field is the convolution of the kernels, whatever the image."""

    def __init__(self, kernels: list[Tensor]) -> None:
        super().__init__()
        self.kernels = kernels

    def forward_features(self, x: Tensor) -> Tensor:
        for kernel in self.kernels:
            x = nn.functional.conv2d(x, kernel[None, None].to(x.dtype), padding=kernel.shape[0] // 2)
        return x.permute(0, 2, 3, 1)


def test_receptive_field_of_convolutions() -> None:
    kernels = [torch.rand(3, 3, dtype=torch.float64), torch.rand(5, 5, dtype=torch.float64)]
    spectrum = torch.fft.fft2(kernels[0].flip(0, 1), s=(15, 15)) * torch.fft.fft2(kernels[1].flip(0, 1), s=(15, 15))
    expected = torch.fft.ifft2(spectrum).real[:7, :7]  # of full convolution: 3 + 5 - 1
    images = torch.randn(4, 1, 15, 15, dtype=torch.float64)
    field = analysis.receptive_field(Convolutions(kernels), images.split(2))
    assert float(field.sum()) == pytest.approx(1)
    surrounding = field.clone()
    surrounding[4:11, 4:11] = 0
    assert float(surrounding.abs().max()) == 0
    # kernels are correlated with the image, so the gradient is their convolution, turned around
    torch.testing.assert_close(field[4:11, 4:11], (expected / expected.sum()).flip(0, 1))


# Similarity


def naive_cka(x: Tensor, y: Tensor) -> float:
    """Kornblith et al.'s biased estimate on all images at once, from centred features."""
    x, y = (t.flatten(1).double() - t.flatten(1).double().mean(0) for t in (x, y))
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def naive_hsic(K: Tensor, L: Tensor) -> float:
    """Song et al.'s U-statistic by its definition: an average over all 4-tuples of different images."""
    n, total, count = len(K), 0.0, 0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += float(K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q]))
                        count += 1
    return total / count


def test_hsic_is_the_u_statistic() -> None:
    K, L = (t @ t.T for t in torch.randn(2, 7, 3, dtype=torch.float64))
    assert float(analysis.hsic(K[None], L[None])) == pytest.approx(naive_hsic(K, L))


class Features(nn.Module):
    """Layers that return a transformation of their input."""

    def __init__(self, **transforms: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: Transform(f) for name, f in transforms.items()})

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers.values()]


class Transform(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_cka_knows_what_it_must_not_see() -> None:
    x = torch.randn(400, 12) @ torch.randn(12, 12) + 100
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0].float()
    noise = torch.randn(400, 5)
    fixed = torch.randn(12, 3)
    model = Features(
        same=lambda t: t,
        rotated=lambda t: t @ rotation,
        scaled=lambda t: -7 * t + 3,
        projected=lambda t: t @ fixed,
        unrelated=lambda t: noise[(t[:, :1] == x[:, 0]).float().argmax(1)],
    )
    layers = analysis.blocks(model, "layers.*")
    cka = analysis.similarity([model], [(batch,) for batch in x.split(40)], [layers])
    assert cka.shape == (5, 5)
    torch.testing.assert_close(cka[0, :3], torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(cka, cka.T)
    assert abs(float(cka[0, 4])) < 0.05
    assert float(cka[0, 3]) == pytest.approx(naive_cka(x, x @ fixed), abs=0.03)
    whole = analysis.similarity([model], [(x,)], [layers])
    torch.testing.assert_close(cka, whole, rtol=0, atol=0.05)


def test_cka_of_two_models() -> None:
    models = [small(), small("cdfformer_s18")]
    layers = [analysis.blocks(model) for model in models]
    images = torch.randn(8, 3, 32, 32)
    cka = analysis.similarity(models, [(images, images)], layers)
    same = analysis.similarity([models[0], models[0]], [(images, images)], [layers[0], layers[0]])
    assert cka.shape == (5, 5)
    assert not torch.allclose(cka, same)
    torch.testing.assert_close(same.diag(), torch.ones(5, dtype=torch.float64))
