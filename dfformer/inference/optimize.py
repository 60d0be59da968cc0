"""Optimises a model for serving: everything that is fixed after training is computed once."""

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, to_2tuple
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dfformer.inference.packed import PackedLinear, PackedMlp, ServedBlock
from dfformer.models.blocks import MetaFormerBlock
from dfformer.models.exact import unsupported_reasons
from dfformer.models.layers import Mlp, SepConv, StarReLU
from dfformer.models.spectral import AFNO2D, DynamicFilter, GlobalFilter, SpectralFilter
from dfformer.utils.accepted import PLANE, check_arguments, choice
from dfformer.utils.copied import copied

_Parts = dict[str, tuple[type[nn.Module], ...]]  # by path, the classes that a module may have

DTYPE = choice(None, torch.float32, torch.bfloat16)

# For each module that follows a norm in a block, the paths of the projections that can take over the norm's scale, and
# of the modules that must be unmodified for that.
_LINEAR = (nn.Linear,)
_READERS: dict[type[nn.Module], _Parts] = {
    DynamicFilter: {"pwconv1": _LINEAR, "reweight": (Mlp,), "reweight.fc1": _LINEAR},
    **{mixer: {"pwconv1": _LINEAR} for mixer in (GlobalFilter, SepConv, AFNO2D)},
    Mlp: {"fc1": _LINEAR},
}


class LeftAlone(NamedTuple):
    """A module that was not optimised: its name in the model, and why."""

    name: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {'; '.join(self.reasons)}"


def optimize_for_inference(
    model: nn.Module, dtype: torch.dtype | None = None, img_size: int | tuple[int, int] | None = None
) -> "InferenceModel":
    """A copy of ``model`` that serves faster but cannot be trained; ``model`` is not changed.

    The scales of norms and of StarReLU are folded into the projections after them. Weights are also kept in oneDNN's
    packed format, which takes their memory once more. Residuals are added in one pass. A module that has anything else
    (a hook, an adapter, a parametrisation, another forward) is left alone.

    Args:
        model: any module that contains blocks of this family, e.g. a classifier or a segmentation model.
        dtype: torch.bfloat16 or torch.float32 for weights and activations of that dtype (filters and spectra are never
            bfloat16); None for the model's own. Images are cast to it, and results back to the dtype of the images.
        img_size: (H, W) of the images, or one number. Filters are resized to it now, and sizes that need other filters
            are refused. None to resize filters in every forward.

    Returns:
        A module that is called like ``model``. Its attribute ``model`` is the optimised copy with its other methods,
        and ``left_alone`` lists the modules that were not optimised, with the reasons. It can be compiled, exported,
        pickled and deep-copied. Packed weights are not parameters, so average or prune the original model instead.

    Raises:
        ValueError: a bad argument, by name. TypeError: ``model`` is not a module.
    """
    check_arguments(DTYPE, dtype=dtype)
    if img_size is not None:
        check_arguments(PLANE, img_size=img_size)
    left_alone: list[LeftAlone] = []
    # load_state_dict could not change tensors that were created in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        served = copied(model).eval().requires_grad_(False)
        if img_size is not None:
            computed = store_filters(served, blank_image(served, to_2tuple(img_size)))
            left_alone += [LeftAlone(name, (reason,)) for name, reason in computed.items()]
            for name, module in served.named_modules():
                if isinstance(module, SpectralFilter) and name not in computed:
                    module.weight_resize = False
        shared = _shared(served)
        for name, module in list(served.named_modules()):
            if isinstance(module, MetaFormerBlock):
                _fold_norms(name, module, shared, left_alone)
        served = _replaced(served, "", left_alone)
        if dtype is not None:
            _convert(served, dtype)
    return InferenceModel(served, dtype, left_alone)


class InferenceModel(nn.Module):
    """The result of `optimize_for_inference`."""

    serves_only = True

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, left_alone: list[LeftAlone]) -> None:
        super().__init__()
        self.dtype = dtype
        self.model = model
        self.left_alone = left_alone
        self.pretrained_cfg = getattr(model, "pretrained_cfg", {})  # it describes how images are prepared
        super().train(False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            if self.dtype is None:
                return self.model(x, *args, **kwargs)
            if not x.is_floating_point():
                raise TypeError(f"x: expected floating-point images, got {x.dtype}")
            results = self.model(x.to(self.dtype), *args, **kwargs)
            return tree_map_only(Tensor, lambda t: t.to(x.dtype) if t.is_floating_point() else t, results)

    def _apply(self, fn: Any, recurse: bool = True) -> "InferenceModel":
        super()._apply(fn, recurse)
        if self.dtype is not None:  # e.g. `.float()` changes the dtype that images are cast to
            self.dtype = fn(torch.zeros((), dtype=self.dtype)).dtype
        return self

    def train(self, mode: bool = True) -> "InferenceModel":
        if mode:
            raise RuntimeError("a model optimised for inference cannot be trained; train the one it was made from")
        return super().train(False)


def blank_image(model: nn.Module, img_size: tuple[int, int]) -> Tensor:
    """Zeros (1,in_chans,H,W) of the dtype and on the device of ``model``; ValueError if it has no convolution."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            like = next(model.parameters())
            return torch.zeros(1, module.in_channels, *img_size, dtype=like.dtype, device=like.device)
    raise ValueError(f"model: expected a model of images, got {type(model).__name__} without a Conv2d")


def store_filters(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Stores each layer's filters for its plane when ``model`` runs on ``images``.

    Returns the names of layers whose filters stay as they are, and why.
    """
    planes: dict[nn.Module, set[tuple[int, int]]] = {
        module: set() for module in model.modules() if isinstance(module, SpectralFilter)
    }

    def note_plane(module: Any, inputs: tuple[Tensor, ...]) -> None:
        planes[module].add(module.plane_of(inputs[0]))

    with ExitStack() as hooks:
        for layer in planes:
            hooks.enter_context(layer.register_forward_pre_hook(note_plane))
        model(images)
    left_alone = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, SpectralFilter):
            continue
        if "complex_weights" not in {**layer._parameters, **layer._buffers}:  # e.g. parametrised
            left_alone[name] = "its filters are computed at each call"
        elif len(planes[layer]) != 1:
            left_alone[name] = f"it runs on {len(planes[layer])} planes"
        else:
            [plane] = planes[layer]
            filters = layer.filters_for(plane).clone()
            layer.complex_weights = nn.Parameter(filters, layer.complex_weights.requires_grad)
            layer.size = plane
    return left_alone


def _fold_norms(name: str, block: Any, shared: set[int], left_alone: list[LeftAlone]) -> None:
    """Folds the norms' scales into the projections that read them: ``W (g * n) = (W * g) n``."""
    for child, follower in (("norm1", "token_mixer"), ("norm2", "mlp")):
        norm, reader = getattr(block, child, None), getattr(block, follower, None)
        if norm is None or reader is None:  # a subclass may do without
            continue
        reasons = [f"its block: {reason}" for reason in unsupported_reasons(block, MetaFormerBlock)]
        reasons += _against_folding(norm, reader, shared)
        if reasons:
            left_alone.append(LeftAlone(f"{name}.{child}".lstrip("."), tuple(reasons)))
            continue
        for path, kinds in _READERS[type(reader)].items():
            if kinds is _LINEAR:  # a new weight, because other layers may have the numbers of the old one
                layer = reader.get_submodule(path)
                layer.weight = nn.Parameter(layer.weight * norm.weight, requires_grad=False)
        placed: dict[str, Any] = {"device": norm.weight.device, "dtype": norm.weight.dtype}
        # With a weight of ones: without one, PyTorch takes twice as long.
        unscaled = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, bias=False, **placed).requires_grad_(False)
        setattr(block, child, unscaled)


def _against_folding(norm: Any, reader: nn.Module, shared: set[int]) -> list[str]:
    reasons = unsupported_reasons(norm, nn.LayerNorm)
    if not reasons and (norm.weight is None or norm.bias is not None or len(norm.normalized_shape) != 1):
        reasons.append("it is not a layer norm of the channels with only a scale")
    if type(reader) not in _READERS:
        return [*reasons, f"it is read by a {type(reader).__qualname__}"]
    against = _against(reader, type(reader), _READERS[type(reader)], shared)
    return reasons + [f"its reader: {reason}" for reason in against]


def _against(module: nn.Module, kind: type[nn.Module], parts: _Parts, shared: Collection[int] = ()) -> list[str]:
    """Why a module is not unmodified and of ``kind``, or a part of it is not there, unmodified and not ``shared``."""
    if reasons := unsupported_reasons(module, kind):
        return reasons
    for path, kinds in parts.items():
        try:
            part = module.get_submodule(path)
        except AttributeError:
            reasons.append(f"its {path}: it is absent")
            continue
        against = unsupported_reasons(part, type(part) if type(part) in kinds else kinds[0])
        if not against and id(part) in shared:
            against = ["it has several names"]
        reasons += [f"its {path}: {reason}" for reason in against]
    return reasons


def _shared(model: nn.Module) -> set[int]:
    """The ids of modules that the model has under several names."""
    counts = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return {identity for identity, count in counts.items() if count > 1}


def _replaced(module: nn.Module, name: str, left_alone: list[LeftAlone]) -> nn.Module:
    """The optimised replacement of a module; its children are replaced in the same way."""
    kind = next((kind for kind in _SERVED if isinstance(module, kind)), None)
    if kind is not None:
        serve, parts = _SERVED[kind]
        if reasons := _against(module, kind, parts):
            left_alone.append(LeftAlone(name, tuple(reasons)))
        else:
            module = serve(module)
    if isinstance(module, PackedLinear | PackedMlp):
        return module
    for child_name, child in list(module.named_children()):
        replacement = _replaced(child, f"{name}.{child_name}".lstrip("."), left_alone)
        if replacement is not child:
            setattr(module, child_name, replacement)
    return module


def _served_mlp(mlp: Any) -> nn.Module:
    """Folds StarReLU into ``fc2``: ``W (s r + b) = (s W) r + b (W 1)``."""
    fc1, act, fc2 = mlp.fc1, mlp.act, mlp.fc2
    shift = act.bias * fc2.weight.sum(1) + (0 if fc2.bias is None else fc2.bias)
    return PackedMlp(PackedLinear(fc1.weight, fc1.bias), PackedLinear(act.scale * fc2.weight, shift))


# By class: what optimises a module, and those of its parts that must be unmodified. Only the projections of a mixer
# are replaced, as the linear layers that they are.
_PROJECTIONS: _Parts = {"pwconv1": _LINEAR, "pwconv2": _LINEAR}
_DROP_PATHS = (DropPath, nn.Identity)
_SERVED: dict[type[nn.Module], tuple[Callable[[Any], nn.Module], _Parts]] = {
    MetaFormerBlock: (ServedBlock, {"drop_path1": _DROP_PATHS, "drop_path2": _DROP_PATHS}),
    **dict.fromkeys((DynamicFilter, GlobalFilter, SepConv, AFNO2D), (lambda mixer: mixer, _PROJECTIONS)),
    Mlp: (_served_mlp, {"fc1": _LINEAR, "act": (StarReLU,), "fc2": _LINEAR}),
    nn.Linear: (lambda linear: PackedLinear(linear.weight, linear.bias), {}),
}


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts all weights to ``dtype`` except the filters, which become float32."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.to(dtype)
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            is_filter = isinstance(module, SpectralFilter) and name == "complex_weights"
            if tensor is not None and tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.float32 if is_filter else dtype)
