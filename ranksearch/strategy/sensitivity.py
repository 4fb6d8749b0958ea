"""How much the loss rises when one layer alone is decomposed: measured at a few errors, without training, and read between."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ranksearch.compress.profile import Candidate, LayerProfile, Profile
from ranksearch.plan import Factorization
from ranksearch.results.objectives import PER_PARAMETER, Price
from ranksearch.results.record import Probe
from ranksearch.strategy.predicted_front import Choice, Corner, predicted_front

PROBED_ERRORS = (0.3, 0.55, 0.75, 0.95)
"""Relative errors at which a layer is probed, as near as its candidates come. Below the first the loss hardly moves."""


MIN_SQUARED_ERROR_GAP = 0.05
"""Squared errors nearer than this tell no slope to go on along: the difference of their losses is mostly noise."""


@dataclass(frozen=True)
class Sensitivity:
    """The rise of the loss over the relative error of one layer: through the origin and the probes, never falling.

    Linear in the squared error between them, and along the last piece beyond them: the weights' error moves the loss in
    second order (LeCun et al. 1990), and by the same error alike whatever the decomposition (Schuurmans et al. 2023).
    """

    errors: tuple[float, ...]
    loss_increases: tuple[float, ...]

    @classmethod
    def of(cls, measured: Sequence[tuple[float, float]]) -> Sensitivity:
        """From pairs (error, rise), in any order. Without any, the loss is taken to rise by the squared error."""
        pairs = sorted(measured) or [(1.0, 1.0)]
        loss_increases = np.maximum.accumulate([0.0, *(loss_increase for _, loss_increase in pairs)])
        return cls((0.0, *(error for error, _ in pairs)), tuple(loss_increases.tolist()))

    def loss_increase(self, error: float) -> float:
        """The predicted rise of the loss at a relative error."""
        squares = np.square(self.errors)
        if error**2 <= squares[-1]:
            return float(np.interp(error**2, squares, self.loss_increases))
        slope = (self.loss_increases[-1] - self.loss_increases[-2]) / max(squares[-1] - squares[-2], MIN_SQUARED_ERROR_GAP)
        return float(self.loss_increases[-1] + slope * (error**2 - squares[-1]))


def error_of(candidate: Candidate) -> float:
    """The error that tells most of a candidate: that in the metric of the layer's inputs, where there is one.

    It foretells the error of the outputs closely for SVD, and but for a half for Tucker-2 and CP, whose metric is a
    Kronecker product: between methods the frontier is the rougher for it.
    """
    return candidate.error if candidate.data_error is None else candidate.data_error


def values_to_probe(layer: LayerProfile) -> list[Factorization]:
    """The candidates nearest to the probed errors, the smallest of those that are about as near."""
    candidates = list(layer.candidates())
    chosen: dict[Factorization, None] = {}
    for wanted in PROBED_ERRORS:
        near = sorted(candidates, key=lambda c: (round(abs(error_of(c) - wanted), 1), c.costs["params"]))
        if near:
            chosen[near[0].value] = None
    return list(chosen)


def predicted_choices(
    profile: Profile, probes: Sequence[Probe], dense_loss: float, price: Price = PER_PARAMETER
) -> dict[str, list[Choice]]:
    """Every candidate of every layer at a price, with the rise of the loss that the measured sensitivities predict."""
    curves = sensitivities(profile, probes, dense_loss)
    return {
        name: [Choice(c.value, price.of(c), curves[name].loss_increase(error_of(c))) for c in layer.candidates()]
        for name, layer in profile.layers.items()
    }


def predict_front(profile: Profile, probes: Sequence[Probe], dense_loss: float, price: Price = PER_PARAMETER) -> list[Corner]:
    """The frontier under the measured sensitivities: see `ranksearch.strategy.predicted_front`."""
    dense = {name: price.of(layer.layer) for name, layer in profile.layers.items()}
    return predicted_front(dense, predicted_choices(profile, probes, dense_loss, price))


def sensitivities(profile: Profile, probes: Sequence[Probe], dense_loss: float) -> Mapping[str, Sensitivity]:
    """The curve of each layer, from its probes."""
    found = {}
    for name, layer in profile.layers.items():
        errors = {candidate.value: error_of(candidate) for candidate in layer.candidates()}
        mine = [probe for probe in probes if probe.layer == name and probe.value in errors]
        found[name] = Sensitivity.of([(errors[probe.value], probe.loss - dense_loss) for probe in mine])
    return found


MAX_LOSS_INCREASE = 2.0
"""A predicted rise of the loss, in nats, from which a net knows next to nothing: a guess at ten classes is off by 2.3."""


def rescuable(corners: Sequence[Corner]) -> list[Corner]:
    """The corners that training may make good. Where there are none but the dense one, as under a hard limit, those that
    are predicted to lose little more than the largest of the rest."""
    kept = [corner for corner in corners if corner.loss_increase < MAX_LOSS_INCREASE]
    if len(kept) > 1 or len(corners) < 2:
        return kept
    return [corner for corner in corners if corner.loss_increase < corners[1].loss_increase + MAX_LOSS_INCREASE]


def spread(corners: Sequence[Corner], whole: float, count: int) -> list[Corner]:
    """`count` corners of a frontier, evenly spaced on the log of how many times they are smaller, the middle ones first.

    From the first that is predicted to lose anything to the last: what cannot be trained back is for the search to find.

    Args:
        corners: by rising savings.
        whole: the cost of the whole dense model.
        count: how many at most.
    """
    pool = [corner for corner in corners if corner.loss_increase > 0] or list(corners[1:])
    if not pool:
        return []
    ratios = [math.log(whole / (whole - corner.saved)) for corner in pool]
    wanted = np.linspace(ratios[0], ratios[-1], count)
    nearest = list(dict.fromkeys(int(np.argmin(np.abs(np.array(ratios) - at))) for at in wanted))
    return [pool[nearest[place]] for place in _middle_out(len(nearest))]


def _middle_out(count: int) -> list[int]:
    """0..count-1 so that every beginning of it is spread over all: the middle, then the middles of the halves."""
    order, spans = list[int](), [(0, count)]
    while spans:
        low, high = spans.pop(0)
        if low < high:
            middle = (low + high) // 2
            order.append(middle)
            spans += [(low, middle), (middle + 1, high)]
    return order
