"""How sure it is that a finalist is nearly as good as the dense model on new inputs, judged by validation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ranksearch.results.messages import Difference
from ranksearch.results.objectives import Objectives
from ranksearch.results.trials import TrialRecord

MIN_STANDARD_ERROR = 1e-3
"""The smallest standard error of a difference; a bootstrap gives 0 where a model and the dense one fail on the same inputs."""
MIN_SPREAD = 1e-3
"""The smallest standard deviation that true differences are assumed to have around their trend."""
MIN_OTHERS = 2
"""The least number of other finalists that tell what to expect of one."""
# In floating point 0.98 - 0.97 > 0.01, although the scores differ by exactly one percentage point.
_ROUNDING = 1e-9


def chances_within(
    trials: Iterable[TrialRecord], margin: float, dense_score: float, objectives: Objectives
) -> dict[int, float]:
    """By number, the chance that a trial scores at most `margin` below the dense model on new inputs; of trials with a score.

    A finalist's measured difference from the dense model is shrunk towards what the other finalists of its size let expect
    (empirical Bayes, Efron and Morris 1975): a model that is chosen from many for its high score owes a part of it to luck.
    Before a difference is measured the chance is 1 or 0, by the score alone.
    """
    trials = [trial for trial in trials if trial.score_validation is not None and objectives.measured(trial)]
    measured = [(trial, difference) for trial in trials if (difference := _difference(trial)) is not None]
    chances = {trial.number: float(_score(trial) >= dense_score - margin - _ROUNDING) for trial in trials}
    if measured:
        sizes = np.array([math.log(objectives.ratio(trial)) for trial, _ in measured])
        values = np.array([difference.value for _, difference in measured])
        errors = np.array([max(difference.standard_error, MIN_STANDARD_ERROR) for _, difference in measured])
        for (trial, _), mean, error in zip(measured, shrunk(sizes, values, errors), errors.tolist(), strict=True):
            chances[trial.number] = NormalDist().cdf((float(mean) + margin + _ROUNDING) / error)
    return chances


def shrunk(sizes: NDArray[np.float64], values: NDArray[np.float64], errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """The expected true differences (models,) from measured ones, their standard errors, and the logs of the models' ratios.

    What to expect of a model is read off a trend that falls with the ratio, fitted to the others. How far true differences lie
    from it follows from how much more the measured ones scatter than their standard errors let expect.
    """
    if len(values) <= MIN_OTHERS:
        return values
    expected = np.array(
        [_trend(np.delete(sizes, i), np.delete(values, i), np.delete(errors, i), sizes[i]) for i in range(len(values))]
    )
    spread = max(MIN_SPREAD**2, float(np.mean((values - expected) ** 2) - np.mean(errors**2)))
    return np.asarray((spread * values + errors**2 * expected) / (spread + errors**2))


def _trend(sizes: NDArray[np.float64], values: NDArray[np.float64], errors: NDArray[np.float64], size: float) -> float:
    """What models of these sizes let expect of one of that size, if differences fall with the ratio."""
    from scipy.optimize import isotonic_regression  # here, since it takes a fifth of a second to import

    order = np.argsort(sizes, kind="stable")
    fitted = isotonic_regression(values[order], weights=errors[order] ** -2.0, increasing=False).x
    return float(np.interp(size, sizes[order], fitted))


def _difference(trial: TrialRecord) -> Difference | None:
    return trial.finalist.difference_validation if trial.finalist else None


def _score(trial: TrialRecord) -> float:
    assert trial.score_validation is not None
    return trial.score_validation
