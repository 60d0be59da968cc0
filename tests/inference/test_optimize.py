"""Models made ready to serve: same results, original untouched, and everything a served model goes through."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from conftest import require_compiler
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune

import dfformer
from dfformer import StarReLU, optimize_for_inference
from dfformer.inference.packed import PackedLinear, PackedMlp
from dfformer.models.blocks import MetaFormerBlock
from dfformer.models.layers import Mlp, Scale
from dfformer_kernels.tolerance import relative_error

# As promised, relative to the logits; bfloat16 rounds every activation of every block.
ERROR = {None: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2}
KINDS = ("dfformer_s18", "cdfformer_s18", "gfformer_s18", "dfformer_s18_afno", "dfformer_s18_gelu")
HAS_ONEDNN = torch.backends.mkldnn.is_available()
EVERY_KIND = pytest.mark.parametrize("name", KINDS)
SHAPE: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40), "img_size": 64, "num_classes": 10}


def trained(name: str = "dfformer_s18", **kwargs: Any) -> nn.Module:
    """A small model whose norms, scales and activations are not those of initialisation."""
    torch.manual_seed(0)
    model = timm.create_model(name, **(SHAPE | kwargs)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | Scale | StarReLU):
                for parameter in module.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
            elif isinstance(module, nn.Linear):  # at initialisation, blocks hardly change what comes in
                module.weight *= 2
    return model


def images(H: int = 64, W: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, H, W, generator=torch.Generator().manual_seed(1))


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


def test_what_is_optimised() -> None:
    served = optimize_for_inference(trained(), img_size=96)
    layers = list(served.modules())
    assert not any(isinstance(m, nn.Linear) for m in layers)
    block: Any = served.model.get_submodule("stages.2.0")
    assert isinstance(block.mlp, PackedMlp)
    assert isinstance(block.token_mixer.pwconv1, PackedLinear)
    assert block.norm1.weight is None
    assert block.token_mixer.size == (6, 6)


def test_images_are_prepared_as_for_the_model() -> None:
    model = trained(pretrained_cfg_overlay={"mean": (0.5, 0.4, 0.3), "crop_pct": 0.9})
    config = resolve_model_data_config(optimize_for_inference(model))
    assert config == resolve_model_data_config(model)
    assert config["mean"] == (0.5, 0.4, 0.3)


def test_fixed_filters_refuse_another_size() -> None:
    served = optimize_for_inference(trained(), img_size=(96, 64))
    served(images(96, 64))
    with pytest.raises(ValueError, match=r"x: got a plane of .* this layer was built for size"):
        served(images(64, 64))


def test_filters_stay_float32_in_bfloat16() -> None:
    served = optimize_for_inference(trained(), torch.bfloat16)
    dtypes = {name.rpartition(".")[2]: t.dtype for name, t in served.state_dict().items()}
    assert dtypes.pop("complex_weights") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, "bfloat16"])
def test_unknown_dtype(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype: got .*, accepted are None, torch.float32, torch.bfloat16"):
        optimize_for_inference(trained(), dtype)


# What happens to a served model


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_copies_serve_the_same(dtype: torch.dtype | None, copied: Any) -> None:
    served, x = optimize_for_inference(trained(), dtype), images()
    y = served(x)  # packs weights, which the copy must do by itself
    assert torch.equal(copied(served)(x), y)


def scaled(served: nn.Module, write: Callable[[Tensor], object]) -> None:
    for t in served.state_dict().values():
        write(t)


def broadcast_from_another(t: Tensor) -> None:
    """What a collective operation does on a process that receives: it writes past autograd."""
    t.data.copy_(t * 1.5)


def write_by_numpy(t: Tensor) -> None:
    values = t.numpy()
    values *= 1.5


def packed(served: nn.Module, name: str) -> PackedLinear:
    layer = served.get_submodule(name)
    assert isinstance(layer, PackedLinear)
    return layer


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "in_place": lambda served: scaled(served, lambda t: t.mul_(1.5)),
    "by_data": lambda served: scaled(served, lambda t: t.data.mul_(1.5)),
    "by_collective": lambda served: scaled(served, broadcast_from_another),
    "by_numpy": lambda served: scaled(served, write_by_numpy),
    "of_one_layer": lambda served: packed(served, "model.stages.2.0.mlp.fc1").weight.data.mul_(1.5),
    "load_state_dict": lambda served: served.load_state_dict({k: 1.5 * t for k, t in served.state_dict().items()}),
}


@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_weights_that_are_written_to_are_what_is_multiplied_by(write: str) -> None:
    served, x = optimize_for_inference(trained()), images()
    before = served(x)
    WRITES[write](served)
    after = served(x)
    assert relative_error(after, before) > 1e-3
    assert relative_error(copy.deepcopy(served)(x), after) < 1e-5  # which packs anew


@torch.no_grad()
def test_weights_are_loaded_and_packed() -> None:
    other, x = optimize_for_inference(trained()), images()
    state = {name: 1.5 * t for name, t in other.state_dict().items()}
    other.load_state_dict(state)
    served = optimize_for_inference(trained())
    served.load_state_dict(state)
    assert all(m._packed is not None for m in served.modules() if isinstance(m, PackedLinear)) or not HAS_ONEDNN
    assert relative_error(served(x), other(x)) < 1e-5


def test_a_state_dict_that_does_not_fit_is_refused() -> None:
    served = optimize_for_inference(trained())
    name = "model.stages.2.0.mlp.fc1.weight"
    state = served.state_dict()
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}: got .2, 2., accepted is"):
        served.load_state_dict({**state, name: torch.ones(2, 2)})
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        served.load_state_dict({key: t for key, t in state.items() if key != name})


# What lives in a module is honoured


class Adapter(nn.Module):
    """What adapters are: a module around the layer, with its weight's name."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        self.weight = base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


def subclassed(owner: nn.Module, name: str) -> None:
    getattr(owner, name).__class__ = Subclass


def patched(owner: nn.Module, name: str) -> None:
    layer = getattr(owner, name)
    forward = layer.forward
    layer.forward = lambda x: forward(x) + forward(x).square()


CONTENTS: dict[str, Callable[[nn.Module, str], object]] = {
    "adapter": lambda owner, name: setattr(owner, name, Adapter(getattr(owner, name))),
    "hook": lambda owner, name: getattr(owner, name).register_forward_hook(lambda m, i, y: y + y.square()),
    "pre_hook": lambda owner, name: getattr(owner, name).register_forward_pre_hook(
        lambda m, i: (i[0] + i[0].square(),)
    ),
    "prune": lambda owner, name: prune.l1_unstructured(getattr(owner, name), "weight", 0.5),
    "weight_norm": lambda owner, name: parametrizations.weight_norm(
        getattr(owner, name)
    ).parametrizations.weight.original0.data.mul_(1.5),
    "old_weight_norm": lambda owner, name: nn.utils.weight_norm(getattr(owner, name)).weight_g.data.mul_(1.5),
    "parametrization": lambda owner, name: parametrize.register_parametrization(
        getattr(owner, name), "weight", Doubled()
    ),
    "subclass": subclassed,
    "patched": patched,
}
PLACES = ("mlp.fc1", "mlp.fc2", "token_mixer.pwconv1", "token_mixer.pwconv2", "token_mixer.reweight.fc1")


def responsive() -> nn.Module:
    """A model whose logits follow each of its layers."""
    model = trained()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("stages.1"):
                parameter.mul_(20 if "complex_weights" in name else 4 if parameter.ndim == 2 else 1)
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("content", CONTENTS)
def test_what_lives_in_a_layer_is_honoured(content: str, place: str) -> None:
    model, x = responsive(), images()
    plain = model(x)
    owner, _, name = place.rpartition(".")
    for block in model.get_submodule("stages.1").children():
        CONTENTS[content](block.get_submodule(owner), name)
    with_gradients = model(x)
    assert relative_error(with_gradients, plain) > 1e-4
    with torch.no_grad():
        assert relative_error(model(x), with_gradients) < 1e-5
    served = optimize_for_inference(model)
    assert relative_error(served(x), with_gradients) < 1e-4
    assert any(entry.name.startswith("stages.1.0") for entry in served.left_alone)


MODULES = (
    "stages.1.0.norm1",
    "stages.1.0.mlp",
    "stages.1.0.mlp.act",
    "stages.2.0.res_scale1",
    "stages.1.0",
    "head.fc1",
)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("content", ["hook", "pre_hook", "patched"])
def test_what_lives_in_any_module_is_honoured(content: str, name: str) -> None:
    model, x = responsive(), images()
    plain = model(x)
    owner, _, child = name.rpartition(".")
    CONTENTS[content](model.get_submodule(owner), child)
    with_gradients = model(x)
    assert relative_error(with_gradients, plain) > 1e-4
    with torch.no_grad():
        assert relative_error(model(x), with_gradients) < 1e-5
    assert relative_error(optimize_for_inference(model)(x), with_gradients) < 1e-4


def test_a_forward_patched_on_the_class_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = trained(), images()
    plain, forward = model(x), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * forward(self, x))
    patched = model(x)
    assert relative_error(patched, plain) > 1e-3
    assert relative_error(optimize_for_inference(model)(x), patched) < 1e-4


def test_global_hooks_see_every_module() -> None:
    model, x = trained(), images()
    seen: dict[bool, set[nn.Module]] = {True: set(), False: set()}
    for gradients, modules in seen.items():
        handle = register_module_forward_hook(lambda module, args, y, modules=modules: modules.add(module))
        try:
            with torch.set_grad_enabled(gradients):
                model(x)
        finally:
            handle.remove()
    assert seen[True] == seen[False] >= {m for m in model.modules() if isinstance(m, nn.Linear | StarReLU)}


@EVERY_KIND
def test_export_with_any_batch(name: str) -> None:
    served = optimize_for_inference(trained(name), img_size=64)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(served, (images(),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 5):
        x = images(batch=size)
        assert relative_error(program(x), served(x)) < 1e-5


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


def share_mixer(model: Any) -> None:
    model.stages[0][1].token_mixer = model.stages[0][0].token_mixer


class ParallelBlock(MetaFormerBlock):
    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        return x + self.token_mixer(n) + self.mlp(n)


def another_block(model: Any) -> None:
    model.stages[0][0].__class__ = ParallelBlock


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


STRUCTURES = (share_mlp, tie_weights, share_mixer, another_block, another_routing, routing_in_sequence, with_biases)


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
    with pytest.raises(TypeError, match=r"x: got torch.uint8, accepted are floating-point images"):
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
