"""The layers that are not spectral, on channels-last (B,H,W,C), with the official parameter names.

Projections and convolutions are exactly ``nn.Linear`` and ``nn.Conv2d``, so tools that look for these find them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from dfformer.models.exact import fusible, is_exact, returns_new
from dfformer.utils.accepted import COUNT, COUNT_OR_0, MODULE, RATIO, check_arguments, choice
from dfformer_kernels import convolution, linear, mlp, star_relu

Activation = Callable[[], nn.Module]
DATA_FORMAT = choice("channels_last", "channels_first")


def channels_last(x: Tensor, data_format: str) -> Tensor:
    """``x`` of ``data_format`` as (B,H,W,C), a view."""
    return x.permute(0, 2, 3, 1) if data_format == "channels_first" else x


def from_channels_last(y: Tensor, data_format: str) -> Tensor:
    """``y`` (B,H,W,C) in ``data_format``, as a view; a channels-first result has torch.channels_last memory."""
    return y.permute(0, 3, 1, 2) if data_format == "channels_first" else y


@torch.fx.wrap
def star_relu_step(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """See `dfformer_kernels.star_relu`. It is one node in a symbolic trace, and torch.jit.script can compile it."""
    if torch.jit.is_scripting():
        return torch.ops.dfformer.star_relu(x, scale, bias, None)
    else:
        return star_relu(x, scale, bias)


@fusible
class StarReLU(nn.Module):
    """``scale * relu(x)^2 + bias`` with learnable scalars (MetaFormer Baselines for Vision, arXiv:2210.13452).

    ``x`` may have any shape and floating dtype; the result has x's dtype. Only the input is saved for backward.

    Args:
        scale_value, bias_value: initial values of the parameters ``scale`` and ``bias``, one element each.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        scale_value: float = 1.0,
        bias_value: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), float(scale_value), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.full((1,), float(bias_value), device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return star_relu_step(x, self.scale, self.bias)


@fusible
class Scale(nn.Module):
    """Learnable scaling of each channel, used on the residual branch."""

    def __init__(self, dim: int, init_value: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), float(init_value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@fusible
class Mlp(nn.Module):
    """``fc2(act(fc1(x)))`` without biases, on (..., dim).

    If all three are unmodified and without biases, and ``act`` is StarReLU, they run as one autograd Function that
    saves less (`dfformer_kernels.mlp`).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        out: int | None = None,
        act_layer: Activation = StarReLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=False, device=device, dtype=dtype)
        self.act = build_activation(act_layer, device, dtype)
        self.fc2 = nn.Linear(hidden, out or dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            fc1, act, fc2 = self.fc1, self.act, self.fc2
            if _is_without_bias(fc1, x) and is_exact(act, StarReLU, x) and _is_without_bias(fc2, x):
                return mlp(x, fc1.weight, (act.scale, act.bias), fc2.weight)
        return self.fc2(self.act(self.fc1(x)))


def hidden_channels(dim: int, expansion_ratio: float, act1_layer: Activation, act2_layer: Activation) -> int:
    """``C = int(expansion_ratio * dim)`` of a token mixer; ValueError for an invalid argument."""
    check_arguments(COUNT, dim=dim)
    check_arguments(RATIO, expansion_ratio=expansion_ratio)
    check_arguments(MODULE, act1_layer=act1_layer, act2_layer=act2_layer)
    if (C := int(expansion_ratio * dim)) < 1:
        raise ValueError(f"expansion_ratio: expected one that leaves some of the {dim} channels, got {expansion_ratio}")
    return C


def check_maps(x: Any, pwconv1: nn.Module, data_format: str) -> None:
    """Raises an error that names ``x`` if an unmodified ``pwconv1`` cannot read it; any other may accept other maps."""
    weight, first = pwconv1._parameters.get("weight"), data_format == "channels_first"
    channels, is_tensor = 1 if first else 3, isinstance(x, Tensor)
    if type(pwconv1) is not nn.Linear or weight is None or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy):
        return
    if is_tensor and x.dtype == weight.dtype and x.dim() == 4 and x.shape[channels] == weight.shape[1]:
        return  # before anything is asked of pwconv1, because this is every call
    if not is_exact(pwconv1, nn.Linear, x if is_tensor else None):
        return
    if not is_tensor:
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dim() != 4 or x.shape[channels] != weight.shape[1]:
        expected = f"({'B,dim,H,W' if first else 'B,H,W,dim'}) with dim={weight.shape[1]}"
        raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")
    castable = x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype)  # autocast leaves float64 alone
    if not (castable and torch.is_autocast_enabled(x.device.type)):
        raise TypeError(f"x: expected {weight.dtype}, the dtype of the parameters, got {x.dtype}")


class Projections(nn.Module):
    """The base of the token mixers: ``pwconv1`` and ``act1`` come first, ``act2`` and ``pwconv2`` last."""

    if TYPE_CHECKING:  # torch.jit.script refuses annotated modules
        # Created in the authors' order, because the state of an optimizer depends on it.
        pwconv1: nn.Module
        act1: nn.Module
        act2: nn.Module
        pwconv2: nn.Module

    def project_in(self, x: Tensor) -> Tensor:
        """``act1(pwconv1(x))``."""
        if torch.jit.is_scripting():
            return self.act1(self.pwconv1(x))
        else:
            owns_y = not torch.is_grad_enabled() and returns_new(self.pwconv1, x)
            y = call_linear(self.pwconv1, x)
            if owns_y and is_exact(self.act1, StarReLU, y):
                return star_relu(y, self.act1.scale, self.act1.bias, overwrite_x=True)
            return self.act1(y)

    def project_out(self, y: Tensor) -> Tensor:
        """``pwconv2(act2(y))``."""
        y = self.act2(y)
        return self.pwconv2(y) if torch.jit.is_scripting() else call_linear(self.pwconv2, y)


@fusible
class SepConv(Projections):
    """Inverted separable convolution: expand, StarReLU, depthwise convolution, project.

    Args:
        dim, expansion_ratio, act1_layer, act2_layer, device, dtype: see `DynamicFilter`.
        bias: whether the projections and the convolution have biases.
        kernel_size, padding: of the depthwise convolution, whole numbers.
        size: ignored; spectral mixers need it.

    ``x`` is (B,H,W,dim) in the parameters' dtype, with any plane.

    Raises:
        ValueError: an invalid argument, by name, or ``x`` of another shape. TypeError: ``x`` of another dtype.
    """

    def __init__(
        self,
        dim: int,
        expansion_ratio: float = 2,
        act1_layer: Activation = StarReLU,
        act2_layer: Activation = nn.Identity,
        bias: bool = False,
        kernel_size: int = 7,
        padding: int = 3,
        size: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        C = hidden_channels(dim, expansion_ratio, act1_layer, act2_layer)
        check_arguments(COUNT, kernel_size=kernel_size)
        check_arguments(COUNT_OR_0, padding=padding)
        self.pwconv1 = nn.Linear(dim, C, bias=bias, **placed)
        self.act1 = build_activation(act1_layer, **placed)
        self.dwconv = nn.Conv2d(C, C, kernel_size, padding=padding, groups=C, bias=bias, **placed)
        self.act2 = build_activation(act2_layer, **placed)
        self.pwconv2 = nn.Linear(C, dim, bias=bias, **placed)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            check_maps(x, self.pwconv1, "channels_last")
        y = self.project_in(x).permute(0, 3, 1, 2)
        y = self.dwconv(y) if torch.jit.is_scripting() else call_convolution(self.dwconv, y)
        return self.project_out(y.permute(0, 2, 3, 1))


def build_activation(layer: Activation, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    """The activation. It is moved only if a device or dtype is given: torch cannot move modules of fake tensors."""
    act = layer()
    return act if device is None and dtype is None else act.to(device=device, dtype=dtype)


def _is_without_bias(layer: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    return is_exact(layer, nn.Linear, x) and layer.bias is None


def call_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; an unmodified ``nn.Linear`` runs on the fastest library (`dfformer_kernels.linear`)."""
    return linear(x, layer.weight, layer.bias) if is_exact(layer, nn.Linear, x) else layer(x)


def call_convolution(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; under torch.compile, some convolutions become a custom operator (`dfformer_kernels.convolution`).

    These are unmodified ``nn.Conv2d`` without dilation and with zero padding. The operator keeps the memory format of
    the surrounding channels-last layers.
    """
    if (
        torch.compiler.is_compiling()
        and is_exact(layer, nn.Conv2d, x)
        and layer.padding_mode == "zeros"
        and layer.dilation == (1, 1)
        and not isinstance(layer.padding, str)
    ):
        return convolution(x, layer.weight, layer.bias, layer.stride, layer.padding, groups=layer.groups)
    return layer(x)
