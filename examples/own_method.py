"""A decomposition of your own in the search: two small classes, and one call that registers them.

A filter basis (Zhang et al. 2015, "Accelerating very deep convolutional networks"): the kernel's filters are combinations of
R filters, so the layer becomes a convolution S -> R with the full kernel and a 1x1 convolution R -> T.

python examples/own_method.py            minutes on two cores
python examples/own_method.py --quick    seconds, to see that it runs
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import ranksearch
from ranksearch import Finalists, Local, Recipe, Search, Space, Task
from ranksearch.data import batches, digits
from ranksearch.methods import Method, Part


@dataclass(frozen=True)
class Basis(ranksearch.Factorization):
    """What a plan holds for a layer: a field for each rank."""

    method = "basis"  # its name in plans and study files
    title = "filter basis"
    rank: int


class BasisMethod(Method):
    """Costs, modules, data-aware factors, candidates and reports all follow from these six functions."""

    kind = Basis
    vbmf = ("out",)  # which VBMF estimate suggests each rank: "in", "out" or "larger"

    def applies(self, weight, *, linear):  # weight: (out, in, *kernel)
        return math.prod(weight[2:]) > 1

    def bounds(self, weight):  # the ranks at which any kernel is reproduced exactly
        return (min(weight[0], math.prod(weight[1:])),)

    def parts(self, weight, ranks):  # the convolutions, in a row, that replace the layer
        every_axis = tuple(range(len(weight) - 2))
        return Part("filters", weight[1], ranks[0], every_axis), Part("mix", ranks[0], weight[0])

    def prepare(self, kernel, ranks, seed, rows=None):  # once a layer: what all ranks share, as tensors by name
        left, singular, right = torch.linalg.svd(kernel.flatten(1), full_matrices=False)
        return {"filters": right, "mix": left * singular, "singular": singular}

    def factors(self, kernel, prepared, ranks, seed, sweeps=0):  # a weight for each part, in their order
        (rank,) = ranks
        return prepared["filters"][:rank].reshape(rank, *kernel.shape[1:]), prepared["mix"][:, :rank]

    def errors(self, prepared, ranks):  # the relative errors of the kernel, without reconstructing it
        energy = prepared["singular"].double().square()
        return [float((energy[rank:].sum() / energy.sum()).sqrt()) for (rank,) in ranks]


ranksearch.register_method(BasisMethod())


def network() -> nn.Sequential:
    """A small CNN for images (batch, 1, 16, 16)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def main(out: str | Path = "runs/own-method", *, quick: bool = False):
    """Train, search and load; returns the dense model, the smallest one of the front and the study's record."""
    torch.manual_seed(0)
    data, model = digits(size=16), network()
    optimizer, shuffle = torch.optim.AdamW(model.parameters(), lr=2e-3), torch.Generator().manual_seed(0)
    for _ in range(1 if quick else 12):
        for images, labels in batches(data.train, 64, generator=shuffle):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    record = ranksearch.search(
        Task(model, data),
        space=Space(methods=("basis", "svd")),  # the search chooses between them, layer by layer
        search=Search(trials=2 if quick else 40),
        finetune=Recipe(epochs=1 if quick else 3, batch_size=32, learning_rate=3e-3),
        finalists=Finalists(epochs=1 if quick else 12, batch_size=32, learning_rate=3e-3, count=1 if quick else 6),
        engine=Local(workers=0 if quick else None),
        out=out,
    )
    for trial in record.front:
        print(f"trial {trial.number}: {trial.ratio:.1f}x smaller, test {trial.finalist.score_test:.1%}: {trial.plan}")
    return model, ranksearch.load_model(model, Path(out) / "models" / str(record.front[-1].number)), record


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
