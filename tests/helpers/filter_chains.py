"""The filter step in plain torch, written in many ways, and what only looks like it: functions of x, logits, basis.

``x`` (B,8,8,C) or (B,C,8,8), C = 6; ``logits`` (B,F,C), F = 3; ``basis`` (8,5,F,2), or (8,5,C,2) where it is not mixed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

B, C, FILTERS, SIZE = 2, 6, 3, (8, 8)
Step = Callable[[Tensor, Tensor, Tensor], Any]
LAST, FIRST = (1, 2), (2, 3)


def mixed(logits: Tensor, basis: Tensor, out: str = "bhkc") -> Tensor:
    return torch.einsum(f"bfc,hkf->{out}", logits.softmax(1).to(torch.complex64), torch.view_as_complex(basis))


def there(x: Tensor, **kw: Any) -> Tensor:
    return torch.fft.rfft2(x, **{"dim": LAST, "norm": "ortho", **kw})


def back(Z: Tensor, **kw: Any) -> Tensor:
    return torch.fft.irfft2(Z, **{"s": SIZE, "dim": LAST, "norm": "ortho", **kw})


# The same step, in other words.


def by_einsum(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    return back(there(x) * mixed(logits, basis))


def by_broadcast_sum(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    filters = torch.view_as_complex(basis).permute(2, 0, 1)[None, :, None]
    M = (F.softmax(logits, dim=1)[..., None, None] * filters).sum(dim=1)
    return torch.fft.irfft2(torch.fft.rfft2(x) * M, s=x.shape[-2:])


def by_tensordot(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    M = torch.tensordot(torch.softmax(logits, 1).to(torch.complex64), torch.view_as_complex(basis), dims=([1], [2]))
    return torch.fft.irfftn(torch.fft.rfftn(x, dim=(2, 3), norm="forward").mul(M), s=SIZE, dim=(2, 3), norm="forward")


def by_matrix_product(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    routing = logits.transpose(1, 2).contiguous().softmax(-1)
    M = (routing.to(torch.complex64) @ torch.view_as_complex(basis).flatten(0, 1).t()).unflatten(2, (8, 5))
    return back(M.permute(0, 2, 3, 1) * there(x))


def by_pairs(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    M = torch.einsum("bfc,hkfz->bhkcz", logits.softmax(1), basis).contiguous()
    return back(there(x.float()) * torch.view_as_complex(M)).to(x.dtype)


def by_parts(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    routing = logits.softmax(1)
    real, imag = (torch.einsum("bfc,hkf->bhkc", routing, basis[..., i]) for i in (0, 1))
    return back(torch.complex(real, imag) * there(x))


def by_imaginary_unit(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    routing = logits.softmax(1)
    real, imag = (torch.einsum("bfc,hkf->bhkc", routing, basis[..., i]) for i in (0, 1))
    return back((real + 1j * imag) * there(x))


def by_real_products(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    X, M = there(x), mixed(logits, basis)
    real, imag = X.real * M.real - X.imag * M.imag, X.real * M.imag + X.imag * M.real
    return back(torch.view_as_complex(torch.stack((real, imag), -1)))


def by_lines(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    X = torch.fft.fft(torch.fft.rfft(x, dim=2, norm="ortho"), dim=1, norm="ortho")
    Y = torch.fft.ifft(X * mixed(logits, basis), dim=1, norm="ortho")
    return torch.fft.irfft(Y, n=8, dim=2, norm="ortho")


def in_place(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    X = there(x)
    X *= mixed(logits, basis)
    return back(X)


def on_a_permuted_view(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    """irfft2's result is contiguous, so it can be viewed."""
    y = back(there(x.permute(0, 2, 3, 1)) * mixed(logits, basis))
    return y.view(x.shape[0], 64, C).transpose(1, 2).reshape(x.shape)


def on_windows(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    """The images' halves as a batch: the step all the same, on another plane."""
    n, H, W, c = x.shape
    x = x.reshape(n, 2, H // 2, W, c).flatten(0, 1)
    M = mixed(logits.repeat_interleave(2, 0), basis[:4].contiguous())
    return back(there(x) * M, s=(4, 8)).reshape(n, H, W, c)


def one_a_channel(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    return back(there(x) * torch.view_as_complex(basis))


def one_a_channel_first(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    filters = torch.view_as_complex(basis.permute(2, 0, 1, 3).contiguous())
    return torch.fft.irfft2(filters[None] * torch.fft.rfft2(x))


def scaled_basis(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    """Before it is mixed, a basis may be anything."""
    return back(there(x) * mixed(logits, (basis * 0.5).sin()))


def attention_map_too(x: Tensor, logits: Tensor, basis: Tensor) -> Any:
    """The softmax may be a result as well."""
    routing = logits.softmax(1)
    return back(
        there(x) * torch.einsum("bfc,hkf->bhkc", routing.to(torch.complex64), torch.view_as_complex(basis))
    ), routing


def softmax_in_double(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    routing = logits.softmax(1, dtype=torch.float64).to(torch.complex64)
    return back(there(x) * torch.einsum("bfc,hkf->bhkc", routing, torch.view_as_complex(basis)))


# With weights of another kind, or filters from anywhere.


def dropped_weights(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    routing = F.dropout(logits.softmax(1), 0.5, True)
    return back(there(x) * torch.einsum("bfc,hkf->bhkc", routing.to(torch.complex64), torch.view_as_complex(basis)))


def filters_too(x: Tensor, logits: Tensor, basis: Tensor) -> Any:
    M = mixed(logits, basis)
    return back(there(x) * M), M.real


def conjugated_basis(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    routing = logits.softmax(1).to(torch.complex64)
    return back(there(x) * torch.einsum("bfc,hkf->bhkc", routing, torch.view_as_complex(basis).conj()))


def swapped_parts(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    M = mixed(logits, basis)
    return back(there(x) * torch.complex(M.imag, M.real))


def softmax_over_channels(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    M = torch.einsum("bfc,hkf->bhkc", logits.softmax(2).to(torch.complex64), torch.view_as_complex(basis))
    return back(there(x) * M)


def sharpened(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    M = torch.einsum("bfc,hkf->bhkc", logits.softmax(1).square().to(torch.complex64), torch.view_as_complex(basis))
    return back(there(x) * M)


def filters_of_all_images(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    M = torch.einsum("bfc,hkf->hkc", logits.softmax(1).to(torch.complex64), torch.view_as_complex(basis))
    return back(there(x) * M)


def by_sigmoid(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    M = torch.einsum("bfc,hkf->bchk", logits.sigmoid().to(torch.complex64), torch.view_as_complex(basis))
    return torch.fft.irfft2(torch.fft.rfft2(x) * M, s=x.shape[2:])


def between_writes(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    """Nothing takes what the calls that write return."""
    gain = logits.mean(1)[..., None, None]
    x = x.clone()
    x.mul_(gain)
    y = by_broadcast_sum(x, logits, basis)
    y.add_(gain)
    return y


def spectrum_routing(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    X = there(x)
    return back(X * mixed(logits + X.abs().mean(dim=(1, 2))[:, None], basis))


def spectrum_too(x: Tensor, logits: Tensor, basis: Tensor) -> Any:
    X = there(x)
    return back(X * mixed(logits, basis)), X.abs()


# The function, whether it is channels-first, whether its filters are mixed by the operator.
SAME: dict[str, tuple[Step, bool, bool]] = {
    "einsum": (by_einsum, False, True),
    "broadcast and sum": (by_broadcast_sum, True, True),
    "between writes": (between_writes, True, True),
    "tensordot": (by_tensordot, True, True),
    "matrix product": (by_matrix_product, False, True),
    "pairs": (by_pairs, False, True),
    "real and imaginary parts": (by_parts, False, True),
    "real products": (by_real_products, False, True),
    "one-dimensional transforms": (by_lines, False, True),
    "in place": (in_place, False, True),
    "a permuted view": (on_a_permuted_view, True, True),
    "windows": (on_windows, False, True),
    "a filter a channel": (one_a_channel, False, False),
    "a filter a channel, channels-first": (one_a_channel_first, True, False),
    "scaled basis": (scaled_basis, False, True),
    "softmax is a result too": (attention_map_too, False, True),
    "softmax in double precision": (softmax_in_double, False, True),
    "sigmoid": (by_sigmoid, True, True),
    "dropout of the weights": (dropped_weights, False, True),
    "softmax over channels": (softmax_over_channels, False, True),
    "sharpened softmax": (sharpened, False, True),
    "mixed filters are a result too": (filters_too, False, True),
    "conjugated basis": (conjugated_basis, False, False),
    "parts swapped": (swapped_parts, False, False),
    "offset": (lambda x, r, b: back(there(x) * (1 + mixed(r, b))), False, False),
    "filters of all images": (filters_of_all_images, False, False),
    "spectrum is a result too": (spectrum_too, False, True),
    "routed by the spectrum": (spectrum_routing, False, True),
    "imaginary part times 1j": (by_imaginary_unit, False, True),
}


# Something else.


def _dropped_spectrum(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    return back(there(x) * F.dropout(torch.ones_like(x[:, :, :5]), 0.0) * mixed(logits, basis))


def _activated(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    x = x.clone()
    X = there(x)
    return F.relu(x, True) + back(X * mixed(logits, basis))


def _multiplied(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    x = x.clone()
    X = there(x)
    x.__imul__(basis[0, 0, 0, 0])
    return x + back(X * mixed(logits, basis))


def _overwritten(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    x = x * 1
    X = there(x)
    x.zero_()
    return back(X * mixed(logits, basis))


def _overwritten_spectrum(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    X = there(x)
    X.mul_(mixed(logits, basis))
    return back(X)


def _spectrum_in_place(x: Tensor, logits: Tensor, basis: Tensor) -> Any:
    """The first rows are seen after they are overwritten."""
    X = there(x)
    rows = X[:, :2]
    X *= mixed(logits, basis)
    return back(X), rows.abs()


def _two_spectra(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    return back((there(x) + there(x.relu())) * mixed(logits, basis))


def _two_softmaxes(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    return back(there(x) * mixed(logits, basis) * mixed(logits * 2, basis))


def _one_image(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    """The first image's filters for all."""
    return back(there(x) * mixed(logits, basis)[:1])


def _full(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    M = mixed(logits, torch.cat((basis, basis[:, :3]), 1))
    return torch.fft.ifft2(torch.fft.fft2(x, dim=LAST) * M, dim=LAST).real


def _single_row(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    return back(there(x) * mixed(logits, basis[:1]))


def _no_batch(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    y = torch.fft.irfft2(torch.fft.rfft2(x[0], dim=(0, 1)) * mixed(logits, basis)[0], s=SIZE, dim=(0, 1))
    return y[None].expand_as(x)


def _odd_width(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    x = x[:, :, :7]
    return torch.fft.irfft2(torch.fft.rfft2(x, dim=LAST) * mixed(logits, basis[:, :4].contiguous()), dim=LAST)


# The function, and why it is left alone.
OTHER: dict[str, tuple[Step, str]] = {
    "norms": (lambda x, r, b: back(there(x) * mixed(r, b), norm="backward"), "norms, 'ortho' and 'backward', do not"),
    "axes swapped": (
        lambda x, r, b: back(there(x, dim=(2, 1)) * mixed(r, b).transpose(1, 2), dim=(2, 1)),
        r"axes \(2, 1\) and \(2, 1\) of a 4-D",
    ),
    "other axes back": (
        lambda x, r, b: back((there(x) * mixed(r, b)).permute(0, 3, 1, 2), dim=FIRST),
        r"axes \(1, 2\) and \(2, 3\)",
    ),
    "full spectrum": (_full, "ifft2 takes a full spectrum"),
    "no batch": (_no_batch, "of a 3-D tensor"),
    "enlarged": (lambda x, r, b: back(there(x) * mixed(r, b), s=(8, 10)), "plane of 8 x 10, the input has 8 x 8"),
    "cropped": (lambda x, r, b: back(there(x, s=(8, 6)) * mixed(r, b[:, :4].contiguous())), "crops or pads the plane"),
    "odd width without a size": (_odd_width, "plane of 8 x 6, the input has 8 x 7"),
    "overwritten spectrum": (_overwritten_spectrum, "also needed by mul_"),
    "rows of a spectrum in place": (_spectrum_in_place, "its output 1 differs from ours"),
    "conjugated filters": (
        lambda x, r, b: back(there(x) * mixed(r, b).conj()),
        "its filters are a lazy conjugate",
    ),
    "conjugated spectrum": (lambda x, r, b: back(there(x).conj() * mixed(r, b)), "conj lies between"),
    "scaled by a number": (lambda x, r, b: back(there(x) * 0.5 * mixed(r, b)), "by a factor, 0.5 in the trial"),
    "scaled by a tensor": (lambda x, r, b: back(there(x) * b[0, 0, 0, 0] * mixed(r, b)), "output differs from ours"),
    "divided": (lambda x, r, b: back(there(x) * mixed(r, b) / 8), "truediv by 8 lies between"),
    "absolute": (lambda x, r, b: back(there(x).abs() * mixed(r, b)), "abs lies between"),
    "residual spectrum": (lambda x, r, b: back(there(x) * mixed(r, b) + there(x)), "takes 2 spectra"),
    "squared": (lambda x, r, b: back(there(x) * (m := mixed(r, b)) * m), "output differs from ours"),
    "random spectrum": (_dropped_spectrum, "dropout"),
    "overwritten input": (_overwritten, r"may be overwritten in between \(zero_\)"),
    "overwritten by an activation": (_activated, r"may be overwritten in between \(relu\)"),
    "overwritten by another name": (_multiplied, r"may be overwritten in between \(__imul__\)"),
    "two spectra": (_two_spectra, "takes 2 spectra"),
    "two softmaxes": (_two_softmaxes, r"its filters, einsum of .* and einsum_1 of shape .*, are not \(H, K, C\)"),
    "one image's filters": (_one_image, "output differs from ours"),
    "one row of filters": (_single_row, "output differs from ours"),
    "shifted": (lambda x, r, b: back(torch.fft.fftshift(there(x), dim=1) * mixed(r, b)), "fftshift by 1 lies between"),
}


class Layer(nn.Module):
    """A step with projections and routing around it, and a residual; ``filters`` in its basis."""

    def __init__(self, step: Step, channels_first: bool = False, filters: int = FILTERS) -> None:
        super().__init__()
        self.step, self.pool = step, FIRST if channels_first else LAST
        self.route, self.basis = nn.Linear(C, filters * C), nn.Parameter(torch.randn(8, 5, filters, 2))
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Any:
        logits = self.route(x.mean(self.pool)).view(x.shape[0], -1, C)
        return self.step(self.drop(x), logits, self.basis)


class Network(nn.Module):
    """Layers one after the other."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)


def network(step: Step, channels_first: bool = False, filters: int = FILTERS) -> Network:
    torch.manual_seed(0)
    return Network(Layer(step, channels_first, filters))


def images(channels_first: bool = False, batch: int = B) -> Tensor:
    return torch.randn((batch, C, *SIZE) if channels_first else (batch, *SIZE, C))
