"""Compress a U-Net: outputs are maps of classes, the loss is per pixel, and the score is the mean IoU.

Transposed convolutions are decomposed like any other; the skip connections need no care. The pictures are made up, so that
the script runs as it is.

python examples/unet_segmentation.py            minutes on two cores
python examples/unet_segmentation.py --quick    seconds, to see that it runs
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ranksearch
from ranksearch import Finalists, Local, Recipe, Search, Space, Splits, Task


def block(into: int, out: int) -> nn.Sequential:
    """Two 3x3 convolutions with batch normalisation."""
    convolutions = [(nn.Conv2d(each, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()) for each in (into, out)]
    return nn.Sequential(*(module for layers in convolutions for module in layers))


class UNet(nn.Module):
    """Two levels down, two up, with skip connections; (batch, 1, height, width) -> (batch, classes, height, width)."""

    def __init__(self, classes: int, width: int = 24):
        super().__init__()
        self.down1, self.down2 = block(1, width), block(width, 2 * width)
        self.bottom = block(2 * width, 4 * width)
        self.up2, self.merge2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), block(4 * width, 2 * width)
        self.up1, self.merge1 = nn.ConvTranspose2d(2 * width, width, 2, 2), block(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.down1(images)
        second = self.down2(nn.functional.max_pool2d(first, 2))
        bottom = self.bottom(nn.functional.max_pool2d(second, 2))
        second = self.merge2(torch.cat([second, self.up2(bottom)], 1))
        return self.head(self.merge1(torch.cat([first, self.up1(second)], 1)))


def discs_and_squares(count: int, seed: int, size: int) -> TensorDataset:
    """Noisy pictures of a disc and a square, equally bright, and the class of each pixel: background, disc, square."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.randint(7, size - 7, (4, count, 1, 1), generator=generator)
    rows, columns = torch.arange(size)[:, None], torch.arange(size)[None, :]
    disc = (rows - at[0]) ** 2 + (columns - at[1]) ** 2 <= 36
    square = ((rows - at[2]).abs() <= 5) & ((columns - at[3]).abs() <= 5)
    classes = torch.where(square, 2, torch.where(disc, 1, 0))
    images = (classes > 0).float() + 0.5 * torch.randn(classes.shape, generator=generator)
    return TensorDataset(images[:, None], classes)


def mean_iou(outputs: Tensor, targets: Tensor) -> float:
    """The score of a whole split, 0 to 1: intersection over union of each class, averaged over the classes."""
    classes = outputs.shape[1]
    pairs = torch.bincount((classes * targets + outputs.argmax(1)).flatten(), minlength=classes**2).reshape(classes, classes)
    hits = pairs.diagonal()
    return float((hits / (pairs.sum(0) + pairs.sum(1) - hits).clamp_min(1)).mean())


def main(out: str | Path = "runs/unet", *, quick: bool = False):
    """Train, search and load; returns the dense model, the smallest one of the front and the study's record."""
    torch.manual_seed(0)
    counts, size = ((48, 16, 16), 24) if quick else ((600, 200, 200), 40)
    parts = [discs_and_squares(count, seed, size) for seed, count in enumerate(counts)]
    data = Splits(*parts, classes=None, about="made-up shapes")
    model = UNet(classes=3, width=8 if quick else 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(4 if quick else 15):
        for images, classes in DataLoader(data.train, batch_size=16, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), classes).backward()
            optimizer.step()

    record = ranksearch.search(
        Task(model, data, score=mean_iou),  # cross-entropy, the default loss, takes maps of classes too
        space=Space(layers=("bottom.*", "up2") if quick else ()),  # empty: all layers that can be decomposed
        search=Search(trials=2 if quick else 40, minimize=("params", "macs")),
        finetune=Recipe(epochs=1 if quick else 2, batch_size=16, learning_rate=2e-3),
        finalists=Finalists(epochs=1 if quick else 10, batch_size=16, learning_rate=2e-3, count=1 if quick else 6),
        engine=Local(workers=0 if quick else None),
        out=out,
    )
    print(f"dense: {record.facts.dense.params:,} parameters, mean IoU {record.facts.dense.score_test:.3f} on test")
    for trial in record.front:
        print(f"trial {trial.number}: {trial.ratio:.1f}x smaller, mean IoU {trial.finalist.score_test:.3f} on test")
    return model, ranksearch.load_model(model, Path(out) / "models" / str(record.front[-1].number)), record


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
