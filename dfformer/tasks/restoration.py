"""Image restoration by a `Restorer`: removes noise or blur, or enlarges; training, evaluation, prediction."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from dfformer.data.pairs import Degradation, InputAndTarget, RestorationTensors, open_pair_dataset
from dfformer.models.checkpoint import load_checkpoint
from dfformer.models.description import RESTORER
from dfformer.tasks.base import DenseTask, load_dense
from dfformer.tasks.evaluate import Measured, Timed, at_each_size, batches, dataset_spec, own_size
from dfformer.tasks.predict import File, Predictor, Top, checked
from dfformer.tasks.restorer import Restorer, SelfEnsemble, enlarged, tiled
from dfformer.tasks.results import result_paths, write_results
from dfformer.utils.device import DistContext
from dfformer.utils.extras import extra

with extra("dense"):
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dfformer.train.config import TrainConfig


def _restorer(description: dict[str, Any]) -> Restorer:
    images = description["degradation"]["scale"], description["data"]["mean"], description["data"]["std"]
    return Restorer(description["architecture"], description["model_args"], *images, **description["restorer"])


def load_restorer(path: str | Path) -> tuple[Restorer, dict[str, Any]]:
    """The model of a restoration checkpoint, in eval mode, and the file's description of it.

    The description has ``architecture`` and ``model_args`` of the encoder, ``data`` (mean, std and input_size, whose
    last two numbers are the tile's), ``restorer`` (channels, stride and blocks) and ``degradation`` (the scale, blur
    and noise that the model was trained to undo, see `dfformer.data.pairs.Degradation`).
    """
    return load_dense(path, "restore", _restorer)


def restore(
    model: nn.Module, image: Tensor, scale: int, tile: tuple[int, int], device: torch.device, at_once: int = 16
) -> Tensor:
    """Restores uint8 (3,H,W) to uint8 (3,scale*H,scale*W) on the CPU, tile by tile (see `tiled`).

    Raises ValueError if an output is not finite.
    """
    with torch.inference_mode():
        restored = tiled(model, image.to(device).float() / 255, scale, tile, at_once).cpu()
    return _eight_bits(checked(restored))


def enlarged_only(image: Tensor, scale: int) -> Tensor:
    """The baseline for `restore`: uint8 (3,H,W), enlarged bicubically."""
    return _eight_bits(enlarged(image[None] / 255, scale)[0])


def _eight_bits(pixels: Tensor) -> Tensor:
    return (255 * pixels).round().clamp(0, 255).to(torch.uint8)


def quality(image: Tensor, target: Tensor) -> tuple[float, float]:
    """PSNR in dB and SSIM of uint8 images (3,H,W), over all channels and up to the border."""
    pair = image[None].double(), target[None].double()
    psnr = peak_signal_noise_ratio(*pair, data_range=255.0)
    ssim = structural_similarity_index_measure(*pair, data_range=255.0)
    return float(psnr), float(ssim)  # type: ignore[arg-type]


def mean_quality(
    model: nn.Module,
    batches: Iterable[InputAndTarget],
    context: DistContext,
    scale: int,
    tile: tuple[int, int],
    at_once: int = 16,
) -> dict[str, float]:
    """The mean `quality` of restored images and of the inputs alone, over the images of all processes.

    Images whose target has no pixels do not count. The model is left in eval mode.
    """
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64)
    for (source,), (target,) in batches:
        restored = restore(model, source, scale, tile, context.device, at_once)
        if target.numel():
            both = *quality(restored, target), *quality(enlarged_only(source, scale), target)
            sums += torch.tensor([*both, 1.0], dtype=torch.float64)
    sums = context.add_up(sums.to(context.device)).cpu()
    return dict(zip(("psnr", "ssim", "input_psnr", "input_ssim"), (sums[:4] / sums[4]).tolist(), strict=True))


class Restoration(DenseTask):
    """Images and their targets; mean absolute error; PSNR and SSIM of whole images, in tiles."""

    metric, unit = "psnr", "dB"
    build = staticmethod(_restorer)
    norm_each_map = False

    def __init__(self, config: "TrainConfig", context: DistContext) -> None:
        given, wanted = config.data, config.restore
        self.degradation = Degradation(wanted.scale, wanted.blur, wanted.noise)
        if any(side % wanted.scale for side in given.size):
            raise ValueError(f"data.img_size: expected multiples of restore.scale={wanted.scale}, got {given.img_size}")
        if min(given.size) <= 3 * wanted.blur:
            raise ValueError(f"restore.blur: expected a number below a third of data.img_size, got {wanted.blur}")
        if config.model.args.get("pretrained"):
            raise ValueError(
                "model.args.pretrained: restoration cannot start from a pretrained encoder; set model.checkpoint to a "
                "restorer's"
            )
        if config.distributed == "fsdp":  # images differ in size, so processes would wait for one another
            raise ValueError("distributed: restoration supports only ddp, got fsdp")
        train_set = open_pair_dataset(given.spec(training=True), self.degradation, given.size)
        if wanted.photometric and train_set[0][0] is not None:
            raise ValueError("restore.photometric: expected false, because inputs are files, got true")
        val_set = open_pair_dataset(given.spec(training=False), self.degradation)
        samples = RestorationTensors(train_set, self.degradation, given.size, wanted.crops, wanted.photometric)
        super().__init__(config, context, samples, RestorationTensors(val_set, self.degradation), [])

    def build_model(self) -> nn.Module:
        model = _restorer(self.description())
        if self.config.model.checkpoint:  # weights of a whole restorer
            load_checkpoint(model, self.config.model.checkpoint)
        return model

    def loss(self, model: nn.Module, batch: InputAndTarget) -> Tensor:
        source, target = (pixels.to(self.context.device, non_blocking=True).float() / 255 for pixels in batch)
        return F.l1_loss(model(source), target)

    def validate(self, model: nn.Module) -> dict[str, float]:
        return mean_quality(
            model, self.validation_loader(), self.context, self.degradation.scale, self.config.data.size
        )

    def own_description(self) -> dict[str, Any]:
        restorer = {name: getattr(self.config.restore, name) for name in RESTORER}
        return {**super().own_description(), "restorer": restorer, "degradation": vars(self.degradation)}

    def picture(self, model: nn.Module) -> "Figure":
        from dfformer.analysis.dense_figures import restorations

        scale, rows = self.degradation.scale, []
        for source, target in (self.whole[n] for n in self.shown):
            restored = restore(model, source, scale, self.config.data.size, self.context.device)
            before = enlarged_only(source, scale)
            named = {
                f"input\n{quality(before, target)[0]:.2f} dB": before,
                f"restored\n{quality(restored, target)[0]:.2f} dB": restored,
                "truth": target,
            }
            rows.append({name: _array(pixels) for name, pixels in named.items()})
        return restorations(rows, f"{self.config.model.name}: details of the first {len(rows)} validation images")


def _array(pixels: Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).numpy()


def _load(checkpoint: Path, arguments: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    model, description = load_restorer(checkpoint)
    return (SelfEnsemble(model) if arguments.self_ensemble else model), description


def evaluate(checkpoint: Path, arguments: argparse.Namespace) -> Iterator[Measured]:
    """``dfformer eval`` of a restoration checkpoint."""
    model, description = _load(checkpoint, arguments)
    context, degradation = DistContext(torch.device(arguments.device)), Degradation(**description["degradation"])
    dataset = open_pair_dataset(dataset_spec(arguments, own_size(description)), degradation)

    def measure(timed: Timed, tile: tuple[int, int]) -> Any:
        H, W = tile
        bar = batches(RestorationTensors(dataset, degradation), arguments, f"{checkpoint.name} {H}x{W}")
        measures = mean_quality(timed, bar, context, degradation.scale, tile, arguments.batch_size)
        return {"tile_height": H, "tile_width": W, "self_ensemble": arguments.self_ensemble}, measures, {}

    return at_each_size(model, description, dataset, arguments, measure)


_ENDINGS = (".png", "_picture.png")


def predictor(arguments: argparse.Namespace, paths: list[Path]) -> Predictor:
    """``dfformer predict`` for a restoration checkpoint: the restored image, and a picture for comparison."""
    from dfformer.analysis.dense_figures import restorations

    model, description = _load(arguments.checkpoint, arguments)
    device, scale = torch.device(arguments.device), description["degradation"]["scale"]
    model.to(device)
    tile = arguments.img_size or own_size(description)
    stems = result_paths(paths, arguments.output, _ENDINGS)

    def apply(batch: list[File]) -> list[Top]:
        [(path, image, *_)] = batch
        restored = restore(model, image, scale, tile, device, arguments.batch_size)
        before, after = _array(enlarged_only(image, scale)), _array(restored)
        figure = restorations([{"input": before, "restored": after}], stems[path].name)
        write_results(stems[path], dict(zip(_ENDINGS, (Image.fromarray(after), figure), strict=True)))
        return [[("mean change", float(np.abs(after.astype(np.float64) - before).mean() / 255))]]

    written = "restored images and pictures"
    return Predictor(v2.functional.pil_to_tensor, apply, value="share", written=written)
