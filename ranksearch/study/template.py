"""A new study file for a user's model, with comments and what the model's inventory found."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor

from ranksearch.compress.inventory import Inventory, inventory
from ranksearch.errors import SpecError, StudyError
from ranksearch.results.account import listed
from ranksearch.study_file import parse_spec
from ranksearch.support.files import writing
from ranksearch.task.task import load_net

SHOWN_LAYERS = 10
"""How many layers the file lists, the largest first. A model may have hundreds."""
MODEL = "MODEL"
"""The name of the reference to the model on the command line."""


def write_study(reference: str, arguments: Mapping[str, Any], examples: Sequence[str], path: Path | None, command: str) -> Path:
    """Write a study file for a model, and return its path.

    Args:
        reference: the function that makes the model, `package.module:name`.
        arguments: its arguments.
        examples: the shapes of the model's inputs, each a batch of one, such as `1,3,224,224`.
        path: the file; None for the function's name in the current folder.
        command: the command that writes the file, for its first line.

    Raises:
        SpecError: the reference cannot be imported or called, or a shape is not that of one input.
        ModelError: the function makes no model, or one that cannot be searched.
        StudyError: the file exists, or cannot be written.
    """
    if not re.fullmatch(r"\w[\w.]*:\w[\w.]*", reference):
        raise SpecError(f"{MODEL} must be 'package.module:name', but got {reference!r}.")
    name = re.sub(r"^[^A-Za-z0-9]+", "", reference.rpartition(":")[2].replace(".", "-")) or "study"
    path = path or Path(f"{name}.toml")
    if path.exists():
        raise StudyError(f"A study file must not be overwritten, but {path} exists; choose another --to.")
    shapes = [_shape(example) for example in examples]
    model = load_net(reference, arguments, key=MODEL)
    inputs = _inputs(shapes)
    found = inventory(model, inputs[0] if len(inputs) == 1 else inputs)
    run = f"Run this study by: ranksearch study {path}"
    comments = [f"Written by: {command}", "docs/reference/study-file.md explains every key.", run, ""]
    text = study_text(name, reference, arguments, [*comments, *findings(shapes, found)], layer=found.layers[0].name)
    parse_spec(text, source=str(path))
    with writing(f"The study file {path}", "choose another --to"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    return path


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"1(,[1-9][0-9]*)+", text):
        fix = f"; write 1,{text}." if re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", text) else "."
        raise SpecError(f"--example must be the shape of a batch of one input, such as 1,3,224,224, but got {text!r}{fix}")
    return tuple(map(int, text.split(",")))


def _inputs(shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def findings(shapes: Sequence[tuple[int, ...]], found: Inventory) -> list[str]:
    """What the inventory of a model with inputs of these shapes found, in lines."""
    sizes = " and ".join("x".join(map(str, shape[1:])) for shape in shapes)
    size = f"{found.params:,} parameters, and {found.macs:,} multiply-accumulates for one input of {sizes}."
    return [size, *_layer_lines(found), *_skipped_lines(found)]


def study_text(name: str, reference: str, arguments: Mapping[str, Any], comments: Sequence[str], *, layer: str) -> str:
    """The text of a study file, under lines of comments. `layer` is one that can be decomposed, for an example."""
    module = reference.partition(":")[0]
    data = f"{'my_pkg' if module.startswith('torchvision.') else module}:make_data"
    table = tomli_w.dumps({"task": {"model_args": dict(arguments)}}) + "\n" if arguments else ""
    lines = "".join(f"# {line}".rstrip() + "\n" for line in comments)
    return lines + "\n" + _BODY.format(name=name, model=reference, data=data, model_args=table, layer=layer)


def _layer_lines(found: Inventory) -> list[str]:
    largest = sorted(found.layers, key=lambda layer: -layer.params)[:SHOWN_LAYERS]
    share = sum(layer.params for layer in found.layers) / found.params
    width = max(len(layer.name) for layer in largest)
    lines = [f"Layers that can be decomposed: {len(found.layers)}, with {share:.1%} of the parameters; the largest are"]
    for layer in largest:
        shape = "x".join(map(str, layer.weight))
        lines.append(f"  {layer.name:{width}}  {shape:>16}  {layer.params:>12,} parameters  {layer.params / found.params:6.1%}")
    return lines


def _skipped_lines(found: Inventory) -> list[str]:
    """The reasons why layers stay dense, each once."""
    reasons = defaultdict[str, list[str]](list)
    for name, reason in found.skipped.items():
        reasons[reason].append(name)
    lines = [f"Layers that stay dense: {len(found.skipped)}"] if reasons else []
    return lines + [f"  {listed(names)}: {reason}" for reason, names in reasons.items()]


_BODY = """\
name = "{name}"

[task]
model = "{model}"
# A function that returns ranksearch.Splits(train, validation, test, classes, about), or a built-in one such as
# "ranksearch.data:image_folder", with data_args = {{ root = "pictures", size = 224 }}.
data = "{data}"
# By default the loss is cross-entropy and the score is accuracy; your own are functions of (outputs, targets). Without labels:
# loss = "ranksearch.task.distillation:kl_divergence"
# score = "ranksearch.task.distillation:agreement"

{model_args}[dense]
# The trained net's state dict, .safetensors or .pt. To train it here, leave weights out and set epochs.
# Its validation split must be new to it: on data that it was trained on, it scores too well to compare with.
weights = "{name}.safetensors"
epochs = 0

[space]
methods = ["tucker2", "cp", "svd"]
# skip = ["{layer}"]  # layers that stay dense, by name or pattern
# rank_multiple = 8             # ranks are multiples of 8, as tensor cores like them
# widths = [1.0, 0.5]           # search from a narrower net too, with half of the multiply-accumulates

[search]
trials = 60                     # plans to train
minimize = ["params"]           # or "macs", "latency", or several
# min_score = 0.9               # limits are optional; also min_ratio, max_params, max_macs, max_latency_ms

# The highest learning rates: a third to a tenth of that of the net's own training.
[finetune]                      # each trial
epochs = 3
learning_rate = 3e-4

[finalists]                     # the best trials are trained for longer, tested and saved
count = 10
epochs = 12
learning_rate = 3e-4
"""
