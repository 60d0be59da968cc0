"""What the tests of served models share."""

import pytest

from dfformer.inference import packed


@pytest.fixture(autouse=True)
def _small_models_use_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As whole models do; the products of the small ones have too little work for it."""
    monkeypatch.setattr(packed, "is_large", lambda x, weight: True)
