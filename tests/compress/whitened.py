"""Inputs to whiten by, and kernels rebuilt from whitened factors."""

from ranksearch.compress import whitening as whitening
from ranksearch.compress.whitening import whitenings
from tests.geometries import kernels_of
from tests.nets import normal


def correlated(inputs, count=40, seed=3):
    """A batch of the shape of `inputs`: correlated along the last axis and across channels, with a mean other than 0."""
    drawn = normal(count, *inputs.shape[1:], seed=seed)
    return drawn.cumsum(-1) + 0.3 * drawn.flip(1) + 2


def measured(model, layer, method, inputs):
    """The whitening and the kernel of each group."""
    found = whitenings(model, {layer: method.holds(layer.weight)}, inputs)[layer.name]
    return list(zip(found, kernels_of(model, layer), strict=True))


def rebuilt(found, layer, kernel, method, ranks):
    """The kernel that the factors with the whitening `found` reconstruct."""
    holds = method.holds(layer.weight)
    whitened = found.whiten(kernel, holds)
    factors = method.factors(whitened, method.prepare(whitened, [ranks], 0), ranks, 0)
    folded = found.fold(factors, holds, layer.weight)
    assert tuple(tuple(factor.shape) for factor in folded) == method.factor_shapes(layer.weight, ranks)
    return method.reconstruct(folded, layer.weight)
