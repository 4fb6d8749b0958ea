"""Measure the overhead of the engines: seconds a trial beyond the trial's own work.

    python benchmarks/engines.py --write    # some six minutes on two cores; makes the table of docs/benchmarks.md

A hundred trials that do nothing run on two workers. With our engines, a trial goes from the ledger's ask to the storage's
commit (SQLite, space of the LeNet, random sampler, a learning curve of one point). For comparison, Ray's `OptunaSearch` runs as
many trials with a function trainable, the usual way in Ray Tune. Each contender runs in its own process, one after the other.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import optuna
import torch
from pages import machine, row, table, write_section

from ranksearch.compress.inventory import inventory
from ranksearch.engines import processes, ray
from ranksearch.engines.base import Engine
from ranksearch.models import lenet
from ranksearch.results.limits import UNLIMITED
from ranksearch.results.messages import CurvePoint, Job, Outcome, Result
from ranksearch.results.objectives import Objectives
from ranksearch.strategy.bases import Bases
from ranksearch.strategy.ledger import Ledger
from ranksearch.strategy.space import make_space
from ranksearch.study import folder

TRIALS, WORKERS = 100, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = parser.parse_args()
    lines = [
        machine("ray", "optuna", "torch"),
        *table(["", "first answer after", "a trial after that", "a trial, start and end included"]),
    ]
    for name in CONTENDERS:
        # By `-c`, since each worker process would import a script again; the command `ranksearch` is no script either.
        code = f"import engines; engines.measure({name!r})"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        first, each, whole = map(float, done.stdout.split()[-3:])
        lines.append(row(name, f"{first:.1f} s", f"{each:.3f} s", f"{whole:.3f} s"))
    if given.write:
        write_section("engines", "python benchmarks/engines.py --write", "\n".join(lines))


def measure(name: str) -> None:
    """Run one contender and print three figures: seconds to the first result, a trial after it, a trial over all."""
    start, answers, end = CONTENDERS[name]()
    assert len(answers) == TRIALS, f"{len(answers)} answers"
    first, last = answers[0], answers[-1]
    print(first - start, (last - first) / (TRIALS - 1), (end - start) / TRIALS)


Clock: TypeAlias = tuple[float, list[float], float]
"""Times: before the engine starts, of each result, after the engine is closed."""


def with_engine(make: Callable[[], Engine]) -> Clock:
    """Run the trials of a study on an engine."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = inventory(lenet(), torch.zeros(1, 3, 32, 32))
    with tempfile.TemporaryDirectory() as scratch:
        study = folder.create_study("nothing", folder.storage_url(Path(scratch), None), Objectives())
        space = make_space(found, ("tucker2", "cp", "svd"))
        ledger = Ledger(
            study,
            Bases.of(space, found),
            [],
            sampler="random",
            seed=0,
            dense_score=1.0,
            limits=UNLIMITED,
            objectives=Objectives(dense=found.costs),
        )
        answers = []

        def on_message(job: Job, message: CurvePoint | Result) -> None:
            if isinstance(message, Result):
                ledger.receive(job, message)
                answers.append(time.perf_counter())

        start = time.perf_counter()
        with make() as engine:
            engine.run(ledger.jobs(TRIALS), no_work, on_message=on_message, should_stop=lambda: False)
        return start, answers, time.perf_counter()


def no_work(job: Job) -> Iterator[CurvePoint | Result]:
    yield CurvePoint(0, 0.5)
    yield Result(Outcome.DONE, (CurvePoint(0, 0.5),))


def with_optuna_search() -> Clock:
    """Run as many trials by Ray's `OptunaSearch`. They have one objective, since it drops the results of two."""
    from ray import init, shutdown, tune
    from ray.tune.search.optuna import OptunaSearch

    answers = []

    class Watch(tune.Callback):
        def on_trial_complete(self, *args: object, **more: object) -> None:
            answers.append(time.perf_counter())

    def objective(config: dict[str, float]) -> None:
        import torch  # noqa: F401  # without it no trial trains anything

        tune.report({"score": 0.5})

    start = time.perf_counter()
    init(address="local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as scratch:
        tune.Tuner(
            objective,
            param_space={f"x{i}": tune.uniform(0, 1) for i in range(16)},
            tune_config=tune.TuneConfig(
                search_alg=OptunaSearch(), metric="score", mode="max", num_samples=TRIALS, max_concurrent_trials=WORKERS
            ),
            run_config=tune.RunConfig(storage_path=scratch, verbose=0, callbacks=[Watch()]),
        ).fit()
    shutdown()
    return start, answers, time.perf_counter()


CONTENDERS = {
    "local engine": lambda: with_engine(lambda: processes.engine(WORKERS)),
    "Ray engine": lambda: with_engine(lambda: ray.engine(ray.Cluster(workers=WORKERS))),
    "`OptunaSearch`, function trainable": with_optuna_search,
}

if __name__ == "__main__":
    main()
