"""The `cufft` backend without a GPU: its Triton kernels in Triton's interpreter, its transforms in torch.fft."""

import importlib
from itertools import product
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    LAYOUTS,
    OPS,
    SMALL,
    Case,
    Inputs,
    Op,
    assert_all_within_bound,
    expected,
    make_grad,
    make_inputs,
)
from cufft_traffic import traffic
from extent import FULL, pairwise, slow
from torch import Tensor

from dfformer_kernels import reference
from dfformer_kernels.backend.cufft import passes as cufft
from dfformer_kernels.problem import Problem, is_channels_first
from dfformer_kernels.tolerance import BOUND, relative_error

triton = pytest.importorskip("triton")
triton_kernels = pytest.importorskip("dfformer_kernels.backend.cufft.triton_kernels")
triton_launch = pytest.importorskip("dfformer_kernels.backend.cufft.triton_launch")

pytestmark = pytest.mark.usefixtures("one_thread", "interpreted")
ALL_OPS = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
FILTERS = {name: op for name, op in OPS.items() if op.parameters}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Triton function of the backend run by Triton's interpreter, on CPU tensors."""
    importlib.import_module("triton.experimental.gluon")  # imported by the interpreter, while all is as it was
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
    from triton.runtime.jit import JITFunction

    for module in (triton_kernels, triton.language, triton.language.standard):
        for name, function in vars(module).copy().items():
            if isinstance(function, JITFunction):
                monkeypatch.setattr(module, name, InterpretedFunction(function.fn))

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A function called by a kernel: as the interpreter does (Triton 3.8), but leaving the language as it was."""
        patched = interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        finally:
            patched.restore()

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        """As Triton 3.8; NumPy 2.4 refuses what 3.6 does with an array of one number."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_and_index)
    monkeypatch.setattr(InterpretedFunction, "__call__", call)
    cast = InterpreterBuilder.cast_impl

    def rounding_cast(self: Any, source: Any, dtype: Any) -> Any:
        """The interpreter cuts bfloat16's digits off (Triton 3.8), GPUs round to nearest."""
        if source.dtype.scalar == triton.language.bfloat16 or dtype.scalar != triton.language.bfloat16:
            return cast(self, source, dtype)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16)
        return TensorHandle(rounded.numpy(), dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)


def run(op: Op, inputs: Inputs, grad_y: Tensor, needs: list[bool] | None = None) -> tuple[Tensor, Inputs]:
    arguments = [None if t is None else t.detach() for t in op.schema_order(inputs)]
    needs = needs or [name in inputs for name in op.names]
    y = cufft.KERNELS[op.name](*arguments)
    gradients = cufft.KERNELS[f"{op.name}_backward"](grad_y, *arguments, needs)
    wanted = [name for name, need in zip(op.names, needs, strict=True) if need]
    return y, dict(zip(wanted, gradients, strict=True))


# Triton's interpreter takes seconds for a large plane, and it has no tile that a plane of 28x28 has not.
PLANES = [case for case in CASES if FULL or case.H * case.W <= 1000]


# With StarReLU on every second plane.
ON_PLANES = [(n, case) for i, case in enumerate(PLANES) for j, n in enumerate(FILTERS) if FULL or (i + j) % 2]


@pytest.mark.parametrize(("name", "case"), ON_PLANES, ids=str)
def test_float32_on_every_plane(name: str, case: Case) -> None:
    op = OPS[name]
    inputs = make_inputs(op, case, torch.float32)
    grad_y = make_grad(op, inputs)
    assert_all_within_bound(*run(op, inputs, grad_y), expected(op, inputs, grad_y))


EDGES = (SMALL, Case(1, 8, 6, 17), Case(2, 7, 8, 3, F=5), Case(3, 1, 1, 5))


@pytest.mark.parametrize(**pairwise(name=tuple(OPS), dtype=DTYPES, case=EDGES))
def test_every_dtype(name: str, dtype: torch.dtype, case: Case) -> None:
    op = OPS[name]
    inputs = make_inputs(op, case, dtype)
    grad_y = make_grad(op, inputs)
    y, gradients = run(op, inputs, grad_y)
    assert_all_within_bound(y, gradients, expected(op, inputs, grad_y))
    assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, inputs["x"].shape, True)
    assert {name: (g.dtype, g.shape) for name, g in gradients.items()} == {
        name: (t.dtype, t.shape) for name, t in inputs.items()
    }


@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float32)], ids=str
)
@ALL_OPS
def test_parameters_of_another_dtype(op: Op, dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    inputs = make_inputs(op, SMALL, dtype, parameter_dtype=parameter_dtype)
    grad_y = make_grad(op, inputs)
    assert_all_within_bound(*run(op, inputs, grad_y), expected(op, inputs, grad_y))


DENSE_OR_NOT = [name for name in LAYOUTS if name != "negated"]  # the dispatcher resolves that


@pytest.mark.parametrize(**pairwise(name=tuple(OPS), B=(1, 2), layout=DENSE_OR_NOT))
def test_memory_layout_does_not_matter(name: str, B: int, layout: str) -> None:
    op = OPS[name]
    inputs = make_inputs(op, Case(B, 4, 6, 3), torch.float32)
    for each in ("x", *op.parameters):
        inputs[each] = LAYOUTS[layout](inputs[each]).requires_grad_()
    grad_y = LAYOUTS[layout](make_grad(op, inputs))
    assert_all_within_bound(*run(op, inputs, grad_y), expected(op, inputs, grad_y))


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("star_relu", [False, True])
@pytest.mark.parametrize("name", ["dynamic_filter", "global_filter"])
def test_weights_without_softmax_and_for_each_sample(name: str, star_relu: bool, channels_first: bool) -> None:
    """In either memory format, which results have too."""
    op = OPS[f"{name}+star_relu" if star_relu else name]
    inputs = make_inputs(op, Case(2, 4, 6, 3, F=20), torch.float32)
    options = [False] if name == "dynamic_filter" else []
    if name == "global_filter":
        inputs["weight"] = torch.stack([inputs["weight"].detach(), 1 + inputs["weight"].detach()]).requires_grad_()
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    wanted = getattr(reference, name)(*op.schema_order(exact), *options)
    grad_y = wanted.detach().float() + 0.5
    wanted_gradients = torch.autograd.grad(wanted, list(exact.values()), grad_y.double())
    if channels_first:
        inputs["x"] = LAYOUTS["channels_first"](inputs["x"])
    arguments = [None if t is None else t.detach() for t in op.schema_order(inputs)]
    y = cufft.KERNELS[name](*arguments, *options)
    needs = [t is not None for t in arguments]
    gradients = cufft.KERNELS[f"{name}_backward"](grad_y, *arguments, needs, *options)
    for result, exactly in zip([y, *gradients], [wanted, *wanted_gradients], strict=True):
        assert relative_error(result, exactly) <= BOUND[torch.float32]
    for result in (y, gradients[0]):
        assert is_channels_first(result) == channels_first


@ALL_OPS
def test_only_the_gradients_asked_for_in_order(op: Op) -> None:
    inputs = make_inputs(op, SMALL, torch.float32)
    grad_y = make_grad(op, inputs)
    _, every = run(op, inputs, grad_y)
    present = [name in inputs for name in op.names]
    for needs in product(*[(False, True) if p else (False,) for p in present]):
        if FULL or sum(needs) in (1, sum(present) - 1):
            _, some = run(op, inputs, grad_y, list(needs))
            assert list(some) == [name for name, need in zip(op.names, needs, strict=True) if need]
            for name, gradient in some.items():
                assert torch.equal(gradient, every[name]), name


@pytest.mark.parametrize("case", [Case(2, 8, 9, 70, F=3), Case(65, 2, 3, 4)], ids=str)
@pytest.mark.parametrize(
    "name", ["dynamic_filter+star_relu", "global_filter", *slow("dynamic_filter", "global_filter+star_relu")]
)
def test_several_tiles_and_the_same_bits_again(name: str, case: Case) -> None:
    op = OPS[name]
    inputs = make_inputs(op, case, torch.float32)
    grad_y = make_grad(op, inputs)
    first, second = run(op, inputs, grad_y), run(op, inputs, grad_y)
    assert_all_within_bound(*first, expected(op, inputs, grad_y))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


# x (B,H,W,C), dtype, StarReLU, backward, and whether each sample is a transform of its own
RULE = [
    ((1, 7, 7, 5), torch.float32, True, False, True),  # one is one
    ((2, 250, 250, 20), torch.float32, False, False, False),  # 1.25 M elements a sample: as many bytes either way
    ((2, 250, 250, 22), torch.float32, False, False, True),
    ((2, 250, 250, 22), torch.float32, False, True, True),
    ((2, 250, 250, 40), torch.float32, True, False, False),  # 2.5 M
    ((2, 250, 250, 42), torch.float32, True, False, True),
    ((2, 250, 250, 60), torch.float32, True, True, False),  # 3.75 M
    ((2, 250, 250, 62), torch.float32, True, True, True),
    ((2, 250, 250, 12), torch.float64, False, False, True),  # twice the bytes
    ((2, 256, 256, 128), torch.bfloat16, True, False, False),  # the passes convert
    ((2, 201, 201, 201), torch.float32, False, False, False),  # the second sample is not aligned
]


@pytest.mark.parametrize(("shape", "dtype", "star_relu", "backward", "wanted"), RULE, ids=str)
def test_samples_are_transforms_of_their_own_where_that_moves_less(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    star_relu: bool,
    backward: bool,
    wanted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cufft.by_sample(shape, dtype, star_relu, backward) == wanted
    launch, moved = cufft._LAUNCH_BYTES, []
    for bytes_of_launch in (0, 2**60):  # of their own where possible, side by side
        monkeypatch.setattr(cufft, "_LAUNCH_BYTES", bytes_of_launch)
        moved.append(sum(size for _, size in traffic("dynamic_filter", shape, dtype, star_relu, backward)))
    saved_a_sample = (moved[1] - moved[0]) / shape[0]
    assert shape[0] == 1 or wanted == (saved_a_sample > (3 if backward else 2) * launch)


SAMPLES = (Case(3, 4, 6, 3), Case(2, 5, 8, 130, F=3), Case(5, 2, 3, 4))


@pytest.mark.parametrize(**pairwise(name=tuple(FILTERS), case=SAMPLES, dtype=(torch.float32, torch.float64)))
def test_each_sample_a_transform_of_its_own(
    name: str, case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on large planes."""
    op, shapes = OPS[name], set()

    def rfft2(u: Tensor) -> Tensor:
        shapes.add(tuple(u.shape))
        return cufft._torch_rfft2(u)

    monkeypatch.setattr(cufft, "_LAUNCH_BYTES", 0)
    monkeypatch.setattr(cufft, "_transforms", lambda device: (rfft2, cufft._torch_irfft2))
    inputs = make_inputs(op, case, dtype)
    grad_y = make_grad(op, inputs)
    assert_all_within_bound(*run(op, inputs, grad_y), expected(op, inputs, grad_y))
    assert shapes == {tuple(inputs["x"].shape)}


def test_slices_of_samples_in_the_global_filters_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["global_filter"]
    inputs = make_inputs(op, Case(7, 4, 5, 3), torch.float32)
    grad_y = make_grad(op, inputs)
    for programs in (1, 3, 1024):
        monkeypatch.setattr(triton_launch, "_PROGRAMS", programs)
        assert_all_within_bound(*run(op, inputs, grad_y), expected(op, inputs, grad_y))


@pytest.mark.parametrize("plane", [(6, 8), (5, 7), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("op", FILTERS.values(), ids=FILTERS)
def test_no_imaginary_part_is_left_to_the_librarys_convention(
    op: Op, plane: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inverse gets spectra that are Hermitian in columns 0 and W/2, so that every library returns the same."""
    seen = []

    def irfft2(Z: Tensor, W: int) -> Tensor:
        for k in {0, W // 2} if W % 2 == 0 else {0}:
            column = torch.view_as_complex(Z[0])[:, k]
            seen.append(
                relative_error(
                    torch.view_as_real(column.roll(-1, 0).flip(0)), torch.view_as_real(column.conj_physical())
                )
            )
        return cufft._torch_irfft2(Z, W)

    monkeypatch.setattr(cufft, "_transforms", lambda device: (cufft._torch_rfft2, irfft2))
    inputs = make_inputs(op, Case(2, *plane, 3), torch.float32)
    run(op, inputs, make_grad(op, inputs))
    assert seen
    assert max(seen) < BOUND[torch.float32]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, for infinity times zero
def test_nan_and_infinity_go_through_star_relu() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 2.0])
    scale, bias = torch.tensor(0.5), torch.tensor(0.25)
    torch.testing.assert_close(
        cufft.star_relu(x, scale, bias),
        torch.tensor([float("nan"), float("inf"), 0.25, 0.25, 0.25, 2.25]),
        equal_nan=True,
    )
    grad_x, _, _ = cufft.star_relu_backward(torch.full_like(x, float("inf")), x, scale, bias, [True] * 3)
    assert grad_x[2:5].eq(0).all()
    assert grad_x[5] == float("inf")


TRAFFIC = {
    "name": tuple(FILTERS),
    "launch": ((1, 2**60), (2, 2**60), (2, 0)),  # samples, bytes of a launch
    "dtype": (torch.float32, torch.bfloat16),
    "backward": (False, True),
}


@pytest.mark.parametrize(**pairwise(**TRAFFIC))
def test_launches_touch_what_the_model_of_traffic_says(
    name: str, launch: tuple[int, int], dtype: torch.dtype, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, (B, bytes_of_launch) = OPS[name], launch
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    monkeypatch.setattr(cufft, "_LAUNCH_BYTES", bytes_of_launch)
    launches: list[list[Tensor]] = []

    def count(method: str, mask_at: int, code: int) -> None:
        original = getattr(InterpreterBuilder, method)

        def counted(self: Any, pointers: Any, *rest: Any) -> Any:
            itemsize = pointers.dtype.scalar.element_ty.primitive_bitwidth // 8
            addresses = torch.from_numpy(pointers.data[rest[mask_at].data].astype("int64"))
            launches[-1].append(code + addresses * 16 + itemsize)
            return original(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, method, counted)

    count("create_masked_load", 0, 0)
    count("create_masked_store", 1, 2**62)
    run_interpreted = InterpretedFunction.run

    def run_counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("warmup"):  # which compiles, and launches nothing
            launches.append([])
        return run_interpreted(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run_counted)
    monkeypatch.setattr(triton_launch, "_PROGRAMS", 1)  # one slot for the gradient of a global filter
    inputs = make_inputs(op, Case(B, 4, 16, 32, F=1), dtype, requires_grad=False)
    arguments = op.schema_order(inputs)
    if backward:
        needs = [name in inputs for name in op.names]
        cufft.KERNELS[f"{op.name}_backward"](make_grad(op, inputs).contiguous(), *arguments, needs)
    else:
        cufft.KERNELS[op.name](*arguments)
    touched = [int((torch.cat(launch).unique() % 16).sum()) for launch in launches]
    passes = traffic(op.name, inputs["x"].shape, dtype, bool(op.scalars), backward)
    model = [size for name, size in passes if "fft" not in name]
    main = sorted(touched, reverse=True)[: len(model)]  # beside these, the launch of softmax's gradient alone
    assert len(touched) - len(model) == (backward and "logits" in inputs)
    # a dynamic filter's parameters and slots come on top
    for size, wanted in zip(main, sorted(model, reverse=True), strict=True):
        assert wanted <= size <= 1.1 * wanted


def test_cuda_without_its_libcufft_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cufft.libcufft, "unavailable_reasons", lambda: ["libcufft cannot be opened"])
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.warns(UserWarning, match=r"uses torch\.fft's transforms: libcufft cannot be opened"):
        assert cufft._transforms.__wrapped__("cuda")[0] is cufft._torch_rfft2
    monkeypatch.setattr(torch.version, "hip", "7.0")  # as planned
    assert cufft._transforms.__wrapped__("cuda")[0] is cufft._torch_rfft2


def test_why_it_cannot_run_here() -> None:
    assert cufft.unavailable_reasons() == ([] if torch.cuda.is_available() else ["there is no CUDA or ROCm device"])
    problem = Problem("dynamic_filter", "cuda", torch.float32, (2, 56, 56, 64), 4)
    assert cufft.unsupported_reasons(problem) == []
    assert "B*C" in cufft.unsupported_reasons(problem._replace(shape=(2**16, 1, 1, 2**15)))[0]
