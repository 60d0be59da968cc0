"""What several files here need."""

import pytest
from conftest import require

from dfformer_kernels.backend.cuda import nvrtc


@pytest.fixture
def compiler() -> None:
    reasons = nvrtc.unavailable_reasons()
    require("cuda", not reasons, "; ".join(reasons))
