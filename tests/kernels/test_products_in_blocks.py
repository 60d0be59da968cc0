"""Products without gradients: norm before, residual after, packed weights; and blocks that leave both to them."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from cases import DTYPES, Operators
from conftest import require_backend, require_compiler
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

import dfformer
from dfformer.models import layers
from dfformer.models.layers import PackedLinear, Scale
from dfformer_kernels import reference, use_backend
from dfformer_kernels.backends import cpu
from dfformer_kernels.backends.cpu import Norm, Residual
from dfformer_kernels.ops import inference, packing
from dfformer_kernels.ops import mlp as dense
from dfformer_kernels.ops.packing import keep_packed
from dfformer_kernels.tolerance import BOUND, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EPS = 1e-6
# Planes with more, fewer and exactly as many rows as a tile and a block of them; channels beside a panel's width.
SHAPES = [(2, 7, 7, 16), (1, 28, 28, 8), (3, 17, 19, 9), (1, 1, 1, 2), (1, 1, 127, 65), (2, 13, 1, 130), (0, 7, 7, 16)]
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=str)
ADDITIONS = pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uneven(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """What is normalised, with means over a plane that are not almost nothing."""
    return (normal(*shape, seed=0) + torch.arange(shape[-1]) % 3).to(dtype)


class Problem:
    """The tensors of a product (..., K) -> (..., N), and of an MLP (..., K) -> (..., K)."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, scaled: bool) -> None:
        K, N = shape[-1], 2 * shape[-1] + 1
        self.x = uneven(*shape, dtype=dtype)
        self.gamma: Any = normal(K, seed=1, dtype=dtype) if scaled else None
        self.weight: Any = (normal(N, K, seed=2) / K**0.5).to(dtype)
        self.bias = normal(N, seed=3, dtype=dtype) if scaled else None
        self.added = normal(*shape[:-1], N, seed=4, dtype=dtype)
        self.scale: Any = None
        self.own_scale: Tensor | None = None
        if scaled:
            self.scale, self.own_scale = normal(N, seed=5, dtype=dtype), normal(K, seed=6, dtype=dtype)
        self.weight2: Any = (normal(K, N, seed=7) / N**0.5).to(dtype)
        self.star_relu = (torch.tensor([0.9]), torch.tensor([0.3]))

    def norm(self) -> Norm:
        return Norm(self.gamma, EPS)

    def normalised(self) -> Tensor:
        gamma = None if self.gamma is None else self.gamma.double()
        return F.layer_norm(self.x.double(), self.x.shape[-1:], gamma, eps=EPS)


def residual(x: Tensor, scale: Tensor | None) -> Tensor:
    return x.double() if scale is None else x.double() * scale.double()


def run_product(p: Problem) -> Tensor:
    return inference.product(p.x, p.weight, p.bias, p.norm(), Residual(p.added, p.scale))


def define_product(p: Problem) -> Tensor:
    bias = None if p.bias is None else p.bias.double()
    return F.linear(p.normalised(), p.weight.double(), bias) + residual(p.added, p.scale)


def run_mlp(p: Problem) -> Tensor:
    return inference.mlp(p.x, p.weight, p.star_relu, p.weight2, None, p.norm(), p.own_scale)


def define_mlp(p: Problem) -> Tensor:
    h = reference.star_relu(F.linear(p.normalised(), p.weight.double()), *(t.double() for t in p.star_relu))
    return F.linear(h, p.weight2.double()) + residual(p.x, p.own_scale)


def run_mean(p: Problem) -> Tensor:
    return inference.norm_mean(p.x, p.norm())


def define_mean(p: Problem) -> Tensor:
    return p.normalised().mean(dim=(1, 2))


# The operator, its definition, and how many results are rounded to the dtype on the way, in units of its bound.
OPERATORS: dict[str, tuple[Callable[[Problem], Tensor], Callable[[Problem], Tensor], int]] = {
    "product": (run_product, define_product, 3),
    "mlp": (run_mlp, define_mlp, 5),
    "norm_mean": (run_mean, define_mean, 2),
}
ALL = pytest.mark.parametrize("name", OPERATORS)


def error_of(name: str, p: Problem, run: Callable[[Problem], Tensor] | None = None) -> float:
    given, define, units = OPERATORS[name]
    y, wanted = (run or given)(p), define(p)
    assert (y.shape, y.dtype) == (wanted.shape, p.x.dtype)
    return relative_error(y, wanted) / (units if p.x.dtype in (torch.bfloat16, torch.float16) else 1)


@ALL
@ALL_SHAPES
@ALL_DTYPES
@ADDITIONS
def test_results_are_within_the_bound(name: str, shape: tuple[int, ...], dtype: torch.dtype, scaled: bool) -> None:
    with torch.no_grad():
        assert error_of(name, Problem(shape, dtype, scaled)) <= BOUND[dtype]


@ALL
@ADDITIONS
def test_without_the_compiled_core(name: str, scaled: bool) -> None:
    with torch.no_grad(), use_backend("torch"):
        assert error_of(name, Problem((2, 7, 7, 16), torch.float32, scaled)) <= BOUND[torch.float32]


@pytest.mark.parametrize("rows", [(1, 7), (7, 7), (25, 40)], ids=str)
@ADDITIONS
@pytest.mark.parametrize("name", ["product", "mlp"])
def test_packed_weights(name: str, rows: tuple[int, int], scaled: bool) -> None:
    require_backend("cpu")

    def packed(p: Problem) -> Tensor:
        keep_packed(p.weight)
        keep_packed(p.weight2)
        return OPERATORS[name][0](p)

    p = Problem((2, *rows, 24), torch.float32, scaled)
    wanted = OPERATORS[name][1](p)
    assert relative_error(packed(p), wanted) <= BOUND[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 49, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_layer(dtype: torch.dtype, rows: int, with_bias: bool) -> None:
    x, weight, bias = (normal(*shape, seed=0, dtype=dtype) for shape in ((rows, 24), (40, 24), (40,)))
    layer = PackedLinear(weight, bias if with_bias else None)
    for _ in range(3):
        wanted = F.linear(x.double(), layer.weight.double(), bias.double() if with_bias else None)
        assert relative_error(layer(x), wanted) <= BOUND[dtype]
        layer.weight.mul_(2)  # and the layout that was kept is another weight's


@pytest.mark.parametrize("kept", [(True, False), (False, True)], ids=str)
def test_one_packed_weight_of_two(kept: tuple[bool, bool]) -> None:
    p = Problem((2, 7, 7, 16), torch.float32, True)
    for weight, keep in zip((p.weight, p.weight2), kept, strict=True):
        if keep:
            keep_packed(weight)
    with torch.no_grad():
        assert error_of("mlp", p) <= BOUND[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights_whose_data_is_set(dtype: torch.dtype) -> None:
    x, layer = normal(7, 24, seed=0, dtype=dtype), PackedLinear(normal(24, 24, seed=1, dtype=dtype))
    for _ in range(2):
        wanted = F.linear(x.double(), layer.weight.double())
        assert relative_error(layer(x), wanted) <= BOUND[dtype]
        layer.weight.data = layer.weight.data.t()  # the same memory, another weight


def test_packed_weights_have_gradients_of_their_products() -> None:
    x, weight = normal(7, 24, seed=0, dtype=torch.float32).requires_grad_(), normal(40, 24, seed=1, dtype=torch.float32)
    keep_packed(weight)
    dense.linear(x, weight).sum().backward()
    assert x.grad is not None
    assert relative_error(x.grad, weight.double().sum(0).expand(7, 24)) <= BOUND[torch.float32]


def test_packed_for_the_instruction_set_in_use() -> None:
    require_backend("cpu")
    core = cpu.core()
    p, active = Problem((2, 7, 7, 16), torch.float32, True), core.active_isa()
    keep_packed(p.weight)
    try:
        for isa in core.supported_isas():
            core.set_active_isa(isa)
            assert error_of("product", p) <= BOUND[torch.float32]
    finally:
        core.set_active_isa(active)


def test_layouts_die_with_their_weights() -> None:
    weight = normal(40, 24, seed=0, dtype=torch.float32)
    keep_packed(weight)
    dense.linear(normal(3, 24, seed=1, dtype=torch.float32), weight)
    before = len(packing._kept)
    del weight
    assert len(packing._kept) == before - 1


@ALL
def test_memory_layout_does_not_matter(name: str) -> None:
    p = Problem((2, 7, 9, 16), torch.float32, True)
    p.x, p.added = p.x.mT.contiguous().mT, p.added.transpose(1, 2).contiguous().transpose(1, 2)
    p.gamma, p.scale = (normal(2 * len(t), seed=1, dtype=torch.float32)[::2] for t in (p.gamma, p.scale))
    wanted = OPERATORS[name][1](p)
    assert not any(t.is_contiguous() for t in (p.x, p.added, p.gamma, p.scale))
    with torch.no_grad():
        assert relative_error(OPERATORS[name][0](p), wanted) <= BOUND[torch.float32]


@ALL
def test_same_bits_for_any_number_of_threads(name: str) -> None:
    p = Problem((2, 31, 30, 40), torch.float32, True)
    one = OPERATORS[name][0](p)
    for threads in (2, 7):
        torch.set_num_threads(threads)
        assert torch.equal(OPERATORS[name][0](p), one)
    torch.set_num_threads(1)


@ALL
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    p = Problem((3, 7, 7, 16), torch.float32, True)
    whole = OPERATORS[name][0](p)
    p.x, p.added = p.x[1:2], p.added[1:2]
    assert torch.equal(OPERATORS[name][0](p), whole[1:2])


def arguments(name: str) -> tuple[Any, ...]:
    p = Problem((2, 7, 7, 16), torch.float32, True)
    return {
        "norm_linear": (p.x, p.gamma, EPS, p.weight, p.bias, p.added, p.scale, None),
        "norm_mlp": (p.x, p.gamma, EPS, p.weight, *p.star_relu, p.weight2, None, p.own_scale, None),
        "norm_mean": (p.x, p.gamma, EPS, None),
    }[name]


REGISTERED = pytest.mark.parametrize("name", ["norm_linear", "norm_mlp", "norm_mean"])


@REGISTERED
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.dfformer, name).default, arguments(name))


@REGISTERED
def test_autocast_leaves_the_dtypes_given(name: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert getattr(torch.ops.dfformer, name)(*arguments(name)).dtype == torch.float32


BAD = [
    ("norm_linear", 0, torch.zeros(2, 15), "weight must be shape"),
    ("norm_linear", 1, torch.zeros(15), r"norm_weight must be shape \(16,\)"),
    ("norm_linear", 2, None, "norm_weight must be None where eps is, got a tensor"),
    ("norm_linear", 4, torch.zeros(15), r"bias must be shape \(33,\)"),
    ("norm_linear", 5, torch.zeros(2, 33), r"residual must be shape \(2, 7, 7, 33\)"),
    ("norm_linear", 5, None, "residual_scale must be None where residual is"),
    ("norm_linear", 6, torch.zeros(16), r"residual_scale must be shape \(33,\)"),
    ("norm_mlp", 3, torch.zeros(33, 15), r"weight1 must be shape \(N, 16\)"),
    ("norm_mlp", 4, torch.zeros(2), "scale must be one element"),
    ("norm_mlp", 6, torch.zeros(17, 33), r"weight2 must be shape \(16, 33\)"),
    ("norm_mlp", 7, torch.zeros(33), r"bias2 must be shape \(16,\)"),
    ("norm_mlp", 8, torch.zeros(16).double(), "residual_scale must be dtype float32"),
    ("norm_mean", 0, torch.zeros(2, 16), r"x must be shape \(B,H,W,C\)"),
    ("norm_mean", 0, torch.zeros(2, 7, 7, 16, dtype=torch.int64), "x must be dtype float32"),
    ("norm_mean", 1, torch.zeros(16, device="meta"), "norm_weight must be on cpu"),
]


@pytest.mark.parametrize(("name", "position", "bad", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_arguments(name: str, position: int, bad: Any, message: str) -> None:
    given = list(arguments(name))
    given[position] = bad
    with pytest.raises((ValueError, TypeError), match=f"{name}: {message}"):
        getattr(torch.ops.dfformer, name)(*given)


# Blocks


def small(**given: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "dfformer_s18", img_size=32, depths=(1, 1, 1, 1), dims=(16, 16, 24, 32), num_classes=7, **given
    ).eval()
    for module in model.modules():  # whose initial values would hide them
        if isinstance(module, nn.LayerNorm | Scale):
            nn.init.normal_(module.weight if isinstance(module, nn.LayerNorm) else module.scale, 1, 0.3)
    return model


def images() -> Tensor:
    return normal(2, 3, 32, 32, seed=1, dtype=torch.float32)


def fused(model: nn.Module) -> bool:
    with torch.no_grad(), Operators() as used:
        model(images())
    return {"dfformer::norm_linear", "dfformer::norm_mlp"} <= set(used.names)


def unfused(model: nn.Module) -> Tensor:
    """With gradients every module runs by itself."""
    return model(images()).detach()


@pytest.mark.parametrize("mixer", ["DynamicFilter", "GlobalFilter", "SepConv", "AFNO2D"])
def test_blocks_compute_the_same_either_way(mixer: str) -> None:
    model = small(token_mixers=getattr(layers, mixer))
    assert fused(model) == (mixer != "AFNO2D" and dense.for_core(images()))
    with torch.no_grad():
        assert relative_error(model(images()), unfused(model)) <= 10 * BOUND[torch.float32]


def hook(block: Any) -> None:
    for module in block.modules():
        module.register_forward_hook(lambda *_: None)


def replace_norms(block: Any) -> None:
    block.norm1, block.norm2 = nn.Identity(), nn.LayerNorm(block.norm2.normalized_shape)


def replace_norms_by_wider_ones(block: Any) -> None:
    W = block.token_mixer.size[1]
    for name in ("norm1", "norm2"):
        channels = getattr(block, name).normalized_shape
        setattr(block, name, nn.LayerNorm((W, *channels), elementwise_affine=False))


def replace_projections(block: Any) -> None:
    class Another(type(block.mlp.fc1)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block.mlp.fc1.__class__ = block.token_mixer.pwconv1.__class__ = Another


def replace_branches(block: Any) -> None:
    block.token_mixer, block.mlp = nn.Identity(), nn.Identity()


def drop(block: Any) -> None:
    block.drop_path1, block.drop_path2 = DropPath(0.5), DropPath(0.5)
    block.drop_path1.train()
    block.drop_path2.train()


def replace_scales(block: Any) -> None:
    block.res_scale1, block.res_scale2 = nn.Tanh(), nn.Tanh()


@pytest.mark.parametrize(
    "change",
    [
        hook,
        replace_norms,
        replace_norms_by_wider_ones,
        replace_projections,
        replace_branches,
        drop,
        replace_scales,
    ],
    ids=lambda change: change.__name__,
)
def test_what_was_changed_runs_by_itself(change: Callable[[Any], None]) -> None:
    require_backend("cpu")
    model = small()
    assert fused(model)
    for stage in model.get_submodule("stages").children():
        change(next(stage.children()))
    assert not fused(model)
    torch.manual_seed(0)
    wanted = unfused(model)
    torch.manual_seed(0)
    with torch.no_grad():
        assert relative_error(model(images()), wanted) <= 10 * BOUND[torch.float32]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_for_any_batch() -> None:
    require_compiler()
    model = small()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            x = normal(batch, 3, 32, 32, seed=batch, dtype=torch.float32)
            assert relative_error(compiled(x), model(x)) <= 10 * BOUND[torch.float32]


def test_optimised_in_inference_mode() -> None:
    with torch.inference_mode():
        model = small()
        served = dfformer.optimize_for_inference(model)
        first = served(images())
        assert torch.equal(served(images()), first)
        assert relative_error(first, model(images())) <= 10 * BOUND[torch.float32]


def test_weights_that_do_not_meet() -> None:
    require_backend("cpu")
    one = torch.ones(1)
    with pytest.raises(RuntimeError, match="the compiled core takes weights that meet"):
        cpu.mlp(torch.randn(3, 24), torch.randn(40, 24), one, one, torch.randn(24, 41))


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled_and_eager_models_pack_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    require_compiler()
    require_backend("cpu")
    packs: list[Tensor] = []

    def counted(weight: Tensor) -> Tensor:
        packs.append(weight)
        return pack(weight)

    pack = cpu._pack
    monkeypatch.setattr(cpu, "_pack", counted)
    served = dfformer.optimize_for_inference(small())
    compiled = torch.compile(served, fullgraph=True)
    first = compiled(images())
    assert len(packs) >= len([m for m in served.modules() if isinstance(m, PackedLinear)]) > 0
    packs.clear()
    assert torch.equal(compiled(images()), first)
    assert relative_error(served(images()), first) <= 10 * BOUND[torch.float32]
    assert not packs
