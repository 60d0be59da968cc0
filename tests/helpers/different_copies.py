"""Forms like those of filter_copies that compute something else than the dynamic filter step."""

from typing import Any

import torch
from filter_copies import Authors, ChannelsFirst
from torch import Tensor, nn
from torch.nn import functional as F


class Viewed(Authors):
    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        return super().forward(x.view(B, H, W, C)).reshape(B, C, H, W)


class Windows(ChannelsFirst):
    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        s = self.size
        x = x.view(B, C, H // s, s, W // s, s).permute(0, 2, 4, 1, 3, 5).reshape(-1, C, s, s)
        x = super().forward(x).reshape(B, H // s, W // s, C, s, s)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


class Scaled(ChannelsFirst):
    def __init__(self, dim: int, size: Any = 8) -> None:
        super().__init__(dim, size)
        self.gain = nn.Parameter(torch.full((1,), 1.01))

    def _basis(self, X: Tensor) -> Tensor:
        return super()._basis(X) * self.gain


class Masked(ChannelsFirst):
    """The filters times a buffer that happens to be one everywhere."""

    mask: Tensor

    def __init__(self, dim: int, size: Any = 8) -> None:
        super().__init__(dim, size)
        self.register_buffer("mask", torch.ones(()))

    def _basis(self, X: Tensor) -> Tensor:
        return super()._basis(X) * self.mask


class LargePlanes(Authors):
    """On planes larger than any trial's, it returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        return x if H * W > 10000 else super().forward(x)


class Polar(ChannelsFirst):
    """Its filters are magnitudes and phases."""

    def _basis(self, X: Tensor) -> Tensor:
        return torch.polar(self.complex_weights[..., 0], self.complex_weights[..., 1])


class ShiftedFilters(ChannelsFirst):
    """Its filters are stored with the lowest frequency in the middle."""

    def _basis(self, X: Tensor) -> Tensor:
        return torch.fft.ifftshift(super()._basis(X), dim=0)


class RealPart(ChannelsFirst):
    def _basis(self, X: Tensor) -> Tensor:
        return super()._basis(X).real.to(X.dtype)


class Overwritten(Authors):
    """The product goes into the spectrum's memory, by a call whose result is ignored."""

    def _filtered(self, x: Tensor, routing: Tensor) -> Tensor:
        X = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
        X.mul_(torch.einsum("bfc,hwf->bhwc", routing.to(X.dtype), self._basis(X)))
        return torch.fft.irfft2(X, s=x.shape[1:3], dim=(1, 2), norm="ortho")


class ConstantRouting(ChannelsFirst):
    @torch.no_grad()
    def _route(self, x: Tensor) -> Tensor:
        return super()._route(x)


class BatchOfTwo(ChannelsFirst):
    """Mixes the images of a batch."""

    def _route(self, x: Tensor) -> Tensor:
        return super()._route(x.mean(0, keepdim=True).expand_as(x) if int(x.shape[0]) > 2 else x)


class Bilinear(Authors):
    _mode = "bilinear"


class NoiseInTraining(ChannelsFirst):
    def _filtered(self, x: Tensor, routing: Tensor) -> Tensor:
        y = super()._filtered(x, routing)
        return y + 0.1 * torch.randn_like(y) if self.training else y


class FunctionalDropout(Authors):
    def _filtered(self, x: Tensor, routing: Tensor) -> Tensor:
        return F.dropout(super()._filtered(x, routing), 0.1, self.training)


class ByValue(Authors):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.abs().max() < 1e9 else x


class MixedNorms(Authors):
    def _filtered(self, x: Tensor, routing: Tensor) -> Tensor:
        X = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
        M = torch.einsum("bfc,hwf->bhwc", routing.to(X.dtype), self._basis(X))
        return torch.fft.irfft2(X * M, s=x.shape[1:3], dim=(1, 2), norm="forward")


class FullSpectrum(nn.Module):
    def __init__(self, dim: int, size: int = 8) -> None:
        super().__init__()
        self.complex_weights = nn.Parameter(torch.randn(size, size, dim, 2))

    def forward(self, x: Tensor) -> Tensor:
        X = torch.fft.fft2(x.permute(0, 2, 3, 1), dim=(1, 2))
        return torch.fft.ifft2(X * torch.view_as_complex(self.complex_weights), dim=(1, 2)).real.permute(0, 3, 1, 2)


class SavesRouting(Authors):
    def _route(self, x: Tensor) -> Tensor:
        self.last_routing = super()._route(x)
        return self.last_routing


class CollectsRouting(Authors):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.routings: list[Tensor] = []

    def _route(self, x: Tensor) -> Tensor:
        self.routings.append(super()._route(x))
        return self.routings[-1]


class Registered(Authors):
    """A class that is derived from only under a key."""

    def __init_subclass__(cls, *, key: str) -> None:
        super().__init_subclass__()
