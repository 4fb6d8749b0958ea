"""The thesis's systems (A. A. Salman, University of Bologna, 2018): its figures, and what they come to here.

    python benchmarks/thesis.py ccnn lenet lenet3 --seeds 3    # trains what is not in runs/thesis yet; hours on two cores
    python benchmarks/thesis.py --write                        # makes the tables of docs/thesis.md from what there is

Nets that the thesis designed, the dense nets beside them, and single layers decomposed at its ranks are trained here, by the
recipe of the study that stands for them. Searched nets come from the folders of finished studies, `ranksearch study NAME`.
Of a search the smallest net counts that validates no worse than its dense net. Tests are on the test split, once a net.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pages import machine, row, table, write_section

from ranksearch import training
from ranksearch.data import example
from ranksearch.dense import recipe
from ranksearch.files import write_whole
from ranksearch.layers import count_params, inventory
from ranksearch.plan import CP, CP4, Factorization, Plan, Tucker2
from ranksearch.spec import StudySpec, load_spec
from ranksearch.surgery import factorize_
from ranksearch.tasks import Task, load_task

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[1] / "docs" / "thesis.md"


@dataclass(frozen=True)
class Net:
    """A row of the tables that is trained here."""

    name: str
    thesis: str
    """The thesis's figures, as it gives them."""
    overrides: tuple[str, ...] = ()
    """What differs from the study's file."""
    plan: dict[str, Factorization] = field(default_factory=dict)
    """What the system's dense net is decomposed to once it is trained; without one the net is trained from its own weights."""


@dataclass(frozen=True)
class Search:
    """A row of the tables that a finished study gives."""

    name: str
    thesis: str
    study: str


@dataclass(frozen=True)
class System:
    """A table: the study whose data and recipes its nets are trained by, and its rows, the dense net first."""

    title: str
    study: str
    score: str
    nets: tuple[Net, ...]
    searches: tuple[Search, ...]


SYSTEMS = {
    "ccnn": System(
        "CCNN: confidence in stereo disparities", "ccnn", "AUC",
        (
            Net("dense", "128,125 parameters, AUC 0.1222"),
            Net("TD blocks of rank 40", "36,357 parameters, AUC 0.1192", ("task.model='ranksearch.models:td_ccnn'",)),
            Net("the same, 1x1 layers of rank 20", "27,277 parameters, AUC 0.1186",
                ("task.model='ranksearch.models:td_ccnn'", "task.model_args.pointwise_rank=20")),
        ),
        (Search("compressed by search", "future work", "ccnn"), Search("designed by search", "future work", "ccnn-design")),
    ),
    "lenet": System(
        "LeNet of four convolutions: design and compression", "lenet-design", "accuracy",
        (
            Net("dense", "1,250,858 parameters, 74 %", ("task.model_args.batch_norm=false",)),
            Net("TD blocks of rank 15 and 30", "27,224 parameters, 82 %",
                ("task.model='ranksearch.models:td_lenet'", "task.model_args={}")),
        ),
        (Search("designed by search", "future work", "lenet-design"),
         Search("compressed by search", "CPD 42,922 parameters, 80 % (dense 79 %); Tucker 77 %", "lenet-cifar10")),
    ),
    "lenet3": System(
        "LeNet of three convolutions: compression", "lenet3", "accuracy",
        (
            Net("dense", "1,415,498 parameters, 74 %"),
            Net("conv1 CPD, 4x", "80 %", plan={"conv1": CP4(16)}),
            Net("conv2 CPD, 31x", "82 %", plan={"conv2": CP4(42)}),
            Net("conv3 CPD, R = 85, 25x", "80 %", plan={"conv3": CP4(85)}),
            Net("conv3 CPD, R = 39, 52x", "77 %", plan={"conv3": CP4(39)}),
            Net("conv3 Tucker, R = 41 and 6, 63x", "76 %", plan={"conv3": Tucker2(41, 6)}),
            Net("conv3 CP with merged kernel modes, of the size of R = 39", "not tried", plan={"conv3": CP(38)}),
        ),
        (Search("compressed by search", "CPD 328,348 parameters (4.3x), 81 %; Tucker 396,673 (3.57x), 80 %", "lenet3"),),
    ),
    "nin": System(
        "Network in Network", "nin", "accuracy", (Net("dense", "1,004,042 parameters, 86 %"),),
        (Search("compressed by search", "CPD 258,664 parameters (3.9x), 87 %; Tucker 532,843 (1.9x), 86 %", "nin"),),
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", choices=[*SYSTEMS, []])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="fewer than the study has, which the tables then say")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the studies' folders are")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.systems:
        for seed in range(given.seeds):
            for net in SYSTEMS[name].nets:
                path = given.runs / "thesis" / name / f"{net.name} {seed}.json"
                if not path.exists():
                    print(f"{name}, {net.name}, seed {seed}", flush=True)
                    found = train(SYSTEMS[name], net, seed, given.epochs, path.with_name(f"dense {seed}.pt"))
                    write_whole(path, json.dumps(found, indent=1))
                    print(found, flush=True)
    if given.write:
        for name, system in SYSTEMS.items():
            write_section(name, "python benchmarks/thesis.py --write", "\n".join(lines(system, name, given.runs)), page=PAGE)


def train(system: System, net: Net, seed: int, epochs: int | None, dense: Path) -> dict[str, Any]:
    """Train a net by the recipe of its study, and say what came of it; the dense net's weights are kept in `dense`."""
    spec = load_spec(system.study, overrides=[*net.overrides, f"seed={seed}"])
    task, start = load_task(spec), time.perf_counter()
    model = training.place(task.model, CPU)
    wanted = recipe(spec.finalists if net.plan else spec.dense)
    if net.plan:
        model.load_state_dict(torch.load(dense, weights_only=True))
        training.place(factorize_(model, Plan.of(net.plan), seed=seed), CPU)
        training.recalibrate(model, task, seed=seed, device=CPU)
    if epochs is not None:
        wanted = training.Recipe(**(vars(wanted) | {"epochs": epochs}))
    for epoch in training.fit(model, task, wanted, seed=seed, device=CPU):
        print(f"  epoch {epoch} of {wanted.epochs}: {time.perf_counter() - start:.0f} s", flush=True)
    if net.name == "dense":
        dense.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), dense)
    return facts(task, spec, seed, wanted, start)


def facts(task: Task, spec: StudySpec, seed: int, recipe: training.Recipe, start: float) -> dict[str, Any]:
    """What is known of a trained net."""
    model, data = task.model, task.data
    validation, test = (training.score(model, task, split, device=CPU) for split in (data.validation, data.test))
    return {
        "params": count_params(model), "macs": inventory(model.cpu(), example(data.train)).macs, "score_validation": validation,
        "score_test": test, "data": data.about, "seed": seed, "recipe": vars(recipe), "seconds": time.perf_counter() - start,
        "versions": {name: version(name) for name in ("torch", "ranksearch")},
    }  # fmt: skip


def lines(system: System, name: str, runs: Path) -> list[str]:
    """A system's table."""
    trained = {net.name: read(runs / "thesis" / name, net.name) for net in system.nets}
    found = [machine("torch", "ranksearch")]
    if trained["dense"]:
        found.append(f"Data: {trained['dense'][0]['data']}.\n")
    found += table(["", "the thesis", "parameters", "smaller", f"{system.score}, test", "against dense", "epochs", "seeds"])
    for net in system.nets:
        each, base = trained[net.name], trained["dense"]
        if not each:
            found.append(row(net.name, net.thesis, *["not run yet", *[""] * 5]))
            continue
        gains = [a["score_test"] - b["score_test"] for a in each for b in base if a["seed"] == b["seed"]]
        found.append(row(
            net.name, net.thesis, f"{each[0]['params']:,}", f"{base[0]['params'] / each[0]['params']:.1f}x",
            spread(system, [a["score_test"] for a in each]), "" if net.name == "dense" else spread(system, gains, gain=True),
            each[0]["recipe"]["epochs"], len(each),
        ))  # fmt: skip
    return found + [line for search in system.searches for line in searched(system, search, runs)]


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    """What was kept of a net, a seed each."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name} *.json"))]


def searched(system: System, search: Search, runs: Path) -> list[str]:
    """The rows of a finished study: its dense net, and the smallest net that validates no worse."""
    path = runs / search.study / "front.json"
    if not path.exists():
        return [row(f"{search.name}: `ranksearch study {search.study}`", search.thesis, *["not run yet", *[""] * 5])]
    record = json.loads(path.read_text())
    dense = record["dense"]
    fitting = [entry for entry in record["front"] if entry["score_validation"] >= dense["score_validation"]]
    rows = [row(f"dense net of the study {search.study}", "", f"{dense['params']:,}", "1x",
                spread(system, [dense["score_test"]]), "", "", 1)]  # fmt: skip
    if not fitting:
        return [*rows, row(search.name, search.thesis, "none validates as well", *[""] * 5)]
    best = max(fitting, key=lambda entry: entry["ratio"])
    gain = [best["score_test"] - dense["score_test"]]
    return [*rows, row(
        f"{search.name}: `{record['command']}`", search.thesis, f"{best['params']:,}", f"{best['ratio']:.1f}x",
        spread(system, [best["score_test"]]), spread(system, gain, gain=True), best["epochs"], 1,
    )]  # fmt: skip


def spread(system: System, scores: list[float], *, gain: bool = False) -> str:
    """Mean and standard deviation of scores, as the system's figure: an AUC of 1 - score, or points of accuracy."""
    area = system.score == "AUC"
    values = [(0 if gain else 1) - score if area else 100 * score for score in scores]
    mean, off = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
    sign, digits = "+" if gain else "", 4 if area else 1
    text = f"{mean:{sign}.{digits}f}" + (f" ± {off:.{digits}f}" if off is not None else "")
    return text if area else text + (" points" if gain else " %")


if __name__ == "__main__":
    main()
