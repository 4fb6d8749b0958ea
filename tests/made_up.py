"""A method outside the package, as a user's module would add it: Tucker-1, 1x1 in -> rank, kernel rank -> out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ranksearch import Factorization, register_method
from ranksearch.methods import Method, Part


@dataclass(frozen=True)
class Tucker1(Factorization):
    """A convolution 1x1 in -> rank, then one with the kernel's size, rank -> out."""

    method = "tucker1"
    title = "Tucker-1"
    rank: int


class Tucker1Method(Method):
    """Keeps the leading directions of the input channels."""

    kind = Tucker1
    vbmf = ("in",)

    def applies(self, weight, *, linear):
        return len(weight) == 4 and weight[2] * weight[3] > 1

    def bounds(self, weight):
        return (min(weight[1], weight[0] * weight[2] * weight[3]),)

    def parts(self, weight, ranks):
        return Part("reduce", weight[1], ranks[0]), Part("core", ranks[0], weight[0], (0, 1))

    def prepare(self, kernel, ranks, seed, rows=None):
        left, singular, _ = torch.linalg.svd(kernel.movedim(1, 0).flatten(1), full_matrices=False)
        return {"basis": left, "singular": singular}

    def factors(self, kernel, prepared, ranks, seed, sweeps=0):
        basis = prepared["basis"][:, : ranks[0]]
        return basis.T, torch.einsum("oihw,ir->orhw", kernel, basis)

    def errors(self, prepared, ranks):
        energy = prepared["singular"].double().square()
        return [float((energy[rank:].sum() / energy.sum()).sqrt()) for (rank,) in ranks]


register_method(Tucker1Method())
