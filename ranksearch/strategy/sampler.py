"""Who proposes the next trial: Optuna's multi-objective samplers."""

from __future__ import annotations

import warnings

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler


def make_sampler(name: str, *, seed: int) -> BaseSampler:
    """The sampler of that name, fresh. Its state is a function of the study's record and of `seed`.

    A study makes a new one before each ask, seeded with its own seed and the trial's index: a resumed study then goes on
    as an uninterrupted one would.
    """
    match name:
        case "tpe":
            with warnings.catch_warnings():
                # Both options are marked experimental in Optuna since 2.2 and 2.8.
                warnings.simplefilter("ignore", ExperimentalWarning)
                # Constant liar: with several workers, running trials count as bad ones, so that proposals spread.
                return TPESampler(multivariate=True, constant_liar=True, n_startup_trials=8, seed=seed)
        case "nsga2":
            return NSGAIISampler(population_size=20, seed=seed)
        case _:
            return RandomSampler(seed=seed)
