"""Compress a network of Conv1d layers on audio. Nothing changes for the user: a kernel (out, in, length) is a kernel.

The sounds are made up (sine, square and sawtooth waves, noise), so that the script runs as it is.

python examples/audio_conv1d.py            minutes on two cores
python examples/audio_conv1d.py --quick    seconds, to see that it runs
"""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ranksearch
from ranksearch import Finalists, Local, Recipe, Search, Space, Splits, Task

SAMPLES, RATE = 1024, 8000


def sounds(count: int, seed: int) -> TensorDataset:
    """Waveforms (count, 1, SAMPLES) of 200 to 800 Hz in noise, and their kinds 0 to 3."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.arange(count) % 4
    pitch, start = torch.rand(2, count, 1, generator=generator)
    phase = 2 * math.pi * ((200 + 600 * pitch) * torch.arange(SAMPLES) / RATE + start)
    noise = torch.randn(count, SAMPLES, generator=generator)
    waves = torch.stack([phase.sin(), phase.sin().sign(), phase.remainder(2 * math.pi) / math.pi - 1, noise])
    return TensorDataset((waves[kinds, torch.arange(count)] + 0.3 * noise).unsqueeze(1), kinds)


def network(width: int) -> nn.Sequential:
    """Four convolutions of length 9, each with stride 2, a mean over time, and a fully connected layer."""
    channels = (1, width, 2 * width, 4 * width, 4 * width)
    layers: list[nn.Module] = []
    for into, out in pairwise(channels):
        layers += [nn.Conv1d(into, out, 9, stride=2, padding=4, bias=False), nn.BatchNorm1d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4 * width, 4))


def main(out: str | Path = "runs/audio", *, quick: bool = False):
    """Train, search and load; returns the dense model, the smallest one of the front and the study's record."""
    torch.manual_seed(0)
    counts = (128, 64, 64) if quick else (1600, 400, 400)
    data = Splits(*(sounds(count, seed) for seed, count in enumerate(counts)), classes=4, about="made-up sounds of four kinds")
    model = network(width=8 if quick else 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(3 if quick else 12):
        for waves, kinds in DataLoader(data.train, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(waves), kinds).backward()
            optimizer.step()

    record = ranksearch.search(
        Task(model, data),
        # The methods with a part for each of two kernel axes (spatial, cp4, tt) have no use here.
        space=Space(methods=("tucker2", "cp", "svd")),
        search=Search(trials=2 if quick else 40, minimize=("params", "macs")),
        finetune=Recipe(epochs=1 if quick else 3, batch_size=32, learning_rate=2e-3),
        finalists=Finalists(epochs=1 if quick else 12, batch_size=32, learning_rate=2e-3, count=1 if quick else 6),
        engine=Local(workers=0 if quick else None),
        out=out,
    )
    dense = record.facts.dense
    print(f"dense: {dense.params:,} parameters, {dense.macs:,} MACs, test {dense.score_test:.1%}")
    for trial in record.front:
        ratios = f"{trial.ratio:.1f}x smaller, {dense.macs / trial.macs:.1f}x fewer MACs"
        print(f"trial {trial.number}: {ratios}, test {trial.finalist.score_test:.1%}")
    return model, ranksearch.load_model(model, Path(out) / "models" / str(record.front[-1].number)), record


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
