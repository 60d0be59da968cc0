"""What exported files compute and say of themselves, by their own runtimes. One test a format: exporting is slow."""

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import require_compiler
from export_models import ERROR, SIZE, images, mixed, tiny
from extent import FULL
from paths import ROOT
from torch import nn

from dfformer import optimize_for_inference
from dfformer.export.export import export
from dfformer.export.formats import FORMATS
from dfformer_kernels.tolerance import relative_error

pytestmark = [
    # what other people's exporters do on import and while they convert
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::ResourceWarning", "ignore::RuntimeWarning"),
]


def optimised(make: Callable[[], nn.Module] = mixed) -> nn.Module:
    return optimize_for_inference(make())


class Case(NamedTuple):
    format: str
    make: Callable[[], nn.Module] = mixed
    fused: bool = False


CASES = {
    "pt2": Case("pt2", optimised),
    "pt2 fused": Case("pt2", partial(optimised, tiny if not FULL else mixed), fused=True),
    "aoti": Case("aoti", tiny),
    "onnx": Case("onnx"),
    "openvino": Case("openvino"),
    "executorch": Case("executorch", tiny if not FULL else mixed),
    "coreml": Case("coreml"),
}
if FULL:
    CASES |= {"aoti fused": Case("aoti", fused=True), "onnx optimised": Case("onnx", optimised)}


def require_format(name: str) -> None:
    chosen = FORMATS[name]
    for module in chosen.needs:
        try:
            importlib.import_module(module)
        except ImportError:
            pytest.skip(f"{name} needs {module}: pip install 'dfformer[{chosen.extra}]'")
    if name == "aoti":
        require_compiler()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_exported_file(case: Case, tmp_path: Path) -> None:
    require_format(case.format)
    path = tmp_path / f"model{FORMATS[case.format].suffix}"
    model = case.make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    error = export(model, path, SIZE, case.format, fused=case.fused, architecture="dfformer_s18", classes=["ä", "<b>"])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    beside = {"openvino": {"model.bin"}}.get(case.format, set())
    assert {file.name for file in tmp_path.iterdir()} >= {path.name, *beside}
    assert not list(tmp_path.glob(".*"))

    # what a program needs to prepare images and name classes
    description = json.loads(SAYS[case.format](path))
    assert description["architecture"] == "dfformer_s18"
    assert description["classes"] == ["ä", "<b>"]
    assert description["data"]["input_size"] == [1, *SIZE]

    if FORMATS[case.format].runs_here:
        assert error < ERROR
        check_outputs(case, model, path)
        check_process_without_this_package(case, model, path)
    else:
        assert math.isnan(error)


def check_outputs(case: Case, model: nn.Module, path: Path) -> None:
    """For batches that the command does not try, and not only once."""
    run = FORMATS[case.format].load(path)
    for batch in (2, 7, 1):
        x = images(batch)
        (y,) = torch.utils._pytree.tree_leaves(run(x))
        with torch.no_grad():
            assert relative_error(y, model(x)) < ERROR


def _in_pt2(path: Path) -> str:
    found = {"dfformer": ""}
    torch.export.load(path, extra_files=found)
    return found["dfformer"]


def _in_onnx(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["dfformer"]


def _in_openvino(path: Path) -> Any:
    import openvino

    model = openvino.Core().read_model(path)
    assert model.input("images").partial_shape.to_string() == "[?,1,24,20]"
    assert model.output("logits").partial_shape.to_string() == "[?,5]"
    return model.get_rt_info(["dfformer"]).value


def _in_executorch(path: Path) -> Any:
    from executorch.runtime import Runtime

    return Runtime.get().load_program(path).load_method("dfformer").execute([])[0]


def _in_coreml(path: Path) -> Any:
    import coremltools

    model = coremltools.models.MLModel(str(path), skip_model_load=True)
    assert [port.name for port in (*model.get_spec().description.input, *model.get_spec().description.output)] == [
        "images", "logits"
    ]  # fmt: skip
    return model.user_defined_metadata["dfformer"]


SAYS: dict[str, Callable[[Path], Any]] = {
    "pt2": _in_pt2,
    "aoti": lambda path: torch._inductor.aoti_load_package(str(path)).get_metadata()["dfformer"],
    "onnx": _in_onnx,
    "openvino": _in_openvino,
    "executorch": _in_executorch,
    "coreml": _in_coreml,
}


# Of the files that Python reads, which could need this package; the others' runtimes know no Python.
LOADERS = {
    "pt2": "torch.export.load(path).module()",
    "aoti": "torch._inductor.aoti_load_package(path)",
}
APART = """
import sys
import numpy, torch, torch._inductor

path, given, root, loader, fused = sys.argv[1:]
sys.modules.update(dfformer=None, dfformer_kernels=None)
if fused == "True":
    try:
        eval(loader)
    except RuntimeError:  # torch has logged which operator it lacks
        pass
    else:
        sys.exit("a fused file was loaded without its operators")
    del sys.modules["dfformer"], sys.modules["dfformer_kernels"]
    sys.path.insert(0, root)
    import dfformer_kernels
with torch.no_grad():
    y = eval(loader)(torch.from_numpy(numpy.load(given)))
numpy.save(given, y.numpy())
"""


def check_process_without_this_package(case: Case, model: nn.Module, path: Path) -> None:
    """A process of its own runs the file; one that is fused says there what is missing, and runs once it is not."""
    if case.format not in LOADERS:
        return
    x, given = images(4), path.parent / "images.npy"
    np.save(given, x.numpy())
    arguments = [path, given, ROOT, LOADERS[case.format], case.fused]
    command = [sys.executable, "-c", APART, *map(str, arguments)]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not case.fused or "failed to resolve torch.ops.dfformer" in done.stderr
    with torch.no_grad():
        assert relative_error(torch.from_numpy(np.load(given)), model(x)) < ERROR
