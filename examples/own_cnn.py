"""Compress a CNN of your own from Python: train it as usual, search, choose a model from the front, load it.

python examples/own_cnn.py            minutes on two cores
python examples/own_cnn.py --quick    seconds, to see that it runs
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ranksearch
from ranksearch import Finalists, Local, Recipe, Search, Splits, Task


class Net(nn.Module):
    """Any module will do: the search runs it once, and finds the layers that it can decompose."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1 = nn.Linear(64 * 4 * 4, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images):
        maps = torch.relu(self.conv2(torch.relu(self.conv1(images))))
        return self.fc2(torch.relu(self.fc1(nn.functional.max_pool2d(maps, 2).flatten(1))))


def handwritten_digits() -> Splits:
    """Your data: three map-style datasets of pairs (input, target). Only `validation` guides the search."""
    raw = load_digits()
    images, labels = torch.tensor(raw.images).float().unsqueeze(1) / 16, torch.tensor(raw.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = [TensorDataset(images[chosen], labels[chosen]) for chosen in order.split([1097, 350, 350])]
    return Splits(*parts, classes=10, about="scikit-learn's handwritten digits of 8x8 pixels")


def train(model: nn.Module, dataset: TensorDataset, epochs: int) -> None:
    """Your own training."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for images, labels in DataLoader(dataset, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()


def main(out: str | Path = "runs/own-cnn", *, quick: bool = False):
    """Train, search and load; returns the dense model, the compressed one and the study's record."""
    torch.manual_seed(0)
    model, data = Net(), handwritten_digits()
    train(model, data.train, epochs=3 if quick else 20)

    record = ranksearch.search(
        Task(model, data),  # a classifier by default; loss and score can be your own functions
        search=Search(trials=2 if quick else 40),
        finetune=Recipe(epochs=1 if quick else 3, learning_rate=3e-3),  # each trial
        finalists=Finalists(epochs=1 if quick else 12, learning_rate=3e-3, count=2 if quick else 8),
        engine=Local(workers=0 if quick else None),  # None: one worker for each core
        out=out,  # the same call goes on where a stopped one ended
    )

    dense = record.facts.dense
    print(f"dense: {dense.params:,} parameters, validation {dense.score_validation:.1%}, test {dense.score_test:.1%}")
    for trial in record.front:
        scores = f"validation {trial.finalist.score_validation:.1%}, test {trial.finalist.score_test:.1%}"
        print(f"trial {trial.number}: {trial.ratio:.1f}x smaller, {trial.params:,} parameters, {scores}: {trial.plan}")

    # The front begins with its largest model. Take the smallest that validation puts within two points of the dense one.
    close = [trial for trial in record.front if trial.score_validation >= dense.score_validation - 0.02]
    chosen = close[-1] if close else record.front[0]
    small = ranksearch.load_model(model, Path(out) / "models" / str(chosen.number))
    print(f"took trial {chosen.number}; the report is {Path(out) / 'report.html'}")
    return model, small, record


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
