"""Ours beside other ways to a smaller net: the same dense net, data, recipe and number of epochs; validation chooses.

    python benchmarks/peers.py digits --seeds 5 --write    # two hours on one core; makes a table of docs/benchmarks.md
    python benchmarks/peers.py digits --only pruning       # minutes; prints what is measured so far

Every contender makes models of one dense net (rivals.py). All models of a seed are timed in turn in one run, with one thread.
The measure is the hypervolume of (score, log10 ratio) above the point (dense score - 0.10, ratio 1). A contender's front is
chosen by validation scores; on test it is measured only.

The folder `--store` keeps dense nets, models and results, so that a run that was stopped resumes, and new contenders join.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from pages import machine, row, said, table, write_section
from rivals import CONTENDERS, CPU, Arena, Made
from scipy.stats import t as student
from torch import nn

from ranksearch.compress.inventory import count_macs, count_params
from ranksearch.compress.weights import weights_of
from ranksearch.console import Silent
from ranksearch.data import example
from ranksearch.latency.runtimes import OnnxRuntime, Torch
from ranksearch.latency.timing import in_turn
from ranksearch.results import pareto
from ranksearch.study.dense import load_required_weights, load_weights, train_dense
from ranksearch.study_file import load_spec
from ranksearch.support.batch import repeat_batch
from ranksearch.support.files import write_whole
from ranksearch.task import training
from ranksearch.task.task import load_task

REFERENCE_SCORE_DROP = 0.10
WITHIN = 0.01
"""Points below dense at which models are compared by their ratios."""
WIDTHS = "space.widths=[1.0, 0.3, 0.1, 0.06, 0.03, 0.015]"
ARENAS: dict[str, tuple[str, list[str]]] = {
    "digits": ("lenet", [WIDTHS]),
    "lenet-cifar10": ("lenet-cifar10", ["space.widths=[1.0, 0.5, 0.25, 0.12]", "narrow.epochs=15"]),
    "resnet20": ("resnet20", [f"dense.weights={Path(__file__).with_name('resnet20.safetensors')}", "dense.epochs=0"]),
}
"""By arena, its built-in study, and what is set in it."""
RUNTIMES = {"ORT": OnnxRuntime(), "torch": Torch(CPU)}
BATCHES = (1, 64)
COSTS = ("params", "macs", *(f"{name} b{batch}" for name in RUNTIMES for batch in BATCHES))
Row = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arena", choices=list(ARENAS))
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0 on")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), help="only these contenders")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the study, as of its command")
    parser.add_argument("--store", type=Path, default=Path("runs/peers"), help="the folder that keeps models and results")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [measured(given, seed) for seed in range(given.seeds)]
    versions = machine("torch", "onnxruntime", "torch-pruning", "optuna")
    lines = [versions, *_about(given.arena, seeds), "", *_hypervolumes(seeds), "", *_largest(seeds)]
    if given.write:
        write_section(f"peers-{given.arena}", f"python benchmarks/peers.py {given.arena} --write", "\n".join(lines))


def measured(given: argparse.Namespace, seed: int) -> list[Row]:
    """The models of all contenders for one seed, timed; the dense net is the first row."""
    arena = made_arena(given, seed)
    (dense,) = kept(arena, "dense", lambda arena: iter([_dense(arena)]))
    rows = [dense | {"contender": "dense"}]
    for name in given.only:
        rows += [entry | {"contender": name} for entry in kept(arena, name, CONTENDERS[name][1])]
        said(f"seed {seed}, {name}: {len(rows)} models so far")
    return _timed(arena, rows)


def made_arena(given: argparse.Namespace, seed: int) -> Arena:
    """The arena of a seed, its dense net trained, or loaded if an earlier run trained it."""
    study, settings = ARENAS[given.arena]
    folder: Path = given.store / given.arena / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    spec = load_spec(study, overrides=[*settings, *given.set, f"seed={seed}"])
    task, weights = load_task(spec), folder / "dense.safetensors"
    if not load_weights(task.model, weights):
        if spec.dense.weights:
            load_required_weights(task.model, Path(spec.dense.weights))
        train_dense(task, spec, CPU, Silent(), unfinished=folder / "dense.pt")
        write_whole(weights, weights_of(task.model))
    task.model.eval()
    return Arena(spec, task, weights, folder, workers=len(os.sched_getaffinity(0)))


def _dense(arena: Arena) -> Made:
    data = arena.task.data
    scores = [training.score(arena.task.model, arena.task, split, device=CPU) for split in (data.validation, data.test)]
    return Made("dense", arena.task.model, *scores)


def kept(arena: Arena, name: str, contender: Callable[[Arena], Iterator[Made]]) -> list[dict[str, Any]]:
    """The models of a contender as rows, made now or by an earlier run; each model is in a file of the store."""
    path = arena.folder / f"{name}.json"
    if not path.exists():
        before, rows = _cpu_seconds(), []
        for number, made in enumerate(contender(arena)):
            file = arena.folder / f"{name}-{number}.pt"
            torch.save(made.model, file)
            size = {
                "params": count_params(made.model),
                "macs": count_macs(made.model, example(arena.task.data.train)),
            }
            rows.append({"label": made.label, "validation": made.validation, "test": made.test, "file": file.name} | size)
        content = {"cpu_seconds": _cpu_seconds() - before, "models": rows}
        write_whole(path, json.dumps(content, indent=1))
    content = json.loads(path.read_text())
    return [entry | {"cpu_seconds": content["cpu_seconds"]} for entry in content["models"]]


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its workers that have ended."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def _timed(arena: Arena, rows: Sequence[dict[str, Any]]) -> list[Row]:
    """The rows with the milliseconds of each model, all timed in turn, unless just these were timed by an earlier run."""
    path, files = arena.folder / "times.json", [entry["file"] for entry in rows]
    content = json.loads(path.read_text()) if path.exists() else {"files": []}
    if content["files"] != files:
        models = [_model(arena.folder / file) for file in files]
        content = {"files": files}
        for name, runtime in RUNTIMES.items():
            for batch in BATCHES:
                inputs = repeat_batch(example(arena.task.data.train), batch)
                times = in_turn([runtime.prepare(model, inputs) for model in models])
                content[f"{name} b{batch}"] = times.ms
                said(f"{name}, batch {batch}: median spread {statistics.median(times.spreads):.0%}")
        write_whole(path, json.dumps(content))
    milliseconds = {key: content[key] for key in content if key != "files"}
    return [entry | {key: ms[place] for key, ms in milliseconds.items()} for place, entry in enumerate(rows)]


def _model(file: Path) -> nn.Module:
    model = torch.load(file, weights_only=False)  # of our own making
    assert isinstance(model, nn.Module)
    return model.eval()


def _about(arena: str, seeds: Sequence[Sequence[Row]]) -> list[str]:
    study, settings = ARENAS[arena]
    dense = [rows[0] for rows in seeds]
    scores = " / ".join(f"{100 * statistics.mean(entry[split] for entry in dense):.1f}" for split in ("validation", "test"))
    set_to = f" with {', '.join(f'`{setting}`' for setting in settings)}" if settings else ""
    return [said(f"Study `{study}`{set_to}; seeds: {len(seeds)}; dense nets {scores} % on validation / test; one thread.\n")]


def _hypervolumes(seeds: Sequence[Sequence[Row]]) -> list[str]:
    """Hypervolume of each contender by each cost, on validation / test: means over the seeds."""
    said("Hypervolume, validation / test, mean over the seeds with the half width of its 95 % interval:\n")
    lines = table(["contender", *COSTS, "CPU s"])
    for name, (title, _) in CONTENDERS.items():
        if any(entry["contender"] == name for rows in seeds for entry in rows):
            cells = []
            for cost in COSTS:
                pairs = [_hypervolume(rows, name, cost) for rows in seeds]
                cells.append(" / ".join(_mean(values) for values in zip(*pairs, strict=True)))
            spent = [next(entry["cpu_seconds"] for entry in rows if entry["contender"] == name) for rows in seeds]
            lines.append(row(title, *cells, f"{statistics.mean(spent):.0f}"))
    return lines


def _hypervolume(rows: Sequence[Row], name: str, cost: str) -> tuple[float, float]:
    dense, models = rows[0], [entry for entry in rows if entry["contender"] == name]
    ratios = [math.log10(dense[cost] / entry[cost]) for entry in models]
    points = list(zip([entry["validation"] for entry in models], ratios, strict=True))
    chosen = [(models[place]["test"], ratios[place]) for place in pareto.front(points)]
    return (
        float(pareto.hypervolume(points, (dense["validation"] - REFERENCE_SCORE_DROP, 0.0))),
        float(pareto.hypervolume(chosen, (dense["test"] - REFERENCE_SCORE_DROP, 0.0))),
    )


def _mean(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    if len(values) < 2:
        return mean
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.3f}"


def _largest(seeds: Sequence[Sequence[Row]]) -> list[str]:
    """The largest ratio of each contender among models within a point of the dense net, on validation: medians."""
    said(f"\nLargest ratio within {100 * WITHIN:g} point of the dense net on validation (median of the seeds; least - most):\n")
    lines = table(["contender", *COSTS])
    for name, (title, _) in CONTENDERS.items():
        if any(entry["contender"] == name for rows in seeds for entry in rows):
            cells = []
            for cost in COSTS:
                best = [_best_ratio(rows, name, cost) for rows in seeds]
                cells.append(f"{statistics.median(best):.3g}x ({min(best):.3g} - {max(best):.3g})")
            lines.append(row(title, *cells))
    return lines


def _best_ratio(rows: Sequence[Row], name: str, cost: str) -> float:
    dense = rows[0]
    near = (e for e in rows if e["contender"] == name and e["validation"] >= dense["validation"] - WITHIN)
    return max((dense[cost] / entry[cost] for entry in near), default=1.0)


if __name__ == "__main__":
    main()
