"""A small SSD of torchvision's, and made-up pictures of several sizes with bright squares to find."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.utils.data import Dataset

from ranksearch.data import Splits


class Squares(Dataset):
    """Pictures (3, height, width) with one to three bright squares; their boxes and labels are given to the model too."""

    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(1000 * self.seed + index)

        def draw(low, high):
            return int(torch.randint(low, high, (), generator=generator))

        height, width = draw(48, 72), draw(48, 72)
        image, boxes = torch.rand(3, height, width, generator=generator) * 0.3, []
        for _ in range(draw(1, 4)):
            side = draw(12, 24)
            top, left = draw(0, height - side), draw(0, width - side)
            image[:, top : top + side, left : left + side] = 1
            boxes.append([left, top, left + side, top + side])
        targets = {"boxes": torch.tensor(boxes).float(), "labels": torch.ones(len(boxes), dtype=torch.long)}
        return (image, targets), targets


def collate(samples):
    """The inputs are (images, targets), the arguments of torchvision's detectors, and the targets again for the score."""
    images, targets = [image for (image, _), _ in samples], [target for _, target in samples]
    return (images, targets), targets


def squares(*counts):
    return Splits(
        *(Squares(count, seed) for seed, count in enumerate(counts or (24, 12, 12))), None, "made-up squares", collate
    )


class Backbone(nn.Module):
    """Three feature maps, as SSD takes them."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, padding=1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in ((3, 8), (8, 16), (16, 24), (24, 24))
        )
        self.out_channels = (16, 24, 24)

    def forward(self, x):
        maps = OrderedDict()
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number:
                maps[str(number)] = x
        return maps


def small_ssd():
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD, SSDHead

    anchors = DefaultBoxGenerator([[2], [2], [2]], scales=[0.2, 0.35, 0.5, 0.7])
    backbone = Backbone()
    head = SSDHead(list(backbone.out_channels), anchors.num_anchors_per_location(), num_classes=2)
    return SSD(backbone, anchors, (64, 64), 2, head=head, detections_per_img=10, topk_candidates=20)


def summed(outputs, targets):
    """The loss of a detector, which gives its losses by name in training mode."""
    return sum(outputs.values())


def recall(outputs, targets):
    """The share of the true boxes that a found box overlaps by at least a half."""
    from torchvision.ops import box_iou

    found = total = 0
    for output, target in zip(outputs, targets, strict=True):
        overlap = box_iou(target["boxes"], output["boxes"])
        found += int((overlap.amax(1) >= 0.5).sum()) if overlap.shape[1] else 0
        total += len(target["boxes"])
    return found / total
