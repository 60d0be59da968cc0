"""Layers whose weights no longer change, and are kept in oneDNN's packed format."""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from dfformer.models.exact import is_exact, returning_new
from dfformer.models.layers import Scale, StarReLU
from dfformer_kernels import linear, star_relu
from dfformer_kernels.ops import by_onednn, in_chunks, is_large, is_under_functorch, pack_for_onednn

_NOT_HERE = "a served layer's weights change by load_state_dict alone; prune, average or replace those it was made from"


@returning_new
class PackedLinear(nn.Module):
    """A linear layer without gradients: ``x @ weight.T + bias`` of x (...,K), weight (N,K), bias (N,).

    On an x86 CPU the weight is also kept packed, which takes its memory once more; small and thin float32 products do
    not use it. The layer owns its weight, which is neither a parameter nor a buffer. A caller who gets it, by
    ``weight`` or ``state_dict()``, could change it unseen. From then on the layer multiplies by the weight itself; a
    copy of the layer packs again.
    """

    serves_only = True  # checkpoints cannot contain it
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self._weight = weight.detach().clone()
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.out_features, self.in_features = self._weight.shape
        self._packed: Tensor | None = None
        self._given_out = False
        self._pack()

    @property
    def weight(self) -> Tensor:
        """The weight itself (N,K)."""
        self._given_out, self._packed = True, None
        return self._weight

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        raise AttributeError(f"weight: {_NOT_HERE}")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Raises TypeError: pruning or a parametrisation would add a parameter that no product would read."""
        raise TypeError(f"{name}: {_NOT_HERE}")

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is not None and self.may_use_packed(x):
            return by_onednn(x, self._packed, self.bias)
        return linear(x, self._weight, self.bias)

    def may_use_packed(self, x: Tensor) -> bool:
        """Whether a call with x uses the packed weight. In graphs, the compiler chooses how to multiply."""
        if type(x) is not Tensor or self._packed is None:  # first, because an FX proxy has no other properties
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if (torch.is_grad_enabled() and x.requires_grad) or is_under_functorch((x,)):
            return False  # the packed product has no derivative
        return (
            x.is_cpu
            and x.dtype == self._weight.dtype
            and x.numel() > 0
            and x.shape[-1] == self._weight.shape[1]
            and (x.dtype != torch.float32 or is_large(x, self._weight))
            and bool(torch.backends.mkldnn.enabled)
            and not torch.is_autocast_enabled("cpu")
        )

    def _pack(self) -> None:
        self._packed = None if self._given_out else pack_for_onednn(self._weight)

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        super()._apply(fn, recurse)
        self._weight = fn(self._weight)
        self._pack()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name, given_out = f"{prefix}weight", self._given_out
        if args[0].get("assign_to_params_buffers", False) and isinstance(state_dict.get(name), Tensor):
            state_dict = {**state_dict, name: state_dict[name].detach().clone()}  # the caller's own stays the caller's
        self._buffers["weight"] = self._weight  # while torch loads, which reads the property too
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            self._weight, self._given_out = self._buffers.pop("weight"), given_out  # type: ignore[assignment]
        self._pack()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_given_out": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._weight = self._weight.clone()  # a shallow copy would share the original's, which a caller may hold
        self._pack()

    def extra_repr(self) -> str:
        N, K = self._weight.shape
        return f"in_features={K}, out_features={N}, bias={self.bias is not None}, packed={self._packed is not None}"


class PackedMlp(nn.Module):
    """``fc2(relu(fc1(x))^2)`` without gradients, with StarReLU's scale and bias folded into ``fc2``.

    On a CPU it runs a few rows at a time, so that the hidden activations stay in cache.
    """

    def __init__(self, fc1: PackedLinear, fc2: PackedLinear) -> None:
        super().__init__()
        like = fc1._weight
        self.fc1 = fc1
        self.act = StarReLU(device=like.device, dtype=like.dtype).requires_grad_(False)
        self.fc2 = fc2

    def forward(self, x: Tensor) -> Tensor:
        if not (
            is_exact(self.fc1, PackedLinear, x)
            and self.fc1.may_use_packed(x)
            and is_exact(self.act, StarReLU, x)
            and not any(parameter.requires_grad for parameter in self.act.parameters())
            and is_exact(self.fc2, PackedLinear, x)
        ):
            return self._layers(x)
        return in_chunks(x, self.fc1.out_features, self.fc2.out_features, self._overwriting_layers)

    def _layers(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))

    def _overwriting_layers(self, x: Tensor) -> Tensor:
        return self.fc2(star_relu(self.fc1(x), self.act.scale, self.act.bias, overwrite_x=True))


class ServedBlock(nn.Module):
    """A MetaFormer block that scales and adds each residual in one pass.

    ``x = r1(x) + l1(mixer(norm1(x)))``, ``x = r2(x) + l2(mlp(norm2(x)))``. It has the block's modules by name.
    """

    serves_only = True

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, module in block.named_children():
            if not isinstance(module, DropPath):
                setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self  # with modules that __init__ took by name
        x = _add_residual(block.layer_scale1(block.token_mixer(block.norm1(x))), x, block.res_scale1)
        return _add_residual(block.layer_scale2(block.mlp(block.norm2(x))), x, block.res_scale2)


def _add_residual(y: Tensor, x: Tensor, scale: nn.Module) -> Tensor:
    """``y + scale(x)``, in one pass if ``scale`` is an unmodified Scale."""
    if is_exact(scale, Scale, x) and scale.scale.dtype == x.dtype == y.dtype:
        return torch.addcmul(y, x, scale.scale)
    return y + scale(x)
