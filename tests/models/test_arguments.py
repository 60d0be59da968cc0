"""The arguments of DFFormer: what each changes, and what is refused."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from dfformer import DFFormer, DynamicFilter, SepConv
from dfformer.models.layers import Scale

SHAPE: dict[str, Any] = {"img_size": 32, "depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 5}
CONV_THEN_DYNAMIC = [SepConv, SepConv, DynamicFilter, DynamicFilter]


def build(**arguments: Any) -> Any:
    return DFFormer(**{**SHAPE, **arguments})


def blocks(model: Any) -> list[Any]:
    return [block for stage in model.stages for block in stage]


def learns(model: nn.Module) -> bool:
    """Whether a training step reaches every parameter."""
    model.train()(torch.randn(4, 3, 32, 32)).square().sum().backward()
    return all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


# What each changes


def test_mlp_bias() -> None:
    model = build(mlp_bias=True)
    assert all(layer.bias.shape == (layer.out_features,) for b in blocks(model) for layer in (b.mlp.fc1, b.mlp.fc2))
    assert learns(model)
    without = build()
    assert without.state_dict().keys() == {
        name for name in model.state_dict() if ".mlp.fc" not in name or "weight" in name
    }


def test_proj_drop_rate() -> None:
    model, x = build(proj_drop_rate=0.5), torch.randn(2, 3, 32, 32)
    assert model.state_dict().keys() == build().state_dict().keys()
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


@pytest.mark.parametrize(("value", "of_stage"), [(0.5, [0.5] * 4), ([None, 0.25, None, 2.0], [None, 0.25, None, 2.0])])
@pytest.mark.parametrize("kind", ["res_scale", "layer_scale"])
def test_scales(kind: str, value: Any, of_stage: list[float | None]) -> None:
    model = build(**{f"{kind}_init_values": value})
    for block, expected in zip(blocks(model), of_stage, strict=True):
        for scale in (block.get_submodule(f"{kind}1"), block.get_submodule(f"{kind}2")):
            assert type(scale) is (nn.Identity if expected is None else Scale)
            assert [p.unique().tolist() for p in scale.parameters()] == ([] if expected is None else [[expected]])
    assert learns(model)


def test_a_block_is_the_sum_it_is_described_as() -> None:
    model = build(layer_scale_init_values=0.5, res_scale_init_values=2.0, mlp_bias=True, drop_path_rate=0.3).eval()
    for block, dim in zip(blocks(model), SHAPE["dims"], strict=True):
        x = torch.randn(2, *block.token_mixer.size, dim)
        y = 2 * x + 0.5 * block.token_mixer(block.norm1(x))
        y = 2 * y + 0.5 * block.mlp(block.norm2(y))
        torch.testing.assert_close(block(x), y)


class Doubled(nn.LayerNorm):
    """A norm of somebody's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_norms() -> None:
    model = build(norm_layers=[Doubled, nn.LayerNorm, Doubled, nn.RMSNorm], downsample_norm=None, output_norm=Doubled)
    kinds = [{type(block.norm1), type(block.norm2)} for block in blocks(model)]
    assert kinds == [{Doubled}, {nn.LayerNorm}, {Doubled}, {nn.RMSNorm}]
    assert type(model.norm) is Doubled
    norms = [norm for layer in model.downsample_layers for norm in (layer.pre_norm, layer.post_norm)]
    assert {type(norm) for norm in norms} == {nn.Identity}
    assert learns(model)
    assert type(build(output_norm=Doubled, fork_feat=True).get_submodule("norm2")) is Doubled


def test_linear_head() -> None:
    model: Any = timm.create_model("dfformer_s18", use_mlp_head=False, drop_rate=0.3, **SHAPE)
    assert model.get_submodule(model.pretrained_cfg["classifier"]).out_features == 5
    assert [p for p, layer in ((m.p, m) for m in model.get_classifier().modules() if isinstance(m, nn.Dropout))] == [
        0.3
    ]
    model.reset_classifier(3)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    weights: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": model.state_dict()}}
    other: Any = timm.create_model("dfformer_s18", use_mlp_head=False, **SHAPE, **weights)
    assert torch.equal(other.stages[3][0].mlp.fc1.weight, model.stages[3][0].mlp.fc1.weight)


def test_other_arguments_go_to_the_mixers_that_take_them() -> None:
    model = build(token_mixers=CONV_THEN_DYNAMIC, num_filters=2, kernel_size=5, padding=2, expansion_ratio=3)
    mixers = [block.token_mixer for block in blocks(model)]
    assert [mixer.dwconv.kernel_size for mixer in mixers[:2]] == [(5, 5)] * 2
    assert [mixer.num_filters for mixer in mixers[2:]] == [2, 2]
    assert [mixer.pwconv1.out_features for mixer in mixers] == [3 * dim for dim in SHAPE["dims"]]
    assert learns(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_is_that_of_a_model_cast_to_it(dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    torch.manual_seed(0)
    cast = build().to(dtype)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), cast.parameters(), strict=True))


def test_a_new_classifier_under_fake_tensors() -> None:
    """As tools that plan memory build models."""
    with FakeTensorMode():
        model = build()
        model.reset_classifier(3)
        assert [*model.get_classifier().parameters()][-1].shape == (3,)


class _BatchNorm(nn.BatchNorm2d):
    """Over channels that come last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


def test_dtype_of_norms_with_statistics() -> None:
    model = build(norm_layers=_BatchNorm, dtype=torch.float64)
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    assert statistics
    assert {t.dtype for t in [*model.parameters(), *statistics]} == {torch.float64}


class Tied(nn.Linear):
    """A mixer with a weight of two names."""

    def __init__(self, dim: int, size: tuple[int, int]) -> None:
        super().__init__(dim, dim)
        self.other = nn.Linear(dim, dim)
        self.other.weight = self.weight


def test_dtype_leaves_tied_weights_tied() -> None:
    mixer = blocks(build(token_mixers=Tied, dtype=torch.bfloat16))[0].token_mixer
    assert mixer.weight is mixer.other.weight
    assert mixer.weight.dtype == torch.bfloat16


def test_device_comes_before_the_surrounding_one() -> None:
    with torch.device("meta"):
        assert {p.device.type for p in build(device="cpu").parameters()} == {"cpu"}
        assert {p.device.type for p in build().parameters()} == {"meta"}


def test_reset_classifier_takes_device_dtype_and_the_norm() -> None:
    model = build()
    model.reset_classifier(3, reset_other=True, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in model.get_classifier().parameters()} == {("meta", torch.float16)}
    assert type(model.norm) is nn.Identity


# What is refused


@pytest.mark.parametrize("name", ["mlp_ratios", "kernel_size", "size", "dim", "weight_resize", "norm_layer"])
def test_unknown_arguments(name: str) -> None:
    """Also a mixer's that no mixer of the model takes, or that the model decides."""
    with pytest.raises(TypeError, match=rf"DFFormer.__init__\(\) got an unexpected keyword argument '{name}'"):
        build(token_mixers=DynamicFilter, **{name: 1})
    with pytest.raises(TypeError, match=f"'{name}'"):
        timm.create_model("dfformer_s18", **SHAPE, **{name: 1})


def test_an_unknown_argument_gets_a_suggestion() -> None:
    with pytest.raises(TypeError, match=r"'num_filter'; did you mean num_filters\b"):
        build(num_filter=3)


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("in_chans", 0, "a whole number from 1 up"),
        ("num_classes", -1, "a whole number from 0 up"),
        ("depths", (), "a whole number from 1 up"),
        ("depths", (1, 0, 1, 1), "a whole number from 1 up"),
        ("dims", (8, 16, -1, 32), "a whole number from 1 up"),
        ("strides", (4, 2, 2, 0), "a whole number from 1 up"),
        ("in_chans", (3,), "a whole number from 1 up"),
        ("num_classes", "3", "a whole number from 0 up"),
        ("depths", 3, "a list of whole numbers, one for each stage"),
        ("depths", "1111", "a whole number from 1 up"),
        ("dims", (8.5, 16, 24, 32), "a whole number from 1 up"),
        ("img_size", "32", "a whole number from 1 up or a pair of them"),
        ("img_size", (32,), "a whole number from 1 up or a pair of them"),
        ("img_size", 2, "one that leaves pixels at stage 0"),
        ("res_scale_init_values", "1", "a number or None"),
        ("token_mixers", "DynamicFilter", "a callable that returns a module"),
        ("mlp_act", "gelu", "a callable that returns a module"),
        ("drop_rate", "0.1", "a probability from 0 to 1"),
        ("drop_rate", 1.5, "a probability from 0 to 1"),
        ("drop_path_rate", -0.1, "a probability from 0 to 1"),
        ("proj_drop_rate", float("nan"), "a probability from 0 to 1"),
        ("global_pool", "mean", "one of 'avg', 'max', 'avgmax', ''"),
        ("resize", "cubic", "one of 'bicubic', 'fourier'"),
    ],
    ids=str,
)
def test_values_out_of_range(argument: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: expected {expected}( or a list of such)?, got "):
        build(**{argument: value})


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("dims", (16, 24, 32)),
        ("token_mixers", [SepConv, DynamicFilter]),
        ("res_scale_init_values", (None,) * 5),
        ("layer_scale_init_values", [1e-5]),
        ("norm_layers", [nn.LayerNorm] * 3),
        ("strides", (4, 2)),
    ],
)
def test_one_value_a_stage(argument: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=f"{argument}: expected 4 values, for the stages of depths=.*, got {len(value)}"
    ):
        build(**{argument: value})
