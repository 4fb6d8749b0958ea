"""Reproduce the systems of the thesis (A. A. Salman, University of Bologna, 2018) and compare its figures with ours.

    python benchmarks/thesis.py ccnn lenet lenet3 --seeds 3    # trains what is not in runs/thesis yet; hours on two cores
    python benchmarks/thesis.py --write                        # adds the results to docs/thesis.json, and makes the tables

This script trains the nets that the thesis designed, their dense nets, and dense nets with single layers decomposed at the
thesis's ranks, by the recipe of the matching built-in study. Searched nets come from the folders of finished studies,
`ranksearch study NAME`: the finalists of the front. Each net is scored once on the test split.

docs/thesis.json keeps every measured figure, with its seed, epochs, versions and machine: no single machine ran them all.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pages import about, row, table, write_section

from ranksearch.compress.inventory import count_params, inventory
from ranksearch.compress.surgery import factorize_
from ranksearch.compress.weights import digest_of
from ranksearch.data import example
from ranksearch.plan import CP, CP4, Factorization, Plan, Tucker2
from ranksearch.spec import Recipe, StudySpec
from ranksearch.study_file import load_spec
from ranksearch.support.files import write_whole
from ranksearch.task import training
from ranksearch.task.checkpoint import Checkpoint
from ranksearch.task.task import Task, load_task

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[1] / "docs" / "thesis.md"
FIGURES_FILE = PAGE.with_suffix(".json")


@dataclass(frozen=True)
class Net:
    """A row of the tables whose net this script trains."""

    name: str
    thesis: str
    """The figures that the thesis gives, as text."""
    overrides: tuple[str, ...] = ()
    """Overrides of the study's file."""
    plan: dict[str, Factorization] | None = None
    """The plan by which the system's trained dense net is decomposed before fine-tuning. None: the net is trained from its own
    weights. Empty: the dense net gets the same further fine-tuning as the decomposed nets."""


@dataclass(frozen=True)
class Search:
    """A row of the tables that is read from a finished study."""

    name: str
    thesis: str
    study: str


@dataclass(frozen=True)
class System:
    """A table: the study that gives data and recipes, and the rows, the dense net first."""

    title: str
    study: str
    score: str
    nets: tuple[Net, ...]
    searches: tuple[Search, ...]


DENSE_LENET = ("task.model_args.batch_norm=false", "task.model_args.dropout=0.25")

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
            Net("dense", "1,250,858 parameters, 74 %", DENSE_LENET),
            Net("dense, without dropout", "", (*DENSE_LENET, "task.model_args.dropout=0.0")),
            Net("TD blocks of rank 15 and 30", "27,224 parameters, 82 %",
                ("task.model='ranksearch.models:td_lenet'", "task.model_args={dropout=0.0}", "dense.learning_rate=1e-2")),
            Net("the same, trained as the dense net", "", ("task.model='ranksearch.models:td_lenet'", "task.model_args={}")),
        ),
        (Search("designed by search", "future work", "lenet-design"),
         Search("compressed by search", "CPD 42,922 parameters, 80 % (dense 79 %); Tucker 77 %", "lenet-cifar10")),
    ),
    "lenet3": System(
        "LeNet of three convolutions: compression", "lenet3", "accuracy",
        (
            Net("dense", "1,415,498 parameters, 74 %"),
            Net("dense, fine-tuned like those below", "", plan={}),
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
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0 on")
    parser.add_argument("--epochs", type=int, help="train for so many epochs instead of the study's; the tables show them")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the studies' folders are")
    parser.add_argument(
        "--write", action="store_true", help="add the results to docs/thesis.json, and put the tables into docs/thesis.md"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.systems:
        for seed in range(given.seeds):
            for net in SYSTEMS[name].nets:
                path = given.runs / "thesis" / name / f"{net.name} {seed}.json"
                if not path.exists():
                    print(f"{name}, {net.name}, seed {seed}", flush=True)
                    unfinished = path.with_suffix(".unfinished.pt")
                    found = train(
                        SYSTEMS[name], net, seed, given.epochs, dense=path.with_name(f"dense {seed}.pt"), unfinished=unfinished
                    )
                    write_whole(path, json.dumps(found, indent=1))
                    unfinished.unlink(missing_ok=True)
                    print(found, flush=True)
    if given.write:
        kept = gathered(given.runs)
        write_whole(FIGURES_FILE, json.dumps(kept, indent=1) + "\n")
        for name, system in SYSTEMS.items():
            own = [entry for entry in kept if entry["system"] == name]
            write_section(name, "python benchmarks/thesis.py --write", "\n".join(table_lines(system, own)), page=PAGE)


Entry: TypeAlias = dict[str, Any]
"""The measurements of one net of one system under one seed. In the entry of a search, `dense` is its own dense net."""


def gathered(runs: Path) -> list[Entry]:
    """All entries kept before and those in `runs`, which replace earlier ones of the same net, seed and epochs."""
    found = json.loads(FIGURES_FILE.read_text()) if FIGURES_FILE.exists() else []
    for name, system in SYSTEMS.items():
        for net in system.nets:
            paths = sorted((runs / "thesis" / name).glob(f"{net.name} *.json"))
            found += [{"system": name, "net": net.name} | json.loads(path.read_text()) for path in paths]
        for search in system.searches:
            if (path := runs / search.study / "front.json").exists():
                front = json.loads(path.read_text())
                if all(entry["score_test"] is None for entry in front["front"]):
                    print(f"{path}: the study has no finalists yet, and is left out", flush=True)
                    continue
                found.append({"system": name, "net": search.name} | searched(front))
    latest = {(e["system"], e["net"], e["seed"], e.get("epochs"), e.get("command")): e for e in found}
    return [latest[key] for key in sorted(latest, key=str)]


def train(system: System, net: Net, seed: int, epochs: int | None, *, dense: Path, unfinished: Path) -> Entry:
    """Train a net by the recipe of its study and measure it. `dense` is the file with the dense net's weights, `unfinished`
    that with the checkpoint of a killed training."""
    spec = load_spec(system.study, overrides=[*net.overrides, f"seed={seed}"])
    task = load_task(spec)
    model = training.place(task.model, CPU)
    section = spec.dense if net.plan is None else spec.finalists
    wanted = Recipe(**{entry.name: getattr(section, entry.name) for entry in fields(Recipe)})
    if epochs is not None:
        wanted = replace(wanted, epochs=epochs)
    if net.plan is not None:
        model.load_state_dict(torch.load(dense, weights_only=True))
        training.place(factorize_(model, Plan.of(net.plan), seed=seed), CPU)
        training.recalibrate(model, task, seed=seed, device=CPU)
    checkpoint = Checkpoint(unfinished, f"{net}, seed {seed}, {wanted}, from {digest_of(model)}")
    for epoch in training.fit(model, task, wanted, seed=seed, device=CPU, checkpoint=checkpoint):
        print(f"  epoch {epoch} of {wanted.epochs}: {checkpoint.seconds():.0f} s", flush=True)
    if net.name == "dense":
        dense.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), dense)
    return measurements(task, spec, seed, wanted, checkpoint.seconds())


def measurements(task: Task, spec: StudySpec, seed: int, recipe: Recipe, seconds: float) -> Entry:
    """The measurements of a trained net."""
    model, data = task.model, task.data
    validation, test = (training.score(model, task, split, device=CPU) for split in (data.validation, data.test))
    return {
        "params": count_params(model), "macs": inventory(model.cpu(), example(data.train)).macs, "score_validation": validation,
        "score_test": test, "data": data.about, "seed": seed, "epochs": recipe.epochs, "recipe": vars(recipe),
        "seconds": seconds, "versions": {name: version(name) for name in ("torch", "ranksearch")},
        "machine": about("torch"),
    }  # fmt: skip


def searched(front: Entry) -> Entry:
    """The entry of a finished study: its dense net, and the finalists of its front."""
    kept = ("params", "macs", "score_validation", "score_test", "epochs", "plan_text")
    about = {key: front[key] for key in ("dense", "seed", "command", "machine", "versions", "seconds")}
    return about | {"nets": [{key: entry[key] for key in kept} for entry in front["front"] if entry["score_test"] is not None]}


def table_lines(system: System, entries: Sequence[Entry]) -> list[str]:
    """A system's table, with a row for each net and number of epochs, then the commands of its searches."""
    machines = sorted({entry["machine"] for entry in entries})
    found = [f"Run on {', and on '.join(machines)}.\n"] if machines else []
    found += [f"Data: {data}.\n" for data in sorted({entry["data"] for entry in entries if "data" in entry})]
    found += table(["", "the thesis", "parameters", "smaller", f"{system.score}, test", "against dense", "epochs", "seeds"])
    for net in system.nets:
        mine = [entry for entry in entries if entry["net"] == net.name]
        found += [
            net_row(system, net, [e for e in mine if e["epochs"] == n], entries) for n in sorted({e["epochs"] for e in mine})
        ]
        if not mine:
            found.append(row(net.name, net.thesis, *["not run yet", *[""] * 5]))
    commands: list[str] = []
    for search in system.searches:
        mine = [entry for entry in entries if entry["net"] == search.name]
        for entry in mine:
            commands.append(entry["command"])
            found += search_rows(system, search, entry, entries, len(commands))
        if not mine:
            found.append(row(f"{search.name}: `ranksearch study {search.study}`", search.thesis, *["not run yet", *[""] * 5]))
    return [*found, *([""] if commands else []), *(f"{i}. Search {i}: `{each}`" for i, each in enumerate(commands, 1))]


def net_row(system: System, net: Net, mine: Sequence[Entry], entries: Sequence[Entry]) -> str:
    """The row of a net for one number of epochs. For a decomposed net only the epochs after decomposition count."""
    dense = system.nets[0]
    # A decomposed and fine-tuned net is compared with the dense net that was fine-tuned as long.
    rival = next(n for n in system.nets if n.plan == {}) if net.plan else dense
    rivals = [e for e in entries if e["net"] == rival.name and (net.plan == {} or e["epochs"] == mine[0]["epochs"])]
    gains = [e["score_test"] - r["score_test"] for e in mine for r in rivals if e["seed"] == r["seed"]]
    return row(
        net.name, net.thesis, f"{mine[0]['params']:,}", smaller(mine[0], system, entries),
        mean_and_deviation(system, [e["score_test"] for e in mine]),
        mean_and_deviation(system, gains, gain=True) if gains and net is not dense else "", mine[0]["epochs"], len(mine),
    )  # fmt: skip


def search_rows(system: System, search: Search, entry: Entry, entries: Sequence[Entry], number: int) -> list[str]:
    """The rows of one search: its own dense net, then the nets of its front."""
    dense, rows = entry["dense"], list[str]()
    for net in (dense, *entry["nets"]):
        title, figures = (f"dense net of search {number}", "") if net is dense else (f"{search.name} {number}", search.thesis)
        gain = "" if net is dense else mean_and_deviation(system, [net["score_test"] - dense["score_test"]], gain=True)
        rows.append(row(
            title, figures, f"{net['params']:,}", smaller(net, system, entries, dense),
            mean_and_deviation(system, [net["score_test"]]), gain, net.get("epochs", ""), f"seed {entry['seed']}",
        ))  # fmt: skip
    return rows


def smaller(net: Entry, system: System, entries: Sequence[Entry], otherwise: Entry | None = None) -> str:
    """How many times smaller a net is than the system's dense net, or than `otherwise` if that was not trained."""
    dense = next((entry for entry in entries if entry["net"] == system.nets[0].name), otherwise)
    return f"{dense['params'] / net['params']:.1f}x" if dense else ""


def mean_and_deviation(system: System, scores: list[float], *, gain: bool = False) -> str:
    """Mean and standard deviation of scores as text: the AUC, which is 1 - score, or accuracy in percent."""
    area = system.score == "AUC"
    values = [(0 if gain else 1) - score if area else 100 * score for score in scores]
    mean, off = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
    sign, digits = "+" if gain else "", 4 if area else 1
    text = f"{mean:{sign}.{digits}f}" + (f" ± {off:.{digits}f}" if off is not None else "")
    return text if area else text + (" points" if gain else " %")


if __name__ == "__main__":
    main()
