"""Swapping look-alikes of the authors' layers in somebody else's model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfformer import DynamicFilter, GlobalFilter, StarReLU, replace_dynamic_filters
from dfformer_kernels.tolerance import relative_error


class Star(nn.Module):
    """A StarReLU under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.full((1,), 0.9)), nn.Parameter(torch.full((1,), -0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x) ** 2 + self.bias


class Affine(Star):
    """The same parameters, another function."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.bias


class Routing(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(dim, hidden, bias=False), Star()
        self.drop, self.fc2 = nn.Dropout(0.5), nn.Linear(hidden, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))


class FrequencyMixer(nn.Module):
    """Somebody's copy of the dynamic (routed) or global filter, in plain torch."""

    def __init__(self, dim: int, plane: tuple[int, int], act: type[nn.Module], routed: bool, gain: float = 1.0) -> None:
        super().__init__()
        H, W = plane
        self.F, self.gain = 4 if routed else 2 * dim, gain
        self.pwconv1, self.act1 = nn.Linear(dim, 2 * dim, bias=False), act()
        self.complex_weights = nn.Parameter(torch.randn(H, W // 2 + 1, self.F, 2) * 0.1)
        self.act2, self.pwconv2 = nn.Identity(), nn.Linear(2 * dim, dim, bias=False)
        if routed:
            self.reweight = Routing(dim, dim // 4, self.F * 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        weights = torch.view_as_complex(self.complex_weights)
        if hasattr(self, "reweight"):
            routing = self.reweight(x.mean(dim=(1, 2))).view(B, self.F, -1).softmax(dim=1)
            weights = torch.einsum("bfc,hkf->bhkc", routing.to(weights.dtype), weights)
        spectrum = torch.fft.rfft2(self.act1(self.pwconv1(x)), dim=(1, 2), norm="ortho")
        x = torch.fft.irfft2(spectrum * weights * self.gain, s=(H, W), dim=(1, 2), norm="ortho")
        return self.pwconv2(self.act2(x))


class SomebodysModel(nn.Module):
    def __init__(self, *mixers: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({f"block{i}": nn.Sequential(nn.LayerNorm(16), m) for i, m in enumerate(mixers)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = x + block(x)
        return x

    def layer(self, block: int, index: int = 1) -> Any:
        """A block's norm (0) or mixer (1)."""
        return self.get_submodule(f"blocks.block{block}.{index}")


MIXERS: dict[str, Callable[[], FrequencyMixer]] = {
    "dynamic": lambda: FrequencyMixer(16, (8, 8), Star, routed=True),
    "dynamic-odd-rectangular": lambda: FrequencyMixer(16, (8, 7), Star, routed=True),
    "dynamic-gelu": lambda: FrequencyMixer(16, (8, 8), nn.GELU, routed=True),
    "global": lambda: FrequencyMixer(16, (8, 8), Star, routed=False),
}


def outputs_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.eval()
    x = x.detach().requires_grad_()
    parameters = [p for _, p in sorted(model.named_parameters())]
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


@pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS.keys())
def test_swapped_model_agrees_and_shares_parameters(make: Callable[[], FrequencyMixer]) -> None:
    torch.manual_seed(0)
    model = SomebodysModel(make(), make())
    plane = (8, 2 * (model.layer(0).complex_weights.shape[1] - 1))
    x = torch.randn(2, *plane, 16)
    if make is MIXERS["dynamic-odd-rectangular"]:
        x = x[:, :, :7]  # the same K, an odd width
    before = outputs_and_gradients(model, x)
    names = dict(model.named_parameters())
    replaced = replace_dynamic_filters(model)
    assert [(r.name, r.refusal) for r in replaced] == [("blocks.block0.1", ""), ("blocks.block1.1", "")]
    kind = GlobalFilter if make is MIXERS["global"] else DynamicFilter
    assert all(type(model.layer(i)) is kind for i in (0, 1))
    after = dict(model.named_parameters())
    assert after.keys() == names.keys()
    assert all(after[name] is names[name] for name in names)
    for actual, expected in zip(outputs_and_gradients(model, x), before, strict=True):
        assert relative_error(actual, expected) < 1e-5
    assert replace_dynamic_filters(model) == [], "nothing is left to swap"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_models_are_swapped_too(dtype: torch.dtype) -> None:
    model = SomebodysModel(MIXERS["dynamic"]()).to(dtype)
    assert [r.refusal for r in replace_dynamic_filters(model)] == [""]
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(1, 8, 8, 16).to(dtype)).dtype == dtype


def test_star_relu_is_fused_only_if_it_is_one() -> None:
    model = SomebodysModel(MIXERS["dynamic"](), FrequencyMixer(16, (8, 8), Affine, routed=True))
    assert [r.refusal for r in replace_dynamic_filters(model)] == ["", ""]
    assert [type(model.layer(i).act1) for i in (0, 1)] == [StarReLU, Affine]


def test_training_mode_is_kept() -> None:
    model = SomebodysModel(MIXERS["dynamic"]()).train()
    model.layer(0, 0).eval()
    replace_dynamic_filters(model)
    assert model.layer(0).training
    assert model.layer(0).reweight.drop.training
    assert not model.layer(0, 0).training


def test_another_formula_with_the_same_parameters_is_left_alone() -> None:
    model = SomebodysModel(FrequencyMixer(16, (8, 8), Star, routed=True, gain=1.01))
    [outcome] = replace_dynamic_filters(model)
    assert "differs from ours" in outcome.refusal
    assert "left alone" in str(outcome)
    assert type(model.layer(0)) is FrequencyMixer


def test_hooked_layers_are_left_alone() -> None:
    model = SomebodysModel(MIXERS["dynamic"]())
    model.layer(0).register_forward_hook(lambda module, inputs, output: None)
    [outcome] = replace_dynamic_filters(model)
    assert "hooks" in outcome.refusal


class NotAFilter(nn.Module):
    """Parameters of these names, of shapes no filter has."""

    def __init__(self) -> None:
        super().__init__()
        self.complex_weights = nn.Parameter(torch.zeros(4, 3, 5, 2))
        self.pwconv1, self.pwconv2 = nn.Linear(16, 32), nn.Linear(32, 16)


def test_unrelated_modules_are_not_found() -> None:
    assert replace_dynamic_filters(nn.Sequential(NotAFilter(), nn.Linear(2, 2), DynamicFilter(8, size=4))) == []


def test_a_bare_layer_has_no_parent() -> None:
    with pytest.raises(ValueError, match="load its state dict"):
        replace_dynamic_filters(MIXERS["dynamic"]())
