"""How far a score on other inputs of the same kind may lie from the measured one: the bootstrap (Efron 1979)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ranksearch.results.messages import Difference
from ranksearch.support.batch import select_inputs, sizes_in
from ranksearch.support.nesting import has_lists_per_input, tensors_in
from ranksearch.task.task import Score

MAX_RESAMPLES, MIN_RESAMPLES = 1000, 100
"""The least number also for outputs in lists, such as boxes: their scores may take a second each, such as a mean precision."""
MAX_VALUES = 2**28
"""About how many values of outputs all resamples together may read, which takes a second or two."""
INTERVAL = (0.025, 0.975)
"""The quantiles of a 95 % interval."""


def difference(score: Score, outputs: Any, dense_outputs: Any, targets: Any, *, seed: int) -> Difference | None:
    """The score of a model minus that of the dense model on one split, and how far it may be off.

    Both models are scored on the same resampled inputs (a paired bootstrap), so that inputs that are hard for both do not count
    as a difference.

    Args:
        score: (outputs, targets) of a whole split -> a number.
        outputs: of the model, for all inputs of the split, as `predict` gives them.
        dense_outputs: of the dense model.
        targets: of the split.
        seed: of the resamples.

    Returns:
        None if the score gives no number for most resamples, for example because these lack a class, or if the outputs hold a
        tensor that has no value for each input, such as anchors.
    """
    value = float(score(outputs, targets)) - float(score(dense_outputs, targets))

    def on(chosen: Tensor) -> float:
        some = select_inputs(targets, chosen)
        return float(score(select_inputs(outputs, chosen), some)) - float(score(select_inputs(dense_outputs, chosen), some))

    found = _values(on, outputs, seed)
    if found is None:
        return None
    low, high = np.quantile(found, INTERVAL)
    return Difference(value, float(low), float(high), float(np.std(found)))


def standard_error(score: Score, outputs: Any, targets: Any, *, seed: int) -> float | None:
    """The standard error of a score; None as for `difference`."""
    found = _values(lambda chosen: float(score(select_inputs(outputs, chosen), select_inputs(targets, chosen))), outputs, seed)
    return None if found is None else float(np.std(found))


def _values(on: Callable[[Tensor], float], outputs: Any, seed: int) -> list[float] | None:
    """A value for each resample, where there is one.

    None if less than half of the resamples have one, or if the outputs hold a tensor that has no value for each input.
    """
    sizes = sizes_in(outputs)
    if len(sizes) != 1:
        return None
    read = sum(tensor.numel() for tensor in tensors_in(outputs))
    most = MIN_RESAMPLES if has_lists_per_input(outputs) else MAX_RESAMPLES
    count = min(most, max(MIN_RESAMPLES, MAX_VALUES // max(read, 1)))
    found = list(_finite(on, sizes.pop(), count, seed))
    return found if 2 * len(found) >= count else None


def _finite(on: Callable[[Tensor], float], inputs: int, count: int, seed: int) -> Iterator[float]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        chosen = torch.randint(inputs, (inputs,), generator=draw)
        try:
            value = on(chosen)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # a user's score may raise anything where a resample lacks what it needs, such as a class
            continue
        if math.isfinite(value):
            yield value
