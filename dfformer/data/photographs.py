"""The photographs that come inside scikit-image and scikit-learn, some for training, others for validation."""

from functools import cache
from pathlib import Path

from PIL import Image

from dfformer.data.files import read_image
from dfformer.utils.extras import extra

NAME = "photographs"
# scikit-image's by file, scikit-learn's by name. The two motorcycle images show one scene, so they are in one split.
_SPLITS: dict[str, tuple[str, ...]] = {
    "train": (
        *("china", "astronaut.png", "brick.png", "coins.png", "grass.png", "gravel.png"),
        *("motorcycle_left.png", "motorcycle_right.png", "rocket.jpg"),
    ),
    "val": ("flower", "camera.png", "chelsea.png", "coffee.png"),
}


def photographs(split: str) -> dict[str, Image.Image]:
    """RGB photographs by name; nothing is downloaded.

    Args:
        split: train or val, which have no scene in common.
    """
    if split not in _SPLITS:
        raise ValueError(f"split: expected train or val, got {split!r}")
    return {name: _photograph(name) for name in _SPLITS[split]}


@cache
def sklearn_photographs() -> dict[str, Image.Image]:
    """The two photographs of scikit-learn by name."""
    from sklearn.datasets import load_sample_images

    data = load_sample_images()
    names = [Path(name).stem for name in data.filenames]
    return dict(zip(names, map(Image.fromarray, data.images), strict=True))


@cache
def _photograph(name: str) -> Image.Image:
    with extra("train,dense"):
        import skimage

        if "." not in name:
            return sklearn_photographs()[name]
    return read_image(Path(skimage.__file__).parent / "data" / name, "RGB")
