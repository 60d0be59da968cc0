"""The compiled core without Python around it: see also `make test-isa` and `make test-sanitize`."""

import shutil
import subprocess
import sys

import pytest
from conftest import require, require_compiler
from paths import NATIVE

RUN = NATIVE / "run.sh"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the harness is written for Linux")
def test_the_core_agrees_with_its_definition_and_stays_within_its_tensors() -> None:
    require_compiler()
    require("cpu", shutil.which("make") is not None, "make not installed")
    done = subprocess.run([RUN, "quick"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
