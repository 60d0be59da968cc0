"""Fixtures shared by all tests, and the one place that decides whether a test is skipped."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import TARGETS, Target
from extent import FULL
from native_core import ISAS
from torch import Tensor

from dfformer.cli.main import main
from dfformer_kernels import backends, dispatch
from dfformer_kernels.backend import cpu

# torch remembers, at the first use of a device context, which functions allocate: the real ones, not the poisoned ones.
with torch.device("meta"):
    torch.empty(0)

ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def require(name: str, available: bool, reason: str) -> None:
    """Skips with ``reason`` unless ``available``; fails instead when DFFORMER_REQUIRE (``"cpu,cuda"``) has ``name``."""
    if available:
        return
    if name in os.environ.get("DFFORMER_REQUIRE", "").split(","):
        pytest.fail(f"DFFORMER_REQUIRE names {name}: {reason}")
    pytest.skip(reason)


def require_compiler() -> None:
    """For tests that compile C++: the extension, or what inductor generates."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    works = compiler is not None and not subprocess.run([compiler, "--version"], capture_output=True).returncode
    require("cpu", works, "no working C++ compiler")


def require_compiled_graphs() -> None:
    """For tests of what our operators are in torch.compile's graphs, as opposed to exported programs."""
    if torch.compile(lambda x: x + torch.compiler.is_exporting(), backend="eager")(torch.zeros(1)).any():
        pytest.skip("this torch says under torch.compile that it exports, and gets what exported programs have")


def require_backend(name: str) -> None:
    reasons = backends()[name]
    require(name, not reasons, f"backend {name}: {'; '.join(reasons)}")


def require_support(backend: str, op: str, tensors: Sequence[Tensor | None]) -> None:
    """Skips with its reasons where an available backend does not take such inputs of ``op`` or its backward."""
    problems = [dispatch.Problem.of(name, tensors) for name in (op, f"{op}_backward")]
    reasons = [reason for p in problems for reason in dispatch.by_name(backend).unsupported_reasons(p)]
    if reasons:
        pytest.skip(f"backend {backend}: {'; '.join(reasons)}")


# Import names of what pyproject.toml's extras bring: tests of what needs one that is missing are skipped.
OPTIONAL = (
    *("cuda", "hypothesis", "jsonargparse", "matplotlib", "mkdocs", "mlxtend", "onnx", "onnxruntime", "onnxscript"),
    *("pybind11", "pycocotools", "segmentation_models_pytorch", "skimage", "sklearn", "tensorboard", "torchmetrics"),
    *("torchvision", "tqdm", "triton"),
)


class Module(pytest.Module):
    """A file of tests, skipped with the reason if it imports an optional package that is not installed."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return list(super().collect())
        except (self.CollectError, RuntimeError) as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, ModuleNotFoundError) and (cause.name or "").split(".")[0] in OPTIONAL:
                    pytest.skip(f"{cause.name} is not installed", allow_module_level=True)
                cause = cause.__cause__ or cause.__context__
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return Module.from_parent(parent, path=module_path)


def pytest_addoption(parser: pytest.Parser) -> None:
    if find_spec("pytest_timeout") is None:
        parser.addini("timeout", "without the plugin tests take as long as they take")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of ``DFFORMER_TEST_SHARD=i/n`` every n-th test, from the i-th on (tests/gpu.sh). The slow ones are skipped."""
    for item in items:
        if not FULL and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: DFFORMER_TEST_FULL=1 runs it"))
    if shard := os.environ.get("DFFORMER_TEST_SHARD"):
        index, count = map(int, shard.split("/"))
        items[:] = items[index::count]


def pytest_configure(config: pytest.Config) -> None:
    """Where the compiled core is missing, tests of other things go on without it."""
    if backends()["cpu"]:
        config.addinivalue_line("filterwarnings", "ignore:.*'cpu' backend is not available:UserWarning")


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)  # a test's random numbers do not depend on the tests before it
    if item.get_closest_marker("gpu"):
        require("cuda", torch.cuda.is_available(), "no CUDA device")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what Python code allocates without a value with NaN, so that an element nobody wrote is seen."""
    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        t = allocate(*args, **kwargs)
        if t.is_floating_point() or t.is_complex():
            with torch.no_grad():
                t.fill_(float("nan"))
        return t

    return allocate_poisoned


@pytest.fixture(autouse=True)
def no_backend_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test runs on is its own choice."""
    monkeypatch.delenv("DFFORMER_BACKEND", raising=False)


def targets(where: Callable[[Target], object] = lambda target: True) -> list[Any]:
    """Parameters of the fixture `target` for only those ``where`` is true."""
    return [
        pytest.param(t, id=str(t), marks=[pytest.mark.gpu] if t.device == "cuda" else []) for t in TARGETS if where(t)
    ]


@pytest.fixture(params=targets())
def target(request: pytest.FixtureRequest) -> Target:
    """Every operator on every backend that implements it, on every device it runs on."""
    require_backend(request.param.backend)
    return request.param


@pytest.fixture
def core() -> Iterator[ModuleType]:
    """The compiled core; its instruction set from before comes back in any case."""
    require_backend("cpu")
    active = cpu.core().active_isa()
    yield cpu.core()
    cpu.core().set_active_isa(active)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, core: ModuleType) -> str:
    """Each instruction set in turn, active."""
    supported = core.supported_isas()
    require(request.param, request.param in supported, f"this machine runs {supported}, not {request.param}")
    core.set_active_isa(request.param)
    return request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small problems: on a busy machine, waiting for a second thread takes longer than the problem.

    A test may set another number; the one from before comes back in any case.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile with nothing compiled yet, and nothing left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[str]], str]:
    """What a training command says that is refused before it starts; ``--output`` is added to it."""

    def message(command: Sequence[str]) -> str:
        output = tmp_path / "run"
        assert main([*command, "--output", str(output)]) == 2
        assert not output.exists()
        return capsys.readouterr().err

    return message
