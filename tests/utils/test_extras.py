"""Which missing packages are reported as a missing extra."""

import sys

import pytest

from dfformer.tasks.table import task_part
from dfformer.utils.extras import extra


def test_a_missing_package_names_its_extra() -> None:
    message = r"^No module named 'absent_package': pip install 'dfformer\[dense\]'$"
    with pytest.raises(RuntimeError, match=message), extra("dense"):
        __import__("absent_package")


@pytest.mark.parametrize("name", ["dfformer.absent", "dfformer_kernels.absent"])
def test_a_mistake_of_this_project_is_no_missing_extra(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=rf"^No module named '{name}'$"), extra("dense"):
        __import__(name)


def test_classification_needs_no_extra_of_the_dense_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.data.random_erasing", None)
    monkeypatch.delitem(sys.modules, "dfformer.tasks.classification", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"timm\.data\.random_erasing"):
        task_part("classify", "training")


EXTRAS = {
    "segmentation_models_pytorch": ("segment", "segmentation"),
    "torchmetrics.detection": ("detect", "detection"),
    "pycocotools": ("detect", "detection"),
    "torchmetrics.functional.image": ("restore", "restoration"),
}


@pytest.mark.parametrize("package", EXTRAS)
def test_the_dense_tasks_name_their_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before training starts, not when it measures."""
    task, module = EXTRAS[package]
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"dfformer.tasks.{module}", raising=False)
    with pytest.raises(RuntimeError, match=rf"{package}.*: pip install 'dfformer\[dense\]'"):
        task_part(task, "training")
