"""Checkpoints of long trainings: a resumed training ends with the same weights as one that was never killed."""

from __future__ import annotations

import io
import time
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ranksearch.errors import StudyError
from ranksearch.results.messages import CurvePoint
from ranksearch.support.files import write_whole

MIN_SECONDS_BETWEEN = 60.0
"""The shortest time between two checkpoints, since writing one may take a second. Shorter trainings write none."""


class Checkpoint:
    """The saved state of one training: weights, optimizer, schedule, learning curve and seconds so far.

    Args:
        path: the file; None for a training that is not saved.
        description: what is trained and how; a file with another description is ignored.

    Raises:
        StudyError: the file cannot be read.
    """

    def __init__(self, path: Path | None = None, description: str = "") -> None:
        self._path, self._description, self._start = path, description, time.monotonic()
        self._last_saved = self._start
        self._state = _read(path, description) if path is not None and path.exists() else {}
        self.curve_points = [CurvePoint(*curve_point) for curve_point in self._state.get("rungs", ())]
        """The learning curve so far; the evaluator appends to it, and `save` writes it."""
        self._earlier_seconds: float = self._state.get("seconds", 0.0)
        self.epochs: int = self._state.get("epochs", 0)
        """Finished epochs of the interrupted fit, as of the file."""

    def seconds(self) -> float:
        """The training's wall time, summed over all runs."""
        return self._earlier_seconds + time.monotonic() - self._start

    def restore(self, order: Generator, **parts: nn.Module | Optimizer | LRScheduler) -> int:
        """Load the saved state into `order` and `parts`, on the first call only; returns the finished epochs, 0 if none."""
        state, self._state = self._state, {}
        if not state:
            return 0
        order.set_state(state["order"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return int(state["epochs"])

    def save(self, epochs: int, order: Generator, **parts: nn.Module | Optimizer | LRScheduler) -> None:
        """Save the state after `epochs` epochs, unless the last save is under `MIN_SECONDS_BETWEEN` ago or the write fails."""
        if self._path is None or time.monotonic() - self._last_saved < MIN_SECONDS_BETWEEN:
            return
        state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
        curve_points = [astuple(curve_point) for curve_point in self.curve_points]
        state |= {
            "of": self._description,
            "epochs": epochs,
            "rungs": curve_points,
            "seconds": self.seconds(),
            "order": order.get_state(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        # On a full disk, go on without a checkpoint.
        with suppress(OSError):
            write_whole(self._path, buffer.getvalue())
        self._last_saved = time.monotonic()


def _read(path: Path, description: str) -> dict[str, Any]:
    """The state in a file; empty if the file is of another training."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state if state["of"] == description else {}
    except Exception as error:  # on a file that is not a checkpoint, torch may raise any exception
        raise StudyError(f"A checkpoint must be readable, but {path} is not ({type(error).__name__}); delete it.") from error
