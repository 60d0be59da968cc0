"""The layers of the DFFormer family: channels-last (B,H,W,C) in and out, with the official parameter names.

A token mixer is built as ``mixer(dim=..., size=plane)`` and maps (B,H,W,dim) to (B,H,W,dim).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from timm.layers import DropPath, to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from dfformer.models.filter_resize import check_rule, resize_filter
from dfformer_kernels import convolution, dynamic_filter, global_filter, linear, mlp, star_relu
from dfformer_kernels.backends.cpu import Norm, Residual
from dfformer_kernels.dispatch import without_autocast
from dfformer_kernels.ops import inference
from dfformer_kernels.ops.inference import fuses
from dfformer_kernels.ops.packing import keep_packed
from dfformer_kernels.reference import compute_dtype

Activation = Callable[[], nn.Module]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class StarReLU(nn.Module):
    """``scale * relu(x)^2 + bias`` with learnable scalars (MetaFormer Baselines for Vision, arXiv:2210.13452).

    Any shape and floating dtype; the result has x's dtype. Saves only its input for backward.
    """

    def __init__(self, scale_value: float = 1.0, bias_value: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), float(scale_value)))
        self.bias = nn.Parameter(torch.full((1,), float(bias_value)))

    def forward(self, x: Tensor) -> Tensor:
        return star_relu(x, self.scale, self.bias)


class Around(NamedTuple):
    """What a block computes around a branch, when that is left to the branch: ``scale x + branch(norm(x))``."""

    norm: Norm
    scale: Tensor | None


class Linear(nn.Linear):
    """``nn.Linear`` on the fastest matrix product there is for ``x``; see `dfformer_kernels.ops.mlp`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def fused(self, x: Tensor, norm: Norm | None = None, residual: Residual | None = None) -> Tensor:
        """``forward(norm(x))`` plus a residual, in one step without gradients."""
        return inference.product(x, self.weight, self.bias, norm, residual)


class Conv2d(nn.Conv2d):
    """``nn.Conv2d``, padded with zeros and without dilation, among channels-last layers that torch.compile leaves so;
    see `dfformer_kernels.convolution`."""

    def forward(self, x: Tensor) -> Tensor:
        assert not isinstance(self.padding, str)
        return convolution(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)


class PackedLinear(nn.Module):
    """A linear layer without gradients whose weight is also kept the way products want it, where there is one."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.keep_packed()

    def forward(self, x: Tensor) -> Tensor:
        self.keep_packed()
        product = inference.onednn_linear if inference.by_onednn(x, self.weight) else linear
        return product(x, self.weight, self.bias)

    def fused(self, x: Tensor, norm: Norm | None = None, residual: Residual | None = None) -> Tensor:
        """``forward(norm(x))`` plus a residual, in one step."""
        self.keep_packed()
        return inference.product(x, self.weight, self.bias, norm, residual)

    def keep_packed(self) -> None:
        if not torch.compiler.is_compiling():
            keep_packed(self.weight)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.keep_packed()

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}, bias={self.bias is not None}"


PROJECTIONS = (Linear, PackedLinear)


class Mlp(nn.Module):
    """``fc2(act(fc1(x)))`` without biases, on (..., dim).

    Where ``act`` is StarReLU the three run as one step that saves less and stays in cache (`dfformer_kernels.mlp`),
    unless a part was replaced or has hooks.
    """

    def __init__(self, dim: int, hidden: int, out: int | None = None, act_layer: Activation = StarReLU) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden, bias=False)
        self.act = act_layer()
        self.fc2 = Linear(hidden, out or dim, bias=False)

    def forward(self, x: Tensor, around: Around | None = None) -> Tensor:
        fc1, act, fc2 = self.fc1, self.act, self.fc2
        if around is not None and isinstance(act, StarReLU):
            return inference.mlp(x, fc1.weight, (act.scale, act.bias), fc2.weight, None, around.norm, around.scale)
        if is_plain(fc1, Linear) and is_plain(act, StarReLU) and is_plain(fc2, Linear):
            return mlp(x, fc1.weight, (act.scale, act.bias), fc2.weight)
        return fc2(act(fc1(x)))

    def takes_around(self) -> bool:
        return type(self.fc1) is type(self.fc2) is Linear and type(self.act) is StarReLU


class PackedMlp(nn.Module):
    """`Mlp` without gradients: ``fc2(relu(fc1(x))^2)``, StarReLU's scale and bias being in ``fc2``."""

    scale: Tensor
    bias: Tensor

    def __init__(self, fc1: PackedLinear, fc2: PackedLinear) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2
        self.register_buffer("scale", fc1.weight.new_ones(1), persistent=False)
        self.register_buffer("bias", fc1.weight.new_zeros(1), persistent=False)

    def forward(self, x: Tensor, around: Around | None = None) -> Tensor:
        star_relu, weight1, weight2, bias2 = (self.scale, self.bias), self.fc1.weight, self.fc2.weight, self.fc2.bias
        self.fc1.keep_packed()
        self.fc2.keep_packed()
        if around is not None:
            return inference.mlp(x, weight1, star_relu, weight2, bias2, around.norm, around.scale)
        if inference.by_onednn(x, weight1):
            return inference.onednn_mlp(x, weight1, star_relu, weight2, bias2)
        y = mlp(x, weight1, star_relu, weight2)
        return y if bias2 is None else y + bias2

    def takes_around(self) -> bool:
        return True


def is_plain(module: nn.Module, kind: type[ModuleT]) -> TypeGuard[ModuleT]:
    """Whether a fused step may do what ``module`` would: it is of this very type, and nothing hooks into its call."""
    return type(module) is kind and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody sees or changes what goes in and out of a module or what it contains."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in module.modules()
    )


class SquaredReLU(nn.Module):
    """``relu(x)^2`` (Primer, arXiv:2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class SepConv(nn.Module):
    """Inverted separable convolution: expand, StarReLU, depthwise convolution, project. ``size`` is any plane's."""

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
    ) -> None:
        super().__init__()
        med_channels = int(expansion_ratio * dim)
        self.pwconv1 = Linear(dim, med_channels, bias=bias)
        self.act1 = act1_layer()
        self.dwconv = Conv2d(med_channels, med_channels, kernel_size, padding=padding, groups=med_channels, bias=bias)
        self.act2 = act2_layer()
        self.pwconv2 = Linear(med_channels, dim, bias=bias)

    def forward(self, x: Tensor, around: Around | None = None) -> Tensor:
        y = self.act1(_project_in(self.pwconv1, x, around))
        y = self.dwconv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return _project_out(self.pwconv2, self.act2(y), x, around)

    def takes_around(self) -> bool:
        return _take_around(self.pwconv1, self.pwconv2)


class SpectralFilter(nn.Module):
    """What `DynamicFilter` and `GlobalFilter` share: the stored filters and their resizing.

    ``complex_weights`` is (H, W//2 + 1, ..., 2) for planes of ``size`` (H, W). Loading a state dict whose filters were
    stored for another plane resizes them, by ``resize``'s rule. See `dfformer.models.filter_resize` for the rules.
    """

    def __init__(self, size: int | tuple[int, int], channels: int, weight_resize: bool, resize: str) -> None:
        super().__init__()
        check_rule(resize)
        H, W = to_2tuple(size)
        self.size = (int(H), int(W))
        self.weight_resize = weight_resize
        self.resize = resize
        self.complex_weights = nn.Parameter(torch.randn(H, W // 2 + 1, channels, 2) * 0.02)
        self._resized: tuple[tuple[int, int], str, Tensor, Tensor] | None = None

    def filters_for(self, plane: tuple[int, int]) -> Tensor:
        """The filters for planes of ``plane`` (H, W), in the dtype arithmetic is done in."""
        weight = self.complex_weights
        dtype = compute_dtype(weight.dtype)
        if torch.jit.is_tracing():  # sizes are tensors there; a trace is for one plane
            plane = (int(plane[0]), int(plane[1]))
        if tuple(weight.shape[:2]) == (plane[0], plane[1] // 2 + 1):
            return weight.to(dtype)
        if not self.weight_resize:
            raise ValueError(
                f"x: got a plane of {tuple(plane)}, this layer was built for size={self.size}; "
                "pass weight_resize=True to resize the filters to each plane"
            )
        return self._cached_resize(plane).to(dtype)

    def _cached_resize(self, plane: tuple[int, int]) -> Tensor:
        weight = self.complex_weights
        # In eval mode the result is kept until the parameter's values change. Comparing values is the only test that
        # also sees `param.data` being written to, and cheap on a CPU; on other devices the two products cost less
        # than waiting for the answer.
        cacheable = (
            not self.training
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not (torch.is_grad_enabled() and weight.requires_grad)
            and weight.device.type == "cpu"
            and type(weight) is nn.Parameter  # not a fake tensor, not what torch.func put in its place
        )
        if not cacheable:
            return resize_filter(weight, self.size, plane, self.resize)
        if self._resized is not None:
            cached_plane, rule, source, resized = self._resized
            same_rule = (cached_plane, rule, source.dtype) == (plane, self.resize, weight.dtype)
            if same_rule and torch.equal(source, weight):
                return resized
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not serve autograd later
            resized = resize_filter(weight, self.size, plane, self.resize)
        self._resized = (plane, self.resize, weight.detach().clone(), resized)
        return resized

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_resized": None}

    def accepts(self, stored: Tensor) -> bool:
        """Whether ``stored`` is filters like this layer's, for any plane."""
        return stored.dim() == 4 and stored.shape[2:] == self.complex_weights.shape[2:]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        name = prefix + "complex_weights"
        stored = state_dict.get(name)
        if isinstance(stored, Tensor) and stored.shape != self.complex_weights.shape and self.accepts(stored):
            # What is stored does not say whether the plane's width was even, and neither rule needs to know.
            stored_size = (stored.shape[0], 2 * (stored.shape[1] - 1) or 1)
            state_dict = {**state_dict, name: resize_filter(stored, stored_size, self.size, self.resize)}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"size={self.size}, weight_resize={self.weight_resize}, resize={self.resize!r}"


class DynamicFilter(SpectralFilter):
    """The dynamic filter token mixer (paper, section 3.2), a drop-in for the authors'.

    ``y = pwconv2(act2(irfft2(rfft2(act1(pwconv1(x))) * M)))``, where ``M`` mixes a basis of ``num_filters`` filters
    with weights that an MLP computes from the mean of ``x``.

    Args:
        dim: channels of ``x``.
        expansion_ratio: ``pwconv1`` expands to ``C = int(expansion_ratio * dim)`` channels.
        reweight_expansion_ratio: hidden width of the routing MLP, relative to ``dim``.
        act1_layer: activation after ``pwconv1``; StarReLU, if nothing hooks into it, is left to the fused step.
        act2_layer: activation before ``pwconv2``.
        bias: whether ``pwconv1`` and ``pwconv2`` have one.
        num_filters: filters in the basis, F.
        size: the plane (H, W), or one number for a square.
        weight_resize: resize the filters to planes of any other size, instead of raising.
        resize: ``"bicubic"`` (the authors' rule) or ``"fourier"``; see `dfformer.models.filter_resize.resize_filter`.

    ``complex_weights`` is (H, W//2 + 1, F, 2). ``x`` is (B,H,W,dim) in the parameters' dtype, or any under autocast.
    """

    def __init__(
        self,
        dim: int,
        expansion_ratio: float = 2,
        reweight_expansion_ratio: float = 0.25,
        act1_layer: Activation = StarReLU,
        act2_layer: Activation = nn.Identity,
        bias: bool = False,
        num_filters: int = 4,
        size: int | tuple[int, int] = 14,
        weight_resize: bool = False,
        resize: str = "bicubic",
    ) -> None:
        super().__init__(size, num_filters, weight_resize, resize)
        med_channels = int(expansion_ratio * dim)
        self.num_filters = num_filters
        self.pwconv1 = Linear(dim, med_channels, bias=bias)
        self.act1 = act1_layer()
        self.reweight = Mlp(dim, int(reweight_expansion_ratio * dim), num_filters * med_channels)
        self.act2 = act2_layer()
        self.pwconv2 = Linear(med_channels, dim, bias=bias)

    def forward(self, x: Tensor, around: Around | None = None) -> Tensor:
        _, H, W, _ = x.shape
        mean = x.mean(dim=(1, 2)) if around is None else inference.norm_mean(x, around.norm)
        logits = self.reweight(mean).unflatten(1, (self.num_filters, -1))
        y, scalars = _activation_on_load(self.act1, _project_in(self.pwconv1, x, around))
        y = dynamic_filter(y, logits, self.filters_for((H, W)), scalars)
        return _project_out(self.pwconv2, self.act2(y), x, around)

    def takes_around(self) -> bool:
        return _take_around(self.pwconv1, self.pwconv2)


class GlobalFilter(SpectralFilter):
    """The static counterpart (GFNet, arXiv:2107.00645; GFFormer in the paper): one filter a channel, learned directly.

    Arguments as for `DynamicFilter`. ``complex_weights`` is (H, W//2 + 1, C, 2).
    """

    def __init__(
        self,
        dim: int,
        expansion_ratio: float = 2,
        act1_layer: Activation = StarReLU,
        act2_layer: Activation = nn.Identity,
        bias: bool = False,
        size: int | tuple[int, int] = 14,
        weight_resize: bool = False,
        resize: str = "bicubic",
    ) -> None:
        med_channels = int(expansion_ratio * dim)
        super().__init__(size, med_channels, weight_resize, resize)
        self.pwconv1 = Linear(dim, med_channels, bias=bias)
        self.act1 = act1_layer()
        self.act2 = act2_layer()
        self.pwconv2 = Linear(med_channels, dim, bias=bias)

    def forward(self, x: Tensor, around: Around | None = None) -> Tensor:
        _, H, W, _ = x.shape
        y, scalars = _activation_on_load(self.act1, _project_in(self.pwconv1, x, around))
        y = global_filter(y, self.filters_for((H, W)), scalars)
        return _project_out(self.pwconv2, self.act2(y), x, around)

    def takes_around(self) -> bool:
        return _take_around(self.pwconv1, self.pwconv2)


class AFNO2D(nn.Module):
    """Adaptive Fourier neural operator (arXiv:2111.13587) between two projections, the paper's ablation.

    A block-diagonal two-layer MLP on every frequency, shared by all: no parameter depends on the plane, so ``size`` is
    any plane's. Spectral arithmetic is float32 (float64 for float64 ``x``).
    """

    def __init__(
        self,
        dim: int,
        expansion_ratio: float = 2,
        act1_layer: Activation = StarReLU,
        act2_layer: Activation = nn.Identity,
        bias: bool = False,
        size: int | tuple[int, int] | None = None,
        num_blocks: int = 8,
        sparsity_threshold: float = 0.01,
        hard_thresholding_fraction: float = 1,
        hidden_size_factor: int = 1,
    ) -> None:
        super().__init__()
        med_channels = int(expansion_ratio * dim)
        if med_channels % num_blocks:
            raise ValueError(
                f"num_blocks: got {num_blocks}, which does not divide the {med_channels} expanded channels"
            )
        block, hidden = med_channels // num_blocks, med_channels // num_blocks * hidden_size_factor
        self.num_blocks = num_blocks
        self.sparsity_threshold = sparsity_threshold
        self.hard_thresholding_fraction = hard_thresholding_fraction
        self.pwconv1 = Linear(dim, med_channels, bias=bias)
        self.act1 = act1_layer()
        self.w1 = nn.Parameter(0.02 * torch.randn(2, num_blocks, block, hidden))
        self.b1 = nn.Parameter(0.02 * torch.randn(2, num_blocks, hidden))
        self.w2 = nn.Parameter(0.02 * torch.randn(2, num_blocks, hidden, block))
        self.b2 = nn.Parameter(0.02 * torch.randn(2, num_blocks, block))
        self.act2 = act2_layer()
        self.pwconv2 = Linear(med_channels, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.pwconv1(x))
        with without_autocast(x.device):
            filtered = self._filter(x.to(compute_dtype(x.dtype))).to(x.dtype)
        return self.pwconv2(self.act2(x + filtered))

    def _filter(self, x: Tensor) -> Tensor:
        if x.numel() == 0:  # which not every FFT library takes
            return x
        _, H, W, _ = x.shape
        K = W // 2 + 1
        kept = int(K * self.hard_thresholding_fraction)
        X = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
        X = (X[:, :, :kept] if kept < K else X).unflatten(-1, (self.num_blocks, -1))
        real, imag = self._complex_linear(X.real, X.imag, self.w1, self.b1)
        real, imag = self._complex_linear(F.relu(real), F.relu(imag), self.w2, self.b2)
        Z = F.softshrink(torch.stack([real, imag], dim=-1), self.sparsity_threshold)
        Z = torch.view_as_complex(Z).flatten(-2)
        if kept < K:
            Z = F.pad(Z, (0, 0, 0, K - kept))
        return torch.fft.irfft2(Z, s=(H, W), dim=(1, 2), norm="ortho")

    @staticmethod
    def _complex_linear(real: Tensor, imag: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        w, b = w.to(real.dtype), b.to(real.dtype)

        def apply(t: Tensor, matrix: Tensor) -> Tensor:
            return torch.einsum("...bi,bio->...bo", t, matrix)

        return apply(real, w[0]) - apply(imag, w[1]) + b[0], apply(imag, w[0]) + apply(real, w[1]) + b[1]


class MlpHead(nn.Module):
    """The official classification head: expand by 4, squared ReLU, norm, dropout, classify."""

    def __init__(self, dim: int, num_classes: int, mlp_ratio: float = 4, drop_rate: float = 0.0) -> None:
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.fc1 = Linear(dim, hidden)
        self.act = SquaredReLU()
        self.norm = nn.LayerNorm(hidden)
        self.head_dropout = nn.Dropout(drop_rate)
        self.fc2 = Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.head_dropout(self.norm(self.act(self.fc1(x)))))


class Scale(nn.Module):
    """Learnable scaling of each channel, used on the residual branch."""

    def __init__(self, dim: int, init_value: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), float(init_value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def add_branch(x: Tensor, scale: nn.Module, norm: nn.Module, branch: nn.Module, drop_path: nn.Module) -> Tensor:
    """``scale(x) + drop_path(branch(norm(x)))``, in as few passes as there can be where nobody sees what is between."""
    around = _around(scale, norm, branch, drop_path) if fuses(x) else None
    if around is not None:
        return branch(x, around)
    y = drop_path(branch(norm(x)))
    if not is_plain(scale, Scale):
        return scale(x) + y
    with without_autocast(x.device):  # which would copy y to x's dtype first
        return torch.addcmul(y, x, scale.scale)


def _around(scale: nn.Module, norm: nn.Module, branch: Any, drop_path: nn.Module) -> Around | None:
    """What ``branch`` computes too where it can, these modules are the usual ones, and nothing hooks into any."""
    if not hasattr(branch, "takes_around") or has_hooks(branch) or not branch.takes_around():
        return None
    if not is_plain(drop_path, nn.Identity) and not (is_plain(drop_path, DropPath) and not drop_path.training):
        return None
    if not is_plain(norm, nn.LayerNorm) or getattr(norm, "bias", None) is not None or len(norm.normalized_shape) > 1:
        return None
    if not is_plain(scale, Scale):
        return Around(Norm(norm.weight, norm.eps), None) if is_plain(scale, nn.Identity) else None
    return Around(Norm(norm.weight, norm.eps), scale.scale)


def _take_around(*projections: nn.Module) -> bool:
    return all(type(projection) in PROJECTIONS for projection in projections)


def _project_in(projection: Any, x: Tensor, around: Around | None) -> Tensor:
    return projection(x) if around is None else projection.fused(x, norm=around.norm)


def _project_out(projection: Any, y: Tensor, x: Tensor, around: Around | None) -> Tensor:
    return projection(y) if around is None else projection.fused(y, residual=Residual(x, around.scale))


def _activation_on_load(act: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Leaves StarReLU to the fused step, which applies it while it loads ``x``; runs any other activation now."""
    if is_plain(act, StarReLU):
        return x, (act.scale, act.bias)
    return act(x), None
