"""The models and images of ``dfformer show``."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from dfformer.data.files import image_files, image_mode, read_image
from dfformer.data.images import DigitImages
from dfformer.data.photographs import sklearn_photographs
from dfformer.data.transforms import evaluation_transform
from dfformer.tasks.evaluate import data_config
from dfformer.tasks.results import result_names

BATCH_SIZE = 16


class ShownModel(NamedTuple):
    """A model in eval mode, its label, and the size (H,W) of its images; None for the model's own."""

    name: str
    network: nn.Module
    img_size: tuple[int, int] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Its image preprocessing, as timm's data configuration."""
        return data_config(self.network, self.img_size)


class ShownImage(NamedTuple):
    """An image that is opened on demand, with its name and class."""

    name: str
    group: str
    open: Callable[[], Image.Image]


class ShownImages(NamedTuple):
    """Images and a description of them."""

    description: str
    members: list[ShownImage]

    @property
    def groups(self) -> dict[str, list[int]]:
        """The images of each class, classes sorted by name."""
        groups: dict[str, list[int]] = {}
        for i, image in enumerate(self.members):
            groups.setdefault(image.group, []).append(i)
        return dict(sorted(groups.items()))

    @property
    def examples(self) -> list[int]:
        """An image of each class, or all images if there is one class."""
        groups = list(self.groups.values())
        return [group[0] for group in groups] if len(groups) > 1 else groups[0]

    def batches(self, model: ShownModel, size: int = BATCH_SIZE) -> Iterator[Tensor]:
        """The images preprocessed for ``model``, (B,in_chans,H,W); B is at most ``size``, and varies little."""
        count = len(self.members)
        for part in torch.arange(count).chunk(-(-count // size)):
            yield torch.stack([self.prepared(i, model) for i in part.tolist()])

    def prepared(self, index: int, model: ShownModel) -> Tensor:
        """An image preprocessed for ``model``, (in_chans,H,W), on its device."""
        image = self.members[index].open().convert(image_mode(model.config["input_size"][0]))
        return evaluation_transform(model.config)(image).to(next(model.network.parameters()).device)

    def pixels(self, index: int, model: ShownModel) -> Tensor:
        """An image preprocessed for ``model``, before normalisation: (in_chans,H,W) from 0 to 1."""
        mean, std = (torch.tensor(model.config[key]).view(-1, 1, 1) for key in ("mean", "std"))
        return (self.prepared(index, model).cpu() * std + mean).clamp(0, 1)


def shown_images(inputs: Sequence[Path], channels: set[int]) -> ShownImages:
    """Image files and folders; the class of an image in a folder is the folder's name.

    Without inputs, images of scikit-learn: the digits to test with (`DigitImages`) for models of grey images, its two
    photographs for models of colour images.
    """
    if inputs:
        given = {path for path in inputs if not path.is_dir()}
        files, mode = image_files(inputs), "L" if channels == {1} else "RGB"
        if not files:
            raise ValueError(f"no images in {', '.join(map(str, inputs))}")
        images = [
            ShownImage(name, name if path in given else path.parent.name, partial(read_image, path, mode))
            for name, path in zip(result_names(files), files, strict=True)
        ]
        return ShownImages(f"{len(images)} image{'s'[: len(images) > 1]}", images)
    if channels == {1}:
        digits = DigitImages("val")
        members = [
            ShownImage(f"{label}_{i}", digits.classes[label], Image.fromarray(pixels).copy)
            for i, (label, pixels) in enumerate(zip(digits.labels, digits.images, strict=True))
        ]
        return ShownImages(f"{len(members)} handwritten digits of scikit-learn", members)
    if not channels <= {1, 3}:
        raise ValueError(f"in_chans: expected 1 or 3, as scikit-learn's images and image files have, got {channels}")
    images = [ShownImage(name, name, image.copy) for name, image in sklearn_photographs().items()]
    return ShownImages("scikit-learn's two photographs", images)
