"""A tiny training run: its recipe, its images, and what it comes to when nobody disturbs it."""

import json
from pathlib import Path

import pytest
from train_runs import NOTHING_RANDOM, TINY, reference_run, write_splits


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_splits(tmp_path / "images")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(TINY))  # which is YAML too
    return path


@pytest.fixture
def command(recipe: Path, root: Path) -> list[str]:
    return ["train", "--recipe", str(recipe), "--data.root", str(root)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference_run(tmp_path_factory.mktemp("expected"))


@pytest.fixture(scope="module")
def expected_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without what each process draws for itself."""
    return reference_run(tmp_path_factory.mktemp("alone"), *NOTHING_RANDOM)
