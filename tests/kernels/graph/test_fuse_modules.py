"""`fuse` on modules: every way of writing the step is found, nothing else is touched, and all else stays as it was."""

import copy
import io
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import different_copies as different
import filter_chains as chains
import filter_copies as copies
import pytest
import timm
import torch
from filter_chains import OTHER, SAME, Layer, Network, images, network
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dfformer.utils.eager_baseline import eager_baseline
from dfformer_kernels import fuse
from dfformer_kernels.graph import compare, trace
from dfformer_kernels.tolerance import gradient_errors, relative_error


def results(module: Any, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of the input and the parameters, with the same dropout."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = module(x)
    outputs = list(y) if isinstance(y, tuple) else [y]
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves, allow_unused=True)
    return outputs, [g for g in gradients if g is not None]


def assert_same(ours: Any, theirs: nn.Module, x: Tensor) -> None:
    (outputs, gradients), (expected, expected_gradients) = results(ours, x), results(theirs, x)
    assert max(relative_error(a, b) for a, b in zip(outputs, expected, strict=True)) < 2e-6
    assert max(gradient_errors(gradients, expected_gradients)) < 1e-5


@pytest.mark.parametrize("name", SAME)
def test_every_way_of_writing_the_step_is_fused(name: str) -> None:
    step, channels_first, mixed = SAME[name]
    model = network(step, channels_first, chains.FILTERS if mixed else chains.C)
    original = copy.deepcopy(model)
    report = fuse(model, images(channels_first))
    operator = "dynamic_filter" if mixed else "global_filter"
    assert [(f.where, f.operator, f.reason) for f in report.found] == [("layers.0 (Layer)", operator, "")]
    code = str(model.layers[0].code)
    assert "_fft.fft_i" not in code
    assert operator in code
    assert list(model.state_dict()) == list(original.state_dict())
    for training, batch in ((False, 1), (True, 3)):
        assert_same(model.train(training), original.train(training), images(channels_first, batch))


@pytest.mark.parametrize("name", OTHER)
def test_what_computes_something_else_is_left_alone_with_its_reason(name: str) -> None:
    step, reason = OTHER[name]
    model = network(step)
    report = fuse(model, images())
    assert report.found
    assert not report.fused, f"{name}: {report}"
    assert type(model.layers[0]) is Layer
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(str(report))


PUBLIC: dict[str, tuple[Any, list[Any], list[str]]] = {
    "authors": (lambda: copies.Authors(6), [(8, 8, 6)], ["dynamic_filter"]),
    "channels-first": (lambda: copies.ChannelsFirst(6, (6, 9)), [(6, 6, 9)], ["dynamic_filter"]),
    "two maps": (lambda: copies.MaxPoolFusion(6), [(6, 8, 8), (6, 8, 8)], ["dynamic_filter"]),
    "routed by a vector": (lambda: copies.Conditioned(6), [(6, 8, 8), (5,)], ["dynamic_filter"]),
    "attention routing": (lambda: copies.AttentionRouting(6), [(6, 8, 8)], ["dynamic_filter"]),
    "autocast off inside": (lambda: copies.SqueezeRouting(6), [(6, 8, 8)], ["dynamic_filter"]),
    "tokens": (lambda: copies.Tokens(6), [(64, 6)], ["global_filter"]),
    "tokens and numbers": (lambda: copies.TokensOfPlane(6), [(64, 6), 8, 8], ["global_filter"]),
    "one in another": (lambda: copies.Nested(6), [(6, 8, 8)], ["dynamic_filter", "dynamic_filter", "global_filter"]),
    "routed by the spectrum": (lambda: copies.SummedSpectrum(6), [(6, 8, 8)], ["dynamic_filter"]),
    "step of three modules": (lambda: Apart(6), [(8, 8, 6)], ["global_filter"]),
}

DIFFERENT: dict[str, tuple[Any, str]] = {
    "full spectrum": (lambda: different.FullSpectrum(6), "takes a full spectrum"),
    "no gradient": (lambda: different.ConstantRouting(6), "gradient of reweight"),
    "by batch": (lambda: different.BatchOfTwo(6), "computes with other numbers"),
    "by value": (lambda: different.ByValue(6), "branches on the values"),
    "noise in training": (lambda: different.NoiseInTraining(6), "in training its forward does something else"),
    "functional dropout": (lambda: different.FunctionalDropout(6), "in training its forward does something else"),
    "stores results": (lambda: different.SavesRouting(6), "changes self.last_routing"),
}


class Apart(nn.Module):
    """Each of the three parts of the step is a module."""

    class There(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft2(x, dim=(1, 2))

    class Times(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 5, dim, dtype=torch.complex64))

        def forward(self, X: Tensor) -> Tensor:
            return X * self.weight

    class Back(nn.Module):
        def forward(self, X: Tensor) -> Tensor:
            return torch.fft.irfft2(X, dim=(1, 2))

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.steps = nn.Sequential(self.There(), self.Times(dim), self.Back())

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(x)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any) -> Any:
        return self.layer(*inputs)


def given(shapes: list[Any], batch: int) -> list[Any]:
    return [torch.randn(batch, *shape) if isinstance(shape, tuple) else shape for shape in shapes]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_forms(name: str) -> None:
    make, shapes, operators = PUBLIC[name]
    model = Holder(make().eval())
    original = copy.deepcopy(model)
    report = fuse(model, *given(shapes, 2))
    assert [f.operator for f in report.found] == operators
    inputs = given(shapes, 3)
    assert relative_error(model(*inputs), original(*inputs)) < 2e-6


@pytest.mark.parametrize("name", DIFFERENT)
def test_forwards_that_no_graph_shows_are_left_alone(name: str) -> None:
    make, reason = DIFFERENT[name]
    model = Holder(make())
    x = torch.randn(2, 6, 8, 8) if isinstance(model.layer, copies.ChannelsFirst) else torch.randn(2, 8, 8, 6)
    report = fuse(model, x.transpose(1, 3) if name == "full spectrum" else x)
    assert not report.fused
    assert reason in str(report)
    assert not type(model.layer).__name__.startswith("Fused")


def test_other_shapes_run_the_original() -> None:
    layer, x = copies.Authors(6), torch.randn(2, 12, 10, 6)
    original = copy.deepcopy(layer)
    fuse(layer, torch.randn(2, 8, 8, 6))
    assert torch.equal(layer(x), original(x))


def test_one_call_for_each_size() -> None:
    layer = copies.Authors(6).eval()
    original = copy.deepcopy(layer)
    sizes = [(8, 8), (12, 10), (5, 7)]
    for size in sizes:
        assert len(fuse(layer, torch.randn(2, *size, 6)).fused) == 1
    for size in sizes:
        x = torch.randn(1, *size, 6)
        y, expected = layer(x), original(x)
        assert relative_error(y, expected) < 2e-6
        assert not torch.equal(y, expected)  # the operator's rounding


def test_hooks_that_a_graph_would_not_call() -> None:
    model = Holder(Apart(6))
    model.get_submodule("layer.steps.1").register_forward_hook(lambda module, inputs, y: None)
    report = fuse(model, torch.randn(2, 8, 8, 6))
    assert report.left_alone[0].reason == "1 has hooks, which the graph would not call"


@pytest.mark.parametrize(
    ("make", "owner", "weight", "name"),
    [(copies.Authors, "layer", "complex_weights", "it"), (Apart, "layer.steps.1", "weight", "1")],
)
def test_parametrisations_stay_removable(make: Any, owner: str, weight: str, name: str) -> None:
    model, x = Holder(make(6)), torch.randn(2, 8, 8, 6)
    module = model.get_submodule(owner)
    parametrize.register_parametrization(module, weight, Doubled())
    expected, report = model(x), fuse(model, x)
    reason = f"{name} has parametrisations; removing them later would not update the rewritten graph"
    assert report.left_alone[0].reason == reason
    parametrize.remove_parametrizations(module, weight)
    assert torch.equal(model(x), expected)


def test_names_and_defaults_of_inputs() -> None:
    layer = copies.Tokens(6)
    original = copy.deepcopy(layer)
    report = fuse(layer, x=torch.randn(1, 64, 6))
    x = torch.randn(4, 64, 6)
    assert len(report.fused) == 1
    assert not torch.equal(layer(x=x), original(x))
    assert torch.equal(layer(x, (8, 8)), original(x, (8, 8)))  # another second input: the original
    with pytest.raises(TypeError, match="unexpected keyword"):
        layer(x, size=8)


def test_state_modes_copies_and_hooks_stay() -> None:
    model = network(SAME["einsum"][0])
    seen: list[Any] = []
    model.layers[0].register_forward_hook(lambda module, inputs, y: seen.append(y.shape))
    model.train()
    state = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    fuse(model, images())
    assert model.layers[0].training
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    seen.clear()
    copied, plain = copy.deepcopy(model), network(SAME["einsum"][0])
    plain.load_state_dict(model.state_dict())
    x = images(batch=3)
    assert type(copied.layers[0]) is type(model.layers[0])
    assert relative_error(copied.eval()(x), plain.eval()(x)) < 2e-6
    assert seen == [x.shape]


def test_a_fused_model_is_pickled_and_saved_whole() -> None:
    layer: Any = copies.Authors(6).eval()
    original = copy.deepcopy(layer)
    for size in ((8, 8), (12, 10)):
        fuse(layer, torch.randn(2, *size, 6))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert type(loaded) is type(layer)
        assert loaded.code.count("dynamic_filter(") == 2
        for size in ((8, 8), (12, 10)):
            x = torch.randn(1, *size, 6)
            assert torch.equal(loaded(x), layer(x))
            assert not torch.equal(loaded(x), original(x))  # the operator's rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = network(SAME["pairs"][0]).eval()
    expected = copy.deepcopy(model).double()
    fuse(model, images())
    x = images().to(dtype)
    if dtype == torch.float64:
        assert relative_error(model.double()(x), expected(x)) < 1e-13
    else:
        with torch.autocast("cpu", dtype=dtype):
            assert relative_error(model(x), expected(x.double())) < 2e-2


def test_a_fused_model_compiles_and_trains_with_any_batch() -> None:
    model = network(SAME["matrix product"][0]).eval()
    original = copy.deepcopy(model)
    fuse(model, images())
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for batch in (2, 3, 5):
        assert_same(compiled, original, images(batch=batch))


def test_whole_models() -> None:
    model = timm.create_model("dfformer_s18", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), img_size=32, num_classes=3)
    model = eager_baseline(model).eval()
    for stage, size in zip(model.stages, (8, 4, 2, 1), strict=True):
        stage[0].token_mixer = copies.Authors(stage[0].token_mixer.pwconv1.in_features, size)
    original, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    report = fuse(model, x)
    assert [(f.where, f.operator) for f in report.found] == [
        (f"stages.{i}.0.token_mixer (Authors)", "dynamic_filter") for i in range(4)
    ]
    mixer, same = model.stages[1][0].token_mixer, original.stages[1][0].token_mixer
    x = torch.randn(3, 4, 4, 8)
    assert relative_error(mixer(x), same(x)) < 2e-6


def test_several_layers_and_their_report() -> None:
    model = Network(Layer(SAME["einsum"][0]), Layer(OTHER["conjugated spectrum"][0]), Layer(SAME["in place"][0]))
    report = fuse(model, images())
    assert str(report).splitlines() == [
        "fused 2 of 3",
        "layers.0 (Layer): is now dynamic_filter",
        "layers.1 (Layer): left alone: conj lies between rfft2 and irfft2",
        "layers.2 (Layer): is now dynamic_filter",
    ]
    assert len(report.fused) == 2
    assert [f.where for f in report.left_alone] == ["layers.1 (Layer)"]
    assert str(fuse(nn.Linear(2, 2), torch.ones(2))).startswith("nothing to fuse")


class Gains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 5, 6, 2))

    def step(self, x: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x, dim=(1, 2)) * torch.view_as_complex(self.weight), dim=(1, 2))

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        y = self.step(x)
        for i in range(len(given)):
            y = y * given[i]
        return y


class Masked(Gains):
    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        y = self.step(x)
        return y * given if given.is_floating_point() else y.masked_fill(given, 0)


def test_a_mask_of_another_kind_runs_the_original() -> None:
    layer, x, mask = Masked(), torch.randn(2, 8, 8, 6), torch.rand(2, 8, 8, 1)
    original = copy.deepcopy(layer)
    assert fuse(layer, x, mask).fused
    for m in (mask, mask.bfloat16(), mask > 0.5):
        assert relative_error(layer(x, m), original(x, m)) < 2e-6


def test_only_the_batch_may_have_another_length() -> None:
    layer, x = Gains(), torch.randn(2, 8, 8, 6)
    original = copy.deepcopy(layer)
    assert fuse(layer, x, torch.ones(5)).fused
    for gains in (torch.full((5,), 0.5), torch.full((7,), 0.5), torch.full((3,), 0.5)):
        assert relative_error(layer(x, gains), original(x, gains)) < 2e-6


class DroppedByPython(copies.Authors):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return x if self.training and random.random() < 0.01 else y


def test_numbers_that_python_draws_are_not_lost() -> None:
    random.seed(0)
    state = random.getstate()
    report = fuse(DroppedByPython(6), torch.randn(2, 8, 8, 6))
    assert "use of random numbers" in str(report.left_alone)
    assert random.getstate() == state


def test_seeds_of_unused_gpus_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps the last one for the first use of a GPU."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(123)
    assert fuse(copies.Authors(6), torch.randn(2, 8, 8, 6)).fused
    assert seeds == [123]


def test_other_threads_may_run_modules_and_wait_to_fuse() -> None:
    other = nn.Linear(2, 2)
    free: list[bool] = []

    def is_free() -> bool:
        if acquired := trace.ONE_AT_A_TIME.acquire(blocking=False):
            trace.ONE_AT_A_TIME.release()
        return acquired

    class Beside(copies.Authors):
        def forward(self, x: Tensor) -> Tensor:
            pool.submit(other, torch.ones(2)).result()
            free.append(pool.submit(is_free).result())
            return super().forward(x)

    with ThreadPoolExecutor(1) as pool:
        assert fuse(Beside(6), torch.randn(2, 8, 8, 6)).fused
    assert free[0]  # the first call shows what the model calls
    assert set(free[1:]) == {False}


def test_refusals() -> None:
    with pytest.raises(TypeError, match="program: expected a module or an ExportedProgram, got function"):
        fuse(lambda x: x)  # type: ignore[arg-type]
    layer = copies.Authors(6)
    layer.forward = layer.forward  # type: ignore[method-assign]
    assert "its forward is not that of its class" in str(fuse(Holder(layer), torch.randn(2, 8, 8, 6)))


def test_a_gradient_that_only_one_module_has_is_named() -> None:
    x = torch.zeros(2)
    assert compare.difference({"gradient of a": x}, {}) == "its gradient of a exists, ours does not"
    assert compare.difference({}, {"gradient of a": x}) == "its gradient of a does not exist, ours does"
