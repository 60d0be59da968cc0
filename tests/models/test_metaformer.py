"""The models, through timm's interfaces and torch's compilers."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
from cases import Operators
from conftest import require_compiler
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dfformer import VARIANTS, DFFormer, DynamicFilter, SepConv
from dfformer.models import filter_resize as resize
from dfformer.models.spectral import SpectralFilter
from dfformer.utils.eager_baseline import eager_baseline
from dfformer_kernels.tolerance import BOUND, gradient_errors, relative_error

DIMS, CLASSES = [16, 24, 32, 40], 7
# Reduced depth and width leave the token mixers as the difference between the models: one of each of the eight.
KINDS = [name for name in VARIANTS if "s18" in name]
PUBLISHED = {f"{family}_{size}" for family in ("dfformer", "cdfformer") for size in ("s18", "s36", "m36", "b36")}
EVERY_KIND = pytest.mark.parametrize("name", KINDS)
# float32 models round some fifty times in a row, in an order that layouts and compilers change
ERROR = 20 * BOUND[torch.float32]
# The same in 16 bits: sums in float32 and norms keep it to a few units of roundoff.
UNITS_16_BIT = 8


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(name: str = "dfformer_s18", **kwargs: Any) -> Any:
    shape = {"depths": (1, 1, 1, 1), "dims": DIMS, "img_size": 64, "num_classes": CLASSES}
    return timm.create_model(name, **{**shape, **kwargs}).eval()


def images(H: int = 64, W: int = 64, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, H, W)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model: Callable[[Tensor], Tensor], parameters_of: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and parameter gradients of a training step, starting from the same random state each time."""
    parameters_of.zero_grad()
    torch.manual_seed(1)
    y = model(x)
    y.square().sum().backward()
    return y.detach(), gradients(parameters_of)


def filters_of(model: nn.Module) -> list[SpectralFilter]:
    return [module for module in model.modules() if isinstance(module, SpectralFilter)]


# Every model


@pytest.mark.parametrize("name", VARIANTS)
def test_full_size_forward(name: str) -> None:
    model = timm.create_model(name).eval()
    with torch.no_grad():
        y = model(images(224, 224, batch=1))
    assert y.shape == (1, 1000)
    assert y.isfinite().all()


@EVERY_KIND
def test_every_parameter_learns(name: str) -> None:
    model = small(name).train()
    _, grads = step(model, model, images())
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert [key for key, grad in grads.items() if not (grad.isfinite().all() and grad.abs().sum() > 0)] == []


@EVERY_KIND
def test_training_reduces_the_loss(name: str) -> None:
    model, x, target = small(name).train(), images(batch=4), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# timm: head and features


@EVERY_KIND
def test_forward_is_its_two_halves(name: str) -> None:
    model, x = small(name), images()
    features = model.forward_features(x)
    assert features.shape == (2, 2, 2, DIMS[-1])
    assert torch.equal(model.forward_head(features), model(x))
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size) == (2, model.num_features)
    assert torch.equal(model.head(pre_logits), model(x))


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.mean((1, 2)),
    "max": lambda x: x.amax((1, 2)),
    "avgmax": lambda x: (x.mean((1, 2)) + x.amax((1, 2))) / 2,
    "": lambda x: x,
}


@pytest.mark.parametrize("pool", POOLS)
def test_global_pool(pool: str) -> None:
    model, x = small(global_pool=pool), images(64, 96)
    expected = model.head(model.norm(POOLS[pool](model.forward_features(x))))
    assert model(x).shape == ((2, CLASSES) if pool else (2, 2, 3, CLASSES))
    assert relative_error(model(x), expected) < ERROR


@pytest.mark.parametrize("pool", ["catavgmax", "mean"])
def test_unsupported_global_pool(pool: str) -> None:
    with pytest.raises(ValueError, match=f"global_pool: got '{pool}', accepted are 'avg', 'max', 'avgmax', ''"):
        small(global_pool=pool)


def test_no_classes() -> None:
    model, x = small(num_classes=0), images()
    assert isinstance(model.get_classifier(), nn.Identity)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    assert model(x).shape == (2, DIMS[-1])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("meta", torch.float32)], ids=["cpu", "meta"])
def test_reset_classifier_keeps_device_dtype_and_mode(device: str, dtype: torch.dtype, training: bool) -> None:
    model = small(drop_rate=0.3).to(device, dtype).train(training)
    before = model.get_classifier()
    model.reset_classifier(5)
    head = model.get_classifier()
    assert head is not before
    assert model.num_classes == 5
    assert head.fc2.weight.shape[0] == 5
    assert head.head_dropout.p == 0.3
    assert {(p.device.type, p.dtype) for p in head.parameters()} == {(device, dtype)}
    assert {module.training for module in head.modules()} == {training}


def test_reset_classifier_to_nothing_and_back() -> None:
    model, x = small(), images()
    body = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("head")}
    model.reset_classifier(0, global_pool="max")
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, DIMS[-1])
    assert model.global_pool.pool_type == "max"
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.global_pool.pool_type == "max"
    assert all(torch.equal(model.state_dict()[name], value) for name, value in body.items())


PLANES = {(224, 224): [(56, 56), (28, 28), (14, 14), (7, 7)], (200, 296): [(50, 74), (25, 37), (13, 19), (7, 10)]}


@EVERY_KIND
@pytest.mark.parametrize("size", PLANES, ids=str)
def test_features_only(name: str, size: tuple[int, int]) -> None:
    model = small(name, features_only=True, img_size=224)
    maps = model(images(*size, batch=1))
    assert [tuple(m.shape) for m in maps] == [(1, C, *plane) for C, plane in zip(DIMS, PLANES[size], strict=True)]
    assert model.feature_info.channels() == DIMS
    assert model.feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize("name", ["dfformer_s18", "cdfformer_s18"])
def test_features_only_full_size(name: str) -> None:
    model = timm.create_model(name, features_only=True).eval()
    with torch.no_grad():
        maps = model(images(224, 224, batch=1))
    assert [m.shape[1] for m in maps] == model.feature_info.channels() == [64, 128, 320, 512]


@pytest.mark.parametrize("indices", [(0, 2), (1,), (3,), (-2, -1)], ids=str)
def test_features_only_out_indices(indices: tuple[int, ...]) -> None:
    model, every = small(features_only=True, out_indices=indices), small(features_only=True)
    model.load_state_dict({name: value for name, value in every.state_dict().items() if name in model.state_dict()})
    x = images()
    maps, expected = model(x), [every(x)[i] for i in indices]
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    assert model.feature_info.channels() == [DIMS[i] for i in indices]
    assert model.feature_info.reduction() == [[4, 8, 16, 32][i] for i in indices]


# timm: forward_intermediates


@pytest.mark.parametrize(
    ("indices", "taken"),
    [(None, [0, 1, 2, 3]), (4, [0, 1, 2, 3]), (2, [2, 3]), ([1], [1]), ([0, 2], [0, 2]), ((-3, -1), [1, 3])],
    ids=str,
)
@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC"])
def test_forward_intermediates(indices: Any, taken: list[int], output_fmt: str) -> None:
    model, x = small(), images()
    expected = [model.stages[0](model.downsample_layers[0](x))]
    for i in (1, 2, 3):
        expected.append(model.stages[i](model.downsample_layers[i](expected[-1])))
    last, maps = model.forward_intermediates(x, indices, output_fmt=output_fmt)
    assert torch.equal(last, model.forward_features(x))
    if output_fmt == "NCHW":
        maps = [m.permute(0, 2, 3, 1) for m in maps]
    assert [m.shape[-1] for m in maps] == [DIMS[i] for i in taken]
    assert all(torch.equal(m, expected[i]) for m, i in zip(maps, taken, strict=True))


def test_forward_intermediates_equals_features_only() -> None:
    model, features = small(), small(features_only=True)
    features.model.load_state_dict(model.state_dict(), strict=False)
    x = images()
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, features(x), strict=True))


def test_forward_intermediates_norm() -> None:
    model, x = small(), images()
    with torch.no_grad():
        model.norm.weight.fill_(2.0)
    plain = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    normed = model.forward_intermediates(x, norm=True, output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(normed, [*plain[:3], model.norm(plain[3])], strict=True))


@pytest.mark.parametrize(("stop_early", "channels"), [(True, DIMS[1]), (False, DIMS[3])])
def test_forward_intermediates_stop_early(stop_early: bool, channels: int) -> None:
    last, maps = small().forward_intermediates(images(), [0, 1], stop_early=stop_early)
    assert last.shape[-1] == channels
    assert [m.shape[1] for m in maps] == DIMS[:2]


@pytest.mark.parametrize("indices", [0, -1, 5, [4], [-5], []], ids=str)
def test_indices_out_of_range(indices: Any) -> None:
    model = small()
    with pytest.raises(ValueError, match="indices: got"):
        model.forward_intermediates(images(), indices)
    with pytest.raises(ValueError, match="indices: got"):
        model.prune_intermediate_layers(indices)


def test_unknown_output_format() -> None:
    with pytest.raises(ValueError, match="output_fmt: got 'NLC'"):
        small().forward_intermediates(images(), output_fmt="NLC")


@pytest.mark.parametrize(
    ("arguments", "stages", "norm", "head"),
    [
        ({"indices": [0, 1]}, 2, nn.Identity, nn.Identity),
        ({"indices": 1}, 4, nn.LayerNorm, nn.Identity),
        ({"indices": 1, "prune_norm": True}, 4, nn.Identity, nn.Identity),
        ({"indices": 2, "prune_head": False}, 4, nn.LayerNorm, object),
        ({"indices": [0, 1], "prune_head": False}, 2, nn.Identity, nn.Identity),  # made for features that are gone
    ],
    ids=["two_stages", "last", "last_without_norm", "nothing", "two_stages_head_too"],
)
def test_prune_intermediate_layers(arguments: Any, stages: int, norm: type, head: type) -> None:
    model, x = small(), images()
    before = model.forward_intermediates(x, arguments["indices"], stop_early=True)
    taken = model.prune_intermediate_layers(**arguments)
    assert taken == [i % 4 for i in ([0, 1] if stages == 2 else range(4 - arguments["indices"], 4))]
    assert len(model.stages) == len(model.downsample_layers) == stages
    assert isinstance(model.norm, norm)
    assert isinstance(model.head, head)
    assert model.num_features == DIMS[stages - 1]
    last, maps = model.forward_intermediates(x, taken)
    assert torch.equal(last, before[0])
    assert all(torch.equal(a, b) for a, b in zip(maps, before[1], strict=True))
    assert model(x).shape[-1] == (CLASSES if head is object else DIMS[stages - 1])


# Training


@EVERY_KIND
def test_checkpointing_changes_nothing(name: str) -> None:
    model, x = small(name, drop_path_rate=0.5, drop_rate=0.2).train(), images(batch=4)
    y, grads = step(model, model, x)
    calls: list[Tensor] = []
    model.stages[2][0].norm1.register_forward_hook(lambda *args: calls.append(args[-1]))
    model.set_grad_checkpointing()
    checkpointed_y, checkpointed = step(model, model, x)
    assert len(calls) == 2  # once more in backward
    assert torch.equal(checkpointed_y, y)
    assert [key for key in grads if not torch.equal(checkpointed[key], grads[key])] == []
    model.set_grad_checkpointing(False)
    step(model, model, x)
    assert len(calls) == 3


def test_drop_path_rates_grow_from_zero() -> None:
    model = small(depths=(1, 2, 2, 1), drop_path_rate=0.5)
    blocks = [block for stage in model.stages for block in stage]
    rates = [(getattr(b.drop_path1, "drop_prob", 0.0), getattr(b.drop_path2, "drop_prob", 0.0)) for b in blocks]
    assert rates == [pytest.approx((rate, rate)) for rate in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)]


def test_dropped_block_is_its_residual() -> None:
    block, x = small(drop_path_rate=1.0).stages[-1][-1].train(), torch.randn(2, 2, 2, DIMS[-1])
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


@pytest.mark.parametrize("rate", ["drop_path_rate", "drop_rate"])
def test_random_in_training_only(rate: str) -> None:
    arguments: dict[str, Any] = {rate: 0.5}
    model, x = small(**arguments), images(batch=8)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_no_weight_decay_names_parameters() -> None:
    model = small()
    names = dict(model.named_parameters())
    spared = model.no_weight_decay()
    assert spared == {name for name, parameter in names.items() if parameter.ndim <= 1}
    assert {"norm.weight", "stages.3.0.res_scale1.scale", "stages.0.0.token_mixer.act1.scale"} <= spared


@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_timm_optimizer(layer_decay: float | None) -> None:
    model = small().train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=layer_decay)
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert {name: decay_of[id(p)] for name, p in model.named_parameters()} == {
        name: 0.0 if p.ndim <= 1 else 0.05 for name, p in model.named_parameters()
    }
    step(model, model, images())
    optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


# the groups of depths (2, 1, 2, 1), in the order in which data runs through them: prefixes of their parameters
BLOCK_GROUPS = [
    ("downsample_layers.0.",),
    ("stages.0.0.",),
    ("stages.0.1.",),
    ("downsample_layers.1.", "stages.1.0."),
    ("downsample_layers.2.", "stages.2.0."),
    ("stages.2.1.",),
    ("downsample_layers.3.", "stages.3.0.", "norm."),
    ("head.",),
]
STAGE_GROUPS = [
    ("downsample_layers.0.",),
    ("stages.0.",),
    *[(f"downsample_layers.{i}.", f"stages.{i}.") for i in (1, 2, 3)],
    ("norm.", "head."),
]


@pytest.mark.parametrize("name", ["dfformer_s18", "cdfformer_s18"])
@pytest.mark.parametrize(("coarse", "expected"), [(False, BLOCK_GROUPS), (True, STAGE_GROUPS)], ids=["block", "stage"])
def test_parameter_groups_follow_the_depth(name: str, coarse: bool, expected: list[tuple[str, ...]]) -> None:
    model = small(name, depths=(2, 1, 2, 1))
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    assert {group: set(members) for group, members in groups.items()} == {
        group: {parameter for parameter, _ in model.named_parameters() if parameter.startswith(prefixes)}
        for group, prefixes in enumerate(expected)
    }
    assert sum(len(members) for members in groups.values()) == len(list(model.parameters()))


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


# Arguments


@EVERY_KIND
def test_one_channel(name: str) -> None:
    assert small(name, in_chans=1)(images(channels=1)).shape == (2, CLASSES)


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="mlp_ratios"):
        small(mlp_ratios=4)
    with pytest.raises(TypeError, match="mlp_ratios"):
        DFFormer(mlp_ratios=4)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("dims", (16, 24, 32)),
        ("token_mixers", [SepConv, DynamicFilter]),
        ("res_scale_init_values", (None,) * 5),
        ("strides", (4, 2)),
    ],
)
def test_one_value_a_stage(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{argument}: got {len(value)} values for the 4 stages"):
        small(**{argument: value})


def test_too_small_image_size() -> None:
    with pytest.raises(ValueError, match="img_size: got 2, which leaves nothing at stage 0"):
        small(img_size=2)


# Image sizes and resizing


@EVERY_KIND
@pytest.mark.parametrize("size", [(64, 64), (33, 65), (96, 70)], ids=str)
def test_other_image_sizes_equal_a_model_built_for_them(name: str, size: tuple[int, int]) -> None:
    model = small(name)
    built = small(name, img_size=size)
    built.load_state_dict(model.state_dict())
    x = images(*size)
    assert model(x).shape == (2, CLASSES)
    assert relative_error(model(x), built(x)) < ERROR


@pytest.mark.parametrize("size", [33, (96, 70), 230], ids=str)
@pytest.mark.parametrize("image_size", [(33, 65), (230, 230), (96, 70)], ids=str)
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


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_parameters(name: str, dtype: torch.dtype) -> None:
    model, x = small(name).to(dtype), images().to(dtype)
    y = model(x)
    assert y.dtype == dtype
    assert relative_error(y, copy.deepcopy(model).float()(x.float())) < UNITS_16_BIT * BOUND[dtype]


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
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
        for _ in range(200):
            x = torch.randn(8, 3, 32, 32, generator=generator)
            target = torch.randint(CLASSES, (8,), generator=generator)
            loss = nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    # What rounding alone does to a run: gradients of either form differ from float64 by the same 1e-6.
    assert relative_error(curves[0][:20], curves[1][:20]) < 1e-4
    assert relative_error(*curves) < 2e-2


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def two_stages(**kwargs: Any) -> DFFormer:
    """As little as there can be to compile, with all there is: stem, downsampling, blocks, residual scale, head."""
    shape: dict[str, Any] = {"depths": (1, 1), "dims": (16, 24), "strides": (4, 2), "img_size": 32}
    return DFFormer(**shape, res_scale_init_values=(None, 1.0), num_classes=CLASSES, **kwargs)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_training_step() -> None:
    require_compiler()
    model = two_stages()
    x = images(32, 32)
    y, grads = step(model, model, x)
    compiled_y, compiled = step(torch.compile(model, fullgraph=True), model, x)
    assert relative_error(compiled_y, y) < ERROR
    assert {name: relative_error(compiled[name], grads[name]) for name in grads} == pytest.approx(
        dict.fromkeys(grads, 0.0), abs=ERROR
    )


@EVERY_KIND
@pytest.mark.usefixtures("fresh_dynamo")
def test_no_graph_break(name: str) -> None:
    explanation = torch._dynamo.explain(small(name))(images())
    assert explanation.graph_break_count == 0
    assert explanation.graph_count == 1


@pytest.mark.parametrize("rule", ["bicubic", "fourier"])
@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_compiled_at_other_image_sizes(rule: str) -> None:
    model = two_stages(resize=rule).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in ((32, 32), (40, 36), (33, 65), (32, 32)):  # the second one makes torch compile for any size
        x = images(*size)
        assert relative_error(compiled(x), model(x)) < ERROR


@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_eager_calls_do_not_make_it_compile_again() -> None:
    model, counter = two_stages().eval(), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for other_size in (32, 44, 52):
        compiled(images(40, 36))
        model(images(other_size, other_size))  # keeps matrices and filters of its own
    assert counter.frame_count == 1


@EVERY_KIND
@pytest.mark.usefixtures("fresh_dynamo")
def test_export_with_any_batch(name: str) -> None:
    model = small(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 5):
        x = images(batch=size)
        assert relative_error(program(x), model(x)) < ERROR


@EVERY_KIND
@pytest.mark.parametrize("size", [(64, 64), (96, 70)], ids=str)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # a trace is for one image size
def test_trace_with_any_batch(name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(name)
    monkeypatch.setattr(resize, "_cached", {})  # the trace is the first to ask for its filters' size
    with torch.no_grad():
        traced = torch.jit.trace(model, images(*size))
        for batch in (1, 5):
            x = images(*size, batch=batch)
            assert relative_error(traced(x), model(x)) < ERROR


# Weights


@pytest.mark.parametrize("name", VARIANTS)
def test_pretrained_cfg(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg = model.pretrained_cfg
    url = f"https://github.com/okojoalg/dfformer/releases/download/weights/{name}.pth"
    assert cfg["url"] == (url if name in PUBLISHED else "")
    assert cfg["input_size"] == (3, 224, 224)
    assert cfg["num_classes"] == model.get_submodule(cfg["classifier"]).out_features == 1000
    assert model.get_submodule(cfg["first_conv"]).in_channels == 3
    assert timm.is_model(name)


@pytest.mark.parametrize("error", [URLError("no route"), TimeoutError("slow"), ConnectionResetError("cut")], ids=str)
def test_download_that_fails_says_what_to_do(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", no_network)
    with pytest.raises(RuntimeError, match=r"pretrained_cfg_overlay=dict\(file=") as raised:
        small("cdfformer_s18", pretrained=True)
    assert "https://github.com/okojoalg/dfformer/releases/download/weights/cdfformer_s18.pth" in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("name", sorted(set(KINDS) - PUBLISHED))
def test_pretrained_without_weights(name: str) -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        small(name, pretrained=True)


@pytest.mark.parametrize("name", ["dfformer_s18", "cdfformer_s18", "gfformer_s18"])
def test_checkpoint_adapted_to_images_and_classes(name: str, tmp_path: Path) -> None:
    stored = small(name, num_classes=1000)
    file = tmp_path / "weights.pth"
    torch.save(stored.state_dict(), file)
    weights = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}
    model = small(name, img_size=(96, 70), in_chans=1, **weights)

    # timm sums the colours' weights for grey images, and drops a classifier of another width
    first = "downsample_layers.0.conv.weight"
    adapted = {first, *(key for key in stored.state_dict() if key.endswith("complex_weights") or "head.fc2" in key)}
    assert relative_error(model.state_dict()[first], stored.state_dict()[first].sum(1, keepdim=True)) < ERROR
    assert model.head.fc2.weight.shape == (CLASSES, 4 * DIMS[-1])
    for key in stored.state_dict().keys() - adapted:
        assert torch.equal(model.state_dict()[key], stored.state_dict()[key])

    grey = images(96, 70, channels=1)
    expected = stored.forward_features(grey.expand(-1, 3, -1, -1))
    assert relative_error(model.forward_features(grey), expected) < ERROR


def test_checkpoint_of_the_same_shape_is_loaded_whole(tmp_path: Path) -> None:
    stored = small(num_classes=1000)
    file = tmp_path / "weights.pth"
    torch.save(stored.state_dict(), file)
    model = small(num_classes=1000, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    assert torch.equal(model(x := images()), stored(x))


# The authors' form for dense prediction


def test_unknown_resize_rule_raises_when_the_model_is_built() -> None:
    with pytest.raises(ValueError, match="resize: got 'cubic', accepted are 'bicubic', 'fourier'"):
        small(resize="cubic")


def stage_maps(model: Any, x: Tensor) -> list[Tensor]:
    return model.forward_intermediates(x, norm=True, intermediates_only=True)


def test_fork_feat_normalises_every_map() -> None:
    model, x = small(fork_feat=True), images(64, 96)
    plain = small(num_classes=0)
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for i in range(4):
            model.get_submodule(f"norm{i}").weight.fill_(i + 1)
    maps = stage_maps(model, x)
    stages = plain.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(2, C, 16 >> i, 24 >> i) for i, C in enumerate(DIMS)]
    for i, (actual, stage) in enumerate(zip(maps, stages, strict=True)):
        expected = nn.functional.layer_norm(stage, stage.shape[-1:], eps=1e-6) * (i + 1)
        assert relative_error(actual.permute(0, 2, 3, 1), expected) < ERROR


def test_fork_feat_calls_like_any_model_without_a_head() -> None:
    """Only features_only changes what a call returns."""
    model, plain, x = small(fork_feat=True), small(num_classes=0), images()
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.norm.load_state_dict(model.get_submodule("norm3").state_dict())
    assert torch.equal(model(x), plain(x))
    features = small(features_only=True, fork_feat=True)
    features.model.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(features(x), stage_maps(model, x), strict=True))


def test_fork_feat_parameters() -> None:
    model = small(fork_feat=True)
    top = {name.split(".")[0] for name in model.state_dict()}
    assert top == {"downsample_layers", "stages", "norm0", "norm1", "norm2", "norm3"}
    assert model.num_classes == 0
    assert isinstance(model.get_classifier(), nn.Identity)
    with pytest.raises(ValueError, match="num_classes: got 3, a model with fork_feat=True has no head"):
        model.reset_classifier(3)


def test_fork_feat_pruned_has_the_norms_of_the_stages_left() -> None:
    model, x = small(fork_feat=True), images(64, 64)
    expected = stage_maps(model, x)[:2]
    model.prune_intermediate_layers([0, 2])
    model.prune_intermediate_layers([0, 1])
    assert {name.split(".")[0] for name, _ in model.named_parameters() if name.startswith("norm")} == {"norm0", "norm1"}
    assert all(torch.equal(a, b) for a, b in zip(stage_maps(model, x), expected, strict=True))
    assert model(x).shape == (2, 8, 8, DIMS[1])


def test_fork_feat_every_parameter_learns() -> None:
    model = small(fork_feat=True).train()
    torch.stack([m.square().mul(torch.randn_like(m)).sum() for m in stage_maps(model, images())]).sum().backward()
    assert gradients(model).keys() == dict(model.named_parameters()).keys()
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in gradients(model).values())
