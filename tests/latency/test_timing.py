"""Times that compare: taken in turn, the least of many, and honest about a busy machine."""

import itertools

import pytest

from ranksearch.latency import timing
from ranksearch.latency.timing import SERIES, in_turn


def giving(values, log=None, name=""):
    values = iter(values)

    def call():
        if log is not None:
            log.append(name)
        return next(values)

    return call


def test_models_take_turns():
    log = []
    in_turn([giving([1.0] * 4, log, "a"), giving([2.0] * 4, log, "b")], rounds=4)
    assert log == ["a", "b"] * 4


def test_the_least_counts():
    times = in_turn([giving([3.0, 2.0, 2.1, 2.0]), giving([5.0, 5.0, 4.9, 5.0])], rounds=4)
    assert times.ms == (2.0, 4.9)
    assert times.spreads == pytest.approx((0.025, 0.1 / 4.9))
    assert times.quiet


def test_a_busy_machine_is_timed_again_until_it_is_quiet():
    busy, quiet = [1.0, 2.0, 3.0], [1.1, 1.1, 1.1]
    times = in_turn([giving([*busy, *quiet])], rounds=3)
    assert times.quiet
    assert times.ms == (1.0,)


def test_a_machine_that_stays_busy_is_said_to_be():
    log = []
    times = in_turn([giving(itertools.cycle([1.0, 2.0, 3.0]), log)], rounds=3)
    assert not times.quiet
    assert len(log) == 3 * SERIES


def test_a_slow_model_is_timed_a_few_times_only(monkeypatch):
    clock = itertools.count(step=30.0)
    monkeypatch.setattr(timing.time, "monotonic", lambda: next(clock))
    log = []
    in_turn([giving([1.0] * 99, log)], rounds=99, max_seconds=20.0)
    assert len(log) == timing.MIN_ROUNDS
