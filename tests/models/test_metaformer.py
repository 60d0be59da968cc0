"""The models: head and features, training, parameter groups, weights, and the form for dense prediction."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import CLASSES, DIMS, ERROR, EVERY_KIND, gradients, images, small, step
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from dfformer_kernels.tolerance import relative_error

# Every model


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
    assert head.head_drop.p == 0.3
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
    with pytest.raises(ValueError, match=r"indices: expected .*, got"):
        model.forward_intermediates(images(), indices)
    with pytest.raises(ValueError, match=r"indices: expected .*, got"):
        model.prune_intermediate_layers(indices)


def test_unknown_output_format() -> None:
    with pytest.raises(ValueError, match=r"output_fmt: expected one of .*, got 'NLC'"):
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


# The authors' form for dense prediction


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
    with pytest.raises(ValueError, match=r"num_classes: with fork_feat=True, .*expected 0, got 3"):
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
