"""Measure start-up, asks and report of a study with 5,000 trials in its record.

    python benchmarks/records.py --write    # some twenty minutes on two busy cores; makes the table of docs/benchmarks.md

The study is the built-in `lenet`: a few trained trials, then random plans with made-up scores. Measured are `ranksearch study`
until its first job, with its parts; the asks and tells of the next jobs, which are trained in the same process; and
`ranksearch report`. Each measurement has its own process and runs three times, of which the fastest counts. All is measured
once for a study that minimises parameters, and once for one that minimises parameters and multiply-accumulates.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import optuna
from pages import machine, row, table, write_section

from ranksearch import cli, console
from ranksearch.compress.inventory import inventory
from ranksearch.data import example
from ranksearch.results.attributes import read_facts, read_initial_plans
from ranksearch.results.messages import CurvePoint, Job, Outcome, Result
from ranksearch.results.objectives import Objectives
from ranksearch.results.trials import TrialRecord
from ranksearch.strategy.bases import Bases
from ranksearch.strategy.ledger import Ledger
from ranksearch.strategy.space import make_space
from ranksearch.study import folder, study
from ranksearch.study_file import load_spec
from ranksearch.task.task import load_task

TRIALS, ASKS, REPEATS = 5000, 20, 3
SHORT_TRAINING = ("dense.epochs=3", "finetune.epochs=1", "finalists.epochs=1", "finalists.count=3")
MINIMIZED = {"parameters": '["params"]', "parameters and MACs": '["params", "macs"]'}
UNTIL_FIRST_JOB = "from the process's start to its first job"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name / "lenet" for name in MINIMIZED]
        for out, costs in zip(folders, MINIMIZED.values(), strict=True):
            build(out, costs)
        found = [measurements(out, costs) for out, costs in zip(folders, MINIMIZED.values(), strict=True)]
        lines = [machine("torch", "optuna", "sqlalchemy"), *table(["seconds", *MINIMIZED])]
        lines += [row(name, *(f"{each[name]:.2f}" for each in found)) for name in found[0]]
    if given.write:
        write_section("records", "python benchmarks/records.py --write", "\n".join(lines))


def build(out: Path, costs: str) -> None:
    """Make a study's folder with `TRIALS` trials in its record: twelve trained ones, the others with made-up results."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spec = load_spec("lenet", overrides=[*settings(costs), "search.trials=12"])
    study.run_study(spec, out)
    record = folder.open_study(spec.name, folder.storage_url(out, None))
    task = load_task(spec)
    found = inventory(task.model, example(task.data.train))
    space = make_space(found, spec.space.methods)
    dense = read_facts(record).dense.score_validation
    ledger = Ledger(
        record, Bases.of(space, found), read_initial_plans(record) or [], sampler="random", seed=spec.seed, dense_score=dense,
        limits=spec.search.limits, objectives=Objectives(spec.search.minimize, found.costs),
    )  # fmt: skip
    for job in ledger.jobs(TRIALS):
        ledger.receive(job, made_up(job, dense))


def settings(costs: str) -> list[str]:
    """Overrides that make the study short and set what it minimises."""
    return [*SHORT_TRAINING, f"search.minimize={costs}"]


def made_up(job: Job, dense: float) -> Result:
    """A result whose learning curve has four points and rises to somewhere below the dense score."""
    drop = random.Random(job.key).lognormvariate(-2.5, 1.0)
    return Result(Outcome.DONE, tuple(CurvePoint(epochs, dense - drop * 2 ** (3 - epochs)) for epochs in range(4)), seconds=1.0)


def measurements(out: Path, costs: str) -> dict[str, float]:
    """All measurements of a study: seconds by name."""
    started = min((in_own_process("start", out, costs) for _ in range(REPEATS)), key=lambda found: found[UNTIL_FIRST_JOB])
    return started | min((in_own_process("report", out, costs) for _ in range(REPEATS)), key=lambda found: found["a report"])


def in_own_process(what: str, out: Path, costs: str) -> dict[str, float]:
    """Run one measurement, the function `what` of this module, in its own process; its seconds by name."""
    code = f"import records; records.{what}({str(out)!r}, {costs!r}, {time.time()})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def start(out: str, costs: str, begun: float) -> None:
    """Resume the study for `ASKS` trials, as the command does, and print the seconds of each part."""
    clock, asks, tells = Clock(begun), list[float](), list[float]()
    clock.lap("packages, torch and Optuna among them")

    class Timed(Ledger):
        def jobs(self, trials: int) -> Iterator[Job]:
            source = super().jobs(trials)
            for _ in range(ASKS + 1):
                before = time.time()
                job = next(source)
                asks.append(time.time() - before)
                if len(asks) == 1:
                    clock.lap("first ask")
                yield job
            raise KeyboardInterrupt

        def receive(self, job: Job, result: Result) -> TrialRecord:
            before = time.time()
            found = super().receive(job, result)
            tells.append(time.time() - before)
            return found

    words = [word for setting in settings(costs) for word in ("--set", setting)]
    command = ["study", "lenet", "--out", out, "--trials", str(2 * TRIALS), "--workers", "0", *words]
    with mock.patch.object(study, "Ledger", Timed), mock.patch.object(console, "Plain", return_value=clock):
        assert cli.main(command) == cli.INTERRUPTED
    parts = {f"- {name}": seconds for name, seconds in clock.parts.items()}
    later = {"an ask after that, mean": sum(asks[1:]) / ASKS, "an ask, longest": max(asks[1:])}
    print(json.dumps({UNTIL_FIRST_JOB: sum(parts.values())} | parts | later | {"a tell, mean": sum(tells) / len(tells)}))


class Clock(console.Silent):
    """A view that measures the seconds between the stages of a study."""

    def __init__(self, begun: float) -> None:
        self.parts: dict[str, float] = {}
        self._last = begun

    def lap(self, name: str) -> None:
        self.parts[name], self._last = time.time() - self._last, time.time()

    def __enter__(self) -> Clock:
        self.lap("model and data, checked")
        return self

    def stage(self, title: str, total: int, done: int = 0) -> None:
        names = {
            "profiling layers": "storage opened, dense net read",
            "probing layers": "prepared factors read",
            "trials": "record read",
        }
        if title in names:
            self.lap(names[title])


def report(out: str, costs: str, begun: float) -> None:
    """Make the report as the command does, and print the seconds."""
    cli.main(["report", out])
    print(json.dumps({"a report": time.time() - begun}))


if __name__ == "__main__":
    main()
