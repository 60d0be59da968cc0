"""The spectral token mixers, on (B,H,W,dim) or (B,dim,H,W), with the official parameter names.

A token mixer is created as ``mixer(dim=..., size=plane)``; a new one goes here. `fitted_filters` resizes filters in a
forward, and `SpectralFilter._load_from_state_dict` those of a checkpoint for another plane.
"""

from typing import Any, Final

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from dfformer.models import layers
from dfformer.models.exact import fusible, is_exact, returns_new
from dfformer.models.filter_resize import RULE, resize_filter, scriptable_resize
from dfformer.models.layers import Activation, Mlp, Projections, StarReLU
from dfformer.utils.accepted import COUNT, PLANE, RATIO, check_arguments
from dfformer_kernels import dft_matmul, dynamic_filter, global_filter
from dfformer_kernels.ops import without_autocast
from dfformer_kernels.reference import compute_dtype

Scalars = tuple[Tensor, Tensor] | None  # StarReLU's scale and bias if the filter step applies it, else None


# Each of these functions is one node in a symbolic trace, and torch.jit.script can compile it.


@torch.fx.wrap
def filter_step(x: Tensor, logits: Tensor | None, filters: Tensor, star_relu: Scalars, overwrite_x: bool) -> Tensor:
    """`dfformer_kernels.dynamic_filter`, or without logits `dfformer_kernels.global_filter`."""
    if torch.jit.is_scripting():  # then StarReLU is never left to the step
        if logits is None:
            return torch.ops.dfformer.global_filter(x, filters, None, None, None)
        return torch.ops.dfformer.dynamic_filter(x, logits, filters, None, None, None)
    elif logits is None:
        return global_filter(x, filters, star_relu, overwrite_x=overwrite_x)
    else:
        return dynamic_filter(x, logits, filters, star_relu, overwrite_x=overwrite_x)


@torch.fx.wrap
def fitted_filters(weight: Tensor, size: tuple[int, int], H: int, W: int, weight_resize: bool, rule: str) -> Tensor:
    """Filters (H, W//2 + 1, ..., 2) for planes of (H, W), in the dtype of the arithmetic, from filters for ``size``.

    Raises ValueError if they would have to be resized and ``weight_resize`` is False.
    """
    dtype = compute_dtype(weight.dtype)
    if weight.shape[0] == H and weight.shape[1] == W // 2 + 1:
        return weight.to(dtype)
    if not weight_resize:
        raise ValueError(
            f"x: expected a plane of size={size}, which this layer was built for, got ({H}, {W}); "
            "pass weight_resize=True to resize the filters to each plane, or if optimize_for_inference fixed them, "
            "leave out its img_size or give that of these images"
        )
    if torch.jit.is_scripting():
        return scriptable_resize(weight, size, (H, W), rule).to(dtype)
    else:
        return resize_filter(weight, size, (H, W), rule).to(dtype)


# The methods that decide whether something else may hold the filter step's input.
_OWN = ("forward", "step_input", "filter")


class SpectralFilter(Projections):
    """The base of `DynamicFilter` and `GlobalFilter`: two projections, the stored filters and their resizing.

    ``complex_weights`` is (H, W//2 + 1, ..., 2) for planes of ``size`` (H, W). If a state dict has filters for another
    plane, loading resizes them by the rule ``resize``; see `dfformer.models.filter_resize`.
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
        data_format: str = "channels_last",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_arguments(RULE, resize=resize)
        check_arguments(layers.DATA_FORMAT, data_format=data_format)
        check_arguments(PLANE, size=size)
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        C, (H, W) = layers.hidden_channels(dim, expansion_ratio, act1_layer, act2_layer), to_2tuple(size)
        self.size = (int(H), int(W))
        self.weight_resize = weight_resize
        self.resize = resize
        self.data_format = data_format
        self.complex_weights = nn.Parameter(torch.randn(H, W // 2 + 1, self._filters(C), 2, **placed) * 0.02)
        self.pwconv1 = nn.Linear(dim, C, bias=bias, **placed)
        self.act1 = layers.build_activation(act1_layer, **placed)
        self._build_routing(dim, C, **placed)
        self.act2 = layers.build_activation(act2_layer, **placed)
        self.pwconv2 = nn.Linear(C, dim, bias=bias, **placed)

    def _filters(self, C: int) -> int:
        """The number of stored filters: by default one per channel."""
        return C

    def _build_routing(self, dim: int, C: int, **placed: Any) -> None:
        """Creates what computes the weights of a basis; by default there is none."""

    def plane_of(self, x: Tensor) -> tuple[int, int]:
        """The plane (H, W) of an input."""
        _, H, W, _ = layers.channels_last(x, self.data_format).shape
        return H, W

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (torch.jit.script compiles both sides of an `and`)
            if type(self).step_input is SpectralFilter.step_input:  # a subclass's own may read other maps
                layers.check_maps(x, self.pwconv1, self.data_format)
        x = layers.channels_last(x, self.data_format)
        logits, filters = self.logits(x), self.filters_for((x.shape[1], x.shape[2]))
        owns_y = False if torch.jit.is_scripting() else self._owns_step_input(x)
        y, star_relu = self.step_input(x)
        if owns_y and star_relu is not None:
            y = filter_step(y, logits, filters, star_relu, True)
        else:
            y = self.filter(y, logits, filters, star_relu)
        return layers.from_channels_last(self.project_out(y), self.data_format)

    def logits(self, x: Tensor) -> Tensor | None:
        """The logits (B,F,C) of the weights of a basis, from x (B,H,W,dim); by default there is no basis."""
        return None

    def step_input(self, x: Tensor) -> tuple[Tensor, Scalars]:
        """``pwconv1(x)``, and the StarReLU for the filter step to apply; any other activation is applied here."""
        if torch.jit.is_scripting():
            return self.project_in(x), None
        else:
            x = layers.call_linear(self.pwconv1, x)
            if is_exact(self.act1, StarReLU, x):
                return x, (self.act1.scale, self.act1.bias)
            return self.act1(x), None

    def filter(self, x: Tensor, logits: Tensor | None, filters: Tensor, star_relu: Scalars) -> Tensor:
        """The filter step, see `filter_step`."""
        return filter_step(x, logits, filters, star_relu, False)

    def _owns_step_input(self, x: Tensor) -> bool:
        """Whether nothing but this layer will hold `step_input` of ``x``, and no gradient needs it."""
        if torch.is_grad_enabled():
            return False
        for name in _OWN:
            if name in self.__dict__ or getattr(type(self), name) is not getattr(SpectralFilter, name):
                return False
        return returns_new(self.pwconv1, x)

    def filters_for(self, plane: tuple[int, int]) -> Tensor:
        """The filters for planes of ``plane`` (H, W), in the dtype of the arithmetic."""
        H, W = plane
        if not torch.jit.is_scripting() and torch.jit.is_tracing():  # sizes are tensors then; a trace is for one plane
            H, W = int(H), int(W)
        return fitted_filters(self.complex_weights, self.size, H, W, self.weight_resize, self.resize)

    def accepts(self, stored: Tensor) -> bool:
        """Whether ``stored`` holds filters like this layer's, for any plane."""
        return stored.dim() == 4 and stored.numel() > 0 and stored.shape[2:] == self.complex_weights.shape[2:]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        name = prefix + "complex_weights"
        stored = state_dict.get(name)
        if isinstance(stored, Tensor) and stored.shape != self.complex_weights.shape and self.accepts(stored):
            # Stored filters do not tell whether the plane's width was even, and neither rule needs to know.
            stored_size = (stored.shape[0], 2 * (stored.shape[1] - 1) or 1)
            state_dict = {**state_dict, name: resize_filter(stored, stored_size, self.size, self.resize)}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        resized = f"weight_resize={self.weight_resize}, resize={self.resize!r}"
        return f"size={self.size}, {resized}, data_format={self.data_format!r}"


@fusible
class DynamicFilter(SpectralFilter):
    """The dynamic filter token mixer (paper, section 3.2), a drop-in replacement for the authors'.

    ``y = pwconv2(act2(irfft2(rfft2(act1(pwconv1(x))) * M)))``, where ``M`` mixes a basis of ``num_filters`` filters
    with weights that an MLP computes from the mean of ``x``.

    Args:
        dim: channels of ``x``.
        expansion_ratio: ``pwconv1`` expands to ``C = int(expansion_ratio * dim)`` channels.
        reweight_expansion_ratio: hidden width of the routing MLP, relative to ``dim``.
        act1_layer: activation after ``pwconv1``; the fused step applies an unmodified StarReLU.
        act2_layer: activation before ``pwconv2``.
        bias: whether ``pwconv1`` and ``pwconv2`` have biases.
        num_filters: number of filters in the basis, F.
        size: the plane (H, W), or one number for a square.
        weight_resize: resize the filters to planes of any other size, instead of raising.
        resize: ``"bicubic"`` (the authors' rule) or ``"fourier"``; see `dfformer.models.filter_resize.resize_filter`.
        data_format: ``"channels_first"`` for x and results (B,dim,H,W); torch.channels_last memory is then fastest.
        device, dtype: of the parameters.

    ``complex_weights`` is (H, W//2 + 1, F, 2). ``x`` is (B,H,W,dim) in the parameters' dtype; under autocast, in any
    but float64.

    Raises:
        ValueError: an invalid argument, by name, or ``x`` of another shape. TypeError: ``x`` of another dtype.
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
        data_format: str = "channels_last",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_arguments(COUNT, dim=dim, num_filters=num_filters)
        check_arguments(RATIO, reweight_expansion_ratio=reweight_expansion_ratio)
        self.num_filters, self._hidden = num_filters, int(reweight_expansion_ratio * dim)
        stored = (size, weight_resize, resize, data_format, device, dtype)
        super().__init__(dim, expansion_ratio, act1_layer, act2_layer, bias, *stored)

    def _filters(self, C: int) -> int:
        return self.num_filters

    def _build_routing(self, dim: int, C: int, **placed: Any) -> None:
        self.reweight = Mlp(dim, self._hidden, self.num_filters * C, **placed)

    def logits(self, x: Tensor) -> Tensor:
        return self.reweight(x.mean(dim=(1, 2))).unflatten(1, (self.num_filters, -1))


@fusible
class GlobalFilter(SpectralFilter):
    """The global filter token mixer (GFNet, arXiv:2107.00645; GFFormer in the paper): one learned filter per channel.

    The arguments, ``x`` and errors are those of `DynamicFilter` but for ``num_filters`` and
    ``reweight_expansion_ratio``. ``complex_weights`` is (H, W//2 + 1, C, 2), C being the expanded channels.
    """


@fusible
class AFNO2D(Projections):
    """Adaptive Fourier neural operator (arXiv:2111.13587) between two projections, the paper's ablation.

    One block-diagonal two-layer MLP runs on every frequency. Spectral arithmetic is float32, for float64 ``x`` float64.

    Args:
        size: ignored, because no parameter depends on the plane.
        num_blocks: number of diagonal blocks; it must divide the ``C`` expanded channels.
        sparsity_threshold: threshold of the softshrink after the MLP.
        hard_thresholding_fraction: share of the frequencies that are kept; the others become 0.
        hidden_size_factor: hidden width of the MLP, relative to a block.

    The other arguments, ``x`` and errors are those of `DynamicFilter`.
    """

    matmul: Final[bool] = False  # whether matrix products transform, see `dfformer.with_dft_matmul`

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
        data_format: str = "channels_last",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        C = layers.hidden_channels(dim, expansion_ratio, act1_layer, act2_layer)
        check_arguments(COUNT, num_blocks=num_blocks, hidden_size_factor=hidden_size_factor)
        fraction = hard_thresholding_fraction
        check_arguments(RATIO, sparsity_threshold=sparsity_threshold, hard_thresholding_fraction=fraction)
        if C % num_blocks:
            raise ValueError(f"num_blocks: expected a divisor of the {C} expanded channels, got {num_blocks}")
        check_arguments(layers.DATA_FORMAT, data_format=data_format)
        self.data_format = data_format
        width, hidden = C // num_blocks, C // num_blocks * hidden_size_factor
        self.num_blocks = num_blocks
        self.sparsity_threshold = sparsity_threshold
        self.hard_thresholding_fraction = float(fraction)
        self.pwconv1 = nn.Linear(dim, C, bias=bias, **placed)
        self.act1 = layers.build_activation(act1_layer, **placed)
        self.w1 = nn.Parameter(0.02 * torch.randn(2, num_blocks, width, hidden, **placed))
        self.b1 = nn.Parameter(0.02 * torch.randn(2, num_blocks, hidden, **placed))
        self.w2 = nn.Parameter(0.02 * torch.randn(2, num_blocks, hidden, width, **placed))
        self.b2 = nn.Parameter(0.02 * torch.randn(2, num_blocks, width, **placed))
        self.act2 = layers.build_activation(act2_layer, **placed)
        self.pwconv2 = nn.Linear(C, dim, bias=bias, **placed)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            layers.check_maps(x, self.pwconv1, self.data_format)
        x = self.project_in(layers.channels_last(x, self.data_format))
        return layers.from_channels_last(self.project_out(x + self.filter(x)), self.data_format)

    def filter(self, x: Tensor) -> Tensor:
        """The neural operator of x (B,H,W,C), in x's dtype."""
        fraction, threshold = self.hard_thresholding_fraction, self.sparsity_threshold
        return afno_filter(x, self.w1, self.b1, self.w2, self.b2, fraction, threshold, self.matmul)


@torch.fx.wrap
def afno_filter(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, kept_fraction: float, threshold: float, matmul: bool
) -> Tensor:
    """``irfft2(softshrink(_complex_mlp(rfft2(x)[:, :, :kept])))`` of x (B,H,W,C), in torch's own operators."""
    if x.numel() == 0:  # not every FFT library accepts this
        return x
    if torch.jit.is_scripting():
        return _afno(x, w1, b1, w2, b2, kept_fraction, threshold)
    else:
        step = _afno_matmul if matmul or dft_matmul.in_onnx_export() else _afno
        with without_autocast(x.device):
            return step(x, w1, b1, w2, b2, kept_fraction, threshold)


def _afno(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, kept_fraction: float, threshold: float) -> Tensor:
    _, H, W, _ = x.shape
    K = W // 2 + 1
    kept = int(K * kept_fraction)
    X = torch.fft.rfft2(x.to(compute_dtype(x.dtype)), dim=(1, 2), norm="ortho")[:, :, :kept]
    real, imag = _complex_mlp(X.real, X.imag, w1, b1, w2, b2)
    Z = torch.view_as_complex(F.softshrink(torch.stack([real, imag], dim=-1), threshold))
    return torch.fft.irfft2(F.pad(Z, (0, 0, 0, K - kept)), s=(H, W), dim=(1, 2), norm="ortho").to(x.dtype)


def _afno_matmul(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, kept_fraction: float, threshold: float
) -> Tensor:
    """`_afno`, with transforms as matrix products."""
    W = x.shape[2]
    K = W // 2 + 1
    kept = int(K * kept_fraction)
    X = dft_matmul.rfft2(x.to(compute_dtype(x.dtype)))[:, :, :, :kept]
    Z = torch.stack(_complex_mlp(X[:, 0], X[:, 1], w1, b1, w2, b2), dim=1)
    return dft_matmul.irfft2(F.pad(F.softshrink(Z, threshold), (0, 0, 0, K - kept)), W).to(x.dtype)


def _complex_mlp(real: Tensor, imag: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """The complex two-layer MLP with ReLU on (...,C) real and imaginary parts, block-diagonal in C.

    ``w1`` (2,blocks,width,hidden), ``b1`` (2,blocks,hidden), ``w2`` (2,blocks,hidden,width), ``b2`` (2,blocks,width).
    """
    shape, blocks, width = real.shape, w1.shape[1], w1.shape[2]
    # Batch dimensions are flattened: Core ML supports at most five dimensions, and no ellipsis in einsum.
    real, imag = real.reshape(-1, blocks, width), imag.reshape(-1, blocks, width)
    real, imag = _complex_linear(real, imag, w1, b1)
    real, imag = _complex_linear(F.relu(real), F.relu(imag), w2, b2)
    return real.reshape(shape), imag.reshape(shape)


def _complex_linear(real: Tensor, imag: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    w, b = w.to(real.dtype), b.to(real.dtype)
    apply = "nbi,bio->nbo"
    return (
        torch.einsum(apply, real, w[0]) - torch.einsum(apply, imag, w[1]) + b[0],
        torch.einsum(apply, imag, w[0]) + torch.einsum(apply, real, w[1]) + b[1],
    )
