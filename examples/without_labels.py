"""Compress a trained network with inputs alone: the outputs of the dense net take the place of labels (distillation).

python examples/without_labels.py            minutes on two cores
python examples/without_labels.py --quick    seconds, to see that it runs
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import ranksearch
from ranksearch import Finalists, Local, Recipe, Search, Splits, Task
from ranksearch.data import batches, digits
from ranksearch.task.distillation import agreement, kl_divergence


def network() -> nn.Sequential:
    """A small CNN for images (batch, 1, 16, 16)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def trained_net(labelled: Splits, epochs: int) -> nn.Module:
    """A network that was trained elsewhere. Here its training still knows labels; nothing below does."""
    model = network()
    optimizer, shuffle = torch.optim.AdamW(model.parameters(), lr=2e-3), torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for images, labels in batches(labelled.train, 64, generator=shuffle):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model


def unlabelled(split: TensorDataset, count: int) -> TensorDataset:
    """Inputs with targets that nobody reads."""
    images = split.tensors[0][:count]
    return TensorDataset(images, torch.zeros(len(images)))


def main(out: str | Path = "runs/without-labels", *, quick: bool = False):
    """Search and load; returns the dense model, the smallest one of the front and the study's record."""
    torch.manual_seed(0)
    labelled = digits(size=16)
    model = trained_net(labelled, epochs=1 if quick else 12)
    parts = [unlabelled(split, 200 if quick else 2000) for split in (labelled.train, labelled.validation, labelled.test)]
    data = Splits(*parts, classes=None, about="digits without labels")

    record = ranksearch.search(
        # For outputs that are no logits of classes: mean_squared_error and explained_variance.
        Task(model, data, loss=kl_divergence, score=agreement),
        search=Search(trials=2 if quick else 40),
        finetune=Recipe(epochs=1 if quick else 3, batch_size=32, learning_rate=3e-3),
        finalists=Finalists(epochs=1 if quick else 12, batch_size=32, learning_rate=3e-3, count=1 if quick else 6),
        engine=Local(workers=0 if quick else None),
        out=out,
    )
    # The score says how faithful a compressed net is to the dense one, not how often it is right.
    for trial in record.front:
        agrees = f"agrees with the dense net on {trial.finalist.score_test:.1%} of the test inputs"
        print(f"trial {trial.number}: {trial.ratio:.1f}x smaller, {agrees}")
    return model, ranksearch.load_model(model, Path(out) / "models" / str(record.front[-1].number)), record


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
