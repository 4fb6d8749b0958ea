"""A model of plans' scores, fitted to the finished trials, on top of the loss increases that the probes predict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ranksearch.compress.inventory import Inventory
from ranksearch.methods import METHODS
from ranksearch.plan import Dense, Factorization, Plan
from ranksearch.results.objectives import Price, prices
from ranksearch.strategy.predicted_front import Choice, edges
from ranksearch.strategy.space import Size

if TYPE_CHECKING:
    from sklearn.ensemble import ExtraTreesRegressor
    from sklearn.isotonic import IsotonicRegression

Rows: TypeAlias = NDArray[np.intp]
"""Plans as an array (plans, layers): the index of each layer's choice in `Table.values`, 0 for dense."""
Values: TypeAlias = NDArray[np.float64]

TREES = 50
"""Number of trees. Each tree is one guess at the scores, and the variance over the guesses is the model's uncertainty."""
MIN_RECORDS_PER_LEAF = 2
"""The smallest number of records in a leaf of a tree. The score of a single record is mostly noise."""
MAX_RECORDS = 256
"""The surrogate is fitted to at most this many records, those nearest to the front, so that a proposal takes 0.1 s."""
SCORE_RESOLUTION = 0.01
"""Score drops are compared on a log scale from about this value on; smaller drops are noise of the validation score."""
MAX_RELATIVE_DROP = 4
"""Drops are clipped at this many times the drop to the floor: far below it, one bad score is as bad as another."""
LOG_WEIGHT_PRIOR_STD = 0.6
"""Prior standard deviation of the log of a layer's weight. How much of a predicted loss increase training recovers differs
between layers by a factor of about two."""
MIN_SLOPE = 0.1
"""The smallest slope of log score drop over log loss increase that the fit of the layers' weights uses."""
SCORE_NOISE_PRIOR_STD, SCORE_NOISE_PRIOR_RECORDS = 0.01, 8
"""Prior on the noise of a score: its standard deviation (that of an accuracy of 96 % on 360 images), and the number of records
that it counts for. Without this prior, a few records that agree by chance would end the search there."""
NOISE_LENGTH_SCALE = 1.0
"""The distance between two plans, in logs of the layers' sizes, from which the noise of their scores is independent."""
MIN_STD = 1e-6
"""Added to every standard deviation, so that none is 0."""
MIN_LOSS_INCREASE = 0.01
"""Offset, in nats, of the log scale on which loss increases are compared; training recovers an increase this small anyway."""


class Table:
    """Costs and predicted loss increases of every choice of every layer, as arrays.

    Args:
        inventory: the model's layers.
        choices: by layer, the ways to store it.
        minimize: the names of the costs to minimise.
    """

    def __init__(
        self, inventory: Inventory, choices: Mapping[str, Sequence[Choice]], minimize: Sequence[str] = ("params",)
    ) -> None:
        self.minimize = tuple(minimize)
        self.layers, self._inventory = tuple(choices), inventory
        dense = [inventory[name] for name in self.layers]
        self.values: list[list[Factorization]] = [
            [Dense(), *(choice.value for choice in choices[layer.name])] for layer in dense
        ]
        self.loss_increases = [
            np.array([0.0, *(max(0.0, choice.loss_increase) for choice in choices[layer.name])]) for layer in dense
        ]
        costs = [
            [layer.costs, *(METHODS[type(value)].costs(layer, value.ranks) for value in values[1:])]
            for layer, values in zip(dense, self.values, strict=True)
        ]
        self.costs = {name: [np.array([choice[name] for choice in layer]) for layer in costs] for name in inventory.costs}
        """By name of the cost: for each layer an array (choices,)."""
        self._index_of = [{value: index for index, value in enumerate(values)} for values in self.values]
        self._ranks_by_method = [_by_method(values) for values in self.values]
        self._edges = [self._priced(price) for price in prices(self.minimize, inventory)]

    def row(self, plan: Plan) -> tuple[int, ...]:
        """A plan as a row. A factorization that is not in the table becomes the one of its method with the nearest ranks."""
        return tuple(self._choice_index(layer, plan[name]) for layer, name in enumerate(self.layers))

    def plan(self, row: Sequence[int]) -> Plan:
        """The plan that a row stands for."""
        return Plan.of({name: self.values[i][row[i]] for i, name in enumerate(self.layers)})

    def sizes(self, rows: Rows) -> list[Size]:
        """The size of the whole model under each plan."""
        names, costs = list(self.costs), [self._totals(name, rows).tolist() for name in self.costs]
        return [Size(dict(zip(names, each, strict=True)), self._inventory.params / each[names.index("params")])
                for each in zip(*costs, strict=True)]  # fmt: skip

    def _totals(self, cost: str, rows: Rows) -> Values:
        """(plans,): one cost of the whole model under each plan."""
        return np.asarray(self._inventory.costs[cost] - _saved(self.costs[cost], rows))

    def log_ratios(self, rows: Rows) -> Values:
        """(plans, costs): log10 of dense cost / plan's cost, for each cost to minimise."""
        return np.stack([np.log10(self._inventory.costs[cost] / self._totals(cost, rows)) for cost in self.minimize], axis=1)

    def loss_increases_of(self, rows: Rows) -> Values:
        """(plans, layers): the predicted loss increase of each layer's choice alone."""
        return np.stack([loss_increases[rows[:, i]] for i, loss_increases in enumerate(self.loss_increases)], axis=1)

    def predicted_front(self, weights: Values, price_index: int = 0) -> Rows:
        """The plans of the predicted front, the largest first, with each layer's loss increases multiplied by its weight.

        Args:
            weights: (layers,).
            price_index: which price to solve for, modulo their number; there are several if there are several costs.
        """
        # Scaling all loss increases of a layer keeps its hull, so only the order of the merged edges changes.
        steps = sorted(self._edges[price_index % len(self._edges)], key=lambda edge: edge[2] * weights[edge[0]])
        rows = np.zeros((len(steps) + 1, len(self.layers)), dtype=np.intp)
        for step, (layer, choice, _) in enumerate(steps, start=1):
            rows[step] = rows[step - 1]
            rows[step, layer] = choice
        return rows

    def features(self, rows: Rows) -> Values:
        """(plans, 2 * layers): the logs of each layer's predicted loss increase and compression ratio."""
        return np.concatenate([_log(self.loss_increases_of(rows)), self.shrunk(rows)], axis=1)

    def shrunk(self, rows: Rows) -> Values:
        """(plans, layers): the log of each layer's own compression ratio."""
        return np.stack([np.log(params[0] / params[rows[:, i]]) for i, params in enumerate(self.costs["params"])], axis=1)

    def _priced(self, price: Price) -> list[tuple[int, int, float]]:
        """The edges of the predicted front at a price: (index of the layer, index of its choice, slope)."""
        costs = [
            np.sum([unit * self.costs[cost][layer] for cost, unit in price.units.items()], axis=0)
            for layer in range(len(self.layers))
        ]
        priced_choices = [
            list(map(Choice, *each)) for each in zip(self.values, map(list, costs), map(list, self.loss_increases), strict=True)
        ]
        dense = {name: priced[0].cost for name, priced in zip(self.layers, priced_choices, strict=True)}
        layer_index = {name: index for index, name in enumerate(self.layers)}
        front_edges = edges(dense, {name: priced[1:] for name, priced in zip(self.layers, priced_choices, strict=True)})
        return [
            (layer_index[edge.layer], self._index_of[layer_index[edge.layer]][edge.value], edge.slope) for edge in front_edges
        ]

    def _choice_index(self, layer: int, value: Factorization) -> int:
        index = self._index_of[layer].get(value)
        if index is None:
            indices, ranks = self._ranks_by_method[layer].get(type(value), ([0], np.ones((1, len(value.ranks)))))
            distances = np.abs(np.log(ranks / np.array(value.ranks, dtype=float))).sum(axis=1)
            index = self._index_of[layer][value] = indices[int(np.argmin(distances))]
        return index


def _saved(costs: list[Values], rows: Rows) -> Values:
    return np.asarray(sum(cost[0] - cost[rows[:, layer]] for layer, cost in enumerate(costs)))


def _by_method(values: Sequence[Factorization]) -> dict[type[Factorization], tuple[list[int], Values]]:
    """By type of factorization, the indices of a layer's choices and their ranks (choices, ranks)."""
    kinds: dict[type[Factorization], list[int]] = {}
    for index, value in enumerate(values):
        kinds.setdefault(type(value), []).append(index)
    return {kind: (indices, np.array([values[i].ranks for i in indices], dtype=float)) for kind, indices in kinds.items()}


@dataclass(frozen=True)
class Surrogate:
    """Predicts the scores of plans from the finished trials. Made by `fit`.

    It predicts log(`top` - score), the log of the score drop, in three steps:
    1. A weight for each layer's predicted loss increase: training recovers the increases of some layers better than those of
       others. Ridge regression around 1.
    2. Isotonic regression of the log drop on the log of the weighted sum: a larger loss increase never predicts a smaller drop.
    3. Extremely randomised trees (Geurts et al. 2006) for the residuals, above all for interactions of layers.
    """

    table: Table
    tried: Rows
    """The plans it was fitted to (plans, layers)."""
    top: float
    """A value above every score, from which drops are measured."""
    log_weights: Values
    """(layers,): the logs of the layers' most likely weights."""
    weights: Values
    """(guesses, layers): samples from the posterior of the layers' weights, one sample for each tree."""
    trend: IsotonicRegression
    trees: ExtraTreesRegressor
    noise: float
    """The standard deviation of the noise of a score."""

    def expect(self, rows: Rows) -> tuple[Values, Values]:
        """Mean and standard deviation (plans,) of log(`top` - score), from the model's uncertainty and the noise of scores."""
        loss_increases = self.table.loss_increases_of(rows)
        features = np.ascontiguousarray(_features(self.table, rows, self.log_weights), dtype=np.float32)
        residuals = np.stack([tree.tree_.predict(features)[:, 0] for tree in self.trees.estimators_])
        guesses = residuals + self.trend.predict(_log(self.weights @ loss_increases.T).ravel()).reshape(residuals.shape)
        mean, noise = guesses.mean(0), self.noise / np.exp(guesses.mean(0))
        return mean, np.sqrt(guesses.var(0) + self._novelty(rows) * noise**2) + MIN_STD

    def _novelty(self, rows: Rows) -> Values:
        """(plans,): 0 for a plan that was tried, approaching 1 as its layers' sizes differ from those of every tried plan.

        Nearly equal plans have nearly equal scores, noise included. Without this factor the search would try one plan again
        and again in tiny variations, until noise gives a high score. It is the variance of a Gaussian process with a single
        record, the nearest one.
        """
        # Imported here for the same reason as scikit-learn.
        from scipy.spatial.distance import cdist

        nearest = cdist(self.table.shrunk(rows), self.table.shrunk(self.tried)).min(axis=1)
        return np.asarray(1.0 - np.exp(-((nearest / NOISE_LENGTH_SCALE) ** 2)))


def fit(table: Table, rows: Rows, scores: Values, *, dense_score: float, floor: float, seed: int) -> Surrogate:
    """Fit a surrogate to finished trials.

    Args:
        table: the choices of each layer.
        rows: the plans of the finished trials (plans, layers).
        scores: their scores (plans,).
        dense_score: score of the dense model.
        floor: scores below it do not count.
        seed: seed of all random numbers.
    """
    # Imported here: scikit-learn takes a second to import, and only the driver uses a surrogate.
    from sklearn.isotonic import IsotonicRegression

    # Plans may score higher than the dense model, so drops are measured from the highest score within reach.
    reach = max(dense_score, floor, float(scores.max()) - SCORE_RESOLUTION / 2)
    max_drop = MAX_RELATIVE_DROP * max(reach - min(floor, dense_score), SCORE_RESOLUTION)
    drops = np.log(np.clip(reach - scores, 0.0, max_drop) + SCORE_RESOLUTION)
    loss_increases = table.loss_increases_of(rows)
    log_weights, covariance_root = _log_weights(loss_increases, drops)
    normal = np.random.default_rng(seed).standard_normal((TREES, len(log_weights)))
    log_increases = _log(loss_increases @ np.exp(log_weights))
    trend = IsotonicRegression(out_of_bounds="clip").fit(log_increases, drops)
    trees = _fit_trees(_features(table, rows, log_weights), drops - trend.predict(log_increases), seed)
    predicted = trend.predict(log_increases) + trees.oob_prediction_
    noise = _noise((np.exp(predicted) - np.exp(drops))[scores > floor])
    weights = np.exp(log_weights + normal @ covariance_root.T)
    return Surrogate(table, rows, reach + SCORE_RESOLUTION, log_weights, weights, trend, trees, noise)


def _fit_trees(features: Values, residuals: Values, seed: int) -> ExtraTreesRegressor:
    from sklearn.ensemble import ExtraTreesRegressor

    trees = ExtraTreesRegressor(
        TREES, min_samples_leaf=MIN_RECORDS_PER_LEAF, max_features="sqrt", bootstrap=True, oob_score=True, random_state=seed
    )
    return trees.fit(features, residuals)


def _noise(errors: Values) -> float:
    """The standard deviation of the noise of a score, from the errors of predicted scores and a prior."""
    prior_sum = SCORE_NOISE_PRIOR_STD**2 * SCORE_NOISE_PRIOR_RECORDS
    return math.sqrt((prior_sum + float(np.sum(errors**2))) / (SCORE_NOISE_PRIOR_RECORDS + len(errors)))


def _features(table: Table, rows: Rows, log_weights: Values) -> Values:
    """(plans, 1 + 2 * layers): the log of the weighted sum of loss increases, and the table's features."""
    total = _log(table.loss_increases_of(rows) @ np.exp(log_weights))
    return np.concatenate([total[:, None], table.features(rows)], axis=1)


def _log(loss_increases: Values) -> Values:
    return np.asarray(np.log(loss_increases + MIN_LOSS_INCREASE))


def _log_weights(loss_increases: Values, drops: Values) -> tuple[Values, Values]:
    """Fit the logs of the layers' weights (layers,); also returns a Cholesky factor of their covariance.

    For weights near 1 the log of the weighted sum is linear in the log weights, with each layer's share of the sum as slope.
    So this is Bayesian linear regression with a prior of mean 0 and standard deviation `LOG_WEIGHT_PRIOR_STD`.

    Args:
        loss_increases: (plans, layers).
        drops: log score drops (plans,).
    """
    from sklearn.isotonic import IsotonicRegression

    total = _log(loss_increases.sum(1))
    # "clip", since with nearly equal sums scikit-learn treats the largest one as out of bounds.
    residuals = drops - IsotonicRegression(out_of_bounds="clip").fit_transform(total, drops)
    steepness = max(MIN_SLOPE, float(np.polyfit(total, drops, 1)[0])) if np.ptp(total) > 0 else MIN_SLOPE
    shares = steepness * loss_increases / (loss_increases.sum(1, keepdims=True) + MIN_LOSS_INCREASE)
    # A lower bound on the noise: with few records the trend can pass through all of them.
    noise = max(float(np.mean(residuals**2)), (SCORE_NOISE_PRIOR_STD / SCORE_RESOLUTION) ** 2 / len(residuals))
    precision = shares.T @ shares / noise + np.eye(loss_increases.shape[1]) / LOG_WEIGHT_PRIOR_STD**2
    covariance = np.linalg.inv(precision)
    return covariance @ shares.T @ residuals / noise, np.linalg.cholesky(covariance)
