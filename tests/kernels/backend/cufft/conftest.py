"""The fake libcufft, compiled once and opened for one test."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import require_compiler
from fake_cufft import Fake, HostMemory, library_plans
from paths import NATIVE

from dfformer_kernels.backend.cufft import libcufft


@pytest.fixture(scope="session")
def fake_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_compiler()
    path = tmp_path_factory.mktemp("fake") / "libcufft.so"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run(
        [compiler, "-std=c++20", "-O2", "-shared", "-fPIC", NATIVE / "fake_cufft.cpp", "-o", path], check=True
    )
    return path


@pytest.fixture
def fake(fake_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """libcufft is the fake, without plans; in the end its rules have been kept and all plans can be destroyed."""
    fake = Fake(fake_path)
    fake.library.fake_cufft_reset()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(libcufft, "_candidates", lambda soname: [str(fake_path)])
    monkeypatch.setattr(libcufft, "_cuda", HostMemory(fake))
    libcufft._open.cache_clear()
    assert libcufft.unavailable_reasons() == []
    assert fake.live_plans == 0
    plans = library_plans()
    yield fake
    fake.assert_no_violation()
    for device, of_device in plans._recent.items():  # each device's plans while it is the current one
        fake.library.fake_cufft_set_device(device)
        of_device.clear()
    plans._captured.clear()
    libcufft._open.cache_clear()
    assert fake.live_plans == 0
