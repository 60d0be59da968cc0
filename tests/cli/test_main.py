"""The command line, run as a user would, and what it counts."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from dfformer import VARIANTS
from dfformer.cli import doctor
from dfformer.cli.main import main
from dfformer.models.checkpoint import read_checkpoint, save_checkpoint
from dfformer.utils.profile import profile, saved_for_backward
from dfformer_kernels import dispatch
from dfformer_kernels.backends import cpu
from dfformer_kernels.tolerance import BOUND

SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "img_size": 32, "num_classes": 3}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    data = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    save_checkpoint(
        timm.create_model("dfformer_s18", **SMALL), path, "dfformer_s18", SMALL, ["ant", "bee", "cat"], data
    )
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with three good images (one grey, one with transparency), a broken one and a text file."""
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 4), dtype=np.uint8)
    Image.fromarray(pixels[..., :3]).save(folder / "a.jpg")
    Image.fromarray(pixels[..., 0]).save(folder / "b.png")
    Image.fromarray(pixels).save(folder / "deeper" / "c.PNG")
    (folder / "broken.png").write_bytes((folder / "b.png").read_bytes()[:100])
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_info_names_versions_backends_and_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--img-size", "64x96"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*VARIANTS, torch.__version__, timm.__version__, "cpu kernels"))
    assert "models at 64x96" in printed
    assert "16x24x64" in printed


def test_info_says_why_a_backend_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "the compiled core is hidden"
    hidden = dispatch.Backend("cpu", "cpu", cpu.KERNELS, lambda: [reason])
    monkeypatch.setattr(dispatch, "TABLE", (hidden, *dispatch.TABLE[1:]))
    assert main(["info", "--img-size", "32"]) == 0
    assert f"no: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["0", "12x", "axb", "1x2x3"])
def test_bad_sizes(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["info", "--img-size", size])
    assert stopped.value.code == 2
    assert repr(size) in capsys.readouterr().err


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "devices", lambda: [doctor.CPU])


@pytest.mark.usefixtures("no_gpu")
def test_doctor_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick"]) == 0
    assert "checks passed" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.usefixtures("no_gpu")
def test_doctor_fails_on_a_wrong_kernel(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = dispatch.by_name("torch")
    kernels = dict(real.kernels)
    # Right in float64, where the judge is, and off by 1e-4 in what is judged.
    kernels["global_filter"] = lambda x, *args: (
        real.kernels["global_filter"](x, *args) * (1 if x.dtype == torch.float64 else 1.0001)
    )
    wrong = dispatch.Backend("torch", None, kernels, list)
    monkeypatch.setattr(dispatch, "TABLE", (wrong,))
    monkeypatch.setattr(dispatch, "_BY_NAME", {"torch": wrong})
    monkeypatch.setattr(doctor, "QUICK_SHAPES", [(1, 4, 4, 3)])
    dispatch.select.cache_clear()
    try:
        assert main(["doctor", "--quick"]) == 1
    finally:
        dispatch.select.cache_clear()
    printed = capsys.readouterr().out
    failed = [line for line in printed.splitlines() if "FAILED: the bound" in line]
    assert len(failed) == 1
    assert "global_filter" in failed[0]
    assert "1 FAILED" in printed.splitlines()[-1]


class HereInsteadOfApart:
    """Runs everything in this process, where a test's patches are."""

    def __enter__(self) -> "HereInsteadOfApart":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, nothing: object, function: Callable[..., Any], *arguments: object) -> Any:
        return function(*arguments)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU examined as if it were a GPU on which every call takes two milliseconds."""

    def two_ms(run: Callable[[], object]) -> float:
        run()
        return 2.0

    shape = (2, 6, 5, 3)
    device = doctor.Device("cpu", tuple(BOUND), (shape,), (shape,), two_ms, checked_first=True)
    monkeypatch.setattr(doctor, "devices", lambda: [device])
    monkeypatch.setattr(doctor, "QUICK_SHAPES", [(1, 4, 4, 3)])
    monkeypatch.setattr(doctor, "_Apart", HereInsteadOfApart)


@pytest.mark.usefixtures("pretended_gpu")
def test_doctor_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """First everything is checked, then what passed is timed."""
    report = tmp_path / "doctor.json"
    assert main(["doctor", "--quick", "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    parts = ["dfformer:", "error y", "times on cpu", "automatic choice on cpu", "checks passed"]
    assert sorted(parts, key=printed.index) == parts
    content = json.loads(report.read_text())
    here = [b.name for b in dispatch.TABLE if b.device in (None, "cpu") and not b.unavailable_reasons()]
    assert content["passed"]
    assert content["environment"]["torch"] == torch.__version__
    assert len(content["checks"]) == len(here) * 2 * 4 * 3
    assert {c["forward_ms"] for c in content["checks"]} == {None}
    assert {t["contestant"] for t in content["times"]} == {*here, "torch.fft"}
    assert len(content["times"]) == (len(here) + 1) * 2 * 3
    (copy,) = content["copies"]
    copied = 2 * 2**28 / copy["gbps"]
    assert copied == pytest.approx(2e6)  # bytes at GB/s are nanoseconds
    for t in content["times"]:
        nbytes = 2 * 6 * 5 * 3 * (4 if t["dtype"] == "float32" else 2)
        of_copy = nbytes / (2 * 2**28)
        assert (t["forward_ms"], t["both_ms"]) == (2, 2)
        assert [t["forward_share"], t["both_share"]] == pytest.approx([2 * of_copy, 5 * of_copy])
    assert {(c["forward"], c["backward"]) for c in content["choices"]} == {(here[0], here[0])}


@pytest.mark.usefixtures("pretended_gpu")
def test_doctor_goes_on_after_a_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And does not time what failed."""

    def crash(*args: Any) -> None:
        raise RuntimeError("an illegal memory access\nof this thread")

    real = dispatch.by_name("torch")
    broken = dispatch.Backend("broken", None, {**real.kernels, "global_filter": crash}, list)
    monkeypatch.setattr(dispatch, "TABLE", (broken, real))
    monkeypatch.setattr(dispatch, "_BY_NAME", {"broken": broken, "torch": real})
    dispatch.select.cache_clear()
    report = tmp_path / "doctor.json"
    try:
        assert main(["doctor", "--quick", "--json", str(report)]) == 1
    finally:
        dispatch.select.cache_clear()
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if "FAILED: RuntimeError: an illegal memory access" in line]
    checks, choices = failed[:8], failed[8:]
    assert all(line.split()[:3] == ["broken", "cpu", "global_filter"] for line in checks)
    assert [line.split()[0] for line in choices] == 2 * ["global_filter"]
    assert lines[-1] == "40 of 48 checks passed, 10 FAILED"
    content = json.loads(report.read_text())
    assert {c["failure"] for c in content["checks"]} == {"", "RuntimeError: an illegal memory access\nof this thread"}
    timed = {(t["contestant"], t["op"]) for t in content["times"]}
    assert ("broken", "dynamic_filter") in timed
    assert ("broken", "global_filter") not in timed


@pytest.mark.usefixtures("pretended_gpu")
def test_doctor_without_a_compiler_for_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of ours has failed then."""

    def compiled(*inputs: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda run, **options: compiled)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("FAILED: RuntimeError: no compiler" in line for line in lines if line.startswith("torch.compile")) == 6


def test_gpu_times_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.testing", None)
    monkeypatch.setattr(doctor.Gpu, "seconds", lambda gpu, run, device: 0.25)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert doctor.GPU.median_ms(lambda: None) == 250


class Killer:
    """Unpickling it kills the process."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return os.abort, ()


def test_doctor_survives_a_process_that_crashes_and_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = dispatch.Problem("star_relu", "cpu", torch.float32, (1, 4, 4, 3), 0, True)
    nothing = doctor.Check("torch", "cpu", "star_relu", "float32", "1x4x4x3")
    with doctor._Apart() as apart:
        crashed = apart.run(nothing, doctor.check_backend, Killer(), problem)
        monkeypatch.setattr(doctor, "LIMIT_S", 0.5)
        hanging: Any = time.sleep
        hung = apart.run(nothing, hanging, 1000)
        monkeypatch.undo()
        checked = apart.run(nothing, doctor.check_backend, "torch", problem)
    assert crashed == nothing._replace(failure="its process crashed")
    assert hung == nothing._replace(failure="it hangs: no result after 0.5 s")
    assert not checked.failure
    assert checked.error_y <= 1e-6


@pytest.mark.usefixtures("pretended_gpu")
def test_doctor_names_what_hangs_and_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Hanging(HereInsteadOfApart):
        def run(self, nothing: Any, function: Callable[..., Any], *arguments: object) -> Any:
            timing = isinstance(nothing, doctor.Timing) and nothing.contestant == "torch" and nothing.op == "star_relu"
            hangs = timing or isinstance(nothing, doctor.Copy)
            return nothing._replace(failure="it hangs") if hangs else function(*arguments)

    monkeypatch.setattr(doctor, "_Apart", Hanging)
    assert main(["doctor", "--quick"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines if line.endswith("FAILED: it hangs")] == [
        ["times", "on", "cpu;"],
        *(["torch", "star_relu", dtype] for dtype in ("float32", "bfloat16")),
    ]
    assert lines[-1].endswith("checks passed, 3 FAILED")


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save({"state_dict": timm.create_model("dfformer_s18", **SMALL).state_dict()}, source)
    assert main(["convert", str(source), str(target)]) == 0
    assert f"wrote {len(read_checkpoint(target)[0])} tensors" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "absent.pth"), str(target)]) == 2
    assert "absent.pth does not exist" in capsys.readouterr().err
    assert target.stat().st_mode == source.stat().st_mode, "readable for whom other new files are"


def test_predict_goes_on_after_broken_files(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent, report = tmp_path / "absent.jpg", tmp_path / "new" / "out.json"
    arguments = ["predict", "--checkpoint", str(checkpoint), "--topk", "2", "--batch-size", "2", "--json", str(report)]
    assert main([*arguments, str(images), str(absent)]) == 1
    printed = capsys.readouterr()
    assert "2 of 5 images could not be read" in printed.err
    assert f"skipped {images / 'broken.png'}" in printed.err
    assert f"skipped {absent}" in printed.err
    content = json.loads(report.read_text())
    assert [Path(p["path"]).name for p in content["predictions"]] == ["a.jpg", "b.png", "c.PNG"]
    assert {Path(e["path"]).name for e in content["errors"]} == {"broken.png", "absent.jpg"}
    top = content["predictions"][0]["top"]
    assert len(top) == 2
    assert top[0]["probability"] >= top[1]["probability"] > 0
    assert all(entry["class"] in ("ant", "bee", "cat") for entry in top)
    assert top[0]["class"] in next(line for line in printed.out.splitlines() if "a.jpg" in line)


def test_predict_is_what_the_model_says(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    from timm.data import create_transform, resolve_model_data_config

    from dfformer.models.checkpoint import load_model

    report = tmp_path / "out.json"
    assert main(["predict", "--checkpoint", str(checkpoint), "--json", str(report), str(images / "a.jpg")]) == 0
    model, classes = load_model(checkpoint)
    assert classes is not None
    with Image.open(images / "a.jpg") as image, torch.no_grad():
        x = create_transform(**resolve_model_data_config(model), is_training=False)(image.convert("RGB"))
        expected = model(x[None]).softmax(-1)[0]
    [prediction] = json.loads(report.read_text())["predictions"]
    probabilities = {entry["class"]: entry["probability"] for entry in prediction["top"]}
    assert [probabilities[name] for name in classes] == pytest.approx(expected.tolist(), rel=1e-5)


def test_predict_at_another_size_and_with_class_names(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("x\ny\nz\n")
    arguments = ["predict", "--checkpoint", str(checkpoint), "--classes", str(names), str(images / "a.jpg")]
    assert main([*arguments, "--img-size", "48x64", "--topk", "1"]) == 0
    assert capsys.readouterr().out.split()[1] in "xyz"
    names.write_text("x\ny\n")
    assert main(arguments) == 2
    assert "--classes: got 2 names, the model has 3 classes" in capsys.readouterr().err


MISUSES = {
    "no-weights": (["--model", "dfformer_s18"], "untrained weights predict nothing"),
    "absent-checkpoint": (["--checkpoint", "absent.safetensors"], "absent.safetensors does not exist"),
    "topk-0": (["--checkpoint", "absent.safetensors", "--topk", "0"], "--topk"),
}


@pytest.mark.parametrize(("arguments", "message"), MISUSES.values(), ids=MISUSES.keys())
def test_predict_misused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", *arguments, "image.png"]) == 2
    assert message in capsys.readouterr().err


COMMANDS = [["predict", "image.png"], ["eval", "m.pth"], ["export", "m.onnx"], ["show", "filters"]]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_a_device_that_is_not_there(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--device", "cuda:99"])
    assert "argument --device: got 'cuda:99', which cannot be used here: " in capsys.readouterr().err


def test_predict_on_an_empty_folder(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["predict", "--checkpoint", str(checkpoint), str(tmp_path / "empty")]) == 2
    assert "no images in" in capsys.readouterr().err


# Linear and convolution multiply-adds at 224, as counted independently from the layer shapes (the paper's FLOPs).
GMACS = {"dfformer_s18": 3.79, "dfformer_s36": 7.35, "dfformer_m36": 12.45, "dfformer_b36": 22.10}
GMACS |= {"cdfformer_s18": 3.88, "cdfformer_s36": 7.53, "cdfformer_m36": 12.71, "cdfformer_b36": 22.46}
GMACS |= {"gfformer_s18": 3.79}


@pytest.mark.parametrize("name", GMACS)
def test_macs_without_the_spectral_part_are_the_papers(name: str) -> None:
    counted = profile(lambda: timm.create_model(name), (224, 224))
    assert round((counted.macs - counted.spectral_macs) / 1e9, 2) == GMACS[name]
    assert counted.spectral_macs > 0


def test_saved_bytes_are_the_same_on_meta_and_for_real() -> None:
    def make() -> torch.nn.Module:
        return timm.create_model("cdfformer_s18", **SMALL)

    measured = saved_for_backward(make().train(), torch.randn(1, 3, 32, 32))
    assert profile(make, (32, 32)).saved_bytes == measured
