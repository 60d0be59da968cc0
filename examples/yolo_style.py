"""A YOLO-style detector on CDFFormer: three feature maps, paths up and down, one box per cell; it learns a few digits.

python examples/yolo_style.py
"""

from typing import Any, cast

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_iou, generalized_box_iou_loss, sigmoid_focal_loss
from torchvision.transforms.functional import to_tensor

import dfformer  # noqa: F401 (registers the models with timm)
from dfformer.data.synthetic_digits import CLASSES, SyntheticDigits

SIZE, STEPS, BATCH = 96, 30, 8
SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}  # leave it out for the model's own


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.GroupNorm(8, outputs), nn.SiLU())


class Detector(nn.Module):
    """Maps images (B,3,H,W), sides multiples of 32, to logits (B,N,classes) and boxes (B,N,4) of all cells."""

    def __init__(self, backbone: str, classes: int, channels: int, **arguments: Any) -> None:
        super().__init__()
        self.backbone = timm.create_model(backbone, features_only=True, out_indices=(1, 2, 3), **arguments)
        self.strides = self.backbone.feature_info.reduction()  # 8, 16, 32
        self.lateral = nn.ModuleList(conv(width, channels, 1) for width in self.backbone.feature_info.channels())
        self.up, self.down = (nn.ModuleList(conv(channels, channels, 3, s) for _ in range(2)) for s in (1, 2))
        kind = nn.Conv2d(channels, classes, 1)
        nn.init.constant_(cast(Tensor, kind.bias), -4.6)  # a probability of 1 %, because few cells have an object
        self.kind = nn.Sequential(conv(channels, channels), kind)
        self.sides = nn.Sequential(conv(channels, channels), nn.Conv2d(channels, 4, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = [lateral(x) for lateral, x in zip(self.lateral, self.backbone(images), strict=True)]
        for i in (1, 0):
            maps[i] = self.up[i](maps[i] + F.interpolate(maps[i + 1], scale_factor=2.0))
        for i in (1, 2):
            maps[i] = maps[i] + self.down[i - 1](maps[i - 1])
        logits = torch.cat([self.kind(x).flatten(2) for x in maps], 2).mT
        distances = torch.cat([s * self.sides(x).exp().flatten(2) for s, x in zip(self.strides, maps, strict=True)], 2)
        left, top, right, bottom = distances.mT.unbind(-1)
        x, y, _ = self.cells(images.shape[-2:]).unbind(-1)
        return logits, torch.stack([x - left, y - top, x + right, y + bottom], -1)

    def cells(self, size: tuple[int, ...]) -> Tensor:
        """All cells (N,3): x and y of the centre, and the stride."""
        grids = []
        for stride in self.strides:
            y, x = torch.meshgrid(*(torch.arange(stride / 2, side, stride) for side in size), indexing="ij")
            grids.append(torch.stack([x, y, torch.full_like(x, stride)], -1).flatten(0, 1))
        return torch.cat(grids)


def loss(model: Detector, images: Tensor, objects: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Focal loss of all cells, and GIoU of those with an object: the central cells in the map for its size."""
    logits, boxes = model(images)
    cells, truth = model.cells(images.shape[-2:]), torch.zeros_like(logits)
    overlap = []
    for image, (wanted, labels) in enumerate(objects):
        for box, label in zip(wanted, labels, strict=True):
            side, middle = (box[2:] - box[:2]).max(), (box[:2] + box[2:]) / 2
            stride = min(model.strides, key=lambda s: abs(float(torch.log2(side / (3 * s)))))
            near = (cells[:, 2] == stride) & ((cells[:, :2] - middle).abs().max(1).values <= 0.75 * stride)
            truth[image, near, label] = 1
            overlap.append(generalized_box_iou_loss(boxes[image, near], box.expand(int(near.sum()), 4)))
    count = sum(map(len, overlap))
    return (sigmoid_focal_loss(logits, truth, reduction="sum") + torch.cat(overlap).sum()) / count


def batch(dataset: SyntheticDigits, indices: range) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    samples = [dataset[index] for index in indices]
    objects = [(torch.from_numpy(sample.boxes), torch.from_numpy(sample.labels)) for sample in samples]
    return torch.stack([to_tensor(sample.image) for sample in samples]) - 0.5, objects


def main() -> None:
    torch.manual_seed(0)
    model = Detector("cdfformer_s18", len(CLASSES), channels=32, img_size=SIZE, **SMALL)
    print(f"strides {model.strides}, widths {model.backbone.feature_info.channels()}")
    data = SyntheticDigits("train", SIZE, BATCH)  # the same at every step, which is enough to learn
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(loss(model, *batch(data, range(BATCH))))
        losses[-1].backward()
        optimizer.step()
    print(f"loss {losses[0].item():.2f}, after {STEPS} steps {losses[-1].item():.2f}")
    model.eval()
    images, [(there, digits)] = batch(data, range(1))
    with torch.no_grad():
        logits, boxes = model(images)
    scores, labels = logits[0].sigmoid().max(-1)
    for n in batched_nms(boxes[0], scores, labels, iou_threshold=0.5)[: len(there)].tolist():
        overlap, nearest = box_iou(boxes[0, n : n + 1], there)[0].max(0)
        truth = CLASSES[int(digits[nearest])]
        print(f"found {CLASSES[int(labels[n])]}, score {scores[n]:.2f}; there is {truth}, IoU {overlap:.2f}")


if __name__ == "__main__":
    main()
