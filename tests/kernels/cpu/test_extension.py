"""The compiled core: every instruction set of this machine, range checks, threads, forks, and the object code."""

import math
import os
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import DTYPES, assert_within_bound
from conftest import require
from native_core import BITS, CODES, ISAS, X86, Guarded, assert_releases_the_gil, run_script
from paths import ROOT
from torch import Tensor

from dfformer_kernels import reference, star_relu

CSRC = ROOT / "csrc"
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run_forward(core: ModuleType, x: Tensor, scale: float, bias: float, threads: int = 1) -> Tensor:
    """``star_relu`` of the core; NaN lies around x and a sentinel around y."""
    given, result = Guarded(x, math.nan), Guarded(torch.full_like(x, math.nan), 123.0)
    core.star_relu(given.address, result.address, given.n, CODES[x.dtype], scale, bias, threads)
    result.assert_margins_untouched()
    return result.inside


def run_backward(
    core: ModuleType, grad_y: Tensor, x: Tensor, scale: float, threads: int = 1
) -> tuple[Tensor, float, float]:
    """``star_relu_backward`` of the core, in the same surroundings."""
    given, grad = Guarded(x, math.nan), Guarded(grad_y, math.nan)
    result = Guarded(torch.full_like(x, math.nan), 123.0)
    sums = core.star_relu_backward(grad.address, given.address, result.address, given.n, CODES[x.dtype], scale, threads)
    result.assert_margins_untouched()
    return result.inside, *sums


def same_bits(actual: Tensor, wanted: Tensor) -> bool:
    """The same values to the sign of a zero, any NaN being as good as another."""
    bits = BITS[actual.dtype]
    return torch.equal(actual.isnan(), wanted.isnan()) and torch.equal(
        actual.nan_to_num(0, math.inf, -math.inf).view(bits), wanted.nan_to_num(0, math.inf, -math.inf).view(bits)
    )


# Instruction sets

# Whole registers of every width with every possible tail, then whole chunks of 16384 with one element less or more.
SIZES = [*range(71), 1023, 16383, 16384, 16385, 3 * 16384 + 5]


@ALL_DTYPES
@pytest.mark.usefixtures("isa")
def test_every_size_is_computed_and_nothing_beyond_it(core: ModuleType, dtype: torch.dtype) -> None:
    scale, bias = torch.tensor([0.9, 0.3], dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for n in SIZES:
        x, noise = torch.randn(2, n, generator=generator, dtype=torch.float64)
        x = x.to(dtype)
        exact = x.double(), scale.double(), bias.double()
        y = run_forward(core, x, float(scale), float(bias), threads=2)
        assert_within_bound(f"y of {n}", y, reference.star_relu(*exact))
        grad_y = (y + noise / 2).to(dtype)
        grad_x, *sums = run_backward(core, grad_y, x, float(scale), threads=2)
        wanted = reference.star_relu_backward(grad_y.double(), *exact, [True, True, True])
        assert_within_bound(f"grad_x of {n}", grad_x, wanted[0])
        # The sums leave the core in float64, whatever they are of: they keep the accuracy of the arithmetic.
        arithmetic = reference.compute_dtype(dtype)
        assert_within_bound(f"sums of {n}", torch.tensor(sums, dtype=arithmetic), torch.stack(wanted[1:]))


def test_sums_do_not_depend_on_whether_grad_x_is_wanted(core: ModuleType) -> None:
    x, grad_y = torch.randn(2, 20_003, generator=torch.Generator().manual_seed(0))
    _, *sums = run_backward(core, grad_y, x, 0.9)
    assert core.star_relu_backward(grad_y.data_ptr(), x.data_ptr(), 0, x.numel(), CODES[x.dtype], 0.9, 1) == (*sums,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("isa")
def test_every_16_bit_pattern_is_read_and_rounded_like_torch(core: ModuleType, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    one, zero = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    for scale in (one, -one):
        assert same_bits(run_forward(core, every, float(scale), 0.0), reference.star_relu(every, scale, zero))
    # 2 * 1 * relu(1/2) * grad_y: reading and writing alone
    grad_x, _, _ = run_backward(core, every, torch.full_like(every, 0.5), 1.0)
    assert same_bits(grad_x, every)


def special_values(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    magnitudes = [0.0, info.smallest_normal * info.eps, info.smallest_normal, 0.5, 1.0, 3.0, info.max, math.inf]
    return torch.tensor([math.nan, *magnitudes, *(-m for m in magnitudes)], dtype=dtype)


@ALL_DTYPES
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (-2.0, 0.5), (0.0, 1.0), (math.inf, 0.0), (1.0, -math.inf)])
@pytest.mark.usefixtures("isa")
def test_special_values_come_out_as_torch_has_them(
    core: ModuleType, dtype: torch.dtype, scale: float, bias: float
) -> None:
    """NaN stays NaN through relu, infinities and signed zeros are kept, subnormals are not flushed."""
    x = special_values(dtype)
    wanted = reference.star_relu(x, *torch.tensor([scale, bias], dtype=reference.compute_dtype(dtype)))
    assert same_bits(run_forward(core, x, scale, bias), wanted)


@ALL_DTYPES
@pytest.mark.usefixtures("isa")
def test_special_gradients_come_out_as_autograd_has_them(core: ModuleType, dtype: torch.dtype) -> None:
    """Every special x with every special grad_y; an infinite one where relu is flat gives 0, as in torch."""
    x, grad_y = (t.contiguous() for t in torch.meshgrid(special_values(dtype), special_values(dtype), indexing="ij"))
    leaf = x.flatten().requires_grad_()
    one, zero = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    (wanted,) = torch.autograd.grad(reference.star_relu(leaf, one, zero), leaf, grad_y.flatten())
    grad_x, _, _ = run_backward(core, grad_y, x, 1.0)
    assert torch.equal(grad_x.isnan(), wanted.isnan())
    assert torch.equal(grad_x.nan_to_num(), wanted.nan_to_num())  # equal zeros, whatever their sign


def test_best_instruction_set_comes_first_and_is_active(core: ModuleType) -> None:
    assert [isa for isa in ISAS if isa in core.supported_isas()] == core.supported_isas()
    if not os.environ.get("DFFORMER_CPU_ISA"):
        assert core.active_isa() == core.supported_isas()[0]


def test_unknown_instruction_set_raises_naming_the_known_ones(core: ModuleType) -> None:
    active = core.active_isa()
    with pytest.raises(ValueError, match=f"isa: got 'mmx', this machine runs {', '.join(core.supported_isas())}"):
        core.set_active_isa("mmx")
    assert core.active_isa() == active


REPORT_ISA = """
from dfformer_kernels.backends import cpu
print(cpu.core().active_isa())
"""


def test_environment_names_the_instruction_set(core: ModuleType) -> None:
    last = core.supported_isas()[-1]
    done = run_script(REPORT_ISA, DFFORMER_CPU_ISA=last)
    assert done.stdout.split() == [last], done.stderr


@pytest.mark.usefixtures("core")
def test_environment_with_an_unknown_instruction_set_raises() -> None:
    done = run_script(REPORT_ISA, DFFORMER_CPU_ISA="mmx")
    assert done.returncode == 1
    assert "ValueError: DFFORMER_CPU_ISA: isa: got 'mmx', this machine runs " in done.stderr


# Range checks. No call gets as far as the address 1.

GOOD: dict[str, dict[str, Any]] = {
    "star_relu": {"x": 1, "y": 1, "n": 0, "dtype": 0, "scale": 1.0, "bias": 0.0, "threads": 1},
    "star_relu_backward": {"grad_y": 1, "x": 1, "grad_x": 1, "n": 0, "dtype": 0, "scale": 1.0, "threads": 1},
}
BAD_ARGUMENTS = [
    ({"dtype": 4}, "dtype: got code 4, accepted are 0 to 3"),
    ({"dtype": -1}, "dtype: got code -1, accepted are 0 to 3"),
    ({"n": -1}, "n: got -1"),
    ({"n": 2**61, "dtype": 0}, f"n: got {2**61}"),  # whose bytes are more than an int64 counts
    ({"n": 2**60, "dtype": 1}, f"n: got {2**60}"),
    ({"n": 2**62, "dtype": 3}, f"n: got {2**62}"),
    ({"x": 0, "n": 1}, "x: got a null pointer"),
    ({"threads": 0}, "threads: got 0, accepted are 1 to 4096"),
    ({"threads": -1}, "threads: got -1"),
    ({"threads": 4097}, "threads: got 4097"),
]


@pytest.mark.parametrize("function", GOOD)
@pytest.mark.parametrize(("bad", "message"), BAD_ARGUMENTS, ids=str)
def test_bad_arguments_never_reach_memory(core: ModuleType, function: str, bad: dict[str, int], message: str) -> None:
    getattr(core, function)(**GOOD[function])
    with pytest.raises(ValueError, match=message):
        getattr(core, function)(**GOOD[function] | bad)


@pytest.mark.parametrize(("function", "name"), [("star_relu", "y"), ("star_relu_backward", "grad_y")])
def test_null_pointers_raise(core: ModuleType, function: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got a null pointer"):
        getattr(core, function)(**GOOD[function] | {name: 0, "n": 1})


# Sizes are 0, so that no call gets as far as the address 1 either.
PRODUCTS: dict[str, dict[str, Any]] = {
    "pack": {"N": 0, "K": 0, "weight": 1, "panels": 1, "threads": 1},
    "product": {"sizes": (0, 0, 0), "layout": 0, "x": 1, "weight": 1, "bias": 0, "y": 1, "threads": 1}
    | {"norm": None, "residual": None},
    "weight_gradient": {"sizes": (0, 0, 0), "grad_y": 1, "x": 1, "grad": 1, "add": False, "threads": 1},
    "mlp": {"sizes": (0, 0, 0), "hidden": 0, "layout": 0, "x": 1, "weight1": 1, "scale": 1.0, "bias": 0.0}
    | {"weight2": 1, "bias2": 0, "before": 0, "y": 1, "norm": None, "residual": None, "threads": 1},
    "norm_mean": {"sizes": (0, 0, 0), "x": 1, "norm": (0, 1e-6), "y": 1, "threads": 1},
}


@pytest.mark.parametrize(
    ("function", "bad", "message"),
    [
        *((function, {"threads": 0}, "threads: got 0") for function in PRODUCTS),
        ("pack", {"N": -1}, "sizes: got -1, accepted are 0 and more"),
        ("pack", {"N": 2**40, "K": 2**40}, "more bytes than 64 bits count"),
        ("pack", {"N": 1, "K": 1, "panels": 0}, "panels: got a null pointer"),
        ("product", {"layout": 3}, "layout: got code 3, accepted are 0 to 2"),
        ("product", {"layout": -1}, "layout: got code -1"),
        ("product", {"sizes": (1, 1, -2)}, "sizes: got -2"),
        ("product", {"sizes": (2**40, 0, 2**40)}, "more bytes than 64 bits count"),
        ("product", {"sizes": (2**63 - 1, 1, 1)}, "more bytes than 64 bits count"),
        ("product", {"sizes": (1, 1, 1), "y": 0}, "y: got a null pointer"),
        ("weight_gradient", {"sizes": (1, 1, 1), "grad": 0}, "grad: got a null pointer"),
        ("product", {"sizes": (1, 1, 1), "residual": (0, 0)}, "residual: got a null pointer"),
        ("norm_mean", {"sizes": (1, -1, 1)}, "sizes: got -1"),
        ("norm_mean", {"sizes": (2**40, 2**40, 1)}, "more bytes than 64 bits count"),
        ("norm_mean", {"sizes": (1, 1, 1), "y": 0}, "y: got a null pointer"),
        ("mlp", {"layout": 1}, "layout: got code 1, accepted for an MLP are 0 and 2"),
        ("mlp", {"hidden": -1}, "sizes: got -1"),
        ("mlp", {"sizes": (1, 1, 1), "hidden": 1, "weight2": 0}, "weight2: got a null pointer"),
    ],
)
def test_bad_products_never_reach_memory(core: ModuleType, function: str, bad: dict[str, Any], message: str) -> None:
    getattr(core, function)(**PRODUCTS[function])
    with pytest.raises(ValueError, match=message):
        getattr(core, function)(**PRODUCTS[function] | bad)


@pytest.mark.parametrize("bad", [{"n": 2**63}, {"x": -1}, {"x": 2**64}, {"n": 1.5}, {"dtype": "float32"}], ids=str)
def test_arguments_of_the_wrong_type_raise(core: ModuleType, bad: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        core.star_relu(**GOOD["star_relu"] | bad)


# Threads and forks


@pytest.mark.usefixtures("core")
def test_eight_threads_at_once_get_their_own_results() -> None:
    tensors = [torch.randn(50_000 + i, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    scale, bias = torch.tensor([0.9]), torch.tensor([0.3])
    wanted = [star_relu(x, scale, bias, backend="cpu") for x in tensors]
    start = threading.Barrier(len(tensors))

    def run(x: Tensor) -> list[Tensor]:
        start.wait()
        return [star_relu(x, scale, bias, backend="cpu") for _ in range(10)]

    with ThreadPoolExecutor(len(tensors)) as pool:
        results = list(pool.map(run, tensors))
    assert all(torch.equal(y, wanted[i]) for i, repeated in enumerate(results) for y in repeated)


def test_other_python_threads_run_during_a_call(core: ModuleType) -> None:
    """Were the GIL held, no time would be read in the middle half of a call."""
    core.set_active_isa(core.supported_isas()[-1])
    x = torch.zeros(2**24, dtype=torch.float16)
    y = torch.zeros_like(x)

    assert_releases_the_gil(lambda: core.star_relu(x.data_ptr(), y.data_ptr(), x.numel(), CODES[x.dtype], 1.0, 0.0, 1))


FORK = """
import os, signal, sys, time
import torch
from dfformer_kernels import star_relu

torch.set_num_threads(4)
x = torch.linspace(-1, 1, 200_001, requires_grad=True)
grad_y = torch.ones(200_001)  # made here: torch's own parallel operators hang in a forked child
scale, bias = torch.tensor([0.9]), torch.tensor([0.3])

def run():  # forward and backward, in several threads where that is allowed
    y = star_relu(x, scale, bias, backend="cpu")
    return [t.numpy().tobytes() for t in (y.detach(), *torch.autograd.grad(y, x, grad_y))]

wanted = run()
child = os.fork()
if child == 0:
    os._exit(0 if run() == wanted else 3)
for _ in range(300):
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.1)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
sys.exit("the forked child hangs")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.usefixtures("core")
def test_a_forked_child_computes_after_a_parallel_call_of_its_parent() -> None:
    done = run_script(FORK)
    assert done.returncode == 0, done.stderr


# Object code

UNITS = {"isa_baseline": "xmm", "isa_avx2": "ymm", "isa_avx512": "zmm"} if X86 else {"isa_baseline": "v"}


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each instruction set's translation unit, compiled alone."""
    tools = [tool for tool in ("g++", "nm", "objdump") if not shutil.which(tool)]
    require("cpu", not tools, f"{', '.join(tools)} not installed")
    folder = tmp_path_factory.mktemp("objects")
    flags = ["-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]
    outputs = {unit: folder / f"{unit}.o" for unit in UNITS}
    compilers = [
        subprocess.Popen(["g++", *flags, "-c", str(CSRC / "cpu" / f"{unit}.cpp"), "-o", str(output)])
        for unit, output in outputs.items()
    ]
    assert [compiler.wait() for compiler in compilers] == [0] * len(UNITS)
    return outputs


@pytest.mark.parametrize("unit", UNITS)
def test_no_instruction_set_leaks_into_another_by_a_shared_symbol(objects: dict[str, Path], unit: str) -> None:
    """The linker keeps one copy of a weak or unique symbol, perhaps that of a wider instruction set."""
    listing = subprocess.run(["nm", "-C", objects[unit]], capture_output=True, text=True, check=True).stdout
    defined = [line.split(maxsplit=2)[1:] for line in listing.splitlines() if not line.startswith(" ")]
    assert f"dfformer::cpu::{unit.removeprefix('isa_')}_kernels" in [name for _, name in defined]
    assert [name for kind, name in defined if kind in "WVu"] == []


@pytest.mark.skipif(not X86, reason="NEON has registers of one width")
@pytest.mark.parametrize(("unit", "register"), UNITS.items())
def test_a_unit_uses_its_registers_and_no_wider_ones(objects: dict[str, Path], unit: str, register: str) -> None:
    code = subprocess.run(["objdump", "-d", objects[unit]], capture_output=True, text=True, check=True).stdout
    assert next(wide for wide in ("zmm", "ymm", "xmm") if f"%{wide}" in code) == register
