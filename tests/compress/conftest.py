"""Fixtures: the small net, trained and factorized, and inputs of it."""

import copy

import pytest

from ranksearch.compress.surgery import factorize_
from ranksearch.plan import CP, SVD, Plan, Tucker2
from tests import nets

PLAN = Plan.of({"conv1": CP(2), "conv2": Tucker2(4, 8), "fc1": CP(8, kernel=(4, 4)), "fc2": SVD(6)})


@pytest.fixture
def compressed(trained):
    return factorize_(copy.deepcopy(trained.model), PLAN).eval()


@pytest.fixture
def inputs():
    return nets.few_digits().validation.tensors[0][:40]
