"""A DETR-style detector on a DFFormer: one feature map, a transformer, and queries that are matched to objects.

python examples/detr_style.py
"""

from typing import Any

import timm
import torch
from scipy.optimize import linear_sum_assignment
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou
from torchvision.transforms.functional import to_tensor

import dfformer  # noqa: F401 (registers the models with timm)
from dfformer.data.synthetic_digits import CLASSES, SyntheticDigits

SIZE, STEPS, BATCH, QUERIES = 96, 30, 8, 8
SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}  # leave it out for the model's own

Objects = list[tuple[Tensor, Tensor]]  # boxes (n,4) as shares of the image, centre and size, and labels (n,)


class Detector(nn.Module):
    """Maps images (B,3,H,W) to logits (B,queries,classes+1), with "no object" last, and boxes (B,queries,4)."""

    def __init__(self, backbone: str, classes: int, queries: int, dim: int = 64, **arguments: Any) -> None:
        super().__init__()
        self.backbone = timm.create_model(backbone, features_only=True, out_indices=(-2,), **arguments)  # stride 16
        [width] = self.backbone.feature_info.channels()
        self.project = nn.Conv2d(width, dim, 1)
        self.queries = nn.Parameter(torch.randn(queries, dim))
        self.transformer = nn.Transformer(dim, 4, 1, 2, 2 * dim, dropout=0.0, batch_first=True)
        self.kind = nn.Linear(dim, classes + 1)
        self.box = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4), nn.Sigmoid())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.project(self.backbone(images)[0])
        tokens = x.flatten(2).mT + build_sincos2d_pos_embed(list(x.shape[-2:]), x.shape[1])
        found = self.transformer(tokens, self.queries.expand(len(images), -1, -1))
        return self.kind(found), self.box(found)


def loss(model: Detector, images: Tensor, objects: Objects) -> Tensor:
    """Cross entropy of all queries; L1 and GIoU of those in the cheapest matching to objects."""
    logits, boxes = model(images)
    total = logits.new_zeros(())
    for kind, box, (wanted, labels) in zip(logits, boxes, objects, strict=True):
        corners = [box_convert(b, "cxcywh", "xyxy") for b in (box, wanted)]
        distance = 5 * torch.cdist(box, wanted, p=1) + 2 * (1 - generalized_box_iou(corners[0], corners[1]))
        cost = distance - kind.softmax(-1)[:, labels]
        queries, matched = (torch.from_numpy(index) for index in linear_sum_assignment(cost.detach().numpy()))
        truth = torch.full((len(kind),), len(CLASSES))  # nothing
        truth[queries] = labels[matched]
        weight = torch.ones(len(CLASSES) + 1)
        weight[-1] = 0.1
        total = total + F.cross_entropy(kind, truth, weight) + distance[queries, matched].mean()
    return total / len(images)


def batch(dataset: SyntheticDigits, indices: range) -> tuple[Tensor, Objects]:
    samples = [dataset[index] for index in indices]
    objects = [
        (box_convert(torch.from_numpy(sample.boxes) / SIZE, "xyxy", "cxcywh"), torch.from_numpy(sample.labels))
        for sample in samples
    ]
    return torch.stack([to_tensor(sample.image) for sample in samples]) - 0.5, objects


def main() -> None:
    torch.manual_seed(0)
    model = Detector("dfformer_s18", len(CLASSES), QUERIES, img_size=SIZE, **SMALL)
    print(f"strides {model.backbone.feature_info.reduction()}, widths {model.backbone.feature_info.channels()}")
    data = SyntheticDigits("train", SIZE, BATCH)  # the same at every step, which is enough to learn
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(loss(model, *batch(data, range(BATCH))))
        losses[-1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"loss {losses[0].item():.2f}, after {STEPS} steps {losses[-1].item():.2f}")


if __name__ == "__main__":
    main()
