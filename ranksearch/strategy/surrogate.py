"""What a plan's score will be: learned from the trials so far, on top of what profile and probes predict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ranksearch.compress.inventory import Inventory
from ranksearch.methods import METHODS
from ranksearch.plan import Dense, Factorization, Plan
from ranksearch.results.objectives import Price, prices
from ranksearch.strategy.predicted_front import Choice, edges
from ranksearch.strategy.space import Size

Rows: TypeAlias = NDArray[np.intp]
"""Plans as rows (plans, layers): the place of each layer's choice in its table, 0 for dense."""
Values: TypeAlias = NDArray[np.float64]

TREES = 50
"""Each is one guess at the scores: their spread is how unsure the surrogate is."""
MIN_RECORDS_PER_LEAF = 2
"""Records in a leaf, at least: one alone is mostly the noise of its score."""
MAX_RECORDS = 256
"""The surrogate learns from so many records at most, those nearest to the front: a guess has to be ready in 0.1 s."""
SCORE_RESOLUTION = 0.01
"""Drops of the score are told apart on a log scale from about here on; below it is the noise of a validation score."""
MAX_RELATIVE_DROP = 4
"""Beyond so many times the drop down to the floor, all drops are alike."""
PRIOR_STD = 0.6
"""Standard deviation of the log of a layer's weight: training makes good what it makes good by a factor of two or so."""
MIN_SLOPE = 0.1
"""The least slope of the log drop over the log rise that weights are fitted with."""
PRIOR_SCORE_STD, PRIOR_RECORDS = 0.01, 8
"""What the standard deviation of a score is taken to be for its noise alone, and how many records that assumption is worth:
96 % on 360 images is known to a point. A handful of records that agree by chance would end the search there."""
NOISE_LENGTH_SCALE = 1.0
"""The distance, in logs of layers' sizes, at which two plans' scores begin to have noise of their own."""
MIN_STD = 1e-6
"""A standard deviation is at least this: nothing is divided by 0."""
MIN_LOSS_INCREASE = 0.01
"""A predicted rise of the loss, in nats, that training makes good in any case; rises are told apart on a log scale."""


class Table:
    """Every choice of every layer as arrays: its costs, and the predicted increase of the loss.

    Args:
        inventory: the model's layers.
        choices: by layer, the ways to store it.
        minimize: the costs that plans are to be small in.
    """

    def __init__(
        self, inventory: Inventory, choices: Mapping[str, Sequence[Choice]], minimize: Sequence[str] = ("params",)
    ) -> None:
        self.minimize = tuple(minimize)
        self.layers, self._inventory = tuple(choices), inventory
        dense = [inventory[name] for name in self.layers]
        self.values: list[list[Factorization]] = [[Dense(), *(choice.value for choice in choices[x.name])] for x in dense]
        self.loss_increases = [np.array([0.0, *(max(0.0, choice.loss_increase) for choice in choices[x.name])]) for x in dense]
        costs = [
            [x.costs, *(METHODS[type(value)].costs(x, value.ranks) for value in values[1:])]
            for x, values in zip(dense, self.values, strict=True)
        ]
        self.costs = {name: [np.array([choice[name] for choice in layer]) for layer in costs] for name in inventory.costs}
        """By the name of each cost, of each layer (choices,)."""
        self._at = [{value: place for place, value in enumerate(values)} for values in self.values]
        self._alike = [_by_method(values) for values in self.values]
        self._edges = [self._priced(price) for price in prices(self.minimize, inventory)]

    def row(self, plan: Plan) -> tuple[int, ...]:
        """A plan as a row; a choice that is not in the table stands as the nearest of its method."""
        return tuple(self._place(layer, plan[name]) for layer, name in enumerate(self.layers))

    def plan(self, row: Sequence[int]) -> Plan:
        """The plan that a row stands for."""
        return Plan.of({name: self.values[i][row[i]] for i, name in enumerate(self.layers)})

    def sizes(self, rows: Rows) -> list[Size]:
        """The size of the whole model under each plan."""
        names, costs = list(self.costs), [self._whole(name, rows).tolist() for name in self.costs]
        return [Size(dict(zip(names, each, strict=True)), self._inventory.params / each[names.index("params")])
                for each in zip(*costs, strict=True)]  # fmt: skip

    def _whole(self, cost: str, rows: Rows) -> Values:
        """(plans,): one cost of the whole model under each plan."""
        return np.asarray(self._inventory.costs[cost] - _saved(self.costs[cost], rows))

    def log_ratios(self, rows: Rows) -> Values:
        """(plans, costs): log10 of how many times each plan is smaller, in each cost to be minimised."""
        return np.stack([np.log10(self._inventory.costs[cost] / self._whole(cost, rows)) for cost in self.minimize], axis=1)

    def loss_increases_of(self, rows: Rows) -> Values:
        """(plans, layers): the predicted rise of the loss that each layer's choice causes."""
        return np.stack([loss_increases[rows[:, i]] for i, loss_increases in enumerate(self.loss_increases)], axis=1)

    def predicted_front(self, weights: Values, at: int = 0) -> Rows:
        """The corners of the frontier, by falling size, with each layer's rises times its weight (layers,), under the price at
        a place; of several costs there are several prices, which take turns."""
        # A layer's hull stays what it is when all its rises are scaled: only the merger changes.
        steps = sorted(self._edges[at % len(self._edges)], key=lambda edge: edge[2] * weights[edge[0]])
        rows = np.zeros((len(steps) + 1, len(self.layers)), dtype=np.intp)
        for step, (layer, place, _) in enumerate(steps, start=1):
            rows[step] = rows[step - 1]
            rows[step, layer] = place
        return rows

    def features(self, rows: Rows) -> Values:
        """(plans, 2 layers): the log of each layer's predicted rise, and of its compression."""
        return np.concatenate([_log(self.loss_increases_of(rows)), self.shrunk(rows)], axis=1)

    def shrunk(self, rows: Rows) -> Values:
        """(plans, layers): the log of each layer's own compression ratio."""
        return np.stack([np.log(params[0] / params[rows[:, i]]) for i, params in enumerate(self.costs["params"])], axis=1)

    def _priced(self, price: Price) -> list[tuple[int, int, float]]:
        """The edges of the frontier at a price: the layer, the place of its choice, the slope."""
        costs = [
            np.sum([unit * self.costs[cost][layer] for cost, unit in price.units.items()], axis=0)
            for layer in range(len(self.layers))
        ]
        whole = [
            list(map(Choice, *each)) for each in zip(self.values, map(list, costs), map(list, self.loss_increases), strict=True)
        ]
        dense = {name: priced[0].cost for name, priced in zip(self.layers, whole, strict=True)}
        places = {name: place for place, name in enumerate(self.layers)}
        found = edges(dense, {name: priced[1:] for name, priced in zip(self.layers, whole, strict=True)})
        return [(places[edge.layer], self._at[places[edge.layer]][edge.value], edge.slope) for edge in found]

    def _place(self, layer: int, value: Factorization) -> int:
        found = self._at[layer].get(value)
        if found is None:
            places, ranks = self._alike[layer].get(type(value), ([0], np.ones((1, len(value.ranks)))))
            distances = np.abs(np.log(ranks / np.array(value.ranks, dtype=float))).sum(axis=1)
            found = self._at[layer][value] = places[int(np.argmin(distances))]
        return found


def _saved(costs: list[Values], rows: Rows) -> Values:
    return np.asarray(sum(cost[0] - cost[rows[:, layer]] for layer, cost in enumerate(costs)))


def _by_method(values: Sequence[Factorization]) -> dict[type[Factorization], tuple[list[int], Values]]:
    """By type of factorization, the places of a layer's choices and their ranks (choices, ranks)."""
    kinds: dict[type[Factorization], list[int]] = {}
    for place, value in enumerate(values):
        kinds.setdefault(type(value), []).append(place)
    return {kind: (places, np.array([values[i].ranks for i in places], dtype=float)) for kind, places in kinds.items()}


class Surrogate:
    """Scores of plans, from the records so far.

    The predicted rise of the loss orders plans well before anything is known of them, but says nothing of what training
    makes good again. An isotonic fit tells the drop of the score from it, and never falls. Which layers' rises training
    makes good better than others' is told by a weight on each, found by ridge regression around 1. What is left, their
    interactions most of all, is learned by extremely randomised trees (Geurts et al. 2006).

    Args:
        table: the choices.
        rows: the plans that were tried (plans, layers).
        scores: theirs.
        dense_score: of the dense model.
        floor: scores below it are worth nothing.
        seed: of everything random.
    """

    def __init__(self, table: Table, rows: Rows, scores: Values, *, dense_score: float, floor: float, seed: int) -> None:
        # Imported here: scikit-learn costs a second, and only the driver asks for a surrogate.
        from sklearn.ensemble import ExtraTreesRegressor
        from sklearn.isotonic import IsotonicRegression

        # Plans may beat the dense net, and the search may climb on: drops are from what is within reach, noise aside.
        reach = max(dense_score, floor, float(scores.max()) - SCORE_RESOLUTION / 2)
        self._table, self.top = table, reach + SCORE_RESOLUTION
        most = MAX_RELATIVE_DROP * max(reach - min(floor, dense_score), SCORE_RESOLUTION)
        drops = np.log(np.clip(reach - scores, 0.0, most) + SCORE_RESOLUTION)
        loss_increases, self._sizes = table.loss_increases_of(rows), table.shrunk(rows)
        self._theta, spread = _log_weights(loss_increases, drops)
        draw = np.random.default_rng(seed).standard_normal((TREES, len(self._theta)))
        self.weights = np.exp(self._theta + draw @ spread.T)
        """(guesses, layers): what each guess takes the weight of each layer's rise to be."""
        mean = _log(loss_increases @ np.exp(self._theta))
        self._trend = IsotonicRegression(out_of_bounds="clip").fit(mean, drops)
        self._trees = ExtraTreesRegressor(
            TREES, min_samples_leaf=MIN_RECORDS_PER_LEAF, max_features="sqrt", bootstrap=True, oob_score=True, random_state=seed
        )
        rest = drops - self._trend.predict(mean)
        self._trees.fit(self._features(rows), rest)
        foretold = self._trend.predict(mean) + self._trees.oob_prediction_
        missed = (np.exp(foretold) - np.exp(drops))[scores > floor]
        self._noise = math.sqrt((PRIOR_SCORE_STD**2 * PRIOR_RECORDS + float(np.sum(missed**2))) / (PRIOR_RECORDS + len(missed)))

    def expect(self, rows: Rows) -> tuple[Values, Values]:
        """Mean and standard deviation (plans,) of log(`top` - score): what is not known of it, and the noise of a score."""
        features, loss_increases = (
            np.ascontiguousarray(self._features(rows), dtype=np.float32),
            self._table.loss_increases_of(rows),
        )
        rest = np.stack([tree.tree_.predict(features)[:, 0] for tree in self._trees.estimators_])
        guesses = rest + self._trend.predict(_log(self.weights @ loss_increases.T).ravel()).reshape(rest.shape)
        mean, noise = guesses.mean(0), self._noise / np.exp(guesses.mean(0))
        return mean, np.sqrt(guesses.var(0) + self._novelty(rows) * noise**2) + MIN_STD

    def _novelty(self, rows: Rows) -> Values:
        """(plans,): 0 for a plan that was tried, towards 1 the farther its layers' sizes are from those of any that was.

        Nearly the same plan has nearly the same score, its noise included: without this, the search would draw lots in one
        place. It is the variance that a Gaussian process with one record, the nearest, would have.
        """
        # Imported here, as scikit-learn is.
        from scipy.spatial.distance import cdist

        nearest = cdist(self._table.shrunk(rows), self._sizes).min(axis=1)
        return np.asarray(1.0 - np.exp(-((nearest / NOISE_LENGTH_SCALE) ** 2)))

    def _features(self, rows: Rows) -> Values:
        return np.concatenate(
            [_log(self._table.loss_increases_of(rows) @ np.exp(self._theta))[:, None], self._table.features(rows)], axis=1
        )


def _log(loss_increases: Values) -> Values:
    return np.asarray(np.log(loss_increases + MIN_LOSS_INCREASE))


def _log_weights(loss_increases: Values, drops: Values) -> tuple[Values, Values]:
    """Logs of the layers' weights (layers,), and a root of their covariance, given rises (plans, layers) and log drops.

    Near 1 the log of the weighted sum is linear in the log weights, by each layer's share of the sum: so this is
    Bayesian linear regression, around 0 with a standard deviation of DOUBT.
    """
    from sklearn.isotonic import IsotonicRegression

    total = _log(loss_increases.sum(1))
    # Clipped, since it takes the largest of nearly equal sums for one out of bounds.
    rest = drops - IsotonicRegression(out_of_bounds="clip").fit_transform(total, drops)
    steepness = max(MIN_SLOPE, float(np.polyfit(total, drops, 1)[0])) if np.ptp(total) > 0 else MIN_SLOPE
    shares = steepness * loss_increases / (loss_increases.sum(1, keepdims=True) + MIN_LOSS_INCREASE)
    # A handful of records that the trend goes through have noise all the same.
    noise = max(float(np.mean(rest**2)), (PRIOR_SCORE_STD / SCORE_RESOLUTION) ** 2 / len(rest))
    precision = shares.T @ shares / noise + np.eye(loss_increases.shape[1]) / PRIOR_STD**2
    covariance = np.linalg.inv(precision)
    return covariance @ shares.T @ rest / noise, np.linalg.cholesky(covariance)
