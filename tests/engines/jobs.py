"""Jobs for tests of engines, and the evaluation of all of them; scripts in tests import them too."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from ranksearch.plan import Plan
from ranksearch.results.messages import CurvePoint, Job, Outcome, Result


def double(job):
    """A learning curve that ends at twice the seed."""
    yield CurvePoint(0, float(job.seed))
    yield Result(Outcome.DONE, (CurvePoint(0, float(job.seed)), CurvePoint(1, 2.0 * job.seed)))


def its_process(job):
    """A learning-curve point whose score is the worker's process id, then the result."""
    yield CurvePoint(0, float(os.getpid()))
    yield Result(Outcome.DONE)


def long(job):
    """Like `its_process`, but takes long."""
    yield CurvePoint(0, float(os.getpid()))
    time.sleep(600)
    yield Result(Outcome.DONE)


def dies(job):
    yield CurvePoint(0, float(job.seed))
    os.kill(os.getpid(), signal.SIGKILL)


def echo(job):
    yield Result(Outcome.DONE, weights=pickle.dumps(job))


@dataclass(frozen=True)
class Raises:
    error: Exception

    def __call__(self, job):
        yield CurvePoint(0, float(job.seed))
        raise self.error


@dataclass(frozen=True)
class Work(Job):
    """A job that says what its evaluation does."""

    act: Callable = double


def perform(job):
    """The evaluation of all tests: workers stay warm only for the same one, and a new worker takes seconds to import torch."""
    yield from job.act(job)


def jobs(count, acts=None):
    """Jobs with keys from 0 and equal seeds. `acts` maps keys to what those jobs do instead of `double`."""
    return iter([Work(key, Plan(), seed=key, act=(acts or {}).get(key, double)) for key in range(count)])


def collect(count, engine, acts=None, work=perform):
    """Run `count` jobs; every message with the key of its job."""
    found = []

    def on_message(job, message):
        found.append((job.key, message))

    engine.run(jobs(count, acts), work, on_message=on_message, should_stop=lambda: False)
    return found


def answers(found):
    return sorted((key, message.outcome.name, message.curve) for key, message in found if isinstance(message, Result))


def its_workers(engine):
    """The process ids of the engine's two workers."""
    found = collect(2, engine, dict.fromkeys(range(2), its_process))
    pids = {int(message.score) for _, message in found if isinstance(message, CurvePoint)}
    assert len(pids) == 2
    return pids


def assert_ended(pids):
    """Assert that processes end soon."""
    deadline = time.monotonic() + 5
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Loads:
    """A value that calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refuse_to_load():
    raise ValueError("no weights here\nand more")


REFUSED = Loads(refuse_to_load)


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)
