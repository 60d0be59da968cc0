"""Fixtures of the compiled core."""

from collections.abc import Iterator
from types import ModuleType

import pytest
from conftest import require, require_backend
from native_core import ISAS

from dfformer_kernels.backends import cpu


@pytest.fixture
def core() -> Iterator[ModuleType]:
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
