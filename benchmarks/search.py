"""Compare searches: how good a front each finds within 20, 40 and 100 trials.

    python benchmarks/search.py digits simulated --write    # hours on two cores; makes tables and charts of docs/
    python benchmarks/search.py simulated                   # minutes; prints the table only

All searches have the same task, dense net, space, training recipe and seeds; a plan tried twice under one seed is trained once.
The measure is the hypervolume of (validation score, log10 ratio) above the point (dense score - 0.10, ratio 1), as a share
of the ideal: the dense score at the ratio of the smallest possible plan.

With `--write`, docs/search.json keeps every measured run, since all runs together take long. A run in it is not measured again,
and the tables show all runs in it. The folder `--store` keeps every trial, so that a run that was stopped resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import altair as alt
import optuna
import vl_convert
from arenas import Simulated, cifar10, digits
from contenders import CONTENDERS, REFERENCE_SCORE_DROP, Arena, Searched
from pages import PAGE, about, row, said, table, write_section
from scipy.stats import t as student

from ranksearch.results import pareto
from ranksearch.strategy.space import size_of
from ranksearch.support.files import write_whole

BUDGETS = (20, 40, 100)
TOO_SLOW = {"simulated": {"gp"}}
"""By arena, searches that are left out: an ask of Optuna's GP takes up to 18 s in 150 dimensions."""
RUNS_FILE = PAGE.with_name("search.json")


@dataclass(frozen=True)
class Measured:
    """One run: after each trial, the hypervolume of validation scores, that of test scores, and the seconds until then."""

    curve: list[float]
    test: list[float]
    seconds: list[float]
    longest_ask: float

    def first(self, trials: int) -> Measured:
        """The run cut to its first `trials` trials."""
        return Measured(self.curve[:trials], self.test[:trials], self.seconds[:trials], self.longest_ask)


class Runs:
    """The measured runs of one arena, and facts about the arena for its table."""

    def __init__(self, name: str) -> None:
        whole = json.loads(RUNS_FILE.read_text()) if RUNS_FILE.exists() else {}
        kept = whole.get(name, {"about": {}, "runs": []})
        self.name, self.about, self.entries = name, dict(kept["about"]), list[dict[str, Any]](kept["runs"])

    def add(self, key: str, seed: int, budget: int, run: Measured) -> None:
        """Add a run, with today's date and this machine."""
        where = {"search": key, "seed": seed, "budget": budget, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
        rounded = {name: _rounded(value) for name, value in asdict(run).items()}
        self.entries.append(where | {"machine": about("torch", "optuna", "scikit-learn")} | rounded)

    def keep(self) -> None:
        """Write the runs into docs/search.json, one run a line."""
        whole = json.loads(RUNS_FILE.read_text()) if RUNS_FILE.exists() else {}
        whole[self.name] = {"about": self.about, "runs": self.entries}
        arenas = []
        for name, kept in sorted(whole.items()):
            runs = sorted(kept["runs"], key=lambda entry: (entry["search"], entry["budget"], entry["seed"]))
            lines = ",\n".join(json.dumps(entry) for entry in runs)
            arenas.append(f'{json.dumps(name)}: {{"about": {json.dumps(kept["about"])}, "runs": [\n{lines}\n]}}')
        write_whole(RUNS_FILE, "{" + ",\n".join(arenas) + "}\n")

    def by_seed(self, key: str, budget: int) -> dict[int, Measured]:
        """By seed, the runs of a search with that budget. A sampler does not know the budget, so the first trials of a longer
        run count too."""
        found = {}
        for entry in self.entries:
            enough = entry["budget"] >= budget if CONTENDERS[key].sampler else entry["budget"] == budget
            if entry["search"] == key and enough:
                run = Measured(**{name: entry[name] for name in Measured.__dataclass_fields__})
                found[entry["seed"]] = run.first(budget)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arenas", nargs="+", choices=["digits", "cifar10", "simulated"])
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0 on")
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS), choices=BUDGETS, help="trials of a run")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), help="only these searches")
    parser.add_argument("--store", type=Path, default=Path("runs/bench-search"), help="the folder that keeps every trial")
    parser.add_argument("--frozen", action="store_true", help="measure nothing; make the tables from docs/search.json")
    parser.add_argument("--write", action="store_true", help="keep the runs, tables and charts in docs/")
    given = parser.parse_args()
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name in given.arenas:
        runs = Runs(name)
        if not given.frozen:
            _measure(runs, given)
        if not runs.entries:
            raise SystemExit(f"{RUNS_FILE} must hold runs of {name!r} to make its table, but holds none; leave --frozen out.")
        dates = sorted({entry["date"] for entry in runs.entries})
        machines = sorted({entry["machine"] for entry in runs.entries})
        lines = [said(f"{', '.join(machines)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.\n")]
        lines += [*_about(runs), *_table(runs), *_words(runs)]
        if given.write:
            _chart(runs, PAGE.with_name(f"search-{name}.png"))
            lines.append(f"\n![Hypervolume over trials and over seconds, {name}](search-{name}.png)")
            write_section(f"search-{name}", f"python benchmarks/search.py {name} --write", "\n".join(lines))


def _measure(runs: Runs, given: argparse.Namespace) -> None:
    """Measure every requested run that is not kept yet."""
    arenas = _arenas(runs.name, given)
    smallest = size_of(arenas[0].space.smallest("params"), arenas[0].inventory).ratio
    runs.about = {
        "layers": len(arenas[0].space.axes), "dense_score": arenas[0].dense_score, "smallest": smallest,
        "epochs": arenas[0].epochs,
    }  # fmt: skip
    for key in given.only:
        if key in TOO_SLOW.get(runs.name, ()):
            continue
        # The largest budget first: a sampler's run of a hundred trials contains its run of twenty.
        for budget in sorted(given.budgets, reverse=True):
            for seed in sorted(set(range(given.seeds)) - runs.by_seed(key, budget).keys()):
                found = CONTENDERS[key].search(arenas[seed], seed, budget)
                runs.add(key, seed, budget, _measured(arenas[seed], CONTENDERS[key].probed, found))
                said(f"{runs.name}, {key}, seed {seed}, {budget} trials: {runs.entries[-1]['curve'][-1]}")
                if given.write:
                    runs.keep()


def _arenas(name: str, given: argparse.Namespace) -> list[Arena]:
    """The arena of each seed. Trained networks are one for all seeds, each seed has a simulated network of its own."""
    if name == "simulated":
        return [Simulated(seed) for seed in range(given.seeds)]
    return [{"digits": digits, "cifar10": cifar10}[name](given.store)] * given.seeds


def _measured(arena: Arena, probed: bool, found: Searched) -> Measured:
    smallest = size_of(arena.space.smallest("params"), arena.inventory).ratio
    ideal = REFERENCE_SCORE_DROP * math.log10(smallest)
    seconds, total = [], arena.probe_seconds if probed else 0.0
    for trial, ask in zip(found.seconds, found.asks, strict=True):
        total += trial + ask
        seconds.append(total)
    points = list(zip(found.scores, found.log_ratios, strict=True))
    reference = (arena.dense_score - REFERENCE_SCORE_DROP, 0.0)
    curve = [pareto.hypervolume(points[: n + 1], reference) / ideal for n in range(len(points))]
    # The front is chosen by validation scores and measured on test scores.
    return Measured(curve, _test_curve(found, arena, ideal), seconds, max(found.asks))


def _test_curve(found: Searched, arena: Arena, ideal: float) -> list[float]:
    """After each trial, the hypervolume of the test scores of the front by validation scores."""
    result = []
    for n in range(1, len(found.scores) + 1):
        points = list(zip(found.scores[:n], found.log_ratios[:n], strict=True))
        chosen = [(found.tests[i], found.log_ratios[i]) for i in pareto.front(points)]
        result.append(pareto.hypervolume(chosen, (arena.dense_test - REFERENCE_SCORE_DROP, 0.0)) / ideal)
    return result


def _rounded(value: Any) -> Any:
    return [round(each, 5) for each in value] if isinstance(value, list) else round(value, 5)


def _seeds(runs: Runs) -> int:
    return max(entry["seed"] for entry in runs.entries) + 1


def _about(runs: Runs) -> list[str]:
    seeds, known = _seeds(runs), runs.about
    return [
        said(
            f"{seeds} seeds; {known['layers']} layers; dense score {known['dense_score']:.4f}; the smallest plan has "
            f"{known['smallest']:.0f}x; trials of {known['epochs']} epochs. Mean and half width of the 95 % interval of the "
            "mean, in percent of the ideal hypervolume.\n"
        )
    ]


def _table(runs: Runs) -> list[str]:
    lines = table(
        ["search", *(f"{budget} trials" for budget in BUDGETS), "40 trials, on test", "trained in 40, s", "longest ask, s"]
    )
    seeds = _seeds(runs)
    for key, contender in CONTENDERS.items():
        if key in TOO_SLOW.get(runs.name, ()):
            continue
        cells = [_cell(list(runs.by_seed(key, budget).values()), seeds, lambda run: run.curve[-1]) for budget in BUDGETS]
        asks = [run.longest_ask for run in runs.by_seed(key, BUDGETS[0]).values()]
        longest = f"{max(asks):.2f}" if contender.sampler and asks else "-"
        at40 = list(runs.by_seed(key, 40).values())
        spent = f"{statistics.mean(run.seconds[-1] for run in at40):.0f}" if at40 else "-"
        lines.append(row(contender.title, *cells, _cell(at40, seeds, lambda run: run.test[-1]), spent, longest))
    return lines


def _cell(runs: Sequence[Measured], seeds: int, value: Callable[[Measured], float]) -> str:
    values = [100 * value(run) for run in runs]
    if len(values) < 2:
        return f"{values[0]:.1f} (1 seed)" if values else "-"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    fewer = f" ({len(values)} seeds)" if len(values) < seeds else ""
    return f"{statistics.mean(values):.1f} ± {half:.1f}{fewer}"


def _words(runs: Runs) -> list[str]:
    """A sentence: after how many trials ours reaches the mean hypervolume of TPE's 100 trials."""
    if not (runs.by_seed("tpe", 100) and runs.by_seed("rank", 100)):
        return []
    goal = statistics.mean(run.curve[-1] for run in runs.by_seed("tpe", 100).values())
    ours = [run.curve for run in runs.by_seed("rank", 100).values()]
    means = [statistics.mean(curve[n] for curve in ours) for n in range(min(map(len, ours)))]
    first = next((n + 1 for n, mean in enumerate(means) if mean >= goal), None)
    reached = f"after trial {first}" if first else "not within 100 trials"
    return [said(f"\nOurs has the mean hypervolume of TPE's 100 trials {reached}.")]


def _chart(runs: Runs, path: Path) -> None:
    rows = []
    for key, contender in CONTENDERS.items():
        found = [list(runs.by_seed(key, budget).values()) for budget in BUDGETS]
        shown = max(reversed(found), key=len)  # the longest of those with the most seeds
        for n in range(min((len(run.curve) for run in shown), default=0)):
            means = {part: statistics.mean(getattr(run, part)[n] for run in shown) for part in ("curve", "seconds")}
            rows.append({"search": contender.title.strip("*"), "trials": n + 1} | means)
    base = alt.Chart(alt.Data(values=rows)).mark_line().encode(
        y=alt.Y("curve:Q", title="share of the ideal hypervolume"), color=alt.Color("search:N", sort=None, title=None),
        strokeWidth=alt.condition("datum.search == 'ours'", alt.value(4), alt.value(1.5)),
    )  # fmt: skip
    trials = base.encode(x=alt.X("trials:Q")).properties(width=420, height=320)
    seconds = base.encode(x=alt.X("seconds:Q", title="seconds of training, probes and asks", scale=alt.Scale(type="log")))
    whole = trials | seconds.properties(width=420, height=320)
    path.write_bytes(vl_convert.vegalite_to_png(whole.to_json(), scale=1.5))


if __name__ == "__main__":
    main()
