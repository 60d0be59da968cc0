"""Restoration on tiny models: tiles against whole images, its command line from training to pictures, refusals."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import require
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from torchvision.transforms import v2
from train_runs import assert_resumes, evaluated, history

from dfformer.cli.main import main
from dfformer.tasks.restoration import enlarged_only, load_restorer, quality, restore
from dfformer.tasks.restorer import Restorer, SelfEnsemble, enlarged, tiled

SMALL: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [16, 16, 16, 16], "strides": [2, 2, 2, 2]}
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")

# A run of seconds: 2 epochs of 12 steps.
TINY: dict[str, Any] = {
    "task": "restore",
    "model": {"name": "cdfformer_s18", "args": SMALL},
    "data": {"img_size": 32, "workers": 0},
    "restore": {"noise": 40.0, "crops": 16, "channels": 16, "blocks": 1},
    "optim": {"lr": 4e-3, "global_batch": 8, "epochs": 2, "cooldown_epochs": 0, "warmup_epochs": 0.2, "clip_grad": 1.0},
    "log_steps": 1,
}
TINY["optim"]["weight_decay"] = 0.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six pieces of one photograph to train on, three of the other to validate, of several sizes."""
    for split, pixels, count in zip(("train", "val"), load_sample_images().images, (6, 3), strict=True):
        folder = tmp_path / "photographs" / "targets" / split
        folder.mkdir(parents=True)
        for n in range(count):
            piece = np.array(pixels)[140 : 180 + n, 60 * n : 60 * n + 55]
            Image.fromarray(piece).save(folder / f"{n}.png")
    return tmp_path / "photographs"


class Local(nn.Module):
    """Enlarges, then looks at most ``reach`` pixels around."""

    def __init__(self, scale: int, reach: int) -> None:
        super().__init__()
        self.scale, self.conv = scale, nn.Conv2d(3, 3, 2 * reach + 1, padding=reach)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        restored: torch.Tensor = self.conv(images.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3))
        return restored


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("size", [(61, 33), (20, 130), (7, 9)])
def test_tiles_are_the_whole_image_where_the_model_is_local(scale: int, size: tuple[int, int]) -> None:
    """It reaches no further than a sixteenth of a tile."""
    model, image = Local(scale, reach=2), torch.rand(3, *size)
    with torch.no_grad():
        whole = model(image[None])[0]
        torch.testing.assert_close(tiled(model, image, scale, (32, 48), at_once=3), whole)
        if max(size) > 48:  # and a model that reaches further shows that these are tiles
            far = Local(scale, reach=9)
            assert (tiled(far, image, scale, (32, 48)) - far(image[None])[0]).abs().max() > 1e-3


@pytest.mark.parametrize("tile", [(1, 1), (2, 5), (4, 3)], ids=str)
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_the_smallest_tiles(scale: int, tile: tuple[int, int]) -> None:
    """Of one pixel of the input there are some that no other tile overlaps."""
    image = torch.rand(3, 5, 7)
    model = nn.Upsample(scale_factor=scale)
    torch.testing.assert_close(tiled(model, image, scale, tile), model(image[None])[0])


def test_tiles_of_different_results_join_without_a_step() -> None:
    """As of a filter that sees all of its tile: here each tile is one colour."""
    image = torch.rand(3, 40, 70)
    result = tiled(lambda tiles: torch.rand(len(tiles), 3, 1, 1).expand_as(tiles), image, 1, (32, 32))  # type: ignore[arg-type]
    assert result.max() - result.min() > 0.3
    steepest = 2 / 8  # of the weights, where tiles overlap by 8
    for axis in (1, 2):
        assert result.diff(dim=axis).abs().max() <= steepest * (result.max() - result.min()) * 1.01


@pytest.mark.parametrize(
    ("stride", "strides"), [(1, [1, 2, 2, 2]), (2, [2, 2, 2, 2]), (1, [4, 2, 2, 2]), (3, [3, 2, 1, 4])]
)
def test_any_size_begins_with_the_enlarged_input_and_every_parameter_learns(stride: int, strides: list[int]) -> None:
    torch.manual_seed(0)  # with one of twelve seeds the few hidden units of a routing are all off
    side = math.prod([stride, *strides])
    arguments = {**SMALL, "strides": strides, "img_size": [2 * side, side]}
    model = Restorer("dfformer_s18", arguments, 2, [0.5] * 3, [0.25] * 3, channels=8, stride=stride, blocks=1)
    assert model.encoder.model.stages[-1][-1].token_mixer.size == (2, 1)
    images = torch.rand(2, 3, 11, 17)
    assert torch.equal(model(images), enlarged(images, 2))
    nn.init.normal_(model.correction.weight)
    model.set_grad_checkpointing()
    model(torch.rand(2, 3, 32, 16)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_only_the_inputs_of_branches_are_normalised() -> None:
    arguments = {**SMALL, "img_size": 32}
    model = Restorer("cdfformer_s18", arguments, 1, [0.5] * 3, [0.25] * 3, channels=8, blocks=1)
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * 7
    assert all(name.rpartition(".")[2] in ("norm1", "norm2") for name in norms)


def test_a_self_ensemble_averages_over_turns_and_mirror_images() -> None:
    """The mean of what a direction makes of an image knows no direction; each result is turned back to its place."""
    model = Local(scale=2, reach=1)
    kernel = model.conv.weight.detach().clone()
    image = torch.rand(1, 3, 6, 9)
    with torch.no_grad():
        result = SelfEnsemble(model)(image)
        ways = [turned.rot90(turns, (2, 3)) for turned in (kernel, kernel.mT) for turns in range(4)]
        model.conv.weight.copy_(torch.stack(ways).mean(0))
        torch.testing.assert_close(result, model(image))


def test_quality() -> None:
    """Both sums by hand: a difference of 10 levels everywhere; the same image."""
    image = torch.randint(0, 240, (3, 20, 30), dtype=torch.uint8)
    psnr, ssim = quality(image + 10, image)
    assert psnr == pytest.approx(20 * np.log10(25.5))
    assert 0.9 < ssim < 1
    assert quality(image, image) == (float("inf"), pytest.approx(1))


def test_an_output_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="the model's output is not finite"):
        restore(Broken(), torch.zeros(3, 8, 8), 1, (8, 8), CPU)


class Broken(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images / 0


def test_train_evaluate_and_predict(
    command: list[str], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Noise of 40 levels is less after 24 steps: by 2.9 dB, less or more where sums are rounded in another order."""
    run, out = tmp_path / "run", tmp_path / "out"
    assert main([*command, "--output", str(run)]) == 0
    last = {name: float(value) for name, value in history(run)[-1].items()}
    assert f"best psnr {last['psnr']:.2f} dB after epoch 2" in capsys.readouterr().out
    assert last["psnr"] - last["input_psnr"] == pytest.approx(2.9, abs=0.7)
    assert last["ssim"] > last["input_ssim"]
    assert np.asarray(Image.open(run / "predictions.png").convert("L")).std() > 5

    checkpoint, report = str(run / "last.safetensors"), tmp_path / "report.json"
    row, larger = evaluated(tmp_path, checkpoint, "--root", str(root), "--img-size", "32", "48x64")
    for name in ("psnr", "ssim", "input_psnr", "input_ssim"):
        assert float(row[name]) == pytest.approx(last[name]), name
    [ensemble] = evaluated(tmp_path, checkpoint, "--root", str(root), "--self-ensemble")
    assert float(ensemble["psnr"]) > float(row["psnr"]) + 0.01
    assert (row["self_ensemble"], ensemble["self_ensemble"]) == ("False", "True")
    assert (row["images"], row["tile_width"], larger["tile_height"], larger["tile_width"]) == ("3", "32", "48", "64")

    targets = root / "targets" / "val"
    (targets / "broken.png").write_bytes(b"")
    arguments = ["--checkpoint", checkpoint, "--output", str(out), "--json", str(report)]
    assert main(["predict", *arguments, str(targets)]) == 1
    assert {path.name for path in out.iterdir()} == {f"{n}{end}.png" for n in range(3) for end in ("", "_picture")}
    model, about = load_restorer(checkpoint)
    assert about["degradation"] == {"scale": 1, "blur": 0.0, "noise": 40.0}
    image = v2.functional.pil_to_tensor(Image.open(targets / "1.png"))
    expected = restore(model, image, 1, (32, 32), CPU)
    assert np.array_equal(np.asarray(Image.open(out / "1.png")), expected.permute(1, 2, 0).numpy())
    said = json.loads(report.read_text())
    [change] = next(p for p in said["predictions"] if p["path"].endswith("1.png"))["top"]
    assert change["share"] == pytest.approx((expected.float() - image).abs().mean().item() / 255)
    assert [Path(e["path"]).name for e in said["errors"]] == ["broken.png"]


@pytest.mark.slow  # segmentation resumes the same way
def test_resuming_amid_an_epoch_is_exact(command: list[str], tmp_path: Path) -> None:
    assert_resumes([*command, "--save_steps", "5"], tmp_path, step=20)


MISUSES = {
    "dataset": (["--data.dataset", "torch/voc"], "dataset: for restoration, expected ''"),
    "nothing": (["--restore.noise", "0"], "to generate inputs, set restore.scale"),
    "scale": (["--restore.scale", "3"], "data.img_size: expected multiples of restore.scale=3, got 32"),
    "small": (["--data.img_size", "48"], "expected 48x48 or larger, got 55x40"),
    "encoder": (
        ["--model.name", "convnext_atto", "--model.args", "{}"],
        "for restoration, expected a model of this",
    ),
    "pretrained": (["--model.args.pretrained", "true"], "model.args.pretrained: restoration cannot start from"),
}


@pytest.mark.parametrize(("arguments", "message"), MISUSES.values(), ids=MISUSES.keys())
def test_misuses(
    arguments: list[str], message: str, command: list[str], refusal: Callable[[Sequence[str]], str]
) -> None:
    assert message in refusal([*command, *arguments])


def test_colours_of_files_are_kept(command: list[str], root: Path, refusal: Callable[[Sequence[str]], str]) -> None:
    shutil.copytree(root / "targets", root / "inputs")
    settings = ["--restore.noise", "0", "--restore.photometric", "true"]
    assert "restore.photometric: expected false, because inputs are files" in refusal([*command, *settings])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "steps", "gain"), [("restore_photographs", 360, 0.8), ("denoise_photographs", 90, 7.5)]
)
def test_recipes_on_photographs(recipe: str, steps: int, gain: float, tmp_path: Path) -> None:
    """As the documentation says, less what rounding may change; of denoising a short run."""
    require("skimage", find_spec("skimage") is not None, "no scikit-image: pip install 'dfformer[dense]'")
    run, crops = tmp_path / "run", steps * 8 // 9
    length = ["--optim.epochs", "1", "--optim.warmup_epochs", "0.1", "--restore.crops", str(crops)]
    assert main(["train", "--recipe", recipe, "--output", str(run), *length]) == 0
    last = history(run)[-1]
    assert float(last["psnr"]) > float(last["input_psnr"]) + gain


def test_what_is_compared_with_is_pillows_bicubic() -> None:
    """Which clips between its two passes: not at these values."""
    image = torch.randint(80, 170, (3, 12, 15), dtype=torch.uint8)
    pillow = v2.functional.to_pil_image(image).resize((30, 24), Image.Resampling.BICUBIC)
    assert np.abs(enlarged_only(image, 2).permute(1, 2, 0).numpy().astype(int) - np.asarray(pillow)).max() <= 1
