"""Losses and scores that need no labels: they compare a model's outputs with those of the dense net (Hinton et al. 2015).

A study file names them as `ranksearch.task.distillation:kl_divergence`. Nested outputs are compared tensor by tensor, and each
tensor counts alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ranksearch.results.scores import AGREEMENT, EXPLAINED
from ranksearch.support.nesting import tensors_in


def kl_divergence(outputs: Any, dense: Any) -> Tensor:
    """A loss of logits (inputs, classes, ...): the mean Kullback-Leibler divergence from the classes of the dense net."""
    divergences = [
        F.kl_div(F.log_softmax(ours, 1), F.log_softmax(theirs, 1), reduction="none", log_target=True).sum(1).mean()
        for ours, theirs in _pairs(outputs, dense, classes=True)
    ]
    return torch.stack(divergences).mean()


def mean_squared_error(outputs: Any, dense: Any) -> Tensor:
    """A loss of outputs of any shape: their mean squared difference from those of the dense net."""
    return torch.stack([F.mse_loss(ours, theirs) for ours, theirs in _pairs(outputs, dense)]).mean()


def agreement(outputs: Any, dense: Any) -> float:
    """A score of logits (inputs, classes, ...): the share with the largest class of the dense net's; NaN if any is NaN."""
    pairs = _pairs(outputs, dense, classes=True)
    if any(torch.isnan(ours).any() for ours, _ in pairs):
        return math.nan
    return sum(float((ours.argmax(1) == theirs.argmax(1)).double().mean()) for ours, theirs in pairs) / len(pairs)


def explained_variance(outputs: Any, dense: Any) -> float:
    """A score of outputs of any shape: 1 less their mean squared difference from the dense net's over the variance of those."""
    shares = [float((ours - theirs).square().mean() / theirs.var(correction=0)) for ours, theirs in _pairs(outputs, dense)]
    return 1 - sum(shares) / len(shares)


AGAINST_DENSE: tuple[Callable[..., Any], ...] = (kl_divergence, mean_squared_error, agreement, explained_variance)
TITLES: dict[Any, str] = {agreement: AGREEMENT, explained_variance: EXPLAINED}
"""The names of scores in reports."""


def is_against_dense(function: Callable[..., Any]) -> bool:
    """Whether a loss or a score takes the outputs of the dense net in the place of targets."""
    return any(function is each for each in AGAINST_DENSE)


def pruning_loss(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss by whose gradient channels are chosen: of those above, which have no gradient at the dense net, another one.

    For `kl_divergence` it is the cross-entropy of the dense net's largest classes, for `mean_squared_error` the mean square.
    """
    if loss is kl_divergence:
        return _cross_entropy
    return _mean_square if loss is mean_squared_error else loss


def _cross_entropy(outputs: Any, dense: Any) -> Tensor:
    return torch.stack(
        [F.cross_entropy(ours, theirs.argmax(1)) for ours, theirs in _pairs(outputs, dense, classes=True)]
    ).mean()


def _mean_square(outputs: Any, dense: Any) -> Tensor:
    return torch.stack([ours.square().mean() for ours, _ in _pairs(outputs, dense)]).mean()


def _pairs(outputs: Any, dense: Any, *, classes: bool = False) -> list[tuple[Tensor, Tensor]]:
    """The floating-point tensors of both, in pairs."""
    ours, theirs = ([tensor for tensor in tensors_in(each) if tensor.is_floating_point()] for each in (outputs, dense))
    shapes = [[tuple(tensor.shape) for tensor in each] for each in (ours, theirs)]
    if shapes[0] != shapes[1] or not ours:
        raise ValueError(f"outputs must have the shapes of the dense net's, but have {shapes[0]} where those have {shapes[1]}")
    if classes and any(len(shape) < 2 or shape[1] < 2 for shape in shapes[0]):
        raise ValueError(
            f"outputs must be of two classes or more, along the second dimension, but have the shapes {shapes[0]}; for other "
            "outputs use mean_squared_error and explained_variance"
        )
    return list(zip(ours, theirs, strict=True))
