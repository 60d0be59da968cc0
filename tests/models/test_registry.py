"""The models' names: as functions, their weights, beside others of the same name, and for timm's scripts."""

import inspect
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
from small_models import CLASSES, DIMS, ERROR, KINDS, images, on_meta, small
from torch import nn

import dfformer
from dfformer import VARIANTS, DFFormer, register_models
from dfformer import timm as runner
from dfformer_kernels.tolerance import relative_error

PUBLISHED = {f"{family}_{size}" for family in ("dfformer", "cdfformer") for size in ("s18", "s36", "m36", "b36")}
SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}


# Functions


@pytest.mark.parametrize("name", VARIANTS)
def test_every_name_is_a_documented_function(name: str) -> None:
    function = getattr(dfformer, name)
    assert inspect.isfunction(function)
    assert function.__name__ == function.__code__.co_name == name  # its own `def`, which editors can jump to
    assert list(inspect.signature(function).parameters) == ["pretrained", "kwargs"]
    assert function.__doc__
    assert name in dfformer.__all__
    assert timm.model_entrypoint(name) is function


def test_a_function_builds_what_create_model_does() -> None:
    arguments: dict[str, Any] = {"num_classes": 5, **SMALL}
    torch.manual_seed(0)
    ours = dfformer.cdfformer_s18(**arguments)
    torch.manual_seed(0)
    theirs = timm.create_model("cdfformer_s18", **arguments)
    assert type(ours) is type(theirs) is DFFormer
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_the_class_does_not_shadow_timms() -> None:
    namespace: dict[str, Any] = {}
    exec("from timm.models.metaformer import *\nfrom dfformer import *", namespace)
    assert namespace["MetaFormer"] is timm.models.metaformer.MetaFormer
    assert "MetaFormer" not in dir(dfformer)


# Weights


@pytest.mark.parametrize("name", VARIANTS)
def test_pretrained_cfg(name: str) -> None:
    model = on_meta(name)
    cfg = model.pretrained_cfg
    url = f"https://github.com/okojoalg/dfformer/releases/download/weights/{name}.pth"
    assert cfg["url"] == (url if name in PUBLISHED else "")
    assert cfg["input_size"] == (3, 224, 224)
    assert cfg["num_classes"] == model.get_submodule(cfg["classifier"]).out_features == 1000
    assert model.get_submodule(cfg["first_conv"]).in_channels == 3
    assert timm.is_model(name)


@pytest.mark.parametrize("error", [URLError("no route"), TimeoutError("slow"), ConnectionResetError("cut")], ids=str)
def test_download_that_fails_says_what_to_do(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", no_network)
    with pytest.raises(RuntimeError, match=r"pretrained_cfg_overlay=dict\(file=") as raised:
        small("cdfformer_s18", pretrained=True)
    assert "https://github.com/okojoalg/dfformer/releases/download/weights/cdfformer_s18.pth" in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("name", sorted(set(KINDS) - PUBLISHED))
def test_pretrained_without_weights(name: str) -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        small(name, pretrained=True)


@pytest.mark.parametrize("name", ["dfformer_s18", "cdfformer_s18", "gfformer_s18"])
def test_checkpoint_adapted_to_images_and_classes(name: str, tmp_path: Path) -> None:
    stored = small(name, num_classes=1000)
    file = tmp_path / "weights.pth"
    torch.save(stored.state_dict(), file)
    weights = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}
    model = small(name, img_size=(96, 70), in_chans=1, **weights)

    # timm sums the colours' weights for grey images, and drops a classifier of another width
    first = "downsample_layers.0.conv.weight"
    adapted = {first, *(key for key in stored.state_dict() if key.endswith("complex_weights") or "head.fc2" in key)}
    assert relative_error(model.state_dict()[first], stored.state_dict()[first].sum(1, keepdim=True)) < ERROR
    assert model.head.fc2.weight.shape == (CLASSES, 4 * DIMS[-1])
    for key in stored.state_dict().keys() - adapted:
        assert torch.equal(model.state_dict()[key], stored.state_dict()[key])

    grey = images(96, 70, channels=1)
    expected = stored.forward_features(grey.expand(-1, 3, -1, -1))
    assert relative_error(model.forward_features(grey), expected) < ERROR


def test_checkpoint_of_the_same_shape_is_loaded_whole(tmp_path: Path) -> None:
    stored = small(num_classes=1000)
    file = tmp_path / "weights.pth"
    torch.save(stored.state_dict(), file)
    model = small(num_classes=1000, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    assert torch.equal(model(x := images()), stored(x))


# Beside code that registers the same names


class Other(nn.Module):
    """What the other code's functions build."""


OTHER_CODE = """
def dfformer_s18(pretrained=False, **kwargs):
    return Other()

def gfformer_s18(pretrained=False, **kwargs):
    return Other()
"""


@pytest.fixture
def others() -> Iterator[list[Any]]:
    """Functions of another module under two of the names; the registry is this package's again afterwards."""
    module = types.ModuleType("models.other")
    namespace: dict[str, Any] = {}
    exec(OTHER_CODE, {"Other": Other}, namespace)
    for function in namespace.values():
        function.__module__ = module.__name__
    sys.modules[module.__name__] = module
    yield list(namespace.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        register_models()
    del sys.modules[module.__name__]


def test_the_last_to_register_has_the_names(others: list[Any]) -> None:
    for function in others:
        with pytest.warns(UserWarning, match=f"Overwriting {function.__name__} in registry"):  # timm's own
            timm.models.register_model(function)
    assert isinstance(timm.create_model("dfformer_s18"), Other)
    assert isinstance(timm.create_model("dfformer_s36", **SMALL), DFFormer)  # names of ours alone
    assert isinstance(dfformer.dfformer_s18(**SMALL), DFFormer)


def test_names_are_taken_over_with_one_warning(others: list[Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for function in others:
            timm.models.register_model(function)
    with pytest.warns(UserWarning, match="timm.create_model now builds") as caught:
        register_models()
    [message] = [str(warning.message) for warning in caught]
    assert message == (
        "timm.create_model now builds dfformer's dfformer_s18, gfformer_s18, not those registered by models.other"
    )
    model: Any = timm.create_model("dfformer_s18", **SMALL)
    assert model.pretrained_cfg["url"].endswith("dfformer_s18.pth")
    assert isinstance(model, DFFormer)


def test_registering_again_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_models()


# Scripts

SCRIPT = """
import argparse
import sys
import timm
import beside

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--model")
    arguments = parser.parse_args()
    model = timm.create_model(arguments.model, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    print(beside.VALUE, arguments.data, type(model).__name__, sys.argv)
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    (tmp_path / "beside.py").write_text("VALUE = 'beside the script'\n")
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_runs_with_the_names_known(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(script), "DATA", "--model", "dfformer_s18_k2"]
    runner.main(arguments)
    assert capsys.readouterr().out == f"beside the script DATA DFFormer {arguments}\n"


def test_a_module_runs_with_the_names_known(
    script: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(script.parent))
    runner.main(["-m", "train", "DATA", "--model", "gfformer_s18"])
    assert capsys.readouterr().out.startswith("beside the script DATA DFFormer ")


def test_help_of_the_runner(capsys: pytest.CaptureFixture[str]) -> None:
    runner.main(["--help"])
    assert capsys.readouterr().out == runner.USAGE + "\n"


@pytest.mark.parametrize("arguments", [[], ["-m"], ["--unknown"], ["missing.py", "DATA"]], ids=str)
def test_no_script(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        runner.main(arguments)
    assert str(stopped.value).endswith(runner.USAGE)
    assert str(stopped.value).startswith("SCRIPT: got missing.py, which is not a file") == ("missing.py" in arguments)


def test_python_dash_m(script: Path) -> None:
    """In a process of its own, through the package's name, from another folder; the script's exit status is its."""
    script.write_text(f"{SCRIPT}    raise SystemExit(7)\n")
    command = [sys.executable, "-m", "dfformer.timm", str(script), "DATA", "--model", "cdfformer_s18"]
    environment = {**os.environ, "PYTHONPATH": str(Path(dfformer.__file__).parents[1])}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=script.parents[1], env=environment)
    assert ended.returncode == 7, ended.stderr
    assert ended.stdout.startswith("beside the script DATA DFFormer ")
