"""What a checkpoint may say of its model: everything else is an error that names it, and nothing runs or is fetched."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from dense_models import DENSE, dense_checkpoint
from small_models import Malicious

import dfformer  # noqa: F401 (registers the models)
from dfformer.models.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_model,
    read_checkpoint,
    read_task,
    save_checkpoint,
)
from dfformer.models.description import DATA, MODEL_ARGS, parse_json
from dfformer.tasks.detection import load_detector
from dfformer.tasks.restoration import load_restorer
from dfformer.tasks.segmentation import Segmenter, load_segmenter

ARGS: dict[str, Any] = {"depths": [1, 1], "dims": [8, 8], "strides": [4, 2], "res_scale_init_values": [None, 1.0]}
ARGS |= {"img_size": 16, "num_classes": 2}
DESCRIPTION: dict[str, Any] = {"architecture": "dfformer_s18", "model_args": ARGS, "classes": ["ant", "bee"]}
DESCRIPTION |= {"data": {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.2] * 3}, "task": "classify"}
RESTORER_ARGS: dict[str, Any] = {"strides": (2, 2), "res_scale_init_values": (None, 1.0), "img_size": (32, 48)}
DENSE_ARGS: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "fork_feat": True, "img_size": (32, 48)}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return timm.create_model("dfformer_s18", **ARGS).state_dict()


@pytest.fixture
def trap(tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pickle that would make "sprung", in a process without a network."""
    torch.save({"state_dict": weights, "trap": Malicious(tmp_path / "sprung")}, tmp_path / "evil.pth")

    def offline(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something reached for the network")

    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, weights: dict[str, torch.Tensor], text: str) -> Path:
    path = folder / "innocent.safetensors"
    safetensors.torch.save_file(weights, path, {"dfformer": text})
    return path


def changed(**changes: Any) -> dict[str, Any]:
    return {**DESCRIPTION, **changes}


def with_args(**arguments: Any) -> dict[str, Any]:
    return changed(model_args={**ARGS, **arguments})


def with_data(**settings: Any) -> dict[str, Any]:
    return changed(data={**DESCRIPTION["data"], **settings})


# Of the wrong type, or out of bounds.
BAD_ARGS: dict[str, list[Any]] = {
    "depths": [[10**9], [0], [1] * 9, "11", [1.0], [True], [[1]], {}, None],
    "dims": [[2**40], [-8, 8], [], 8],
    "img_size": [0, -1, 4097, 10**6, [16, 16, 16], [16], "16", 16.0, True],
    "in_chans": [0, 10**7, "3"],
    "num_classes": [-1, 10**9, None],
    "drop_rate": [1.5, -0.1, "0.1", [0]],
    "global_pool": ["median", 1, ["avg"]],
    "strides": [[0, 2]],
    "resize": ["magic"],
    "fork_feat": [1],
}
BAD_DATA: dict[str, list[Any]] = {
    "mean": [[0.5], [0.5] * 4, [0.5, 0.5, "x"], [1e300] * 3, "abc"],
    "std": [[0, 1, 1], [-1, 1, 1], [1, 1]],
    "input_size": [[3, 16], [1, 16, 16], [3, 0, 16], [3, 16, 10**8]],
    "interpolation": ["random", "cubic", 3],
    "crop_pct": [0, 3, "1"],
}
BAD_ENTRIES: dict[str, list[Any]] = {
    "classes": ["ab", [], ["a", 1], ["a", ""], ["a", "\x1b[2J"], ["a", "\ud800"], {}, ["a"] * 3, ["a", "x" * 10_000]],
    "task": ["sing", None, 1, ["classify"], ""],
    "model_args": [[], "x", None],
    "data": [[], 1, None],
}
# Named by what the error must name.
REFUSED: list[tuple[str, dict[str, Any]]] = [
    # what reaches a pickle, a file or the network
    ("model_args.checkpoint_path", with_args(checkpoint_path="evil.pth")),
    ("model_args.pretrained", with_args(pretrained=True)),
    ("model_args.pretrained", with_args(pretrained="")),
    ("model_args.pretrained_cfg", with_args(pretrained_cfg={"file": "evil.pth"})),
    ("model_args.pretrained_cfg", with_args(pretrained_cfg="in1k")),
    ("model_args.pretrained_cfg_overlay", with_args(pretrained_cfg_overlay={"url": "http://127.0.0.1/evil.pth"})),
    ("model_args.cache_dir", with_args(cache_dir="/")),
    ("model_args.scriptable", with_args(scriptable=True)),
    ("model_args.token_mixers", with_args(token_mixers="os.system")),
    ("model_args.feature_cls", with_args(feature_cls="fx")),
    ("model_args.depthss", with_args(depthss=[1])),
    ("model_args.'__class__.x'", with_args(**{"__class__.x": 1})),
    *((f"data.{key}", with_data(**{key: "evil.pth"})) for key in ("file", "url", "hf_hub_id", "hf_hub_filename")),
    *((f"data.{key}", with_data(**{key: {}})) for key in ("state_dict", "custom_load", "source", "num_classes")),
    *(
        ("architecture", changed(architecture=name))
        for name in (
            *("hf-hub:timm/resnet18", "hf_hub:timm/resnet18", "local-dir:.", "LOCAL-DIR:x", "dfformer_s18.hf-hub:x/y"),
            *("./evil", "/evil", "..", "dfformer_s18/", "dfformer_s18\n", "dfformer_s18.", "", "nothing"),
            *(7, ["dfformer_s18"], {"a": 1}, "x" * 10_000),
        )
    ),
    ("its model cannot be built: RuntimeError", changed(architecture="dfformer_s18.no_such_tag")),
    *((f"model_args.{key}", with_args(**{key: value})) for key, values in BAD_ARGS.items() for value in values),
    *((f"data.{key}", with_data(**{key: value})) for key, values in BAD_DATA.items() for value in values),
    *((key, changed(**{key: value})) for key, values in BAD_ENTRIES.items() for value in values),
    ("decoder", changed(decoder={})),
    ("module", changed(module="os")),
]


@pytest.mark.parametrize(("key", "description"), REFUSED, ids=[f"{n}-{key}" for n, (key, _) in enumerate(REFUSED)])
def test_what_a_file_must_not_say(
    key: str, description: dict[str, Any], trap: Path, weights: dict[str, torch.Tensor]
) -> None:
    path = write(trap, weights, json.dumps(description))
    with pytest.raises(CheckpointError) as raised:
        load_model(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: {key}: ")
    assert len(message) < 1000
    assert "weights_only" not in message
    assert message.isprintable()
    assert not (trap / "sprung").exists()


TEXTS: dict[str, str] = {
    "not-json": "{'a': 1}",
    "empty": "",
    "half": json.dumps(DESCRIPTION)[:-5],
    "list": "[]",
    "number": "1",
    "null": "null",
    "nested-lists": "[" * 10_000 + "]" * 10_000,
    "nested-dicts": '{"a":' * 10_000 + "1" + "}" * 10_000,
    "nested-in-args": '{"model_args": {"depths": ' + "[" * 10_000 + "]" * 10_000 + "}}",
    "twice": '{"task": "classify", "task": "segment"}',
    "twice-inside": '{"model_args": {"img_size": 16, "img_size": 32}}',
    "nan": '{"model_args": {"drop_rate": NaN}}',
    "infinity": '{"data": {"mean": [Infinity, 0, 0]}}',
    "1e999": '{"data": {"mean": [1e999, 0, 0]}}',
    "400-digits": '{"model_args": {"img_size": ' + "9" * 400 + "}}",
    "minus-400-digits": '{"category_ids": [-' + "9" * 400 + "]}",
    "5000-digits": '{"model_args": {"img_size": ' + "9" * 5000 + "}}",
    "huge": '{"classes": ["' + "x" * (17 * 2**20) + '"]}',
    "nul": "\0",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_text_that_is_no_description(text: str, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = write(tmp_path, {"a": torch.zeros(1)}, text)
    for read in (read_checkpoint, read_task, load_model, load_segmenter, load_detector):
        with pytest.raises(CheckpointError, match=r"innocent\.safetensors: ") as raised:
            read(path)
        assert len(str(raised.value)) < 500


def test_text_that_is_not_json_is_said_to_be_the_description() -> None:
    with pytest.raises(ValueError, match=r"its description of the model is not JSON \(Expecting value"):
        parse_json("")


def test_a_million_equal_keys_take_no_time() -> None:
    text = "{" + ", ".join(f'"{n}": 1' for n in range(200_000)) + ', "5": 1}'
    with pytest.raises(ValueError, match="'5': is repeated"):
        parse_json(text)


def assert_refused(load: Callable[[Path], Any], path: Path, refused: list[tuple[str, dict[str, Any]]]) -> None:
    state_dict, description = read_checkpoint(path)
    for key, changes in refused:
        safetensors.torch.save_file(state_dict, path, {"dfformer": json.dumps({**description, **changes})})
        with pytest.raises(CheckpointError) as raised:
            load(path)
        assert str(raised.value).startswith(f"{path}: {key}: "), (key, str(raised.value))


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_dense_checkpoints(task: str, trap: Path) -> None:
    """Their own settings, and an encoder that is registered with timm, from neither a hub nor a folder."""
    load = load_segmenter if task == "segment" else load_detector
    path = dense_checkpoint(task, trap / "dense.safetensors", "dfformer_s18", DENSE_ARGS)
    model_args = read_checkpoint(path)[1]["model_args"]
    load(path)
    own = "decoder" if task == "segment" else "detector"
    refused: list[tuple[str, dict[str, Any]]] = [
        ("architecture", {"architecture": "hf-hub:timm/resnet18"}),
        ("architecture", {"architecture": "resnet18x"}),
        ("architecture", {"architecture": "tu-resnet18"}),
        ("architecture", {"architecture": None}),
        ("model_args.pretrained", {"model_args": {**model_args, "pretrained": True}}),
        ("model_args.checkpoint_path", {"model_args": {**model_args, "checkpoint_path": "evil.pth"}}),
        ("model_args.block", {"architecture": "resnet18", "model_args": {"block": "x"}}),
        ("model_args.pretrained", {"architecture": "resnet18", "model_args": {"pretrained": True}}),
        (f"{own}.encoder_weights", {own: {**DENSE[task][own], "encoder_weights": "imagenet"}}),
        (f"{own}.aux_params", {own: {**DENSE[task][own], "aux_params": {"classes": 1}}}),
        (own, {own: None}),
        (own, {own: "x"}),
        ("classes", {"classes": None}),
        ("data.mean", {"data": {"input_size": [3, 32, 48], "std": [1] * 3}}),
        ("data.input_size", {"data": {"input_size": [3, 32], "std": [1] * 3, "mean": [0] * 3}}),
    ]
    if task == "segment":
        refused += [("decoder.decoder_pyramid_channels", {own: {"decoder_pyramid_channels": 10**6}})]
        refused += [("reduce_zero_label", {"reduce_zero_label": 1}), ("category_ids", {"category_ids": [0, 1]})]
    else:
        refused += [("detector.channels", {own: {**DENSE[task][own], "channels": 10**6}})]
        refused += [("detector.norm_groups", {own: {"channels": 8, "anchor_scale": 2.0}})]
        refused += [("category_ids", {"category_ids": v}) for v in ([0], [1, 1], [0, 1.5], ["0", "1"], None)]
    assert_refused(load, path, refused)
    assert not (trap / "sprung").exists()


def test_checkpoints_of_restoration(trap: Path) -> None:
    path = trap / "restorer.safetensors"
    dense_checkpoint("restore", path, "dfformer_s18", {"depths": (1, 1), "dims": (8, 8), **RESTORER_ARGS})
    model_args = read_checkpoint(path)[1]["model_args"]
    load_restorer(path)
    undone = DENSE["restore"]["degradation"]
    refused: list[tuple[str, dict[str, Any]]] = [
        ("degradation.scale", {"degradation": {**undone, "scale": 10**6}}),
        ("degradation.noise", {"degradation": {"scale": 2, "blur": 0.0}}),
        ("restorer", {"restorer": None}),  # as written before there were convolutions around the U
        ("restorer.blocks", {"restorer": {"channels": 8, "stride": 2}}),
        ("restorer.channels", {"restorer": {"channels": 10**6, "stride": 2, "blocks": 1}}),
        ("degradation.gamma", {"degradation": {**undone, "gamma": 2}}),
        ("degradation", {"degradation": None}),
        ("classes", {"classes": ["one"]}),
        ("decoder", {"decoder": {}}),
        ("data.mean", {"data": {"input_size": [3, 32, 48], "std": [1] * 3}}),
        ("model_args.img_size", {"model_args": {**model_args, "img_size": 10**6}}),
        ("model_args.downsample_norm", {"model_args": {**model_args, "downsample_norm": None}}),
        ("its model cannot be built", {"architecture": "resnet18", "model_args": {"img_size": 32}}),
    ]
    assert_refused(load_restorer, path, refused)


def test_an_encoder_larger_than_its_file_is_never_allocated(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one of another kind: what a file says is compared with its weights on the meta device first."""
    path = dense_checkpoint("segment", trap / "dense.safetensors", "dfformer_s18", DENSE_ARGS)
    state_dict, description = read_checkpoint(path)
    description |= {"architecture": "resnet18", "model_args": {}}
    safetensors.torch.save_file(state_dict, path, {"dfformer": json.dumps(description)})
    with monkeypatch.context() as patch:
        real = Segmenter.__init__

        def outlined(self: Segmenter, *args: Any) -> None:
            real(self, *args)
            assert all(parameter.is_meta for parameter in self.parameters())

        patch.setattr(Segmenter, "__init__", outlined)
        with pytest.raises(CheckpointError, match="does not fit this Segmenter"):
            load_segmenter(path)
    large = {**ARGS, "img_size": 4096, "depths": [8, 1], "strides": [1, 2]}
    state_dict = timm.create_model("dfformer_s18", **{**large, "img_size": 16}).state_dict()
    path = write(trap, state_dict, json.dumps(changed(model_args=large, classes=None, data={})))
    with pytest.raises(CheckpointError, match="img_size: the model would have"):
        load_model(path)
    deep = {**ARGS, "depths": [128] * 8, "dims": [8] * 8, "strides": [1] * 8, "res_scale_init_values": [None] * 8}
    path = write(trap, state_dict, json.dumps(changed(model_args=deep, classes=None, data={})))
    monkeypatch.setattr(torch.nn.Module, "__init__", None)  # nothing is built at all
    with pytest.raises(CheckpointError, match=r"model_args\.depths: adds up to 1024 blocks, the file has"):
        load_model(path)


def test_the_caller_may_choose_another_model_and_trusted_arguments(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=2)
    path = tmp_path / "resnet.safetensors"
    save_checkpoint(model, path, "resnet10t", {"num_classes": 2}, ["a", "b"])
    with pytest.raises(CheckpointError, match=r"expected one of dfformer's models, got 'resnet10t'.*--model resnet10t"):
        load_model(path)
    loaded, classes = load_model(path, "resnet10t")
    assert classes == ["a", "b"]
    assert torch.equal(loaded.get_parameter("fc.weight"), model.get_parameter("fc.weight"))


def test_a_fresh_classifier_is_no_answer(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = write(tmp_path, weights, json.dumps(changed(classes=None)))
    with pytest.raises(CheckpointError, match="num_classes: the checkpoint's classifier has another number"):
        load_model(path, num_classes=3)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64], ids=str)
def test_numbers_of_another_kind(dtype: torch.dtype, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """As of a quantised checkpoint: torch would copy the integers, and drop the imaginary part."""
    kinds = {name: tensor.to(dtype) if name == "norm.weight" else tensor for name, tensor in weights.items()}
    path = write(tmp_path, kinds, json.dumps(DESCRIPTION))
    expected = f"with another number type .1.: norm.weight .checkpoint {str(dtype)[6:]}, model float32"
    with pytest.raises(CheckpointError, match=expected):
        load_model(path)
    model = timm.create_model("dfformer_s18", **ARGS)
    mismatch = load_checkpoint(model, path, strict=False)
    assert list(mismatch.wrong_type) == ["norm.weight"]
    assert model.get_parameter("norm.weight").eq(1).all(), "left as it was"


def test_everything_in_the_tables_can_be_saved_and_loaded(tmp_path: Path) -> None:
    arguments = {**ARGS, "in_chans": 2, "drop_rate": 0.5, "drop_path_rate": 1, "resize": "fourier"}
    arguments |= {"global_pool": "avgmax", "out_indices": [0, 1], "features_only": False, "fork_feat": False}
    del arguments["out_indices"], arguments["features_only"]  # of a model that is no classifier
    data: dict[str, Any] = {"input_size": (2, 16, 16), "mean": (0.5, 0), "std": (1, 0.25), "interpolation": "nearest"}
    data |= {"crop_pct": 0.5, "crop_mode": "border"}
    assert data.keys() == DATA.keys()
    assert arguments.keys() == MODEL_ARGS.keys() - {"out_indices", "features_only"}
    path = tmp_path / "model.safetensors"
    names = ["Żółw \N{TURTLE}", "joined\u200cwith nothing", "$x$"]
    model = timm.create_model("dfformer_s18", **{**arguments, "num_classes": 3})
    save_checkpoint(model, path, "dfformer_s18", {**arguments, "num_classes": 3}, names, data)
    loaded, classes = load_model(path)
    assert classes == names
    config: Any = loaded.pretrained_cfg
    assert (config["crop_mode"], list(config["mean"])) == ("border", [0.5, 0])


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("model_args.mlp_act", {"model_args": {"mlp_act": torch.nn.GELU}}),
        ("model_args.pretrained", {"model_args": {"pretrained": True}}),
        ("data.mean", {"data": {"mean": [0.5]}}),
        ("classes", {"classes": ["a\nb"]}),
        ("number that is not finite|not JSON compliant", {"data": {"crop_pct": float("nan")}}),
        ("category_idx", {"category_idx": [1]}),
        ("architecture", {"architecture": "hf-hub:a/b"}),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(key: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{key}|JSON's types"):
        save_checkpoint(
            {"a": torch.zeros(1)}, tmp_path / "a.safetensors", **{"architecture": "dfformer_s18", **arguments}
        )
    assert not list(tmp_path.iterdir())
