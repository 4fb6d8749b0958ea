"""Decompose layers by hand, without a search: list the layers, factorize some, fine-tune, save, load.

python examples/factorize_by_hand.py            half a minute
python examples/factorize_by_hand.py --quick    seconds, to see that it runs
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import nn

import ranksearch
from ranksearch import CP, SVD, Splits, Tucker2
from ranksearch.data import batches, digits
from ranksearch.models import lenet
from ranksearch.task.task import accuracy, predict


def train(model: nn.Module, data: Splits, epochs: int, learning_rate: float) -> None:
    """A factorized model is trained like any other."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for images, labels in batches(data.train, 64, generator=shuffle):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(images), labels).backward()
            optimizer.step()


def main(out: str | Path = "runs/by-hand", *, quick: bool = False):
    """Train, factorize, fine-tune, save and load; returns the dense model, the factorized one, and that loaded again."""
    torch.manual_seed(0)
    data, dense = digits(), lenet(channels=1)
    train(dense, data, epochs=1 if quick else 12, learning_rate=2e-3)

    # Which layers can be decomposed, and what each costs. `fc1` reads a flattened map, so it counts as a 6x6 convolution.
    found = ranksearch.inventory(dense, torch.zeros(1, 1, 32, 32))
    for layer in found.layers:
        print(f"{layer.name}: kernel {'x'.join(map(str, layer.weight))}, {layer.params:,} parameters, {layer.macs:,} MACs")
    for name, reason in found.skipped.items():
        print(f"{name} stays dense: {reason}")

    plan = {
        "conv2": Tucker2(rank_in=8, rank_out=12),
        "conv3": CP(24),
        "conv4": CP(24),
        "fc1": CP(32, kernel=(6, 6)),
        "fc2": SVD(6),
    }
    small = ranksearch.factorize_(copy.deepcopy(dense), plan)  # in place, all or nothing; layers not named stay dense
    before = accuracy(*predict(small, data.validation))
    train(small, data, epochs=1 if quick else 6, learning_rate=3e-3)

    ranksearch.save_model(small, plan, out)  # plan.json and weights.safetensors
    again = ranksearch.load_model(dense, out)  # onto a copy of the dense net, whose weights do not matter

    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (dense, small)]
    print(f"{sizes[0]:,} -> {sizes[1]:,} parameters, {sizes[0] / sizes[1]:.1f}x smaller")
    scores = [accuracy(*predict(model, data.validation)) for model in (dense, small, again)]
    print(f"validation: dense {scores[0]:.1%}, factorized {before:.1%}, fine-tuned {scores[1]:.1%}, loaded {scores[2]:.1%}")
    return dense, small, again


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
