"""Who proposes the next trial: Optuna's multi-objective samplers, and the project's own."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from ranksearch.compress.inventory import Inventory
from ranksearch.compress.profile import Profile
from ranksearch.plan import Plan
from ranksearch.results import pareto
from ranksearch.results.limits import UNLIMITED, Limits
from ranksearch.results.record import MAX_TRIES, Probe
from ranksearch.strategy.finalists import floor_of
from ranksearch.strategy.prior import WEAKENINGS, vbmf_plans
from ranksearch.strategy.sensitivity import predicted_choices
from ranksearch.strategy.space import Space
from ranksearch.strategy.surrogate import MAX_RECORDS, PRIOR_STD, Rows, Surrogate, Table, Values

MIN_RECORDS = 4
"""Trials from which the project's sampler has something to learn."""
RANDOM_TRIALS = 8
"""Trials that Optuna's TPE and GP take at random first."""
ASKED_STATES = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.FAIL)
"""All trials but the queued ones."""
SIZE_CONSTRAINT = "within the limits"
"""The constraint of a trial that was over the limits of size."""
MAX_SCORE_DROP = 0.10
"""So far below the dense score, and lower, a score gains nothing, unless the user sets a limit to it; so far below the best
trial's, where none reaches the dense score."""
RESAMPLED_FRONTS = 8
"""How often the frontier is solved again, each time with other weights on the layers' rises."""
PLANS_PER_FRONT = 64
"""Plans of each such frontier that are looked at, evenly spaced over it."""
MOVES, CROSSINGS = 384, 128
"""Plans that differ from one of the front in a layer or two, and plans that take their layers from two of the front."""
MOVE_STD = 0.8
"""How far a move goes: the standard length, in the log of the layer's parameters."""


@dataclass
class Knowledge:
    """What the project's sampler starts from, made once in a study: the space, its choices as a table, the dense score. It
    keeps the rows of the trials it has seen, and what moves it has looked up."""

    space: Space
    table: Table
    dense_score: float
    limits: Limits = UNLIMITED
    suggested: Sequence[Plan] = ()
    """Plans that a prior suggests; they are tried where they promise a gain."""
    rows: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _near: dict[tuple[int, int], Values] = field(default_factory=dict)

    @functools.cached_property
    def suggested_rows(self) -> Rows:
        """The suggested plans as rows of the table."""
        rows = [self.table.row(plan) for plan in self.suggested]
        return np.array(rows, dtype=np.intp).reshape(-1, len(self.table.layers))

    @classmethod
    def of(
        cls,
        space: Space,
        inventory: Inventory,
        layers: Profile,
        probes: Sequence[Probe],
        *,
        dense_loss: float | None,
        dense_score: float,
        limits: Limits,
        minimize: Sequence[str],
    ) -> Knowledge:
        """What profile, probes and VBMF tell; without the dense model's loss there is nothing to set probes against."""
        choices = predicted_choices(layers, probes if dense_loss is not None else (), dense_loss or 0.0)
        table = Table(inventory, {axis.layer.name: choices[axis.layer.name] for axis in space.axes}, minimize)
        suggested = [plan for _, plan in vbmf_plans(space, layers.vbmf, WEAKENINGS)]
        return cls(space, table, dense_score, limits, suggested)

    def floor(self, scores: Values) -> float:
        """Where scores begin to count, given those of the trials so far.

        Until one has the score that the user asks for, the next is to score more than the best: at a floor out of reach all
        plans gain nothing alike.
        """
        asked = floor_of(self.dense_score, scores.tolist(), self.limits, below=MAX_SCORE_DROP)
        return min(asked, max(scores.tolist(), default=asked))

    def fits(self, plans: Rows) -> NDArray[np.bool_]:
        """Which plans are within the limits of size."""
        return np.array([not self.limits.excess(size) for size in self.table.sizes(plans)], dtype=bool)

    def near(self, layer: int, place: int) -> Values:
        """Cumulative chances (choices,) of what a move from a choice of a layer ends at: those of about its size."""
        if (layer, place) not in self._near:
            sizes = np.log(self.table.costs["params"][layer])
            chances = np.cumsum(np.exp(-0.5 * ((sizes - sizes[place]) / MOVE_STD) ** 2))
            self._near[layer, place] = chances / chances[-1]
        return self._near[layer, place]

    def row(self, trial: FrozenTrial) -> tuple[int, ...]:
        """A trial's plan as a row of the table."""
        if trial.number not in self.rows:
            self.rows[trial.number] = self.table.row(self.space.plan(trial.params))
        return self.rows[trial.number]


def make_sampler(name: str, *, seed: int, knowledge: Knowledge | None = None) -> BaseSampler:
    """The sampler of that name, fresh. Its state is a function of the study's record and of `seed`.

    A study makes a new one before each ask, seeded with its own seed and the trial's index: a resumed study then goes on
    as an uninterrupted one would.
    """
    with warnings.catch_warnings():
        # Optuna has marked these options of its samplers experimental since 2.2.
        warnings.simplefilter("ignore", ExperimentalWarning)
        match name:
            case "rank":
                assert knowledge is not None
                return RankSampler(knowledge, seed=seed)
            case "tpe":
                # Constant liar: with several workers, running trials count as bad ones, so that proposals spread.
                return TPESampler(multivariate=True, constant_liar=True, n_startup_trials=RANDOM_TRIALS, seed=seed)
            case "gp":
                return GPSampler(n_startup_trials=RANDOM_TRIALS, deterministic_objective=False, seed=seed)
            case "nsga2":
                return NSGAIISampler(population_size=20, seed=seed)
            case _:
                return RandomSampler(seed=seed)


def admit(study: optuna.Study, trial: optuna.Trial, sampler: str) -> None:
    """Give a queued trial the place among the sampler's own that one it proposes has.

    Optuna's NSGA-II counts a trial to a generation when it is asked for a parameter, which it is not where all are given; its
    population would then never hold the first plans, nor a trial that was queued again.
    """
    if sampler == "nsga2":
        genetic = make_sampler(sampler, seed=0)
        assert isinstance(genetic, NSGAIISampler)
        genetic.get_trial_generation(study, study.get_trials(deepcopy=False)[trial.number])


class RankSampler(BaseSampler):
    """Proposes the plan of the largest expected gain in hypervolume among plans near the predicted and the found front.

    A plan's size is known before training, so only its score is uncertain. The plans come from the frontier, solved again
    under doubt about the layers' rises; from moves of a layer or two away from the front so far; from crossings of two of
    its plans; and from what VBMF suggests.
    """

    def __init__(self, knowledge: Knowledge, *, seed: int) -> None:
        self._known, self._seed = knowledge, seed
        self._rng = np.random.default_rng(seed)
        self._independent = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All axes: they are static."""
        return self._known.space.distributions()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of the proposed plan; none where every plan near the fronts was tried."""
        table = self._known.table
        # A trial that is just being asked for has no parameters yet, one that was killed while it was has some.
        trials = [t for t in study.get_trials(deepcopy=False, states=ASKED_STATES) if t.params.keys() == search_space.keys()]
        done = [t for t in trials if t.state is TrialState.COMPLETE]
        points = np.array([t.values for t in done]).reshape(-1, 1 + len(table.minimize))
        floor = self._known.floor(points[:, 0])
        tried, running = self._rows(done), self._rows([t for t in trials if t.state is TrialState.RUNNING])
        # Where nothing is known yet, layers' rises are as doubtful as before any trial.
        weights = self._rng.lognormal(0.0, PRIOR_STD, (RESAMPLED_FRONTS, len(table.layers)))
        surrogate = None
        if len(done) >= MIN_RECORDS:
            ranks, numbers = pareto.ranks(points), np.arange(len(points))
            # Of those of one rank the newest: the next proposals lie beside them.
            nearest = np.lexsort((-numbers, ranks))[:MAX_RECORDS]
            nearest = nearest[np.lexsort((nearest, ranks[nearest]))]
            surrogate = Surrogate(
                table, tried[nearest], points[nearest, 0], dense_score=self._known.dense_score, floor=floor, seed=self._seed
            )
            weights = surrogate.weights[:RESAMPLED_FRONTS]
        worth = points[:, 0] >= floor
        plans = self._plans(tried[worth][pareto.front(points[worth])], weights, self._seen(trials))
        if not len(plans):
            return {}
        if surrogate is None:
            return self._known.space.params(table.plan(self._rng.choice(plans)))
        if len(running):
            # Running trials count as done, with the scores that are expected of them, so that proposals spread.
            expected = surrogate.top - np.exp(surrogate.expect(running)[0])
            points = np.concatenate([points, np.column_stack([expected, table.log_ratios(running)])])
        mean, std = surrogate.expect(plans)
        gains = expected_gains(mean, std, table.log_ratios(plans), points, top=surrogate.top, floor=floor)
        return self._known.space.params(table.plan(plans[int(np.argmax(gains))]))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """At random: what Optuna asks where `sample_relative` proposes nothing."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def _rows(self, trials: Sequence[FrozenTrial]) -> Rows:
        return np.array([self._known.row(t) for t in trials], dtype=np.intp).reshape(-1, len(self._known.table.layers))

    def _seen(self, trials: Sequence[FrozenTrial]) -> set[tuple[int, ...]]:
        """Plans that are not proposed again: those that are known or running, and those that lost too many workers."""
        # What was over the limits is not known: the limits may be wider now, and are judged anew.
        known = {
            self._known.row(t)
            for t in trials
            if t.state is not TrialState.FAIL and not (t.state is TrialState.PRUNED and SIZE_CONSTRAINT in t.constraints)
        }
        lost = Counter(self._known.row(t) for t in trials if t.state is TrialState.FAIL)
        return known | {row for row, times in lost.items() if times >= MAX_TRIES}

    def _plans(self, parents: Rows, weights: Values, seen: set[tuple[int, ...]]) -> Rows:
        """The plans to choose from, each once, but for those that were asked for before and the dense one."""
        table = self._known.table
        parts = [_evenly(table.predicted_front(guess, at), PLANS_PER_FRONT) for at, guess in enumerate(weights)]
        parts.append(self._known.suggested_rows)
        if len(parents):
            parts += [self._moved(parents), self._crossed(parents)]
        plans = np.unique(np.concatenate(parts), axis=0)
        fits = self._known.fits(plans)
        return plans[[fits[i] and any(row) and tuple(row) not in seen for i, row in enumerate(plans.tolist())]]

    def _moved(self, parents: Rows) -> Rows:
        """Plans that differ from one of `parents` in a layer or two, by other methods and other ranks of about its size."""
        rows = self._rng.choice(parents, MOVES)
        for row in rows:
            layers = self._rng.choice(len(row), size=min(len(row), int(self._rng.integers(1, 3))), replace=False)
            for layer in layers:
                row[layer] = self._known.near(layer, row[layer]).searchsorted(self._rng.random(), side="right")
        return rows

    def _crossed(self, parents: Rows) -> Rows:
        """Plans that take each layer from one or the other of two of `parents`."""
        ones, others = self._rng.choice(parents, CROSSINGS), self._rng.choice(parents, CROSSINGS)
        return np.where(self._rng.random(ones.shape) < 0.5, ones, others)


def expected_gains(mean: Values, std: Values, log_ratios: Values, points: Values, *, top: float, floor: float) -> Values:
    """The expected gain in hypervolume of each plan (Emmerich et al. 2006), where log(`top` - score) is normal.

    Between two scores of the front, a plan gains what it spans in the costs beyond the trials that score higher, times how far
    its score reaches in between. The expectation of that for a lognormal drop is the price of a put option (Black and Scholes
    1973), once for each of the two scores.

    Args:
        mean: (plans,) of log(top - score).
        std: (plans,) of the same, above 0.
        log_ratios: (plans, costs), known before training.
        points: (trials, 1 + costs) score and log ratios.
        top: no score reaches it.
        floor: scores count from here on, and log ratios from 0.
    """
    from scipy.special import ndtr

    front = points[pareto.front(points)]
    heights = np.unique([floor, *front[front[:, 0] > floor, 0]])
    heights = heights[heights < top]
    drop = np.exp(mean + 0.5 * std**2)
    gains, reached = np.zeros(len(mean)), np.zeros(len(mean))
    for height in heights[::-1]:
        chance = (np.log(top - height) - mean) / std
        above = (top - height) * ndtr(chance) - drop * ndtr(chance - std)
        gains += (above - reached) * _beyond(log_ratios, front[front[:, 0] > height, 1:])
        reached = above
    return gains


def _beyond(sizes: Values, taken: Values) -> Values:
    """What each box from 0 to `sizes` (plans, costs) holds that none of the boxes from 0 to `taken` (n, costs) holds."""
    if sizes.shape[1] == 1:
        return np.maximum(sizes[:, 0] - taken.max(initial=0.0), 0.0)
    # Slice by slice of the last cost: within a slice, the boxes that reach through it take the same of the other costs.
    levels = [0.0, *np.unique(taken[taken[:, -1] > 0, -1]), np.inf]
    held = np.zeros(len(sizes))
    for low, high in pairwise(levels):
        thickness = np.clip(sizes[:, -1] - low, 0.0, high - low)
        held += thickness * _beyond(sizes[:, :-1], taken[taken[:, -1] > low, :-1])
    return held


def _evenly(rows: Rows, count: int) -> Rows:
    return rows[np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int))]
