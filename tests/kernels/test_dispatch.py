"""Which backend runs a problem, and what is said when none does."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import DTYPES, OPS, Case, counting, make_grad, make_inputs
from conftest import require, require_backend
from torch import Tensor

from dfformer_kernels import backends, dispatch, star_relu, use_backend
from dfformer_kernels.backend import cpu
from dfformer_kernels.dispatch import TABLE, Backend
from dfformer_kernels.ops import without_autocast
from dfformer_kernels.problem import Problem

OP = OPS["star_relu"]


def run(backend: str | None = None) -> Tensor:
    return OP.public(make_inputs(OP, Case(1, 2, 3, 4), torch.float32, requires_grad=False), backend)


@pytest.mark.parametrize(
    ("argument", "context", "environment", "chosen"),
    [
        (None, None, None, "first"),
        (None, None, "", "first"),
        (None, None, "second", "second"),
        (None, "second", None, "second"),
        (None, "second", "first", "second"),
        ("second", None, None, "second"),
        ("second", "first", None, "second"),
        ("second", None, "first", "second"),
        ("second", "first", "first", "second"),
        ("second", None, "nonesuch", "second"),
    ],
)
def test_argument_beats_context_beats_environment_beats_table(
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    argument: str | None,
    context: str | None,
    environment: str | None,
    chosen: str,
) -> None:
    if environment is not None:
        monkeypatch.setenv("DFFORMER_BACKEND", environment)
    with use_backend(context) if context else nullcontext():
        run(argument)
    assert calls == [f"{chosen} star_relu"]


def test_environment_is_read_at_every_call(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("second", "first", "second"):
        monkeypatch.setenv("DFFORMER_BACKEND", name)
        run()
    assert calls == ["second star_relu", "first star_relu", "second star_relu"]


def test_unknown_names_raise_naming_the_known_ones(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    known = "expected one of 'first', 'second', 'broken', got 'nonesuch'"
    with pytest.raises(ValueError, match=f"backend: {known}"):
        run("nonesuch")
    with pytest.raises(ValueError, match=f"name: {known}"), use_backend("nonesuch"):
        pass
    monkeypatch.setenv("DFFORMER_BACKEND", "nonesuch")
    with pytest.raises(ValueError, match=f"DFFORMER_BACKEND: {known}"):
        run()
    assert calls == []


@pytest.mark.parametrize("name", [dispatch._AT_RUN_TIME, ["cpu"]], ids=str)
def test_only_names_of_backends_are_accepted(name: Any) -> None:
    """Not the mark for a name that compiled code looks up, either."""
    for call in (lambda: run(name), lambda: use_backend(name).__enter__()):
        with pytest.raises(ValueError, match=r"expected one of 'cpu', .*, got "):
            call()


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_a_requested_backend_that_cannot_run_raises_with_every_reason(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "environment":
        monkeypatch.setenv("DFFORMER_BACKEND", "broken")
    with pytest.raises(RuntimeError) as info, use_backend("broken") if how == "context" else nullcontext():
        run("broken" if how == "argument" else None)
    for part in ("star_relu", "float32", "(1, 2, 3, 4)", "broken: no driver; no luck; it runs on cuda, x is on cpu"):
        assert part in str(info.value)
    assert calls == []


def test_a_backend_without_the_kernel_says_which_it_has(install: Callable[..., None]) -> None:
    install(replace(counting("partial", []), kernels={"global_filter": TABLE[-1].kernels["global_filter"]}))
    with pytest.raises(RuntimeError, match="partial: it has no star_relu kernel, only global_filter"):
        run("partial")


def test_no_backend_at_all_raises_with_the_reasons_of_each(install: Callable[..., None]) -> None:
    install(counting("one", [], reasons=("out of order",)), counting("two", [], "cuda"))
    with pytest.raises(RuntimeError) as info:
        run()
    for part in ("one: out of order", "two: it runs on cuda, x is on cpu"):
        assert part in str(info.value)


def test_the_table_skips_what_cannot_run(install: Callable[..., None]) -> None:
    calls: list[str] = []
    install(counting("elsewhere", calls, "cuda"), counting("anywhere", calls))
    run()
    assert calls == ["anywhere star_relu"]


def test_backends_lists_the_table_in_order_with_reasons(calls: list[str]) -> None:
    assert backends() == {"first": [], "second": [], "broken": ["no driver", "no luck"]}
    assert list(backends()) == ["first", "second", "broken"]


def test_torch_is_the_last_resort_everywhere() -> None:
    assert list(backends())[-1] == "torch"
    assert backends()["torch"] == []
    assert TABLE[-1].device is None
    for backend in TABLE:
        assert {op.removesuffix("_") for op in backend.kernels} <= set(TABLE[-1].kernels)


@pytest.mark.parametrize("op", cpu.KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_compiled_core_runs_all_it_has_kernels_for(op: str, dtype: torch.dtype) -> None:
    require_backend("cpu")
    assert dispatch.select(Problem(op, "cpu", dtype, (2, 3))).name == "cpu"


def test_backward_runs_where_forward_ran(calls: list[str]) -> None:
    inputs = make_inputs(OP, Case(1, 2, 3, 4), torch.float32)
    with use_backend("second"):
        y = OP.public(inputs)
    y.backward(make_grad(OP, inputs))
    assert calls == ["second star_relu", "second star_relu_backward"]


def test_backward_of_a_backend_argument_ignores_the_context_it_runs_in(calls: list[str]) -> None:
    inputs = make_inputs(OP, Case(1, 2, 3, 4), torch.float32)
    y = OP.public(inputs, backend="second")
    with use_backend("first"):
        y.backward(make_grad(OP, inputs))
    assert calls == ["second star_relu", "second star_relu_backward"]


def test_nothing_runs_for_an_empty_x(calls: list[str]) -> None:
    inputs = make_inputs(OP, Case(0, 2, 3, 4), torch.float32)
    OP.public(inputs).backward(torch.zeros(0, 2, 3, 4))
    assert calls == []


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_follows_use_backend(calls: list[str]) -> None:
    compiled = torch.compile(star_relu, fullgraph=True, backend="eager")
    tensors = torch.ones(5), torch.ones(1), torch.ones(1)
    for name in ("first", "second", "first"):  # without a name, a compiled graph has StarReLU as an expression
        with use_backend(name):
            compiled(*tensors)
    assert calls == ["first star_relu", "second star_relu", "first star_relu"]


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_autocast_is_left_in_compiled_code(enabled: bool) -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def product(a: Tensor) -> Tensor:
        with without_autocast(a.device):
            return a @ a

    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        assert product(torch.ones(2, 2)).dtype == torch.float32


def test_no_autocast_on_the_meta_device() -> None:
    with torch.autocast("cpu", torch.bfloat16), without_autocast(torch.device("meta")):
        assert torch.is_autocast_enabled("cpu")


def test_kernels_run_outside_autocast(install: Callable[..., None]) -> None:
    seen: list[bool] = []

    def kernel(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return x.clone()

    install(Backend("watching", None, {"star_relu": kernel}, list))
    with torch.autocast("cpu", torch.bfloat16):
        run()
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


@pytest.fixture
def without_core(install: Callable[..., None]) -> None:
    """The real table on a machine where the compiled core is missing."""
    install(*(replace(b, unavailable_reasons=lambda: ["no core"]) if b.name == "cpu" else b for b in TABLE))


@pytest.mark.usefixtures("without_core")
def test_a_missing_core_warns_once_and_changes_no_result() -> None:
    """Warnings are errors in this test run, so a second one would raise."""
    inputs = make_inputs(OP, Case(2, 4, 6, 3), torch.float32)
    with pytest.warns(UserWarning, match=r"'cpu' backend is not available and torch\.fft is used instead.*no core"):
        y = OP.public(inputs)
    y.backward(make_grad(OP, inputs))
    for op in OPS.values():
        op.public(make_inputs(op, Case(2, 4, 6, 3), torch.float32))
    assert torch.equal(y, OP.public(inputs, "torch"))


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
@pytest.mark.usefixtures("without_core")
def test_asking_for_torch_silences_the_warning(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Warnings are errors in this test run."""
    if how == "environment":
        monkeypatch.setenv("DFFORMER_BACKEND", "torch")
    with use_backend("torch") if how == "context" else nullcontext():
        run("torch" if how == "argument" else None)


@pytest.mark.usefixtures("without_core")
def test_asking_for_the_missing_core_raises_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match="cpu: no core"):
        run("cpu")


def test_a_core_that_cannot_be_imported_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_load", lambda: (None, "cannot be imported"))
    assert cpu.unavailable_reasons() == ["cannot be imported"]
    with pytest.raises(RuntimeError, match="cannot be imported"):
        cpu.core()


def test_a_strided_tensor_never_reaches_the_core() -> None:
    with pytest.raises(
        RuntimeError,
        match=r"x: expected a contiguous .* of 6 elements, got torch.float32 \(3, 2\) with strides \(1, 3\)",
    ):
        cpu._pointer("x", torch.zeros(2, 3).t())


@pytest.mark.parametrize("available", [True, False])
@pytest.mark.parametrize("named", ["", "cpu", "cuda,cpu"])
def test_require_skips_fails_or_passes(monkeypatch: pytest.MonkeyPatch, named: str, available: bool) -> None:
    monkeypatch.setenv("DFFORMER_REQUIRE", named)
    outcome = pytest.fail.Exception if named else pytest.skip.Exception
    with nullcontext() if available else pytest.raises(outcome, match="the reason"):
        require("cpu", available, "the reason")
