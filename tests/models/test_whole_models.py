"""Whole models: image sizes, layouts, dtypes, devices and copies; what torch's compilers and tracers make of them."""

import copy
import pickle
from collections.abc import Callable
from inspect import unwrap
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Operators
from conftest import require_compiler
from extent import FULL, slow
from small_models import CLASSES, ERROR, EVERY_KIND, KINDS, gradients, images, small, step
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dfformer import AFNO2D, DFFormer, DynamicFilter, GlobalFilter, SepConv, load_checkpoint
from dfformer.models import filter_resize as resize
from dfformer.models.spectral import SpectralFilter
from dfformer.utils.eager_baseline import eager_baseline
from dfformer_kernels.kept import kept
from dfformer_kernels.tolerance import BOUND, gradient_errors, relative_error

# In 16 bits, sums in float32 and norms keep a model's error to a few units of roundoff.
UNITS_16_BIT = 8
EVERY_KIND_IN_16_BITS = pytest.mark.parametrize(
    ("name", "dtype"), [*zip(KINDS, cycle([torch.bfloat16, torch.float16]))], ids=str
)


def filters_of(model: nn.Module) -> list[SpectralFilter]:
    return [module for module in model.modules() if isinstance(module, SpectralFilter)]


# Copies


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_state_dict(model: Any) -> nn.Module:
    twin = small(model.pretrained_cfg["architecture"])
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin


@EVERY_KIND
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_state_dict])
def test_copies_compute_the_same(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x = small(name), images(96, 70)
    expected = model(x)
    twin = copied(model)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():  # and share nothing
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(x), expected)


# Image sizes and resizing


@EVERY_KIND
@pytest.mark.parametrize("size", [(33, 65), (96, 70)], ids=str)
def test_other_image_sizes_equal_a_model_built_for_them(name: str, size: tuple[int, int]) -> None:
    model = small(name)
    built = small(name, img_size=size)
    built.load_state_dict(model.state_dict())
    x = images(*size)
    assert model(x).shape == (2, CLASSES)
    assert relative_error(model(x), built(x)) < ERROR


@pytest.mark.parametrize(
    ("size", "image_size"), [(33, (96, 70)), ((96, 70), (230, 230)), (230, (33, 65)), (33, (33, 33))], ids=str
)
def test_any_two_sizes(size: int | tuple[int, int], image_size: tuple[int, int]) -> None:
    model = small(img_size=size).train()
    y, grads = step(model, model, images(*image_size))
    assert y.shape == (2, CLASSES)
    assert y.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("name", ["dfformer_s18", "gfformer_s18", "cdfformer_s18"])
@pytest.mark.parametrize("rule", ["bicubic", "fourier"])
def test_resize_rule_reaches_every_filter(name: str, rule: str) -> None:
    model = small(name, resize=rule)
    assert {(module.resize, module.weight_resize) for module in filters_of(model)} == {(rule, True)}


def test_resize_rules_differ_on_another_size_only() -> None:
    bicubic, fourier = small(), small(resize="fourier")
    fourier.load_state_dict(bicubic.state_dict())
    assert torch.equal(bicubic(x := images()), fourier(x))
    assert not torch.equal(bicubic(x := images(96, 70)), fourier(x))


def test_a_checkpoint_of_a_shared_mixer_at_another_size(tmp_path: Path) -> None:
    """Its filters have two names."""
    models = [small(depths=(2, 1, 1, 1), img_size=size) for size in (64, 96)]
    for model in models:
        model.stages[0][1].token_mixer = model.stages[0][0].token_mixer
    torch.save(models[0].state_dict(), tmp_path / "shared.pth")
    assert not any(load_checkpoint(models[1], tmp_path / "shared.pth"))


# Layouts, dtypes, devices


@EVERY_KIND
def test_channels_last_images(name: str) -> None:
    model, x = small(name), images(96, 64)
    assert relative_error(model(x.to(memory_format=torch.channels_last)), model(x)) < ERROR
    assert relative_error(copy.deepcopy(model).to(memory_format=torch.channels_last)(x), model(x)) < ERROR


@EVERY_KIND
def test_convolutions_need_no_copy_of_the_layout(name: str) -> None:
    model, layouts = small(name), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda *args: layouts.append(args[-1].is_contiguous(memory_format=torch.channels_last))
            )
    model(images(96, 64))
    assert layouts == [True] * (6 if name == "cdfformer_s18" else 4)


@EVERY_KIND_IN_16_BITS
def test_16_bit_parameters(name: str, dtype: torch.dtype) -> None:
    model, x = small(name).to(dtype), images().to(dtype)
    y = model(x)
    assert y.dtype == dtype
    assert relative_error(y, copy.deepcopy(model).float()(x.float())) < UNITS_16_BIT * BOUND[dtype]


@EVERY_KIND_IN_16_BITS
def test_autocast(name: str, dtype: torch.dtype) -> None:
    model, x = small(name), images()
    expected = model(x)
    with torch.autocast("cpu", dtype):
        y = model(x)
    y.float().square().sum().backward()
    assert y.dtype == dtype
    assert relative_error(y, expected) < UNITS_16_BIT * BOUND[dtype]
    assert gradients(model).keys() == dict(model.named_parameters()).keys()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@EVERY_KIND
def test_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = small(name)
        y = model(images(96, 70))
    assert y.device.type == "meta"
    assert y.shape == (2, CLASSES)


@EVERY_KIND
def test_fake_tensors(name: str) -> None:
    small(name)(images(96, 70))  # real tensors kept from before must not get in
    with FakeTensorMode():
        model = small(name).train()
        y, grads = step(model, model, images(96, 70))
    assert y.shape == (2, CLASSES)
    assert grads.keys() == dict(model.named_parameters()).keys()


@EVERY_KIND
def test_inference_mode_then_training(name: str) -> None:
    model, x = small(name), images(96, 70)
    with torch.inference_mode():
        inferred = model(x)
    y, grads = step(model, model, x)
    assert relative_error(inferred, y) < ERROR
    assert grads.keys() == dict(model.named_parameters()).keys()


def test_empty_batch() -> None:
    assert small()(images(batch=0)).shape == (0, CLASSES)


# Compilers


class Copies(TorchDispatchMode):
    """Notes every operation that rearranges or duplicates the memory of an activation."""

    COPYING = ("clone", "copy_", "_to_copy", "contiguous")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.COPYING and args[0].dim() == 4:
            self.seen.append(f"{func} of {tuple(args[0].shape)} with strides {args[0].stride()}")
        return func(*args, **(kwargs or {}))


# AFNO runs on torch.fft, whose backward copies the half spectrum.
@pytest.mark.parametrize("name", [name for name in KINDS if not name.endswith("afno")])
def test_blocks_copy_no_activation(name: str) -> None:
    model = small(name)
    for stage, plane in zip(model.stages, ((24, 16), (12, 8), (6, 4), (3, 2)), strict=True):
        block = stage[0]
        x = torch.randn(2, *plane, block.norm2.weight.numel(), requires_grad=True)
        with Copies() as copies:
            y = block(x)
            y.backward(torch.ones_like(y))
        assert copies.seen == []


def test_hooks_inside_an_mlp_run() -> None:
    model, seen = small("dfformer_s18"), []
    block = model.stages[0][0]
    x = torch.randn(2, 16, 16, block.norm2.weight.numel())
    fused = block(x)
    for module in (block.mlp.fc1, block.mlp.act, block.token_mixer.act1, block.token_mixer.reweight.fc2):
        module.register_forward_hook(lambda module, inputs, y: seen.append(module))
    assert relative_error(block(x), fused) < ERROR
    assert len(seen) == 4


@EVERY_KIND
def test_the_plain_formulation_computes_the_same(name: str) -> None:
    model, x = small(name), images()
    y, grads = step(model, model, x)
    baseline = eager_baseline(model)
    with Operators() as used:
        plain_y, plain = step(baseline, baseline, x)
    assert used.names
    assert not any(name.startswith("dfformer::") for name in used.names)
    assert relative_error(y, plain_y) < ERROR
    assert max(gradient_errors(list(grads.values()), list(plain.values()))) < 10 * ERROR


def test_training_follows_the_plain_formulation() -> None:
    curves = []
    for form in (lambda model: model, eager_baseline):
        torch.manual_seed(0)
        model = form(small("dfformer_s18").train())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        generator, losses = torch.Generator().manual_seed(1), []
        for _ in range(60):
            x = torch.randn(4, 3, 32, 32, generator=generator)
            target = torch.randint(CLASSES, (4,), generator=generator)
            loss = nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    # What rounding alone does to a run: gradients of either form differ from float64 by the same 1e-6.
    assert relative_error(curves[0][:20], curves[1][:20]) < 1e-4
    assert relative_error(*curves) < 2e-2


def narrow(stages: int, **kwargs: Any) -> DFFormer:
    """As little as there can be to compile. Two stages have all there is: downsampling and residual scales too."""
    two: dict[str, Any] = {"depths": (1, 1), "dims": (16, 24), "strides": (4, 2), "res_scale_init_values": (None, 1.0)}
    shape = {name: values[2 - stages :] for name, values in two.items()}
    return DFFormer(32, num_classes=CLASSES, **shape, **kwargs)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_training_step() -> None:
    require_compiler()
    model = narrow(stages=2 if FULL else 1)
    x = images(32, 32)
    y, grads = step(model, model, x)
    compiled_y, compiled = step(torch.compile(model, fullgraph=True), model, x)
    assert relative_error(compiled_y, y) < ERROR
    assert {name: relative_error(compiled[name], grads[name]) for name in grads} == pytest.approx(
        dict.fromkeys(grads, 0.0), abs=ERROR
    )


@pytest.mark.parametrize("mixer", [DynamicFilter, GlobalFilter, AFNO2D, SepConv])
@pytest.mark.usefixtures("fresh_compiler")
def test_no_graph_break(mixer: Any) -> None:
    explanation = torch._dynamo.explain(narrow(stages=1, token_mixers=mixer))(images(32, 32))
    assert explanation.graph_break_count == 0
    assert explanation.graph_count == 1


@pytest.mark.parametrize("rule", [*slow("bicubic"), "fourier"])
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled_at_other_image_sizes(rule: str) -> None:
    model = narrow(stages=1, resize=rule).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in ((32, 32), (40, 36), (33, 65)):  # the second one makes torch compile for any size
        x = images(*size)
        assert relative_error(compiled(x), model(x)) < ERROR


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_eager_calls_do_not_make_it_compile_again() -> None:
    model, counter = narrow(stages=2).eval(), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for other_size in (32, 44, 52):
        compiled(images(40, 36))
        model(images(other_size, other_size))  # keeps matrices and filters of its own
    assert counter.frame_count == 1


# tests/export has a model of every mixer
@pytest.mark.parametrize("name", ["cdfformer_s18", *slow(*(name for name in KINDS if name != "cdfformer_s18"))])
@pytest.mark.usefixtures("fresh_compiler")
def test_export_with_any_batch(name: str) -> None:
    model = small(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 5):
        x = images(batch=size)
        assert relative_error(program(x), model(x)) < ERROR


@pytest.mark.parametrize(("name", "size"), [*zip(KINDS, cycle([(64, 64), (96, 70)]))], ids=str)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # a trace is for one image size
def test_trace_with_any_batch(name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(name)
    empty = kept(64)(unwrap(resize._kept_matrices))  # the trace is the first to ask for its filters' size
    monkeypatch.setattr(resize, "_kept_matrices", empty)
    with torch.set_grad_enabled(size == (64, 64)):
        traced = torch.jit.trace(model, images(*size))
        for batch in (1, 5):
            x = images(*size, batch=batch)
            assert relative_error(traced(x), model(x)) < ERROR
