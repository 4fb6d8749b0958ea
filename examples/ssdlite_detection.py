"""Compress torchvision's SSDlite, a detector that computes its losses itself and takes pictures of several sizes.

The targets are among the model's inputs, as torchvision's detectors want them in training; the loss adds up what the model
returns then, and the score sees the boxes that it finds. The pictures are made up, so that the script runs as it is.

python examples/ssdlite_detection.py            wants a GPU, or patience; downloads the weights of the backbone
python examples/ssdlite_detection.py --quick    tiny pictures, random weights, one trial: does it run?
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, StackDataset
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.ops import box_iou

import ranksearch
from ranksearch import Finalists, Local, Recipe, Search, Space, Splits, Task


def squares(count: int, seed: int) -> StackDataset:
    """Pictures (3, height, width) of several sizes with one to three bright squares, their boxes and their labels."""
    generator, images, targets = torch.Generator().manual_seed(seed), [], []
    for height, width, number in zip(*(torch.randint(80, 120, (count,), generator=generator) for _ in range(3)), strict=True):
        sides = torch.randint(20, 40, (1 + int(number) % 3, 1), generator=generator)
        corners = (torch.rand(len(sides), 2, generator=generator) * (torch.stack([width, height]) - sides)).long()
        boxes = torch.cat([corners, corners + sides], 1)
        image = 0.3 * torch.rand(3, int(height), int(width), generator=generator)
        for left, top, right, bottom in boxes.tolist():
            image[:, top:bottom, left:right] = 1.0
        images.append(image)
        targets.append({"boxes": boxes.float(), "labels": torch.ones(len(boxes), dtype=torch.long)})
    return StackDataset(images, targets)


def collate(samples):
    """A batch (inputs, targets). The tuple of inputs holds the model's arguments; a list has an entry for each picture."""
    images, targets = map(list, zip(*samples, strict=True))
    return (images, targets), targets


def summed_losses(losses: dict[str, Tensor], targets) -> Tensor:
    """The loss: in training mode the model returns its losses by name."""
    return sum(losses.values())


def average_precision(found, targets) -> float:
    """The score of a whole split, 0 to 1: average precision of the boxes at an overlap of 0.5."""
    detections = []  # (confidence, whether it hits a box that no more confident one hits)
    for boxes, truth in zip(found, targets, strict=True):
        free = torch.ones(len(truth["boxes"]))
        order = boxes["scores"].argsort(descending=True)
        for confidence, overlaps in zip(boxes["scores"][order], box_iou(boxes["boxes"][order], truth["boxes"]), strict=True):
            overlap, best = (overlaps * free).max(0)
            hit = float(overlap >= 0.5)
            free[best] -= hit
            detections.append((float(confidence), hit))
    hits = torch.tensor([hit for _, hit in sorted(detections, reverse=True)])
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / sum(len(truth["boxes"]) for truth in targets))


def main(out: str | Path = "runs/ssdlite", *, quick: bool = False):
    """Train, search and load; returns the dense model, the smallest one of the front and the study's record."""
    torch.manual_seed(0)
    splits = [squares(count, seed) for seed, count in enumerate((16, 8, 8) if quick else (400, 100, 100))]
    data = Splits(*splits, classes=None, about="made-up squares", collate=collate)
    backbone = None if quick else "DEFAULT"
    model = ssdlite320_mobilenet_v3_large(weights_backbone=backbone, num_classes=2, detections_per_img=10)
    model.transform.fixed_size = (96, 96) if quick else (320, 320)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(1 if quick else 30):
        for inputs, targets in DataLoader(splits[0], batch_size=8, shuffle=True, collate_fn=collate):
            optimizer.zero_grad()
            summed_losses(model.train()(*inputs), targets).backward()
            optimizer.step()

    record = ranksearch.search(
        Task(model, data, loss=summed_losses, score=average_precision),
        space=Space(layers=("backbone.extra.0.*",) if quick else ()),
        search=Search(trials=1 if quick else 40),
        finetune=Recipe(epochs=1 if quick else 3, batch_size=8),
        finalists=Finalists(epochs=1 if quick else 15, batch_size=8, count=1 if quick else 6),
        engine=Local(workers=0 if quick else None),
        out=out,
    )
    print(f"dense: {record.facts.dense.params:,} parameters, average precision {record.facts.dense.score_test:.3f} on test")
    for trial in record.front:
        print(f"trial {trial.number}: {trial.ratio:.2f}x smaller, average precision {trial.finalist.score_test:.3f} on test")
    return model, ranksearch.load_model(model, Path(out) / "models" / str(record.front[-1].number)), record


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
