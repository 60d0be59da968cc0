"""Checkpoints: what loads, what is refused, and what the error says."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import dfformer  # noqa: F401 (registers the models)
from dfformer.models.checkpoint import (
    CheckpointError,
    convert,
    load_checkpoint,
    load_model,
    read_checkpoint,
    save_checkpoint,
)
from dfformer.models.filter_resize import resize_filter

SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "img_size": 64, "num_classes": 5}


def small(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("dfformer_s18", **{**SMALL, **overrides}).eval()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A synthetic checkpoint with the official names, as the authors' training script would write it."""
    path = tmp_path / "official.pth"
    torch.save(small().state_dict(), path)
    return path


def test_official_checkpoint_loads_strictly(official: Path) -> None:
    torch.manual_seed(1)
    model = timm.create_model("dfformer_s18", **SMALL)
    mismatch = load_checkpoint(model, official)
    assert not any(mismatch)
    assert equal(model.state_dict(), small().state_dict())


@pytest.mark.parametrize("rule", ["bicubic", "fourier"])
def test_filters_are_resized_to_the_requested_image_size(official: Path, rule: str) -> None:
    model = small(img_size=(96, 160), resize=rule)
    load_checkpoint(model, official)
    name = "stages.0.0.token_mixer.complex_weights"
    expected = resize_filter(small().state_dict()[name], (16, 16), (24, 40), rule)
    assert torch.equal(model.state_dict()[name], expected)


def test_timm_loads_the_same_through_checkpoint_path(official: Path) -> None:
    model = timm.create_model("dfformer_s18", checkpoint_path=str(official), **{**SMALL, "img_size": 96})
    expected = small(img_size=96)
    load_checkpoint(expected, official)
    assert equal(model.state_dict(), expected.state_dict())


def test_other_number_of_classes_keeps_all_but_the_last_layer(official: Path) -> None:
    model = small(num_classes=3)
    before = model.get_parameter("head.fc2.weight").clone()
    with torch.no_grad():
        model.get_parameter("head.fc1.weight").zero_()
    mismatch = load_checkpoint(model, official)
    assert mismatch.reinitialised == ["head.fc2.bias", "head.fc2.weight"]
    assert torch.equal(model.get_parameter("head.fc2.weight"), before)
    assert torch.equal(model.get_parameter("head.fc1.weight"), small().get_parameter("head.fc1.weight"))


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "timm": lambda sd: {"state_dict": sd, "epoch": 3, "arch": "dfformer_s18"},
    "model": lambda sd: {"model": sd},
    "averaged-weights-win": lambda sd: {"state_dict": {k: v * 0 for k, v in sd.items()}, "state_dict_ema": sd},
    "ddp": lambda sd: {f"module.{k}": v for k, v in sd.items()},
    "compiled": lambda sd: {f"_orig_mod.{k}": v for k, v in sd.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_wrapped_state_dicts(tmp_path: Path, wrap: Callable[[dict[str, Tensor]], Any]) -> None:
    expected = small().state_dict()
    torch.save(wrap(expected), tmp_path / "wrapped.pth")
    state_dict, _ = read_checkpoint(tmp_path / "wrapped.pth")
    assert equal(state_dict, dict(expected))


def test_mismatch_lists_missing_unexpected_and_wrongly_shaped_names(tmp_path: Path) -> None:
    state_dict = small().state_dict()
    del state_dict["norm.bias"]
    state_dict["extra.weight"] = torch.zeros(1)
    state_dict["stages.1.0.norm1.weight"] = torch.zeros(9)
    state_dict["stages.0.0.token_mixer.complex_weights"] = torch.zeros(16, 9, 3, 2)  # three filters instead of four
    torch.save(state_dict, tmp_path / "bad.pth")
    model = small()
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(model, tmp_path / "bad.pth")
    for line in (
        "missing (1): norm.bias",
        "unexpected (1): extra.weight",
        "stages.1.0.norm1.weight (checkpoint (9,), model (8,))",
        "stages.0.0.token_mixer.complex_weights (checkpoint (16, 9, 3, 2), model (16, 9, 4, 2))",
    ):
        assert line in str(raised.value)
    assert equal(model.state_dict(), small().state_dict()), "nothing was loaded before the error"
    mismatch = load_checkpoint(model, tmp_path / "bad.pth", strict=False)
    assert (mismatch.missing, mismatch.unexpected, len(mismatch.wrong_shape)) == (["norm.bias"], ["extra.weight"], 2)


class Malicious:
    """Unpickled freely, this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"state_dict": Malicious(trap)}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"refused, because loading it would run code.*mkdir"):
        read_checkpoint(tmp_path / "evil.pth")
    (tmp_path / "evil_plain.pth").write_bytes(pickle.dumps(Malicious(trap)))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "evil_plain.pth")
    assert not trap.exists()


BROKEN: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "truncated-pth": (".pth", lambda content: content[: len(content) // 2]),
    "truncated-safetensors": (".safetensors", lambda content: content[: len(content) // 2]),
    "empty-pth": (".pth", lambda content: b""),
    "empty-safetensors": (".safetensors", lambda content: b""),
    "text-pth": (".pth", lambda content: b"not found: 404\n"),
    "text-safetensors": (".safetensors", lambda content: b"not found: 404\n"),
}


@pytest.mark.parametrize(("suffix", "damage"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_files(tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"broken{suffix}"
    if suffix == ".pth":
        torch.save(small().state_dict(), path)
    else:
        safetensors.torch.save_file(small().state_dict(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"broken{suffix}: is (truncated or )?not? a?"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], {}], ids=["numbers", "list", "empty"])
def test_files_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_checkpoint(tmp_path / "other.pth")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist"):
        read_checkpoint(tmp_path / "nowhere.pth")


def test_convert(official: Path, tmp_path: Path) -> None:
    target = tmp_path / "folder" / "converted.safetensors"
    assert convert(official, target) == len(small().state_dict())
    assert equal(read_checkpoint(target)[0], dict(small().state_dict()))
    with pytest.raises(ValueError, match=r"target: got .*\.safetensors"):
        convert(official, tmp_path / "converted.bin")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(small(), path, "dfformer_s18", SMALL)
    before = path.read_bytes()

    def fail(*args: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(small(), path, "dfformer_s18", SMALL)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_save_and_load_model(tmp_path: Path) -> None:
    model, x = small(), torch.randn(2, 3, 64, 64)
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path, "dfformer_s18", SMALL, list("abcde"), {"mean": (0.5,) * 3, "std": (0.2,) * 3})
    loaded, classes = load_model(path)
    assert classes == list("abcde")
    config: Any = loaded.pretrained_cfg
    assert tuple(config["mean"]) == (0.5,) * 3
    assert torch.equal(loaded(x), model(x))
    larger, _ = load_model(path, img_size=96)
    assert larger.get_parameter("stages.0.0.token_mixer.complex_weights").shape[:2] == (24, 13)


def test_load_model_needs_an_architecture(official: Path) -> None:
    with pytest.raises(CheckpointError, match="does not say which model"):
        load_model(official)
    arguments = {key: value for key, value in SMALL.items() if key != "num_classes"}  # read off the head
    model, classes = load_model(official, "dfformer_s18", **arguments)
    assert (model.num_classes, classes) == (5, None)
