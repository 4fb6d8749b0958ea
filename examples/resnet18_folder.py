"""Compress torchvision's ResNet-18 for your own pictures, which lie in one folder per class.

pictures/train/<class>/<any name>.jpg
pictures/test/<class>/<any name>.jpg

python examples/resnet18_folder.py pictures            starts from ImageNet weights; wants a GPU, or patience
python examples/resnet18_folder.py pictures --quick    small pictures, random weights, one trial: does it run?
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18

import ranksearch
from ranksearch import Finalists, Local, Recipe, Search, Space, Splits, Task
from ranksearch.data import batches, image_folder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What torchvision's weights expect of the three channels."""


def train(model: nn.Module, data: Splits, epochs: int, device: torch.device) -> None:
    """Fine-tune the dense net; `batches` shuffles, mirrors and normalises the pictures."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    shuffle = torch.Generator().manual_seed(0)
    model.train().to(device)
    for epoch in range(epochs):
        for images, labels in batches(data.train, 32, generator=shuffle, device=device):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f} in the last batch")


def main(root: str | Path = "pictures", out: str | Path = "runs/resnet18", *, quick: bool = False):
    """Fine-tune, search and load; returns the dense model, the smallest one of the front and the study's record."""
    torch.manual_seed(0)
    data = image_folder(root=str(root), size=32 if quick else 160, mean=MEAN, std=STD)
    model = resnet18(weights=None if quick else ResNet18_Weights.DEFAULT)
    model.fc = nn.Linear(model.fc.in_features, data.classes)
    train(model, data, 1 if quick else 5, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    record = ranksearch.search(
        Task(model, data),
        space=Space(
            skip=("conv1",),  # 0.1 % of the parameters, and all later layers read it
            layers=("layer1.0.*",) if quick else (),  # empty: all layers that can be decomposed
            rank_multiple=8,  # as vector units and tensor cores like them
            smaller_in=("params", "macs"),
        ),
        search=Search(trials=1 if quick else 60, minimize=("params", "macs")),
        finetune=Recipe(epochs=1, batch_size=32, learning_rate=5e-4),
        finalists=Finalists(epochs=1 if quick else 10, batch_size=32, learning_rate=5e-4, count=1 if quick else 6),
        engine=Local(workers=0 if quick else None),
        out=out,
    )

    dense = record.facts.dense
    print(f"dense: {dense.params:,} parameters, {dense.macs:,} MACs, test {dense.score_test:.1%}")
    for trial in record.front:
        macs_ratio = dense.macs / trial.macs
        print(f"trial {trial.number}: {trial.ratio:.1f}x smaller, {macs_ratio:.1f}x MACs, test {trial.finalist.score_test:.1%}")
    small = ranksearch.load_model(model, Path(out) / "models" / str(record.front[-1].number))
    return model, small, record


if __name__ == "__main__":
    main(*(word for word in sys.argv[1:] if word != "--quick"), quick="--quick" in sys.argv)
