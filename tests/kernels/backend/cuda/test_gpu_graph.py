"""What the models run on a GPU, without one: their operators on fake CUDA tensors, in forward and backward.

A pass over a feature map costs what reading and writing it costs, so each is listed here with its reason. What this
package's operators launch by themselves is tested where they are defined.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dfformer
from dfformer.utils.eager_baseline import EAGER

B = 3  # no weight is a tensor of four dimensions with so many rows
VIEWS = {"view", "_unsafe_view", "t", "permute", "unsqueeze", "expand", "detach"}
COPIES = {"clone", "copy_", "_to_copy"}
FORWARD = {
    "mm": "projections",
    "addmm": "the head's, with a bias",
    "convolution": "stem, downsampling, separable convolutions",
    "native_layer_norm": "norms",
    "mean": "of each channel: what filters are chosen by, and the head's pool",
    "add": "a residual",
    "mul": "residual scales",
    "relu": "the head's activation",
    "pow": "the same",
}
BACKWARD = {
    "mm": "projections: two products each",
    "convolution_backward": "",
    "native_layer_norm_backward": "",
    "add": "where a tensor was used twice: block's input, norm's output",
    "mul": "residual scales, and the head's activation",
    "sum": "gradients of residual scales and biases",
    "div": "means",
    "threshold_backward": "the head's activation",
    "pow": "the same",
}
# MLPs of each model: of its blocks, and those that route.
MLPS = {"dfformer_s18": 18 + 18, "cdfformer_s18": 18 + 12, "gfformer_s18": 18}
# This package's operators in a forward pass of each model.
OURS = {
    "dfformer_s18": {"dynamic_filter": 18, "star_relu": MLPS["dfformer_s18"]},
    "cdfformer_s18": {"dynamic_filter": 12, "star_relu": MLPS["cdfformer_s18"] + 6},  # and of separable convolutions
    "gfformer_s18": {"global_filter": 18, "star_relu": MLPS["gfformer_s18"]},
}
EVERY_MODEL = pytest.mark.parametrize("name", OURS)


class Record(TorchDispatchMode):
    """Which operators run, and the feature maps that are copied."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.ours: Counter[str] = Counter()
        self.copied: list[tuple[torch.dtype, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, name = func.namespace, func.overloadpacket.__name__
        if namespace == "dfformer":
            self.ours[name] += 1
            assert all(t.is_contiguous() for t in args if isinstance(t, Tensor)), f"{name} copies its input"
        elif namespace == "aten" and name not in VIEWS | COPIES:
            self.ops[name] += 1
        elif name in COPIES and args[0].dim() == 4 and args[0].shape[0] == B:
            self.copied.append((args[0].dtype, out.dtype))
        return out


@contextmanager
def on_fake_gpu(autocast: torch.dtype | None = None) -> Iterator[None]:
    """``torch.autocast`` itself would be off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode(), torch.device("cuda"):
        torch.set_autocast_enabled("cuda", autocast is not None)
        torch.set_autocast_dtype("cuda", autocast or before[1])
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
            torch.clear_autocast_cache()


def forward(
    name: str, training: bool, form: Callable[[nn.Module], nn.Module] = lambda model: model
) -> tuple[Tensor, Record]:
    model = form(timm.create_model(name).train(training))
    images = torch.randn(B, 3, 224, 224)
    with Record() as record, torch.set_grad_enabled(training):
        return model(images), record


def backward(y: Tensor) -> Record:
    """What ``y.backward()`` does, which wants to know a GPU's streams: the nodes, the latest first."""
    waiting: dict[Any, dict[int, Tensor]] = {y.grad_fn: {0: torch.ones_like(y)}}
    with Record() as record, torch.no_grad(), torch.autocast("cuda", enabled=False):
        while waiting:
            node = max(waiting, key=lambda node: node._sequence_nr())
            given = waiting.pop(node)
            apply = getattr(node, "apply", node)  # of a torch.autograd.Function, of torch's own
            gradients = apply(*(given.get(i) for i in range(len(node._input_metadata))))
            gradients = gradients if isinstance(gradients, tuple) else (gradients,)
            for gradient, (reader, i) in zip(gradients, node.next_functions, strict=False):
                if gradient is None or reader is None:
                    continue
                shape, dtype = tuple(reader._input_metadata[i].shape), reader._input_metadata[i].dtype
                gradient = gradient.sum_to_size(shape).to(dtype)
                if "AccumulateGrad" not in reader.name():
                    found = waiting.setdefault(reader, {})
                    found[i] = found[i] + gradient if i in found else gradient
    return record


@EVERY_MODEL
def test_inference(name: str) -> None:
    with on_fake_gpu():
        _, record = forward(name, training=False)
    assert record.ops.keys() <= FORWARD.keys()
    assert record.ours == OURS[name]
    assert record.copied == [(torch.float32, torch.float32)]  # the image, to channels last


@EVERY_MODEL
def test_training(name: str) -> None:
    with on_fake_gpu():
        y, forwards = forward(name, training=True)
        backwards = backward(y)
    assert forwards.ops.keys() <= FORWARD.keys()
    assert backwards.ops.keys() <= BACKWARD.keys()
    assert forwards.ours == OURS[name]
    recomputed = {"star_relu": MLPS[name]}
    assert backwards.ours == {f"{op}_backward": count for op, count in OURS[name].items()} | recomputed
    assert (len(forwards.copied), len(backwards.copied)) == (1, 0)


# Feature maps that autocast copies to a narrow dtype: the image, inputs of three convolutions and of each block's
# projections; and from it, for norms: the stem's, the second stage's (whose residuals stay narrow), the first norm of
# the stages after it.
NARROWED, WIDENED = 1 + 3 + 2 * 18, 1 + (2 * 3 + 1) + 2
HALF = (torch.float32, torch.float16)
FLOAT = HALF[::-1]


@EVERY_MODEL
def test_autocast(name: str) -> None:
    """To float16: where no GPU is, torch lays out bfloat16 convolutions as for one that has none."""
    with on_fake_gpu(torch.float16):
        y, forwards = forward(name, training=True)
        backwards = backward(y)
    assert y.dtype == torch.float16
    copied = Counter(forwards.copied)
    assert copied.pop((torch.float32, torch.float32)) == 1
    assert copied == {HALF: NARROWED, FLOAT: WIDENED}
    # Gradients go the other way, but for the image's; those of what was added to something wider are copied too:
    # branches in all stages but the second, and what enters the last two.
    assert Counter(backwards.copied) == {FLOAT: NARROWED - 1, HALF: WIDENED + 2 * (3 + 9 + 3) + 2}
    assert forwards.ops.keys() <= FORWARD.keys()
    assert backwards.ops.keys() <= BACKWARD.keys()


def test_what_the_plain_formulation_adds() -> None:
    """So that it is known to be seen."""

    def as_eager(model: nn.Module) -> nn.Module:
        for module in model.modules():  # in place: fake tensors cannot be copied deeply
            module.__class__ = EAGER.get(type(module), type(module))
        return model

    with on_fake_gpu():
        y, forwards = forward("dfformer_s18", training=True, form=as_eager)
        backwards = backward(y)
    assert not forwards.ours
    assert {"_fft_r2c", "_fft_c2r", "_softmax"} <= forwards.ops.keys() - FORWARD.keys()
    assert {"_fft_r2c", "_fft_c2c", "_softmax_backward_data"} <= backwards.ops.keys() - BACKWARD.keys()


def test_a_copy_is_seen() -> None:
    with on_fake_gpu():
        mixer: Any = dfformer.DynamicFilter(8, size=6)
        mixer.pwconv1 = nn.Sequential(mixer.pwconv1, Transposed())
        with Record(), pytest.raises(AssertionError, match="dynamic_filter copies its input"):
            mixer(torch.randn(B, 6, 6, 8))


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)
