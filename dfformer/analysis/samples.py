"""The models and images of ``dfformer show``."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dfformer.data.files import image_files, image_mode, read_image
from dfformer.data.photographs import sklearn_photographs
from dfformer.data.transforms import evaluation_transform
from dfformer.tasks.evaluate import data_config
from dfformer.tasks.results import result_names

BATCH_SIZE = 16


class Loaded(NamedTuple):
    """A model in eval mode, its label, and the size (H,W) of its images; None for the model's own."""

    name: str
    model: nn.Module
    img_size: tuple[int, int] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Its image preprocessing, as timm's data configuration."""
        return data_config(self.model, self.img_size)


class Sample(NamedTuple):
    """An image that is opened on demand, with its name and class."""

    name: str
    group: str
    open: Callable[[], Image.Image]


class Samples(NamedTuple):
    """Images and a description of them."""

    description: str
    samples: list[Sample]

    @property
    def groups(self) -> dict[str, list[int]]:
        """The images of each class, classes sorted by name."""
        groups: dict[str, list[int]] = {}
        for i, sample in enumerate(self.samples):
            groups.setdefault(sample.group, []).append(i)
        return dict(sorted(groups.items()))

    @property
    def examples(self) -> list[int]:
        """An image of each class, or all images if there is one class."""
        groups = list(self.groups.values())
        return [group[0] for group in groups] if len(groups) > 1 else groups[0]

    def batches(self, loaded: Loaded, size: int = BATCH_SIZE) -> Iterator[Tensor]:
        """The images preprocessed for ``loaded``, (B,in_chans,H,W); B is at most ``size``, and varies little."""
        count = len(self.samples)
        for part in torch.arange(count).chunk(-(-count // size)):
            yield torch.stack([self.prepared(i, loaded) for i in part.tolist()]).to(device_of(loaded.model))

    def prepared(self, index: int, loaded: Loaded) -> Tensor:
        """An image preprocessed for ``loaded``, (in_chans,H,W)."""
        image = self.samples[index].open().convert(image_mode(loaded.config["input_size"][0]))
        return evaluation_transform(loaded.config)(image)

    def pixels(self, index: int, loaded: Loaded) -> Tensor:
        """An image preprocessed for ``loaded``, before normalisation: (in_chans,H,W) from 0 to 1."""
        mean, std = (torch.tensor(loaded.config[key]).view(-1, 1, 1) for key in ("mean", "std"))
        return (self.prepared(index, loaded) * std + mean).clamp(0, 1)


def load_samples(inputs: Sequence[Path], channels: set[int]) -> Samples:
    """Image files and folders; the class of an image in a folder is the folder's name.

    Without inputs, images of scikit-learn: 360 of its handwritten digits for models of grey images, its two photographs
    for models of colour images.
    """
    if inputs:
        given = {path for path in inputs if not path.is_dir()}
        files, mode = image_files(inputs), "L" if channels == {1} else "RGB"
        if not files:
            raise ValueError(f"no images in {', '.join(map(str, inputs))}")
        samples = [
            Sample(name, name if path in given else path.parent.name, partial(read_image, path, mode))
            for name, path in zip(result_names(files), files, strict=True)
        ]
        return Samples(f"{len(samples)} image{'s'[: len(samples) > 1]}", samples)
    if channels == {1}:
        return _digits()
    if not channels <= {1, 3}:
        raise ValueError(f"in_chans: expected 1 or 3, as scikit-learn's images and image files have, got {channels}")
    samples = [Sample(name, name, photograph.copy) for name, photograph in sklearn_photographs().items()]
    return Samples("scikit-learn's two photographs", samples)


def _digits() -> Samples:
    data = load_digits()
    samples = [
        Sample(f"{label}_{i}", str(label), Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).copy)
        for i, (label, pixels) in enumerate(zip(data.target, data.images, strict=True))
    ]
    return Samples("360 handwritten digits of scikit-learn", samples[::5])


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
