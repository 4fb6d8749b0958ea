"""Searches against each other: how good a front each finds within 20, 40 and 100 trials.

    python benchmarks/search.py digits simulated --write    # hours on two cores; makes tables and charts of docs/
    python benchmarks/search.py simulated                   # minutes; prints the table only

All searches have the same task, dense net, space, trial recipe and seeds; a plan tried twice under a seed is trained once.
The measure is the hypervolume of (validation score, log10 ratio) above the point (dense score - 0.10, ratio 1), as a share
of the ideal: the dense score at the ratio of the smallest plan there is. `--store` keeps every trial, so that a run that
was stopped goes on, and several may share the work; `--frozen` makes the tables of what the store holds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import altair as alt
import optuna
import vl_convert
from arenas import NotTrained, Simulated, cifar10, digits
from contenders import CONTENDERS, DROP, Arena, Contender, Found
from pages import machine, row, said, table, write_section
from scipy.stats import t as student

from ranksearch import pareto
from ranksearch.strategy.space import size_of

BUDGETS = (20, 40, 100)
SLOW = {"simulated": {"gp"}}
"""Left out: an ask of Optuna's GP takes up to 18 s in 150 dimensions."""


@dataclass(frozen=True)
class Measured:
    """The hypervolume after each trial of one run, on validation and on test scores, and the seconds up to it."""

    curve: list[float]
    test: list[float]
    seconds: list[float]
    asks: list[float]

    def first(self, trials: int) -> Measured:
        """What it was after so many trials."""
        return Measured(self.curve[:trials], self.test[:trials], self.seconds[:trials], self.asks[:trials])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arenas", nargs="+", choices=["digits", "cifar10", "simulated"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS), choices=BUDGETS)
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--store", type=Path, default=Path("runs/bench-search"))
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name in given.arenas:
        arenas = _arenas(name, given)
        found = _all(name, arenas, given.only, given.budgets)
        lines = [machine("torch", "optuna", "scikit-learn"), *_about(arenas[0], given.seeds), *_table(found), *_words(found)]
        if given.write:
            _chart(found, Path("docs") / f"search-{name}.png")
            lines.append(f"\n![Hypervolume over trials and over seconds, {name}](search-{name}.png)")
            write_section(f"search-{name}", f"python benchmarks/search.py {name} --write", "\n".join(lines))


def _arenas(name: str, given: argparse.Namespace) -> list[Arena]:
    """The arena of each seed: one network for all where it is trained, one of its own where it is simulated."""
    if name == "simulated":
        return [Simulated(seed) for seed in range(given.seeds)]
    make = {"digits": digits, "cifar10": cifar10}[name]
    return [make(given.store, frozen=given.frozen)] * given.seeds


def _all(
    name: str, arenas: Sequence[Arena], only: Sequence[str], budgets: Sequence[int]
) -> dict[str, dict[int, list[Measured]]]:
    """By contender and budget, the runs of all seeds that there are."""
    found: dict[str, dict[int, list[Measured]]] = {}
    for key in only:
        if key not in SLOW.get(name, ()):
            runs = [_runs(CONTENDERS[key], arena, seed, budgets) for seed, arena in enumerate(arenas)]
            found[key] = {budget: [run[budget] for run in runs if budget in run] for budget in BUDGETS}
    return found


def _runs(contender: Contender, arena: Arena, seed: int, budgets: Sequence[int]) -> dict[int, Measured]:
    """By budget, as far as the arena has the trials."""
    found: dict[int, Measured] = {}
    for budget in sorted(budgets, reverse=True):
        if contender.sampler and found:
            # Who proposes one after the other does not know the budget.
            found[budget] = next(iter(found.values())).first(budget)
            continue
        with suppress(NotTrained):
            found[budget] = _measured(arena, contender, contender.search(arena, seed, budget))
    return found


def _measured(arena: Arena, contender: Contender, found: Found) -> Measured:
    smallest = size_of(arena.space.smallest("params"), arena.inventory).ratio
    ideal = DROP * math.log10(smallest)
    seconds, total = [], arena.probe_seconds if contender.probed else 0.0
    for trial, ask in zip(found.seconds, found.asks, strict=True):
        total += trial + ask
        seconds.append(total)

    def curve(scores: Sequence[float | None], dense: float) -> list[float]:
        points = [(-math.inf if s is None else s, x) for s, x in zip(scores, found.log_ratios, strict=True)]
        return [pareto.hypervolume(points[: n + 1], (dense - DROP, 0.0)) / ideal for n in range(len(points))]

    # Validation chooses the front, test judges it.
    return Measured(curve(found.scores, arena.dense_score), _judged(found, arena, ideal), seconds, found.asks)


def _judged(found: Found, arena: Arena, ideal: float) -> list[float]:
    """After each trial, the hypervolume of the test scores of the front that validation chose."""
    result = []
    for n in range(1, len(found.scores) + 1):
        points = [(-math.inf if s is None else s, x) for s, x in zip(found.scores[:n], found.log_ratios[:n], strict=True)]
        chosen = [(found.tests[i], found.log_ratios[i]) for i in pareto.front(points) if found.scores[i] is not None]
        result.append(pareto.hypervolume(chosen, (arena.dense_test - DROP, 0.0)) / ideal)
    return result


def _about(arena: Arena, seeds: int) -> list[str]:
    smallest = size_of(arena.space.smallest("params"), arena.inventory).ratio
    return [
        said(
            f"{seeds} seeds; {len(arena.space.axes)} layers; dense score {arena.dense_score:.4f}; the smallest plan has "
            f"{smallest:.0f}x; trials of {arena.epochs} epochs. Mean and half width of the 95 % interval of the mean, in "
            "percent of the ideal hypervolume.\n"
        )
    ]


def _table(found: dict[str, dict[int, list[Measured]]]) -> list[str]:
    lines = table(
        ["search", *(f"{budget} trials" for budget in BUDGETS), "40 trials, on test", "trained in 40, s", "longest ask, s"]
    )
    for key, budgets in found.items():
        cells = [_cell(budgets[budget], lambda run: run.curve[-1]) for budget in BUDGETS]
        asks = [max(run.asks) for runs in budgets.values() for run in runs]
        longest = f"{max(asks):.2f}" if CONTENDERS[key].sampler and asks else "-"
        seconds = [run.seconds[-1] for run in budgets[40]]
        spent = f"{statistics.mean(seconds):.0f}" if seconds else "-"
        lines.append(row(CONTENDERS[key].title, *cells, _cell(budgets[40], lambda run: run.test[-1]), spent, longest))
    return lines


def _cell(runs: Sequence[Measured], value: Callable[[Measured], float]) -> str:
    values = [100 * value(run) for run in runs]
    if len(values) < 2:
        return f"{values[0]:.1f} (1 seed)" if values else "-"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def _words(found: dict[str, dict[int, list[Measured]]]) -> list[str]:
    """After how many trials ours has what TPE has after a hundred."""
    if not (found.get("tpe", {}).get(100) and found.get("rank", {}).get(100)):
        return []
    goal = statistics.mean(run.curve[-1] for run in found["tpe"][100])
    ours = [run.curve for run in found["rank"][100]]
    means = [statistics.mean(curve[n] for curve in ours) for n in range(min(map(len, ours)))]
    first = next((n + 1 for n, mean in enumerate(means) if mean >= goal), None)
    reached = f"after trial {first}" if first else "not within 100 trials"
    return [said(f"\nOurs has the mean hypervolume of TPE's 100 trials {reached}.")]


def _chart(found: dict[str, dict[int, list[Measured]]], path: Path) -> None:
    rows = []
    for key, budgets in found.items():
        runs = max(budgets.values(), key=lambda found: (len(found), len(found[0].curve) if found else 0))
        for n in range(min((len(run.curve) for run in runs), default=0)):
            about = {"search": CONTENDERS[key].title.strip("*"), "hypervolume": statistics.mean(run.curve[n] for run in runs)}
            rows.append(about | {"trials": n + 1, "seconds": statistics.mean(run.seconds[n] for run in runs)})
    base = alt.Chart(alt.Data(values=rows)).mark_line().encode(
        y=alt.Y("hypervolume:Q", title="share of the ideal hypervolume"), color=alt.Color("search:N", sort=None, title=None),
        strokeWidth=alt.condition("datum.search == 'ours'", alt.value(4), alt.value(1.5)),
    )  # fmt: skip
    trials = base.encode(x=alt.X("trials:Q")).properties(width=420, height=320)
    seconds = base.encode(x=alt.X("seconds:Q", title="seconds of training, probes and asks", scale=alt.Scale(type="log")))
    whole = trials | seconds.properties(width=420, height=320)
    path.write_bytes(vl_convert.vegalite_to_png(whole.to_json(), scale=1.5))


if __name__ == "__main__":
    main()
