"""The detection model: torchvision's RetinaNet on any encoder of timm."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

_STRIDES = (8, 16, 32, 64, 128)  # of the pyramid's maps; the first three are the encoder's
_MAX_FOUND = 100  # objects per image, as in COCO

NormLayer = Callable[[int], nn.Module]
Boxes = dict[str, Tensor]  # boxes, labels and other properties of the objects in an image


class Pyramid(nn.Module):
    """Maps images (B,3,H,W) to five feature maps of ``channels`` channels with strides 8 to 128, by name."""

    def __init__(self, encoder: str, encoder_args: dict[str, Any], channels: int, norm: NormLayer | None) -> None:
        super().__init__()
        self.encoder = timm.create_model(encoder, features_only=True, out_indices=(-3, -2, -1), **encoder_args)
        strides, widths = self.encoder.feature_info.reduction(), self.encoder.feature_info.channels()
        if tuple(strides) != _STRIDES[:3]:
            raise ValueError(f"model.name: expected last maps of strides 8, 16, 32, got {strides} of {encoder}")
        self.fpn = FeaturePyramidNetwork(widths, channels, LastLevelP6P7(widths[-1], channels), norm)
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.encoder(images)
        if self.encoder.output_fmt == "NHWC":
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        maps: dict[str, Tensor] = self.fpn({f"p{n}": feature for n, feature in enumerate(features, 3)})
        return maps


class _Float32Head(RetinaNetHead):
    """A head whose outputs are float32 even under autocast, because 16 bits are not precise enough for coordinates."""

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        return {name: output.float() for name, output in super().forward(maps).items()}


class _Resize(GeneralizedRCNNTransform):
    """torchvision's resize, except that the shorter side of a long strip keeps one pixel instead of 0."""

    def resize(self, image: Tensor, target: Boxes | None = None) -> tuple[Tensor, Boxes | None]:
        H, W = image.shape[-2:]
        scale = min(self.min_size[0] / min(H, W), self.max_size / max(H, W))
        if min(H, W) * scale >= 1:
            resized: tuple[Tensor, Boxes | None] = super().resize(image, target)
            return resized
        size = [max(1, int(side * scale)) for side in (H, W)]
        image = F.interpolate(image[None], size, mode="bilinear")[0]
        if target is not None:
            target = {**target, "boxes": resize_boxes(target["boxes"], [H, W], size)}
        return image, target


class Detector(RetinaNet):
    """torchvision's RetinaNet on an encoder of timm: maps a list of images (3,H,W) of 0 to 1 to losses or detections.

    Args:
        encoder: its name for ``timm.create_model``; its last three feature maps must have strides 8, 16 and 32.
        encoder_args: other arguments of the encoder.
        classes: number of classes.
        img_size: limits of the shorter and the longer side, to which images are resized.
        mean, std: of the pixels.
        channels: channels of the pyramid and the head.
        anchor_scale: side of the smallest anchors, in strides of their map.
        norm_groups: groups of a group norm after each convolution of the pyramid and the head; 0 for no norm.
    """

    def __init__(
        self,
        encoder: str,
        encoder_args: dict[str, Any],
        classes: int,
        img_size: tuple[int, int],
        mean: list[float],
        std: list[float],
        channels: int,
        anchor_scale: float,
        norm_groups: int,
    ) -> None:
        norm = partial(nn.GroupNorm, norm_groups) if norm_groups else None
        sides = [[anchor_scale * stride * 2 ** (third / 3) for third in range(3)] for stride in _STRIDES]
        anchors = AnchorGenerator(sides, [[0.5, 1.0, 2.0]] * len(sides))
        super().__init__(
            Pyramid(encoder, encoder_args, channels, norm),
            classes,
            image_mean=mean,
            image_std=std,
            anchor_generator=anchors,
            head=_Float32Head(channels, anchors.num_anchors_per_location()[0], classes, norm_layer=norm),
            detections_per_img=_MAX_FOUND,
        )
        self.transform = _Resize(*img_size, mean, std)
        self.set_img_size(*img_size)

    def set_img_size(self, shorter: int, longer: int) -> None:
        self.transform.min_size, self.transform.max_size = (shorter,), longer

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        encoder = self.backbone.encoder
        getattr(encoder, "model", encoder).set_grad_checkpointing(enable)
