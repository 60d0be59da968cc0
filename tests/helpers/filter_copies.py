"""Copies of the dynamic filter as other projects carry them, written anew from descriptions of their forms."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def results(model: Any, *inputs: Any) -> list[Tensor]:
    """Output, and gradients of the inputs and of the parameters that train."""
    inputs = copy.deepcopy(inputs)
    leaves = [x.requires_grad_() for x in inputs if isinstance(x, Tensor)]
    leaves += [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    y = model(*inputs)
    y = y["y"] if isinstance(y, dict) else y
    gradients = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
    return [y.detach(), *(torch.view_as_real(g) if g.is_complex() else g for g in gradients if g is not None)]


class Star(nn.Module):
    """A StarReLU under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.full((1,), 0.9)), nn.Parameter(torch.full((1,), -0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x) ** 2 + self.bias


class Gained(Star):
    """A StarReLU until its buffer changes."""

    _gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_gain", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self._gain


class Routing(nn.Module):
    def __init__(self, dim: int, out: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(dim, max(dim // 4, 2), bias=False), Star()
        self.drop, self.fc2 = nn.Dropout(drop), nn.Linear(max(dim // 4, 2), out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))


def interpolated(weight: Tensor, H: int, K: int, mode: str = "bicubic") -> Tensor:
    """Stored filters (h,k,F,2) for another plane, as an image."""
    h, k, filters = weight.shape[:3]
    planes = weight.permute(2, 3, 0, 1).reshape(1, 2 * filters, h, k)
    planes = F.interpolate(planes, size=(H, K), mode=mode, align_corners=True)
    return planes.reshape(filters, 2, H, K).permute(2, 3, 0, 1).contiguous()


class Authors(nn.Module):
    """The authors' layer, channels-last, and the parts that other forms share."""

    _mode = "bicubic"
    _expansion = 2
    _activation: type[nn.Module] = Star

    def __init__(self, dim: int, size: Any = 8, num_filters: int = 4, weight_resize: bool = True, bias: bool = False):
        super().__init__()
        H, W = (size, size) if isinstance(size, int) else size
        self.size, self.filter_size, self.num_filters, self.weight_resize = H, W // 2 + 1, num_filters, weight_resize
        self.med_channels = C = self._expansion * dim
        self.pwconv1, self.act1 = nn.Linear(dim, C, bias=bias), self._activation()
        self.reweight: Any = Routing(dim, num_filters * C)
        self.complex_weights = nn.Parameter(torch.randn(H, W // 2 + 1, num_filters, 2) * 0.1)
        self.act2, self.pwconv2 = nn.Identity(), nn.Linear(C, dim, bias=bias)

    def _basis(self, X: Tensor) -> Tensor:
        weights: Tensor = self.complex_weights
        if self.weight_resize:
            weights = interpolated(weights, X.shape[1], X.shape[2], self._mode)
        return torch.view_as_complex(weights)

    def _route(self, x: Tensor) -> Tensor:
        return self.reweight(x.mean(dim=(1, 2))).view(x.shape[0], self.num_filters, -1).softmax(dim=1)

    def _filtered(self, x: Tensor, routing: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        X = torch.fft.rfft2(x.to(torch.float32), dim=(1, 2), norm="ortho")
        M = torch.einsum("bfc,hwf->bhwc", routing.to(torch.complex64), self._basis(X))
        if not self.weight_resize:
            M = M.view(-1, self.size, self.filter_size, self.med_channels)
        return torch.fft.irfft2(X * M, s=(H, W), dim=(1, 2), norm="ortho")

    def forward(self, x: Tensor) -> Tensor:
        return self.pwconv2(self.act2(self._filtered(self.act1(self.pwconv1(x)), self._route(x))))


class ChannelsFirst(Authors):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class InnerConvolution(ChannelsFirst):
    """A detector's: ``inc -> dim`` by convolution, norm and activation in front; the input's dtype comes back."""

    def __init__(self, inc: int, dim: int, size: Any = 8) -> None:
        super().__init__(dim, size)
        self.conv1x1 = nn.Sequential(nn.Conv2d(inc, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        return super().forward(self.conv1x1(x)).to(dtype)


class SecondInput(Authors):
    """Routed by another map than the one that is filtered."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.pwconv2(self.act2(self._filtered(self.act1(self.pwconv1(x)), self._route(y))))


class CrossModal(SecondInput):
    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(rgb.permute(0, 2, 3, 1), depth.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MaxPoolFusion(nn.Module):
    """Two saliency maps: one norm for all, a grouped convolution and a maximum for routing, a shortcut, a convolution
    behind; transforms of (B,C,H,W), ``irfft2`` without a size."""

    def __init__(self, dim: int, size: int = 8, num_filters: int = 4) -> None:
        super().__init__()
        self.num_filters, self.act1 = num_filters, Star()
        self.complex_weights = nn.Parameter(torch.randn(size, size // 2 + 1, num_filters, 2) * 0.1)
        self.pwconv1 = nn.Conv2d(dim, num_filters * dim, 1, groups=dim, bias=False)
        self.max_pool, self.bnorm = nn.AdaptiveMaxPool2d(1), nn.BatchNorm2d(dim)
        self.ffn = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        u = self.bnorm(x) + self.bnorm(y)
        routing = self.max_pool(self.pwconv1(u)).view(len(x), self.num_filters, -1).softmax(dim=1)
        X = torch.fft.rfft2(self.act1(u).float(), dim=(2, 3), norm="ortho")
        M = torch.einsum("bfc,hkf->bchk", routing.to(torch.complex64), torch.view_as_complex(self.complex_weights))
        f = torch.fft.irfft2(X * M, dim=(2, 3), norm="ortho") + x + y
        return f + self.ffn(self.bnorm(f))


class SummedSpectrum(ChannelsFirst):
    """Routed by the sum of the spectrum's magnitudes; neither projection."""

    _expansion = 1

    def __init__(self, dim: int, size: Any = 8) -> None:
        super().__init__(dim, size)
        del self.pwconv1, self.pwconv2, self.act1, self.act2

    def forward(self, x: Tensor) -> Tensor:
        X = torch.fft.rfft2(x.float())
        strength = X.abs().sum(dim=(-2, -1)) / (X.shape[-1] * X.shape[-2])
        routing = F.softmax(self.reweight(strength).reshape(-1, self.num_filters, x.shape[1]), dim=1)
        basis = torch.view_as_complex(interpolated(self.complex_weights, *X.shape[2:]))
        M = torch.einsum("bfc,hkf->bchk", routing.to(basis.dtype), basis)
        return torch.fft.irfft2(X * M, s=x.shape[-2:])


class Splines(nn.Module):
    """A KAN-like layer: learned piecewise-linear functions of every input, summed."""

    grid: Tensor

    def __init__(self, dim: int, out: int, knots: int = 5) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(-2, 2, knots))
        self.weight, self.base = nn.Parameter(torch.randn(out, dim * knots) * 0.1), nn.Linear(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        near = (1 - (x[..., None] - self.grid).abs()).clamp(min=0)
        return self.base(F.silu(x)) + F.linear(near.flatten(1), self.weight)


class SplineRouting(Authors):
    def __init__(self, dim: int, size: Any = 8) -> None:
        super().__init__(dim, size)
        self.reweight = Splines(dim, self.num_filters * self.med_channels)


class AttentionRouting(ChannelsFirst):
    """Routed by attention over the plane, whose module ends in the softmax itself: (B,C,F), filters last."""

    class Attention(nn.Module):
        def __init__(self, dim: int, channels: int, filters: int) -> None:
            super().__init__()
            self.query, self.filters = nn.Parameter(torch.randn(1, 1, dim) * 0.1), filters
            self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
            self.proj = nn.Linear(dim, channels * filters)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2)
            pooled, _ = self.attention(self.query.expand(len(x), -1, -1), tokens, tokens)
            return self.proj(pooled[:, 0]).view(len(x), -1, self.filters).softmax(-1)

    def __init__(self, dim: int, size: Any = 8) -> None:
        super().__init__(dim, size)
        self.reweight = self.Attention(dim, self.med_channels, self.num_filters)

    def _route(self, x: Tensor) -> Tensor:
        return self.reweight(x.permute(0, 3, 1, 2)).transpose(1, 2)


class FixedSquare(ChannelsFirst):
    def __init__(self, dim: int, size: int = 8) -> None:
        super().__init__(dim, size, weight_resize=False)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        assert H == W == self.size, f"expected {self.size}x{self.size}, got {H}x{W}"
        return super().forward(x)


class UndefinedResize(ChannelsFirst):
    """Calls a function that its file lost."""

    def _basis(self, X: Tensor) -> Tensor:
        H, K = X.shape[1:3]
        return torch.view_as_complex(resize_weights(self.complex_weights, H, K).contiguous())  # type: ignore[name-defined] # noqa: F821


class Tokens(nn.Module):
    """GFNet's own layer: one complex filter a channel, on (B,N,C) of a square plane, no projections."""

    def __init__(self, dim: int, size: int = 8) -> None:
        super().__init__()
        self.complex_weight = nn.Parameter(torch.randn(size, size // 2 + 1, dim, 2) * 0.1)

    def forward(self, x: Tensor, spatial_size: Any = None) -> Tensor:
        B, N, C = x.shape
        a, b = spatial_size or (int(math.sqrt(N)),) * 2
        X = torch.fft.rfft2(x.view(B, a, b, C).to(torch.float32), dim=(1, 2), norm="ortho")
        x = torch.fft.irfft2(X * torch.view_as_complex(self.complex_weight), s=(a, b), dim=(1, 2), norm="ortho")
        return x.reshape(B, N, C)


class FiltersFirst(nn.Module):
    """A gate in a restoration network: filters stored (C,H,K), complex, transforms in torch's default norm."""

    def __init__(self, dim: int, size: int = 8) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(dim, dim, 1)
        self.spectral = nn.Parameter(torch.randn(dim, size, size // 2 + 1, dtype=torch.complex64) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.proj_in(x).chunk(2, dim=1)
        y = torch.fft.irfft2(torch.fft.rfft2(u.float()) * self.spectral, s=u.shape[-2:])
        return x + self.proj_out(y * torch.sigmoid(gate))


class SqueezeRouting(nn.Module):
    """A detector's: everything by 1x1 convolutions, filters last in the routing, mixed by a matrix product, autocast
    switched off around the transforms."""

    def __init__(self, dim: int, size: int = 8, num_filters: int = 3) -> None:
        super().__init__()
        self.F, C = num_filters, 2 * dim
        self.cv1 = nn.Sequential(nn.Conv2d(dim, C, 1), nn.BatchNorm2d(C), nn.SiLU(inplace=True))
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, 6, 1), nn.ReLU(inplace=True))
        self.excite, self.cv2 = nn.Conv2d(6, C * num_filters, 1), nn.Conv2d(C, dim, 1)
        self.filters = nn.Parameter(torch.randn(size, size // 2 + 1, num_filters, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.size()
        u = self.cv1(x)
        routing = torch.softmax(self.excite(self.squeeze(x)).view(b, 2 * c, self.F).float(), -1)
        with torch.autocast(device_type=x.device.type, enabled=False):
            X = torch.fft.rfftn(u.float(), dim=(2, 3), norm="ortho")
            basis = torch.view_as_complex(self.filters)
            M = torch.matmul(routing.to(basis.dtype), basis.flatten(0, 1).t()).view(b, 2 * c, *basis.shape[:2])
            y = torch.fft.irfftn(X.mul(M), s=(h, w), dim=(2, 3), norm="ortho")
        return x + self.cv2(y.type_as(u))


class TokensOfPlane(nn.Module):
    """Tokens, given the height and width."""

    def __init__(self, dim: int, size: int = 8) -> None:
        super().__init__()
        self.norm, self.weight = nn.LayerNorm(dim), nn.Parameter(torch.randn(size, size // 2 + 1, dim, 2) * 0.1)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        u = self.norm(x).view(len(x), H, W, -1)
        X = torch.fft.rfft2(u, dim=(1, 2)) * torch.view_as_complex(self.weight)
        return x + torch.fft.irfft2(X, s=(H, W), dim=(1, 2)).reshape(x.shape)


class Conditioned(ChannelsFirst):
    """Routed by a vector, such as the embedding of a time step; one routing for all channels."""

    def __init__(self, dim: int, embedding: int = 5, size: int = 8) -> None:
        super().__init__(dim, size)
        self.reweight = nn.Linear(embedding, self.num_filters)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        routing = self.reweight(condition).softmax(dim=1)[..., None].expand(-1, -1, self.med_channels)
        y = self._filtered(self.act1(self.pwconv1(x.permute(0, 2, 3, 1))), routing)
        return self.pwconv2(self.act2(y)).permute(0, 3, 1, 2)


class Nested(nn.Module):
    """Filters of its own around another copy."""

    def __init__(self, dim: int, size: int = 8) -> None:
        super().__init__()
        self.inner, self.outer = ChannelsFirst(dim, size), nn.Parameter(torch.randn(dim, size, size // 2 + 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        X = torch.fft.rfft2(self.inner(x)) * torch.view_as_complex(self.outer)
        return torch.fft.irfft2(X, s=x.shape[-2:])


class ResizedIfNeeded(Authors):
    """Asks the spectrum for its plane."""

    def _basis(self, X: Tensor) -> Tensor:
        weights: Tensor = self.complex_weights
        if weights.shape[:2] != X.shape[1:3]:
            weights = interpolated(weights, X.shape[1], X.shape[2])
        return torch.view_as_complex(weights)


class WithoutSize(ResizedIfNeeded):
    """``irfft2`` without a size: on a plane of odd width, its result has a column less."""

    def _filtered(self, x: Tensor, routing: Tensor) -> Tensor:
        X = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
        M = torch.einsum("bfc,hwf->bhwc", routing.to(torch.complex64), self._basis(X))
        return torch.fft.irfft2(X * M, dim=(1, 2), norm="ortho")


class WithDropout(Authors):
    """Dropout as submodules, in the routing and on the filtered signal."""

    def __init__(self, dim: int, size: Any = 8) -> None:
        super().__init__(dim, size)
        self.reweight.drop.p, self.drop = 0.3, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        routing = self._route(x)
        return self.pwconv2(self.drop(self._filtered(self.act1(self.pwconv1(x)), routing)))


class Gated(Authors):
    """Weights that do not sum to one."""

    def _route(self, x: Tensor) -> Tensor:
        return self.reweight(x.mean(dim=(1, 2))).view(len(x), self.num_filters, -1).sigmoid()


class TwoInTurn(ChannelsFirst):
    """Filters what it filtered once more, with other filters; returns a dict."""

    def __init__(self, dim: int, size: int = 8) -> None:
        super().__init__(dim, size)
        self.second = nn.Parameter(torch.randn(dim, size, size // 2 + 1, 2) * 0.1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        X = torch.fft.rfft2(super().forward(x)) * torch.view_as_complex(self.second)
        return {"y": torch.fft.irfft2(X, s=x.shape[-2:])}
