"""Times of several models that can be compared: taken in turn, round after round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ranksearch.latency.runtimes import Timer

ROUNDS, MIN_ROUNDS = 10, 3
MAX_SECONDS = 20.0
"""How long one series of rounds may take, the least number of rounds aside."""
QUIET_SPREAD = 0.1
"""A series with a median spread above this is taken again."""
SERIES = 3
"""How many series are taken at most, on a busy machine."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of each model, the least of its rounds; and how far the median of its last rounds lies above their least,
    relative.

    Other work on the machine only ever adds time, so the least is nearest to the model's own.
    """

    ms: tuple[float, ...]
    spreads: tuple[float, ...]

    @property
    def quiet(self) -> bool:
        """Whether the machine was quiet enough for the order of these times to be trusted."""
        return statistics.median(self.spreads) <= QUIET_SPREAD


def in_turn(calls: Sequence[Timer], *, rounds: int | None = None, max_seconds: float = MAX_SECONDS) -> Times:
    """Time all of them once in each round; on a busy machine again, up to `SERIES` times."""
    least = [float("inf")] * len(calls)
    for _ in range(SERIES):
        taken = _series(calls, rounds or ROUNDS, max_seconds)
        least = [min(before, *each) for before, each in zip(least, taken, strict=True)]
        times = Times(tuple(least), tuple(statistics.median(each) / min(each) - 1 for each in taken))
        if times.quiet:
            break
    return times


def _series(calls: Sequence[Timer], rounds: int, max_seconds: float) -> list[list[float]]:
    taken: list[list[float]] = [[] for _ in calls]
    start = time.monotonic()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.monotonic() - start > max_seconds:
            break
        for call, each in zip(calls, taken, strict=True):
            each.append(call())
    return taken
