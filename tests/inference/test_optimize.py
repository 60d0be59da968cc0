"""Models made ready to serve: same results, original untouched, and everything a served model goes through."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from conftest import require_compiler
from small_models import images, trained
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import dfformer
from dfformer import optimize_for_inference
from dfformer.inference.packed import PackedLinear, PackedMlp
from dfformer.models.blocks import MetaFormerBlock
from dfformer.models.layers import Mlp
from dfformer_kernels.tolerance import relative_error

# As promised, relative to the logits; bfloat16 rounds every activation of every block.
ERROR = {None: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2}
KINDS = ("dfformer_s18", "cdfformer_s18", "gfformer_s18", "dfformer_s18_afno", "dfformer_s18_gelu")
EVERY_KIND = pytest.mark.parametrize("name", KINDS)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("size", [(64, 64), (96, 70)], ids=str)
@EVERY_KIND
def test_serves_the_same_results(name: str, size: tuple[int, int], dtype: torch.dtype | None) -> None:
    model, x = trained(name), images(*size)
    before = copy.deepcopy(model.state_dict())
    for img_size in (None, size):
        y = optimize_for_inference(model, dtype, img_size)(x)
        assert y.dtype == x.dtype
        assert relative_error(y, model(x)) < ERROR[dtype]
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_packed_mlp_whose_activation_learns() -> None:
    """With more rows than it would compute at a time, and an input that needs no gradient."""
    mlp = PackedMlp(PackedLinear(torch.randn(2048, 512)), PackedLinear(torch.randn(512, 2048))).requires_grad_(True)
    mlp(torch.randn(3137, 512)).sum().backward()
    assert mlp.act.scale.grad is not None


def test_what_is_optimised() -> None:
    served = optimize_for_inference(trained(), img_size=96)
    layers = list(served.modules())
    assert not any(isinstance(m, nn.Linear) for m in layers)
    block: Any = served.model.get_submodule("stages.2.0")
    assert isinstance(block.mlp, PackedMlp)
    assert isinstance(block.token_mixer.pwconv1, PackedLinear)
    assert block.norm1.weight.eq(1).all()
    assert block.token_mixer.size == (6, 6)


def test_images_are_prepared_as_for_the_model() -> None:
    model = trained(pretrained_cfg_overlay={"mean": (0.5, 0.4, 0.3), "crop_pct": 0.9})
    config = resolve_model_data_config(optimize_for_inference(model))
    assert config == resolve_model_data_config(model)
    assert config["mean"] == (0.5, 0.4, 0.3)


def test_fixed_filters_refuse_another_size() -> None:
    served = optimize_for_inference(trained(), img_size=(96, 64))
    served(images(96, 64))
    with pytest.raises(ValueError, match=r"x: expected a plane of size=.*, got .* leave out its img_size"):
        served(images(64, 64))


def test_filters_stay_float32_in_bfloat16() -> None:
    served = optimize_for_inference(trained(), torch.bfloat16)
    dtypes = {name.rpartition(".")[2]: t.dtype for name, t in served.state_dict().items()}
    assert dtypes.pop("complex_weights") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_in_float64_becomes_one_of_the_dtype(dtype: torch.dtype) -> None:
    model, x = trained().double(), images().double()
    served = optimize_for_inference(model, dtype)
    assert served.state_dict()["model.stages.0.0.token_mixer.complex_weights"].dtype == torch.float32
    assert relative_error(served(x), model(x)) < ERROR[dtype]


def test_feature_maps_and_other_methods() -> None:
    model, x = trained(), images()
    served = optimize_for_inference(model)
    features: Any = served.model
    assert relative_error(features.forward_features(x), model.forward_features(x)) < 1e-4  # type: ignore[operator]
    maps = timm.create_model("dfformer_s18", features_only=True, depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)).eval()
    for y, expected in zip(optimize_for_inference(maps, torch.bfloat16)(x), maps(x), strict=True):
        assert y.dtype == torch.float32
        assert relative_error(y, expected) < ERROR[torch.bfloat16]


def test_layers_with_hooks_or_replaced_are_left_alone() -> None:
    model: Any = trained()
    mlp = model.stages[0][0].mlp
    mlp.act = nn.GELU()
    served: Any = optimize_for_inference(model)
    assert type(served.model.stages[0][0].mlp.act) is nn.GELU
    assert relative_error(served(images()), model(images())) < 1e-4


def test_cannot_be_trained() -> None:
    served = optimize_for_inference(trained())
    assert served.eval() is served
    with pytest.raises(RuntimeError, match="cannot be trained; train the one it was made from"):
        served.train()
    assert not served(images()).requires_grad
    assert not any(p.requires_grad for p in served.parameters())


def test_unknown_model_and_size() -> None:
    none: Any = None
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got NoneType"):
        optimize_for_inference(none)
    with pytest.raises(ValueError, match="img_size: expected a whole number from 1 up or a pair of them, got 0"):
        optimize_for_inference(trained(), img_size=0)
    with pytest.raises(ValueError, match="model: expected a model of images, got Linear without a Conv2d"):
        optimize_for_inference(nn.Linear(3, 3), img_size=64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, "bfloat16"])
def test_unknown_dtype(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype: expected one of None, torch.float32, torch.bfloat16, got "):
        optimize_for_inference(trained(), dtype)


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled() -> None:
    require_compiler()
    model = dfformer.DFFormer(32, depths=(1, 1), dims=(16, 24), strides=(4, 2), res_scale_init_values=(None, 1.0))
    served = optimize_for_inference(model)
    compiled = torch.compile(served, fullgraph=True)
    assert relative_error(compiled(images()), served(images())) < 1e-5


# What blocks share and what stands between


def share_mlp(model: Any) -> None:
    model.stages[0][1].mlp = model.stages[0][0].mlp


def tie_weights(model: Any) -> None:
    model.stages[0][1].mlp.fc1.weight = model.stages[0][0].mlp.fc1.weight


def tie_buffers(model: Any) -> None:
    """Frozen weights with the same numbers, behind norms with different scales."""
    first, second = (model.stages[0][n].mlp.fc1 for n in (0, 1))
    weight = first.weight.detach()
    for layer in (first, second):
        del layer.weight
        layer.register_buffer("weight", weight)


def share_mixer(model: Any) -> None:
    model.stages[0][1].token_mixer = model.stages[0][0].token_mixer


def share_norms(model: Any) -> None:
    model.stages[0][1].norm1 = model.stages[0][0].norm1
    model.stages[0][1].norm2.weight = model.stages[0][0].norm2.weight


class ParallelBlock(MetaFormerBlock):
    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        return x + self.token_mixer(n) + self.mlp(n)


def another_block(model: Any) -> None:
    model.stages[0][0].__class__ = ParallelBlock


def another_block_with_one_norm(model: Any) -> None:
    another_block(model)
    del model.stages[0][0].norm2


class Squashed(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(10 * torch.tanh(5 * x))


def another_routing(model: Any) -> None:
    for block in model.stages[0]:
        block.token_mixer.reweight.__class__ = Squashed
        block.token_mixer.complex_weights *= 60


def routing_in_sequence(model: Any) -> None:
    routing = model.stages[0][0].token_mixer.reweight
    model.stages[0][0].token_mixer.reweight = nn.Sequential(routing.fc1, routing.act, routing.fc2)


def with_biases(model: Any) -> None:
    for block in model.stages[1]:
        block.mlp.fc1.bias = nn.Parameter(torch.full((4 * 24,), 0.5))
        block.mlp.fc2.bias = nn.Parameter(torch.full((24,), 0.5))


STRUCTURES = (
    *(share_mlp, tie_weights, tie_buffers, share_mixer, share_norms),
    *(another_block, another_block_with_one_norm, another_routing, routing_in_sequence, with_biases),
)


@pytest.mark.parametrize("change", STRUCTURES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_other_structures_serve_the_same(change: Callable[[Any], None]) -> None:
    model, x = trained(depths=(2, 1, 1, 1)), images()
    plain = model(x)
    change(model)
    expected = model(x)
    if change is not routing_in_sequence:
        assert relative_error(expected, plain) > 1e-4
    assert relative_error(optimize_for_inference(model)(x), expected) < 1e-4


def test_biases_of_an_mlp_take_part_in_training() -> None:
    layer, x = Mlp(4, 8), torch.randn(3, 4)
    layer.fc1, layer.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
    assert relative_error(layer(x), layer.fc2(layer.act(layer.fc1(x)))) < 1e-6
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_derivatives_through_a_served_model() -> None:
    model, x = trained(), images().requires_grad_()
    served: Any = optimize_for_inference(model)
    gradient, expected = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (served.model, model))
    assert relative_error(gradient, expected) < 1e-3
    x = x.detach()
    tangent, expected = (torch.func.jvp(m, (x,), (x.roll(1, 3),))[1] for m in (served.model, model))
    assert relative_error(tangent, expected) < 1e-3


class Labelled(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        logits = scale * self.model(x)
        return {"logits": logits, "labels": logits.argmax(1), "sure": logits.amax(1) > 0}


def test_other_arguments_and_results_that_are_no_floats() -> None:
    model, x = Labelled(trained()), images()
    expected = model(x, scale=2.0)
    results = optimize_for_inference(model, torch.bfloat16)(x, scale=2.0)
    assert {name: t.dtype for name, t in results.items()} == {name: t.dtype for name, t in expected.items()}
    assert relative_error(results["logits"], expected["logits"]) < ERROR[torch.bfloat16]
    with pytest.raises(TypeError, match=r"x: expected floating-point images, got torch.uint8"):
        optimize_for_inference(trained(), torch.bfloat16)(images().to(torch.uint8))


def test_a_served_model_of_another_dtype_again() -> None:
    model, x = trained(), images()
    served = optimize_for_inference(model, torch.bfloat16).float()
    assert relative_error(served(x), model(x)) < ERROR[torch.bfloat16]


def test_per_sample_gradients_of_a_model() -> None:
    model, x = trained(), images(batch=3)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    expected = torch.autograd.grad(model(x[:1]).square().sum(), list(model.parameters()))
    for gradient, wanted in zip(each.values(), expected, strict=True):
        assert relative_error(gradient[0], wanted) < 1e-3
