"""Checkpoints: what loads, what is refused, and what the error says."""

import io
import json
import pickle
import re
import tarfile
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from small_models import Malicious
from torch import Tensor, nn

from dfformer.models.checkpoint import (
    CheckpointError,
    convert,
    load_checkpoint,
    load_model,
    read_checkpoint,
    save_checkpoint,
)
from dfformer.models.filter_resize import resize_filter

ADVICE = re.compile("weights_only|safe_globals|trusted|arbitrary code|torch.load")
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
    assert not any(load_checkpoint(model, official))
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


def test_the_arguments_in_the_wrong_order(official: Path) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got PosixPath"):
        load_checkpoint(official, small())  # type: ignore[arg-type]


def test_other_number_of_classes_keeps_all_but_the_last_layer(official: Path) -> None:
    model = small(num_classes=3)
    before = model.get_parameter("head.fc2.weight").clone()
    with torch.no_grad():
        model.get_parameter("head.fc1.weight").zero_()
    mismatch = load_checkpoint(model, official)
    assert mismatch.reinitialised == ["head.fc2.bias", "head.fc2.weight"]
    assert str(mismatch) == "left as initialised (2): head.fc2.bias, head.fc2.weight"
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
    assert equal(read_checkpoint(tmp_path / "wrapped.pth")[0], dict(expected))


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


CAUSES: dict[str, tuple[dict[str, Any], str]] = {
    "depths": ({"depths": (1, 2, 1, 1)}, "depths differ: the checkpoint has 2 blocks in stage 1, the model 1"),
    "dims": ({"dims": (8, 12, 16, 16)}, "dims differ: the checkpoint has 12 channels in stage 1, the model 8"),
}


@pytest.mark.parametrize(("other", "cause"), CAUSES.values(), ids=CAUSES.keys())
def test_a_mismatch_names_its_cause(other: dict[str, Any], cause: str, tmp_path: Path) -> None:
    torch.save(small(**other).state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(small(), tmp_path / "other.pth")
    assert cause in str(raised.value).splitlines()[0]


@pytest.mark.parametrize(
    "names", [["fpn.encoder.stages_0.0.norm1.weight"], ["stages.0.blocks.0.norm1.weight", "head.fc1.bias"]], ids=str
)
def test_a_mismatch_with_another_kind_of_model(names: list[str], tmp_path: Path) -> None:
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="the checkpoint is of another kind of model;"):
        load_checkpoint(small(), tmp_path / "other.pth")


def test_a_mismatch_lists_ten_names_a_kind(tmp_path: Path) -> None:
    state_dict = {name: torch.zeros(99) for name in small().state_dict() if name.endswith("norm1.weight")}
    state_dict |= {f"extra.{n}\n": torch.zeros(1) for n in range(12)}
    torch.save(state_dict, tmp_path / "other.pth")
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(small(), tmp_path / "other.pth")
    _, missing, unexpected, wrong = str(raised.value).splitlines()
    absent = len(small().state_dict()) - 4
    assert missing.startswith(f"missing ({absent}): ")
    assert missing.endswith(f" and {absent - 10} more")
    assert unexpected.startswith("unexpected (12): extra.0\\n, ")
    assert unexpected.endswith(" and 2 more")
    assert (missing.count(", "), unexpected.count(", "), wrong.count("(checkpoint ")) == (9, 9, 4)


def _malicious(path: Path, **options: bool) -> None:
    torch.save({"a": torch.zeros(1), "b": Malicious(path.with_name("trap"))}, path, **options)


def _old_tar(path: Path) -> None:
    """As torch wrote before version 0.4: three pickles."""
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(Malicious(path.with_name("trap")))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def _torchscript(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"model/{name}", pickle.dumps(Malicious(path.with_name("trap"))))
        archive.writestr("model/version", "3\n")


def _compressed(path: Path) -> None:
    torch.save({"a": torch.zeros(2**16)}, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


UNSAFE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "numbers that torch does not take for data": (
        "is truncated or not a checkpoint",
        lambda path: path.write_bytes(pickle.dumps({"a": complex(1)})),
    ),
    "malicious": ("refused, because loading it would run code: it refers to .*mkdir", _malicious),
    "plain-malicious": (
        "is truncated or not a checkpoint",
        lambda path: path.write_bytes(pickle.dumps(Malicious(path.with_name("trap")))),
    ),
    "old-malicious": (
        "is truncated or not a checkpoint",
        lambda path: _malicious(path, _use_new_zipfile_serialization=False),
    ),
    "old-tar": ("expected a state dict written by torch.save, got the .tar format of torch before 0.4", _old_tar),
    "torchscript": ("expected a state dict written by torch.save, got a TorchScript archive", _torchscript),
    "zip-bomb": ("is compressed, [0-9]+ bytes from [0-9]+", _compressed),
    "expanded": ("'a' is not a strided", lambda path: torch.save({"a": torch.zeros(1).expand(2**38)}, path)),
    "sparse": ("'a' is not a strided", lambda path: torch.save({"a": torch.zeros(3).to_sparse()}, path)),
    "meta": ("'a' is not a strided", lambda path: torch.save({"a": torch.zeros(2**40, device="meta")}, path)),
}


@pytest.mark.parametrize(("message", "write"), UNSAFE.values(), ids=UNSAFE.keys())
def test_pickles_that_are_refused(message: str, write: Callable[[Path], Any], tmp_path: Path) -> None:
    """Without running code, and without torch's advice to load them all the same."""
    path = tmp_path / "evil.pth.tar"
    write(path)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_checkpoint(path)
    told = "".join(traceback.format_exception_only(raised.value))
    assert not ADVICE.search(told)
    assert len(told) < 1000
    assert not (tmp_path / "trap").exists()


def test_pretrained_weights_that_are_refused(tmp_path: Path) -> None:
    """timm reads these; its advice is not passed on."""
    torch.save({"state_dict": Malicious(tmp_path / "trap")}, tmp_path / "evil.pth")
    with pytest.raises(RuntimeError, match="the pretrained weights of dfformer_s18 were refused: ") as raised:
        small(pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "evil.pth")})
    assert not ADVICE.search("".join(traceback.format_exception(raised.value)).split("RuntimeError: ")[-1])
    assert not (tmp_path / "trap").exists()


def _entry(first: int, last: int, shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape or [(last - first) // 4], "data_offsets": [first, last]}


HEADERS: dict[str, bytes] = {
    "huge": (2**63).to_bytes(8, "little") + b"{}",
    "longer-than-the-file": (2**20).to_bytes(8, "little") + b"{}",
    **{
        name: len(text := json.dumps(header).encode()).to_bytes(8, "little") + text + bytes(16)
        for name, header in {
            "overlapping": {"a": _entry(0, 16), "b": _entry(8, 16)},
            "same-place": {"a": _entry(0, 16), "b": _entry(0, 16)},
            "beyond-the-end": {"a": _entry(0, 64)},
            "hole": {"a": _entry(0, 4), "b": _entry(12, 16)},
            "huge-shape": {"a": _entry(0, 16, [2**31, 2**31])},
            "overflowing-shape": {"a": _entry(0, 16, [2**62, 4])},
            "negative": {"a": _entry(-4, 12)},
            "no-dtype": {"a": {"shape": [4], "data_offsets": [0, 16]}},
            "unknown-dtype": {"a": {**_entry(0, 16), "dtype": "F99"}},
        }.items()
    },
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS.keys())
def test_headers_of_safetensors_that_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: is truncated or not a safetensors file"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the order of arguments; safetensors writes the entries of its metadata in an order of chance."""
    contents = set()
    for n in range(8):
        arguments = dict(reversed(SMALL.items())) if n % 2 else SMALL
        path = tmp_path / f"{n}.safetensors"
        save_checkpoint(small(), path, "dfformer_s18", arguments, list("abcde"), {"crop_pct": 0.5})
        contents.add(path.read_bytes())
    assert len(contents) == 1


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "text": lambda content: b"not found: 404\n",
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_broken_files(tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"broken{suffix}"
    save: Any = torch.save if suffix == ".pth" else safetensors.torch.save_file
    save(small().state_dict(), path)
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
    with pytest.raises(ValueError, match=r"target: expected a name ending in \.safetensors"):
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
