"""A model of plans' scores, fitted to the finished trials, on top of the loss increases that the probes predict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ranksearch.methods import METHODS
from ranksearch.plan import Dense, Factorization, Plan
from ranksearch.results import pareto
from ranksearch.results.objectives import Price, prices
from ranksearch.strategy.bases import Base, Bases
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
MAX_RELATIVE_DROP = 4
"""Drops are clipped at this many times the drop to the floor: far below it, one bad score is as bad as another."""
LOG_WEIGHT_PRIOR_STD = 0.6
"""Prior standard deviation of the log of a layer's weight. How much of a predicted loss increase training recovers differs
between layers by a factor of about two."""
MIN_SLOPE = 0.1
"""The smallest slope of log score drop over log loss increase that the fit of the layers' weights uses."""
NOISE_PRIOR_RECORDS = 8
"""How many records the noise of the dense net's score counts for, as a prior on the noise of scores. Without this prior, a few
records that agree by chance would end the search there."""
NOISE_LENGTH_SCALE = 1.0
"""The distance between two plans, in logs of the layers' sizes, from which the noise of their scores is independent."""
MIN_STD = 1e-6
"""Added to every standard deviation, so that none is 0."""
MIN_LOSS_INCREASE = 0.01
"""Offset, in nats, of the log scale on which loss increases are compared; training recovers an increase this small anyway."""


class Table:
    """Costs and predicted loss increases of every choice of every layer, as arrays.

    A layer's choices are those in the first net (dense first, so that its index is 0), then those in the second, and so on; all
    choices of a row belong to one net.

    Args:
        bases: the nets to search from.
        choices: for each net, by layer, the ways to store it.
        minimize: the names of the costs to minimise.
        base_losses: for each net, how much larger its loss is than that of the first.
    """

    def __init__(
        self,
        bases: Bases,
        choices: Sequence[Mapping[str, Sequence[Choice]]],
        minimize: Sequence[str] = ("params",),
        base_losses: Sequence[float] = (0.0,),
    ) -> None:
        self.minimize, self._bases = tuple(minimize), bases
        self.layers = tuple(dict.fromkeys(name for found in choices for name in found))
        self.values: list[list[Factorization]] = [[] for _ in self.layers]
        self.nets: list[NDArray[np.intp]] = []
        """For each layer an array (choices,): the index of the net that each choice belongs to."""
        self.loss_increases: list[Values] = []
        """For each layer an array (choices,)."""
        self.costs: dict[str, list[Values]] = {name: [] for name in bases.dense.costs}
        """By name of the cost: for each layer an array (choices,)."""
        self.base_losses = np.maximum(np.array(base_losses, dtype=float), 0.0)
        """(nets,)"""
        self._index_of: list[dict[tuple[int, Factorization], int]] = []
        for layer, name in enumerate(self.layers):
            self._add_layer(layer, name, choices)
        self._rest = {
            cost: np.array([
                base.inventory.costs[cost] - sum(_layer_costs(base, name)[cost] for name in self.layers) for base in bases
            ])
            for cost in self.costs
        }  # fmt: skip
        self.log_params = [np.log(np.maximum(params, 1.0)) for params in self.costs["params"]]
        """For each layer an array (choices,): the log of its number of parameters."""
        self._ranks_by_method = [_by_method(*each) for each in zip(self.values, self.nets, strict=True)]
        self._prices = prices(self.minimize, bases.dense)
        self._edges = [[self._priced(price, net) for net in range(len(bases))] for price in self._prices]

    def _add_layer(self, layer: int, name: str, choices: Sequence[Mapping[str, Sequence[Choice]]]) -> None:
        nets, increases, costs = list[int](), list[float](), list[Mapping[str, float]]()
        for net, (base, found) in enumerate(zip(self._bases, choices, strict=True)):
            values = [choice.value for choice in found.get(name, ())]
            self.values[layer] += [Dense(), *values]
            nets += [net] * (1 + len(values))
            increases += [0.0, *(max(0.0, choice.loss_increase) for choice in found.get(name, ()))]
            costs.append(_layer_costs(base, name))
            costs += [METHODS[type(value)].costs(base.inventory[name], value.ranks) for value in values]
        self.nets.append(np.array(nets, dtype=np.intp))
        self.loss_increases.append(np.array(increases))
        for cost, arrays in self.costs.items():
            arrays.append(np.array([each[cost] for each in costs]))
        self._index_of.append({(net, value): i for i, (net, value) in enumerate(zip(nets, self.values[layer], strict=True))})

    @property
    def weights(self) -> int:
        """How many weights the surrogate has for loss increases: one for each layer, and one for those of narrower nets."""
        return len(self.layers) + (len(self._bases) > 1)

    def row(self, plan: Plan) -> tuple[int, ...]:
        """A plan as a row. A factorization that is not in the table becomes the one of its method with the nearest ranks."""
        net = [base.width for base in self._bases].index(plan.width)
        return tuple(self._choice_index(layer, net, plan[name]) for layer, name in enumerate(self.layers))

    def plan(self, row: Sequence[int]) -> Plan:
        """The plan that a row stands for."""
        width = self._bases.nets[self.nets[0][row[0]]].width
        return Plan.of({name: self.values[i][row[i]] for i, name in enumerate(self.layers)}, width)

    def sizes(self, rows: Rows) -> list[Size]:
        """The size of the whole model under each plan."""
        names, costs = list(self.costs), [self._totals(name, rows).tolist() for name in self.costs]
        return [Size(dict(zip(names, each, strict=True)), self._bases.dense.params / each[names.index("params")])
                for each in zip(*costs, strict=True)]  # fmt: skip

    def _totals(self, cost: str, rows: Rows) -> Values:
        """(plans,): one cost of the whole model under each plan."""
        layers = sum(costs[rows[:, layer]] for layer, costs in enumerate(self.costs[cost]))
        return np.asarray(layers + self._rest[cost][self.nets[0][rows[:, 0]]])

    def log_ratios(self, rows: Rows) -> Values:
        """(plans, costs): log10 of dense cost / plan's cost, for each cost to minimise."""
        dense = self._bases.dense.costs
        return np.stack([np.log10(dense[cost] / self._totals(cost, rows)) for cost in self.minimize], axis=1)

    def loss_increases_of(self, rows: Rows) -> Values:
        """(plans, weights): the predicted loss increase of each layer's choice alone, and last that of the narrower net."""
        found = [loss_increases[rows[:, i]] for i, loss_increases in enumerate(self.loss_increases)]
        if len(self._bases) > 1:
            found.append(self.base_losses[self.nets[0][rows[:, 0]]])
        return np.stack(found, axis=1)

    def predicted_front(self, weights: Values, price_index: int = 0) -> Rows:
        """The plans of the predicted front, the largest first, with each loss increase multiplied by its weight.

        Args:
            weights: (weights,), as in `loss_increases_of`.
            price_index: which price to solve for, modulo their number; there are several if there are several costs.
        """
        place = price_index % len(self._prices)
        rows = np.concatenate([self._front_of(net, edges, weights) for net, edges in enumerate(self._edges[place])])
        if len(self._bases) == 1:
            return rows
        cost = np.sum([unit * self._totals(name, rows) for name, unit in self._prices[place].units.items()], axis=0)
        best = pareto.front(np.column_stack([-cost, -(self.loss_increases_of(rows) @ weights)]))
        return rows[sorted(best, key=lambda index: -cost[index])]

    def _front_of(self, net: int, edges: Sequence[tuple[int, int, float]], weights: Values) -> Rows:
        """The predicted front of one net."""
        # Scaling all loss increases of a layer keeps its hull, so only the order of the merged edges changes.
        steps = sorted(edges, key=lambda edge: edge[2] * weights[edge[0]])
        rows = np.zeros((len(steps) + 1, len(self.layers)), dtype=np.intp)
        rows[0] = [index[net, Dense()] for index in self._index_of]
        for step, (layer, choice, _) in enumerate(steps, start=1):
            rows[step] = rows[step - 1]
            rows[step, layer] = choice
        return rows

    def features(self, rows: Rows) -> Values:
        """(plans, weights + layers): the logs of the predicted loss increases and of each layer's compression ratio."""
        return np.concatenate([_log(self.loss_increases_of(rows)), self.log_layer_ratios(rows)], axis=1)

    def log_layer_ratios(self, rows: Rows) -> Values:
        """(plans, layers): the log of each layer's own compression ratio, to the layer of the first net."""
        sizes = self.log_params
        return np.stack([sizes[i][0] - sizes[i][rows[:, i]] for i in range(len(self.layers))], axis=1)

    def _priced(self, price: Price, net: int) -> list[tuple[int, int, float]]:
        """The edges of one net's predicted front at a price: (index of the layer, index of its choice, slope)."""
        dense, choices = {}, {}
        for layer, name in enumerate(self.layers):
            own = np.flatnonzero(self.nets[layer] == net)
            costs = np.sum([unit * self.costs[cost][layer][own] for cost, unit in price.units.items()], axis=0)
            values = [self.values[layer][index] for index in own]
            priced = list(map(Choice, values, costs.tolist(), self.loss_increases[layer][own].tolist()))
            dense[name], choices[name] = priced[0].cost, priced[1:]
        index = {name: layer for layer, name in enumerate(self.layers)}
        return [
            (index[edge.layer], self._index_of[index[edge.layer]][net, edge.value], edge.slope)
            for edge in edges(dense, choices)
        ]

    def _choice_index(self, layer: int, net: int, value: Factorization) -> int:
        index = self._index_of[layer].get((net, value))
        if index is None:
            dense = [self._index_of[layer][net, Dense()]], np.ones((1, len(value.ranks)))
            indices, ranks = self._ranks_by_method[layer].get((net, type(value)), dense)
            distances = np.abs(np.log(ranks / np.array(value.ranks, dtype=float))).sum(axis=1)
            index = self._index_of[layer][net, value] = indices[int(np.argmin(distances))]
        return index


def _layer_costs(base: Base, name: str) -> Mapping[str, float]:
    """The costs of a layer without decomposition; all 0 if the net has no such layer to decompose."""
    costs = next((layer.costs for layer in base.inventory.layers if layer.name == name), None)
    return costs if costs is not None else dict.fromkeys(base.inventory.costs, 0)


def _by_method(
    values: Sequence[Factorization], nets: NDArray[np.intp]
) -> dict[tuple[int, type[Factorization]], tuple[list[int], Values]]:
    """By net and type of factorization, the indices of a layer's choices and their ranks (choices, ranks)."""
    kinds: dict[tuple[int, type[Factorization]], list[int]] = {}
    for index, (net, value) in enumerate(zip(nets.tolist(), values, strict=True)):
        kinds.setdefault((net, type(value)), []).append(index)
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
    """(weights,): the logs of the most likely weights of the loss increases."""
    weights: Values
    """(guesses, weights): samples from the posterior of the weights, one sample for each tree."""
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

        nearest = cdist(self.table.log_layer_ratios(rows), self.table.log_layer_ratios(self.tried)).min(axis=1)
        return np.asarray(1.0 - np.exp(-((nearest / NOISE_LENGTH_SCALE) ** 2)))


def fit(table: Table, rows: Rows, scores: Values, *, dense_score: float, noise: float, floor: float, seed: int) -> Surrogate:
    """Fit a surrogate to finished trials.

    Args:
        table: the choices of each layer.
        rows: the plans of the finished trials (plans, layers).
        scores: their scores (plans,).
        dense_score: score of the dense model.
        noise: its standard error. Score drops are compared on a log scale from about this value on.
        floor: scores below it do not count.
        seed: seed of all random numbers.
    """
    # Imported here: scikit-learn takes a second to import, and only the driver uses a surrogate.
    from sklearn.isotonic import IsotonicRegression

    # Plans may score higher than the dense model, so drops are measured from the highest score within reach.
    reach = max(dense_score, floor, float(scores.max()) - noise / 2)
    max_drop = MAX_RELATIVE_DROP * max(reach - min(floor, dense_score), noise)
    drops = np.log(np.clip(reach - scores, 0.0, max_drop) + noise)
    loss_increases = table.loss_increases_of(rows)
    log_weights, covariance_root = _log_weights(loss_increases, drops)
    normal = np.random.default_rng(seed).standard_normal((TREES, len(log_weights)))
    log_increases = _log(loss_increases @ np.exp(log_weights))
    trend = IsotonicRegression(out_of_bounds="clip").fit(log_increases, drops)
    trees = _fit_trees(_features(table, rows, log_weights), drops - trend.predict(log_increases), seed)
    predicted = trend.predict(log_increases) + trees.oob_prediction_
    fitted = _noise((np.exp(predicted) - np.exp(drops))[scores > floor], prior=noise)
    weights = np.exp(log_weights + normal @ covariance_root.T)
    return Surrogate(table, rows, reach + noise, log_weights, weights, trend, trees, fitted)


def _fit_trees(features: Values, residuals: Values, seed: int) -> ExtraTreesRegressor:
    from sklearn.ensemble import ExtraTreesRegressor

    trees = ExtraTreesRegressor(
        TREES, min_samples_leaf=MIN_RECORDS_PER_LEAF, max_features="sqrt", bootstrap=True, oob_score=True, random_state=seed
    )
    return trees.fit(features, residuals)


def _noise(errors: Values, prior: float) -> float:
    """The standard deviation of the noise of a score, from the errors of predicted scores and a prior."""
    return math.sqrt((prior**2 * NOISE_PRIOR_RECORDS + float(np.sum(errors**2))) / (NOISE_PRIOR_RECORDS + len(errors)))


def _features(table: Table, rows: Rows, log_weights: Values) -> Values:
    """(plans, 1 + weights + layers): the log of the weighted sum of loss increases, and the table's features."""
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
    # A lower bound on the noise, in units of that of a score: with few records the trend can pass through all of them.
    noise = max(float(np.mean(residuals**2)), 1 / len(residuals))
    precision = shares.T @ shares / noise + np.eye(loss_increases.shape[1]) / LOG_WEIGHT_PRIOR_STD**2
    covariance = np.linalg.inv(precision)
    return covariance @ shares.T @ residuals / noise, np.linalg.cholesky(covariance)
