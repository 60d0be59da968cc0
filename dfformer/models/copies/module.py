"""The replacement of a copy of the dynamic filter: its own forward, with our step in place of the transforms."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from dfformer.models.filter_resize import resize_filter
from dfformer_kernels import dynamic_filter, global_filter
from dfformer_kernels.dispatch import without_autocast
from dfformer_kernels.reference import compute_dtype

# The orders of axes that filters are stored in, and the permutation of each to (H,K,F,2).
STORAGE: dict[str, tuple[int, ...]] = {"(H,K,F,2)": (0, 1, 2, 3), "(F,H,K,2)": (1, 2, 0, 3)}


def as_basis(weight: Tensor, storage: str) -> Tensor:
    """Stored filters, real with a last axis of 2 or complex, as (H,K,F,2)."""
    real = torch.view_as_real(weight) if weight.is_complex() else weight
    return real.permute(STORAGE[storage])


class Form(NamedTuple):
    """How a copy lays out the inputs of its transforms.

    With ``channels_first``, maps are (B,C,H,W), else (B,H,W,C). ``size`` is the plane (H, W) of the stored filters, W
    up to its parity. ``storage`` is a key of `STORAGE`. ``filter_axis`` is the axis of the logits that the softmax runs
    over. With ``normalised``, the routing is taken after its softmax.
    """

    channels_first: bool
    size: tuple[int, int]
    storage: str
    resize: str
    filter_axis: int = 1
    normalised: bool = False


@torch.fx.wrap
def filter_step(x: Tensor, weight: Tensor, logits: Tensor | None, form: Form) -> Tensor:
    """The dynamic or global filter step on the tensors of a copy; one node of a symbolic trace.

    Args:
        x: (B,H,W,C) or (B,C,H,W).
        weight: the stored filters.
        logits: the first axis is B, ``form.filter_axis`` is F, and the others are C or 1; None for one filter per
            channel.

    Returns:
        x's shape and dtype, contiguous.
    """
    data_format = "channels_first" if form.channels_first else "channels_last"
    C, H, W = x.shape[1:] if form.channels_first else (x.shape[3], *x.shape[1:3])
    with without_autocast(x.device):
        basis = as_basis(weight, form.storage).to(compute_dtype(x.dtype))
        if tuple(basis.shape[:2]) != (H, W // 2 + 1):
            basis = resize_filter(basis.contiguous(), form.size, (H, W), form.resize)
    if logits is None:
        return global_filter(x, basis, data_format=data_format).contiguous()
    logits = logits.movedim(form.filter_axis, 1)
    logits = logits.flatten(2) if logits.dim() > 2 else logits[..., None]
    normalization = None if form.normalised else "softmax"
    y = dynamic_filter(x, logits.expand(-1, -1, C), basis, normalization=normalization, data_format=data_format)
    return y.contiguous()


class FilterStep(nn.Module):
    """`filter_step` with its form; it has no parameters of its own."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor, weight: Tensor, logits: Tensor | None = None) -> Tensor:
        return filter_step(x, weight, logits, self.form)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.form._asdict().items())


class FusedCopy(fx.GraphModule):
    """A copy's forward as a graph that contains `FilterStep`; ``print(module.code)`` shows it.

    It has the copy's own parameters, buffers and submodules, so its state dict is the same, in the same order. It also
    has the copy's other attributes.
    """

    @classmethod
    def of(cls, original: nn.Module, graph: fx.Graph, steps: dict[str, "FilterStep"]) -> "FusedCopy":
        """A module with the parts of ``original`` that runs ``graph``; the graph's other targets are ``steps``."""
        targets = [str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")]
        root = {target: steps[target] if target in steps else _attribute(original, target) for target in targets}
        fused = cls(root, copy.deepcopy(graph), class_name=cls.__name__)
        fused._adopt(_Parts.of(original))
        return fused

    def _adopt(self, parts: "_Parts") -> None:
        for name, child in self.named_children():
            parts.modules.setdefault(name, child)  # the steps
        self._parameters, self._buffers, self._modules = dict(parts.parameters), dict(parts.buffers), parts.modules
        self._non_persistent_buffers_set = set(parts.non_persistent)
        for name, value in parts.attributes.items():
            if not hasattr(self, name):
                setattr(self, name, value)
        self.training = parts.training

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedCopy":
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, FusedCopy)
        copied._adopt(copy.deepcopy(_Parts.of(self), memo))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (super().__reduce__(), _Parts.of(self))


def _load(reduced: tuple[Callable[..., nn.Module], tuple[Any, ...]], parts: "_Parts") -> FusedCopy:
    rebuild, arguments = reduced[:2]
    loaded = rebuild(*arguments)
    assert isinstance(loaded, fx.GraphModule)
    fused = FusedCopy(loaded, loaded.graph, class_name=FusedCopy.__name__)
    fused._adopt(parts)
    return fused


class _Parts(NamedTuple):
    """Everything that a module holds."""

    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    modules: dict[str, nn.Module | None]
    non_persistent: set[str]
    attributes: dict[str, Any]
    training: bool

    @classmethod
    def of(cls, module: nn.Module) -> "_Parts":
        own = vars(nn.Module())
        graph = vars(fx.GraphModule(nn.Module(), fx.Graph()))
        plain = {k: v for k, v in vars(module).items() if k not in own and k not in graph}
        return cls(
            dict(module._parameters),
            dict(module._buffers),
            dict(module._modules),
            set(module._non_persistent_buffers_set),
            plain,
            module.training,
        )


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for name in target.split("."):
        value = getattr(value, name)
    return value
