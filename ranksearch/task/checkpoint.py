"""The checkpoint of a long training: what a killed one goes on from, to the same weights as one that never stopped."""

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
"""Seconds between two checkpoints, at least: writing one may take a second, and short trainings have none."""


class Checkpoint:
    """One training's state on the disk, and what it has behind it.

    Args:
        path: the file; None keeps nothing.
        of: what is trained and how, in words: a file of another training is passed over.

    Raises:
        StudyError: the file cannot be read.
    """

    def __init__(self, path: Path | None = None, of: str = "") -> None:
        self._path, self._of, self._start = path, of, time.monotonic()
        self._kept = self._start
        self._state = _read(path, of) if path is not None and path.exists() else {}
        self.curve_points = [CurvePoint(*curve_point) for curve_point in self._state.get("rungs", ())]
        """The scores so far; the evaluator appends each, and `keep` writes them too."""
        self._before: float = self._state.get("seconds", 0.0)
        self.epochs: int = self._state.get("epochs", 0)
        """What the file has behind it, of the fit that was cut short."""

    def seconds(self) -> float:
        """How long the training has taken, in all runs together."""
        return self._before + time.monotonic() - self._start

    def restore(self, order: Generator, **parts: nn.Module | Optimizer | LRScheduler) -> int:
        """Bring what trains to where the file has it, once; the number of epochs behind it, 0 where there is no file."""
        state, self._state = self._state, {}
        if not state:
            return 0
        order.set_state(state["order"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return int(state["epochs"])

    def keep(self, epochs: int, order: Generator, **parts: nn.Module | Optimizer | LRScheduler) -> None:
        """Write the state after so many epochs, where the last was written long enough ago, and the disk takes it."""
        if self._path is None or time.monotonic() - self._kept < MIN_SECONDS_BETWEEN:
            return
        state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
        curve_points = [astuple(curve_point) for curve_point in self.curve_points]
        state |= {
            "of": self._of,
            "epochs": epochs,
            "rungs": curve_points,
            "seconds": self.seconds(),
            "order": order.get_state(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        # On a full disk a training without a checkpoint is better than none.
        with suppress(OSError):
            write_whole(self._path, buffer.getvalue())
        self._kept = time.monotonic()


def _read(path: Path, of: str) -> dict[str, Any]:
    """The state that a file holds; empty where it is of another training."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state if state["of"] == of else {}
    except Exception as error:  # of a file that is none of its own torch may raise anything
        raise StudyError(
            f"A checkpoint must be whole, but {path} cannot be read ({type(error).__name__}); delete it."
        ) from error
