"""The loss increase when one layer alone is decomposed: measured at a few errors without training, interpolated between."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ranksearch.compress.profile import LayerProfile, Profile
from ranksearch.plan import Factorization
from ranksearch.results import pareto
from ranksearch.results.objectives import PER_PARAMETER, Price
from ranksearch.results.record import Probe
from ranksearch.strategy.bases import Bases
from ranksearch.strategy.predicted_front import Choice, Corner, predicted_front

PROBED_ERRORS = (0.3, 0.55, 0.75, 0.95)
"""Relative errors at which a layer is probed, each by the nearest candidate. Below the first the loss hardly changes."""


TRAINED_LOSS_FACTOR = 5.0
"""How much more a loss increase counts that remains after training."""
MIN_SQUARED_ERROR_GAP = 0.05
"""The smallest difference of squared errors that the slope for extrapolation is divided by: between nearer probes the
difference of the losses is mostly noise."""


@dataclass(frozen=True)
class Sensitivity:
    """One layer's loss increase as a function of its relative error: a non-decreasing curve through the origin and the probes.

    The curve is piecewise linear in the squared error, and its last piece is extended. The reason: the weights' error changes
    the loss in second order (LeCun et al. 1990), and equal errors change it alike for all decompositions (Schuurmans et al.
    2023).
    """

    errors: tuple[float, ...]
    loss_increases: tuple[float, ...]

    @classmethod
    def of(cls, measured: Sequence[tuple[float, float]]) -> Sensitivity:
        """From pairs (error, loss increase) in any order. Without any pair, the loss increase is taken as the squared error."""
        pairs = sorted(measured) or [(1.0, 1.0)]
        loss_increases = np.maximum.accumulate([0.0, *(loss_increase for _, loss_increase in pairs)])
        return cls((0.0, *(error for error, _ in pairs)), tuple(loss_increases.tolist()))

    def loss_increase(self, error: float) -> float:
        """The predicted loss increase at a relative error."""
        squares = np.square(self.errors)
        if error**2 <= squares[-1]:
            return float(np.interp(error**2, squares, self.loss_increases))
        slope = (self.loss_increases[-1] - self.loss_increases[-2]) / max(squares[-1] - squares[-2], MIN_SQUARED_ERROR_GAP)
        return float(self.loss_increases[-1] + slope * (error**2 - squares[-1]))


def values_to_probe(layer: LayerProfile) -> list[Factorization]:
    """For each of `PROBED_ERRORS`, the candidate with the nearest error; of those about equally near, the smallest."""
    candidates = list(layer.candidates())
    chosen: dict[Factorization, None] = {}
    for target in PROBED_ERRORS:
        near = sorted(candidates, key=lambda c: (round(abs(c.error - target), 1), c.costs["params"]))
        if near:
            chosen[near[0].value] = None
    return list(chosen)


def predicted_choices(
    profile: Profile, probes: Sequence[Probe], dense_loss: float, price: Price = PER_PARAMETER
) -> dict[str, list[Choice]]:
    """By layer, every candidate with its cost at `price` and its predicted loss increase."""
    curves = sensitivities(profile, probes, dense_loss)
    return {
        name: [Choice(c.value, price.of(c), curves[name].loss_increase(c.error)) for c in layer.candidates()]
        for name, layer in profile.layers.items()
    }


def choices_of(
    bases: Bases, profiles: Sequence[Profile], probes: Sequence[Probe], dense_losses: Mapping[float, float],
    price: Price = PER_PARAMETER,
) -> list[dict[str, list[Choice]]]:  # fmt: skip
    """For each net, its `predicted_choices`. Probes of a net whose own loss is unknown are ignored: no increase is known."""
    return [
        predicted_choices(
            profile,
            [probe for probe in probes if probe.width == base.width and base.width in dense_losses],
            dense_losses.get(base.width, 0.0),
            price,
        )
        for base, profile in zip(bases, profiles, strict=True)
    ]


def base_loss_increases(bases: Bases, dense_losses: Mapping[float, float]) -> list[float]:
    """For each net, how much larger its loss counts than that of the given net, on the scale of decompositions.

    Fine-tuning recovers most of the loss increase of a decomposition, but little of that of a narrower net, which was trained
    already. So the latter counts `TRAINED_LOSS_FACTOR` times.
    """
    dense = dense_losses.get(1.0, 0.0)
    return [TRAINED_LOSS_FACTOR * max(0.0, dense_losses.get(base.width, dense) - dense) for base in bases]


def predict_front(
    bases: Bases, profiles: Sequence[Profile], probes: Sequence[Probe], dense_losses: Mapping[float, float],
    price: Price = PER_PARAMETER,
) -> list[Corner]:  # fmt: skip
    """The predicted front of all nets under the measured sensitivities; see `ranksearch.strategy.predicted_front`."""
    found = choices_of(bases, profiles, probes, dense_losses, price)
    corners = []
    for base, choices, loss in zip(bases, found, base_loss_increases(bases, dense_losses), strict=True):
        saved = price.of(bases.dense) - price.of(base.inventory)
        own = predicted_front({layer.name: price.of(layer) for layer in base.inventory.layers}, choices)
        corners += [Corner(replace(c.plan, width=base.width), saved + c.saved, loss + c.loss_increase) for c in own]
    if len(bases) == 1:
        return corners
    best = pareto.front([(corner.saved, -corner.loss_increase) for corner in corners])
    return sorted((corners[index] for index in best), key=lambda corner: corner.saved)


def sensitivities(profile: Profile, probes: Sequence[Probe], dense_loss: float) -> Mapping[str, Sensitivity]:
    """By layer, the sensitivity fitted to its probes."""
    curves = {}
    for name, layer in profile.layers.items():
        errors = {candidate.value: candidate.error for candidate in layer.candidates()}
        layer_probes = [probe for probe in probes if probe.layer == name and probe.value in errors]
        curves[name] = Sensitivity.of([(errors[probe.value], probe.loss - dense_loss) for probe in layer_probes])
    return curves


MAX_LOSS_INCREASE = 2.0
"""A predicted loss increase, in nats, from which a model is useless: random guessing among ten classes has a loss of 2.3."""


def rescuable(corners: Sequence[Corner]) -> list[Corner]:
    """The corners whose predicted loss increase training may recover: those below `MAX_LOSS_INCREASE`.

    If only the dense plan is below it, as under a tight limit, the corners less than `MAX_LOSS_INCREASE` above the largest
    compressed one.
    """
    kept = [corner for corner in corners if corner.loss_increase < MAX_LOSS_INCREASE]
    if len(kept) > 1 or len(corners) < 2:
        return kept
    return [corner for corner in corners if corner.loss_increase < corners[1].loss_increase + MAX_LOSS_INCREASE]


def spread(corners: Sequence[Corner], dense_cost: float, count: int) -> list[Corner]:
    """At most `count` corners of a predicted front, evenly spaced on the log of their compression ratio, the middle ones first.

    Corners without a predicted loss increase are left out, unless there are no others.

    Args:
        corners: by rising savings, the dense plan first.
        dense_cost: the cost of the whole dense model.
        count: how many at most.
    """
    pool = [corner for corner in corners if corner.loss_increase > 0] or list(corners[1:])
    if not pool:
        return []
    ratios = [math.log(dense_cost / (dense_cost - corner.saved)) for corner in pool]
    targets = np.linspace(ratios[0], ratios[-1], count)
    nearest = list(dict.fromkeys(int(np.argmin(np.abs(np.array(ratios) - at))) for at in targets))
    return [pool[nearest[place]] for place in _middle_out(len(nearest))]


def _middle_out(count: int) -> list[int]:
    """The numbers 0..count-1, ordered so that any first few are spread over the range: the middle, then the halves' middles."""
    order, spans = list[int](), [(0, count)]
    while spans:
        low, high = spans.pop(0)
        if low < high:
            middle = (low + high) // 2
            order.append(middle)
            spans += [(low, middle), (middle + 1, high)]
    return order
