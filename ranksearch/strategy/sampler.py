"""The samplers that propose trials: Optuna's multi-objective samplers and the sampler "rank"."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from ranksearch.compress.profile import Profile
from ranksearch.plan import Plan
from ranksearch.results import pareto
from ranksearch.results.limits import UNLIMITED, Limits
from ranksearch.results.record import Probe
from ranksearch.results.trials import MAX_TRIES
from ranksearch.strategy.bases import Bases
from ranksearch.strategy.finalists import floor_of
from ranksearch.strategy.prior import RANK_SCALES, vbmf_plans
from ranksearch.strategy.sensitivity import base_loss_increases, choices_of
from ranksearch.strategy.surrogate import LOG_WEIGHT_PRIOR_STD, MAX_RECORDS, Rows, Surrogate, Table, Values, fit

MIN_TRIALS_FOR_SURROGATE = 4
"""The number of finished trials from which the sampler "rank" fits a surrogate."""
RANDOM_TRIALS = 8
"""The number of random trials at the start of Optuna's TPE and GP samplers."""
NOT_QUEUED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.FAIL)
"""The states of all trials that are not queued."""
SIZE_CONSTRAINT = "within the limits"
"""The name of the Optuna constraint of a trial that was over a size limit."""
MAX_SCORE_DROP = 0.10
"""Scores this far below the dense score (or below the best score, if no trial reaches the dense score) gain nothing, unless the
user sets `search.min_score`."""
SAMPLED_FRONTS = 8
"""How many predicted fronts a proposal draws plans from, each with other weights on the layers' loss increases."""
PLANS_PER_FRONT = 64
"""How many plans of each of these fronts are considered, evenly spaced over the front."""
MOVED_PLANS, MIXED_PLANS = 384, 128
"""How many plans are made by changing one or two layers of a plan on the front, and how many by mixing two such plans."""
MOVE_LOG_PARAMS_STD = 0.8
"""How far a move changes a layer: the standard deviation of the log of its number of parameters."""


@dataclass
class Knowledge:
    """What the sampler "rank" knows before the first trial. Made once in a study; also caches rows of trials and chances of
    moves."""

    bases: Bases
    table: Table
    dense_score: float
    noise: float
    """The standard error of that score."""
    limits: Limits = UNLIMITED
    suggested: Sequence[Plan] = ()
    """The VBMF plans at many factors on their ranks; the sampler considers them in each proposal."""
    rows: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _near: dict[tuple[int, int], Values] = field(default_factory=dict)

    @functools.cached_property
    def suggested_rows(self) -> Rows:
        """The suggested plans as rows of the table (plans, layers)."""
        rows = [self.table.row(plan) for plan in self.suggested]
        return np.array(rows, dtype=np.intp).reshape(-1, len(self.table.layers))

    @classmethod
    def of(
        cls,
        bases: Bases,
        profiles: Sequence[Profile],
        probes: Sequence[Probe],
        *,
        dense_losses: Mapping[float, float],
        dense_score: float,
        noise: float,
        limits: Limits,
        minimize: Sequence[str],
    ) -> Knowledge:
        """From profiles, probes and VBMF ranks.

        Args:
            bases: the nets to search from.
            profiles: of each of them.
            probes: losses of single layers.
            dense_losses: by width, the loss of each net without any decomposition.
            dense_score: score of the given net.
            noise: its standard error.
            limits: the user's.
            minimize: the names of the costs to minimise.
        """
        choices = [
            {axis.layer.name: found[axis.layer.name] for axis in base.space.axes}
            for base, found in zip(bases, choices_of(bases, profiles, probes, dense_losses), strict=True)
        ]
        table = Table(bases, choices, minimize, base_loss_increases(bases, dense_losses))
        suggested = [
            replace(plan, width=base.width)
            for base, profile in zip(bases, profiles, strict=True)
            for _, plan in vbmf_plans(base.space, profile.vbmf, RANK_SCALES)
        ]
        return cls(bases, table, dense_score, noise, limits, suggested)

    def floor(self, scores: Values) -> float:
        """The score above which a plan gains hypervolume, given the scores of the trials so far.

        Until a trial reaches the requested score, this is the best score so far: under a floor that no plan reaches, all plans
        would gain nothing, and the sampler could not compare them.
        """
        floor = floor_of(self.dense_score, scores.tolist(), self.limits, below=MAX_SCORE_DROP)
        return min(floor, max(scores.tolist(), default=floor))

    def fits(self, plans: Rows) -> NDArray[np.bool_]:
        """(plans,): which plans are within the size limits."""
        return np.array([not self.limits.excess(size) for size in self.table.sizes(plans)], dtype=bool)

    def near(self, layer: int, choice: int) -> Values:
        """Cumulative probabilities (choices,) of the choices that a move can end at: those of the same net, of which those of
        similar size are more likely.

        Args:
            layer: index of the layer.
            choice: index of the layer's choice before the move.
        """
        if (layer, choice) not in self._near:
            sizes, nets = self.table.log_params[layer], self.table.nets[layer]
            likely = np.exp(-0.5 * ((sizes - sizes[choice]) / MOVE_LOG_PARAMS_STD) ** 2)
            chances = np.cumsum(np.where(nets == nets[choice], likely, 0.0))
            self._near[layer, choice] = chances / chances[-1]
        return self._near[layer, choice]

    def row(self, trial: FrozenTrial) -> tuple[int, ...]:
        """A trial's plan as a row of the table."""
        if trial.number not in self.rows:
            self.rows[trial.number] = self.table.row(self.bases.plan(trial.params))
        return self.rows[trial.number]


def make_sampler(name: str, *, seed: int, knowledge: Knowledge | None = None) -> BaseSampler:
    """A new sampler of that name. What it proposes is a function of the study's record and of `seed`.

    A study makes a new sampler before each ask, with a seed from its own seed and the trial's index, so a resumed study
    continues as if it had never stopped.
    """
    with warnings.catch_warnings():
        # Optuna has marked these options of its samplers experimental since 2.2.
        warnings.simplefilter("ignore", ExperimentalWarning)
        match name:
            case "rank":
                assert knowledge is not None
                return RankSampler(knowledge, seed=seed)
            case "tpe":
                # Constant liar: running trials count as bad ones, so that proposals for several workers spread.
                return TPESampler(multivariate=True, constant_liar=True, n_startup_trials=RANDOM_TRIALS, seed=seed)
            case "gp":
                return GPSampler(n_startup_trials=RANDOM_TRIALS, deterministic_objective=False, seed=seed)
            case "nsga2":
                return NSGAIISampler(population_size=20, seed=seed)
            case _:
                return RandomSampler(seed=seed)


def admit(study: optuna.Study, trial: optuna.Trial, sampler: str) -> None:
    """Let the sampler treat a queued trial like one that it proposed itself.

    Optuna's NSGA-II assigns a trial to a generation only when it samples a parameter of it. A queued trial has all its
    parameters already, so the initial plans, and trials queued again, would never enter the population.
    """
    if sampler == "nsga2":
        genetic = make_sampler(sampler, seed=0)
        assert isinstance(genetic, NSGAIISampler)
        genetic.get_trial_generation(study, study.get_trials(deepcopy=False)[trial.number])


class RankSampler(BaseSampler):
    """Proposes the plan with the largest expected gain in hypervolume among plans near the predicted and the measured front.

    A plan's size is known before training, so only its score is uncertain. The plans to choose from are: predicted fronts with
    sampled weights on the layers' loss increases; plans of the measured front with one or two layers changed; mixtures of two
    plans of the measured front; and the VBMF plans.
    """

    def __init__(self, knowledge: Knowledge, *, seed: int) -> None:
        self._knowledge, self._seed = knowledge, seed
        self._rng = np.random.default_rng(seed)
        self._independent = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The whole space, which is the same for every trial."""
        return self._knowledge.bases.distributions()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of the proposed plan; empty if every plan near the fronts was tried already."""
        table = self._knowledge.table
        # Skips incomplete trials: the one being asked for has no parameters yet, and one of a killed run may have only some.
        trials = [t for t in study.get_trials(deepcopy=False, states=NOT_QUEUED) if t.params.keys() == search_space.keys()]
        done, running = ([t for t in trials if t.state is state] for state in (TrialState.COMPLETE, TrialState.RUNNING))
        points = np.array([t.values for t in done]).reshape(-1, 1 + len(table.minimize))
        floor = self._knowledge.floor(points[:, 0])
        surrogate = self._surrogate(self._rows(done), points, floor)
        parents = _front_above(floor, self._rows(done), points)
        plans = self._plans(parents, self._weights(surrogate), self._seen(trials))
        if not len(plans):
            return {}
        if surrogate is None:
            return self._knowledge.bases.params(table.plan(self._rng.choice(plans)))
        points = np.concatenate([points, _expected_points(surrogate, self._rows(running))])
        mean, std = surrogate.expect(plans)
        gains = expected_gains(mean, std, table.log_ratios(plans), points, top=surrogate.top, floor=floor)
        return self._knowledge.bases.params(table.plan(plans[int(np.argmax(gains))]))

    def _surrogate(self, tried: Rows, points: Values, floor: float) -> Surrogate | None:
        """A surrogate fitted to the finished trials nearest to the front; None if there are too few trials."""
        if len(tried) < MIN_TRIALS_FOR_SURROGATE:
            return None
        ranks, numbers = pareto.ranks(points), np.arange(len(points))
        # Within a rank the newest trials come first, since the next proposals will be near them.
        nearest = np.lexsort((-numbers, ranks))[:MAX_RECORDS]
        nearest = nearest[np.lexsort((nearest, ranks[nearest]))]
        known = self._knowledge
        return fit(
            known.table, tried[nearest], points[nearest, 0], dense_score=known.dense_score, noise=known.noise, floor=floor,
            seed=self._seed,
        )  # fmt: skip

    def _weights(self, surrogate: Surrogate | None) -> Values:
        """(fronts, weights): weights on the layers' loss increases, from their posterior, or from their prior without a
        surrogate."""
        # Drawn in any case, so that the random numbers that follow are the same ones.
        prior = self._rng.lognormal(0.0, LOG_WEIGHT_PRIOR_STD, (SAMPLED_FRONTS, self._knowledge.table.weights))
        return prior if surrogate is None else surrogate.weights[:SAMPLED_FRONTS]

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value. Optuna calls this for each parameter if `sample_relative` returns an empty dict."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def _rows(self, trials: Sequence[FrozenTrial]) -> Rows:
        return np.array([self._knowledge.row(t) for t in trials], dtype=np.intp).reshape(-1, len(self._knowledge.table.layers))

    def _seen(self, trials: Sequence[FrozenTrial]) -> set[tuple[int, ...]]:
        """Rows that are not proposed again: plans that finished or are running, and plans that lost too many workers."""
        # Plans that were over a size limit may be proposed again, since the limits may be wider now.
        evaluated = {
            self._knowledge.row(t)
            for t in trials
            if t.state is not TrialState.FAIL and not (t.state is TrialState.PRUNED and SIZE_CONSTRAINT in t.constraints)
        }
        lost = Counter(self._knowledge.row(t) for t in trials if t.state is TrialState.FAIL)
        return evaluated | {row for row, times in lost.items() if times >= MAX_TRIES}

    def _plans(self, parents: Rows, weights: Values, seen: set[tuple[int, ...]]) -> Rows:
        """The plans to choose from, without duplicates, plans over a size limit, plans in `seen` and the dense plan.

        Args:
            parents: plans on the measured front (plans, layers).
            weights: (fronts, weights), the weights of the loss increases for each predicted front.
            seen: rows that must not be proposed again.
        """
        table = self._knowledge.table
        parts = [
            _evenly(table.predicted_front(layer_weights, number), PLANS_PER_FRONT)
            for number, layer_weights in enumerate(weights)
        ]
        parts.append(self._knowledge.suggested_rows)
        if len(parents):
            parts += [self._moved(parents), self._mixed(parents)]
        plans = np.unique(np.concatenate(parts), axis=0)
        fits = self._knowledge.fits(plans)
        return plans[[fits[i] and any(row) and tuple(row) not in seen for i, row in enumerate(plans.tolist())]]

    def _moved(self, parents: Rows) -> Rows:
        """Plans of `parents` with one or two layers changed to another method or rank of similar size."""
        rows = self._rng.choice(parents, MOVED_PLANS)
        for row in rows:
            layers = self._rng.choice(len(row), size=min(len(row), int(self._rng.integers(1, 3))), replace=False)
            for layer in layers:
                row[layer] = self._knowledge.near(layer, row[layer]).searchsorted(self._rng.random(), side="right")
        return rows

    def _mixed(self, parents: Rows) -> Rows:
        """Mixtures of two plans of `parents` from the same net: each layer comes from one of the two at random."""
        first, second = self._rng.choice(parents, MIXED_PLANS), self._rng.choice(parents, MIXED_PLANS)
        nets = self._knowledge.table.nets[0]
        second = np.where((nets[first[:, 0]] == nets[second[:, 0]])[:, None], second, first)
        return np.where(self._rng.random(first.shape) < 0.5, first, second)


def _front_above(floor: float, tried: Rows, points: Values) -> Rows:
    """The plans of the measured front, of those with scores from the floor on."""
    above = points[:, 0] >= floor
    return tried[above][pareto.front(points[above])]


def _expected_points(surrogate: Surrogate, running: Rows) -> Values:
    """The expected scores and the log ratios of running trials, which count as finished so that proposals spread."""
    log_ratios = surrogate.table.log_ratios(running)
    if not len(running):
        return np.empty((0, 1 + log_ratios.shape[1]))
    return np.column_stack([surrogate.top - np.exp(surrogate.expect(running)[0]), log_ratios])


def expected_gains(mean: Values, std: Values, log_ratios: Values, points: Values, *, top: float, floor: float) -> Values:
    """The expected gain in hypervolume of each plan (plans,) (Emmerich et al. 2006), where log(`top` - score) is normal.

    The score axis is cut into slabs at the scores of the front. In each slab a plan gains a product: how far its score reaches
    into the slab, times the volume of its log ratios that no trial with a score above the slab dominates. The expected reach
    above a score, with a lognormal drop, is the price of a put option (Black and Scholes 1973); a slab takes the difference of
    two prices.

    Args:
        mean: mean of log(top - score) (plans,).
        std: standard deviation of log(top - score) (plans,), above 0.
        log_ratios: (plans, costs), known before training.
        points: score and log ratios of the trials (trials, 1 + costs).
        top: a value above every score.
        floor: only scores above it and log ratios above 0 count.
    """
    from scipy.special import ndtr

    front = points[pareto.front(points)]
    heights = np.unique([floor, *front[front[:, 0] > floor, 0]])
    heights = heights[heights < top]
    drop = np.exp(mean + 0.5 * std**2)
    gains, reach_above = np.zeros(len(mean)), np.zeros(len(mean))
    for height in heights[::-1]:
        z = (np.log(top - height) - mean) / std
        reach = (top - height) * ndtr(z) - drop * ndtr(z - std)
        gains += (reach - reach_above) * _beyond(log_ratios, front[front[:, 0] > height, 1:])
        reach_above = reach
    return gains


def _beyond(boxes: Values, dominated: Values) -> Values:
    """The volume (plans,) of each box from 0 to `boxes` (plans, costs) outside the boxes from 0 to `dominated` (n, costs)."""
    if boxes.shape[1] == 1:
        return np.maximum(boxes[:, 0] - dominated.max(initial=0.0), 0.0)
    # Cut the last axis into slices at the ends of the boxes `dominated`. Each of these passes through a slice fully or not at
    # all, so a slice's volume is its thickness times the volume over the other axes.
    levels = [0.0, *np.unique(dominated[dominated[:, -1] > 0, -1]), np.inf]
    volume = np.zeros(len(boxes))
    for low, high in pairwise(levels):
        thickness = np.clip(boxes[:, -1] - low, 0.0, high - low)
        volume += thickness * _beyond(boxes[:, :-1], dominated[dominated[:, -1] > low, :-1])
    return volume


def _evenly(rows: Rows, count: int) -> Rows:
    return rows[np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int))]
