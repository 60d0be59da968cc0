"""Other people's tools on these models, as on timm's: adapters, quantisers, offloaders, counters."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.metaformer import MetaFormer, SepConv
from torch import Tensor, nn

import dfformer
from dfformer_kernels.tolerance import relative_error

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # what these packages do on import, and what torch says of it
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::ResourceWarning"),
]
NAMES = pytest.mark.parametrize("name", ["dfformer_s18", "cdfformer_s18", "gfformer_s18", "convformer_s18"])
SHAPE: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 5}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "convformer_s18":
        model: nn.Module = MetaFormer(**SHAPE, token_mixers=SepConv).eval()
    else:
        model = timm.create_model(name, **SHAPE, img_size=32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that each layer is seen in the logits
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def needs(package: str) -> Any:
    return pytest.importorskip(package, reason=f"{package} is not installed", exc_type=ImportError)


def adapted(name: str, config: Callable[[Any], Any]) -> nn.Module:
    peft = needs("peft")
    model = peft.get_peft_model(make(name), config(peft)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in ("lora_B", "ia3_l")):
                parameter.add_(0.5)  # as after training: fresh adapters change nothing
    return model


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "lora": lambda peft: peft.LoraConfig(r=2, target_modules=r".*(pwconv1|pwconv2|fc1|fc2)"),
    "dora": lambda peft: peft.LoraConfig(r=2, target_modules=r".*(pwconv1|pwconv2|fc1|fc2)", use_dora=True),
    "ia3": lambda peft: peft.IA3Config(target_modules=r".*(pwconv1|pwconv2|mlp.fc1)", feedforward_modules=r".*mlp.fc1"),
}


@NAMES
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_are_part_of_the_model(adapter: str, name: str) -> None:
    model, x = adapted(name, ADAPTERS[adapter]), images()
    y = model(x)
    with model.disable_adapter():  # type: ignore[operator]
        assert relative_error(y, model(x)) > 1e-3
    with torch.no_grad():
        assert relative_error(model(x), y) < 1e-5
    merged = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator] # into the weights, by the tool itself
    assert relative_error(merged(x), y) < 1e-4
    if name != "convformer_s18":
        assert relative_error(dfformer.optimize_for_inference(model)(x), y) < 1e-4
    y.square().sum().backward()
    trained = [p for n, p in model.named_parameters() if p.requires_grad]
    moved = [p.grad is not None and bool(p.grad.any()) for p in trained]
    assert sum(moved) > 0.8 * len(moved) > 0  # a few see nothing but zeros of StarReLU


@NAMES
def test_offloaded_weights(name: str) -> None:
    accelerate = needs("accelerate")
    model, x = make(name), images()
    expected = model(x).detach()
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert relative_error(offloaded(x), expected) < 1e-5


@NAMES
def test_int8_weights(name: str) -> None:
    quantization = needs("torchao.quantization")
    model, x = make(name), images()
    expected = model(x).detach()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert 0 < relative_error(model(x), expected) < 0.1
    if name != "convformer_s18":
        assert relative_error(dfformer.optimize_for_inference(model)(x), model(x)) < 1e-3


@NAMES
def test_counted_layers(name: str) -> None:
    """Every linear layer and convolution counts, as for timm's model."""
    thop = needs("thop")
    model = make(name)
    seen: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        seen[module] = seen.get(module, 0) + 1

    macs, _ = thop.profile(model, inputs=(images(),), verbose=False)
    handles = [m.register_forward_hook(note) for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d)]
    model(images())
    for handle in handles:
        handle.remove()
    assert len(seen) == len(handles) > 0
    assert macs > 0


@pytest.mark.parametrize("optimised", [False, True])
def test_dynamic_quantisation_finds_linear_layers(optimised: bool) -> None:
    model, x = make("dfformer_s18"), images()
    expected = model(x).detach()
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)} == {nn.Linear, nn.Conv2d}
    quantised: nn.Module = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert not any(type(m) is nn.Linear for m in quantised.modules())
    run = dfformer.optimize_for_inference(quantised) if optimised else quantised
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert 0 < relative_error(run(x), expected) < 0.1
