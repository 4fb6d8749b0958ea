"""A layer computes the tensor that TensorLy decomposed, with any TensorLy backend."""

from __future__ import annotations

import copy
import re

import pytest
import tensorly
import torch
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac, partial_tucker, tucker
from torch import nn

from ranksearch.compress.surgery import factorize_
from ranksearch.errors import PlanError
from ranksearch.methods.layer import as_weight
from ranksearch.plan import SVD
from tests.geometries import BY_NAME, alone, behind_flatten
from tests.nets import normal

CONV, CONV1D, CONV3D = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1), nn.Conv1d(4, 6, 3), nn.Conv3d(3, 4, 2)
TRANSPOSED = nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1)
FLAT = behind_flatten(4, 3, 2)[0]
# id: (model, input, shape of the kernel for TensorLy, its decomposition, the method)
DECOMPOSED = {
    "parafac of four modes": (alone(CONV), (4, 9, 8), (6, 4, 3, 2), lambda k: parafac(k, 3, init="random", random_state=0), "cp4"),
    "parafac of three modes": (alone(CONV), (4, 9, 8), (6, 4, 6), lambda k: parafac(k, 3, init="random", random_state=0), "cp"),
    "normalised parafac": (
        alone(CONV), (4, 9, 8), (6, 4, 6), lambda k: parafac(k, 3, normalize_factors=True, init="random", random_state=0), "cp",
    ),
    "parafac of a sequence": (alone(CONV1D), (4, 9), (6, 4, 3), lambda k: parafac(k, 2, init="random", random_state=0), "cp"),
    "parafac behind a map": (FLAT, (4, 3, 2), (6, 4, 3, 2), lambda k: parafac(k, 2, init="random", random_state=0), "cp4"),
    "tucker": (alone(CONV), (4, 9, 8), (6, 4, 3, 2), lambda k: tucker(k, [3, 2, 2, 1]), "tucker2"),
    "tucker of three modes": (alone(CONV), (4, 9, 8), (6, 4, 6), lambda k: tucker(k, [3, 2, 6]), "tucker2"),
    "tucker of a volume": (alone(CONV3D), (3, 4, 4, 4), (4, 3, 2, 2, 2), lambda k: tucker(k, [3, 2, 2, 2, 2]), "tucker2"),
    "partial tucker": (alone(CONV), (4, 9, 8), (6, 4, 3, 2), lambda k: partial_tucker(k, [3, 2], modes=[0, 1])[0], "tucker2"),
    "tucker of a transposed one": (alone(TRANSPOSED), (4, 5, 4), (6, 4, 3, 2), lambda k: tucker(k, [3, 2, 2, 1]), "tucker2"),
    "parafac of a transposed one": (
        alone(TRANSPOSED), (4, 5, 4), (6, 4, 3, 2), lambda k: parafac(k, 3, init="random", random_state=0), "cp4",
    ),
    "partial tucker behind a map": (FLAT, (4, 3, 2), (6, 4, 3, 2), lambda k: partial_tucker(k, [3, 2], modes=[0, 1])[0], "tucker2"),
}  # fmt: skip


def rebuilt(given):
    core, factors = given
    if isinstance(given, tuple):
        return tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    return given.to_tensor()


@pytest.mark.parametrize("backend", ["numpy", "pytorch"])
@pytest.mark.parametrize(("model", "size", "shape", "decompose", "method"), DECOMPOSED.values(), ids=DECOMPOSED)
def test_the_layer_computes_what_was_decomposed(backend, model, size, shape, decompose, method):
    kernel, inputs = normal(*shape, seed=1), normal(2, *size, seed=2)
    with tensorly.backend_context(backend):
        given = decompose(kernel if backend == "pytorch" else kernel.numpy())
        whole = torch.as_tensor(rebuilt(given))
    dense, built = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    with torch.no_grad():
        dense.layer.weight.copy_(as_weight(dense.layer, whole))
    factorize_(built, {"layer": given})
    torch.testing.assert_close(built(inputs), dense(inputs))
    names = [part.name for part in BY_NAME[method].parts(shape, (1, 1)[: len(BY_NAME[method].vbmf)])]
    assert [name for name, _ in built.layer.named_children() if "flatten" not in name] == names
    assert tensorly.get_backend() == "numpy"


def test_a_factor_of_all_channels_is_multiplied_into_the_core():
    model, kernel, inputs = alone(CONV).double(), normal(6, 4, 3, 2, seed=1), normal(2, 4, 9, 8, seed=2)
    dense = copy.deepcopy(model)
    with tensorly.backend_context("pytorch"):
        given = partial_tucker(kernel, [3, 4], modes=[0, 1])[0]
        with torch.no_grad():
            dense.layer.weight.copy_(rebuilt(given))
    built = factorize_(copy.deepcopy(model), {"layer": given})
    torch.testing.assert_close(built(inputs), dense(inputs))
    assert [name for name, _ in built.layer.named_children()] == ["core", "expand"]


def ones(*shape, rank=2):
    return CPTensor((None, [torch.ones(size, rank).numpy() for size in shape]))


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (alone(CONV), ones(6, 4, 9), "Layer 'layer': the decomposed kernel must have the shape (6, 4, 3, 2) or (6, 4, 6), but has (6, 4, 9)."),
        (alone(CONV), ones(4, 6, 3, 2), "Layer 'layer': the decomposed kernel must have the shape (6, 4, 3, 2) or (6, 4, 6), but has (4, 6, 3, 2)."),
        (alone(TRANSPOSED), ones(4, 6, 3, 2), "Layer 'layer': the decomposed kernel must have the shape (6, 4, 3, 2) or (6, 4, 6), but has (4, 6, 3, 2)."),
        (alone(CONV3D), ones(4, 3, 2, 2, 2), "Layer 'layer': the decomposed kernel must have the shape (4, 3, 8), but has (4, 3, 2, 2, 2)."),
        (FLAT, ones(6, 24), "Layer 'layer': the decomposed kernel must have the shape (6, channels, *map) of 24 inputs, but has (6, 24)."),
        (alone(nn.Conv2d(4, 6, 3, groups=2)), ones(3, 2, 3, 3), "Layer 'layer': TensorLy's decomposition must be of a layer without groups, but this one has 2; give a factorization such as CP(8)."),
        (alone(CONV), (1, 2), "Layer 'layer': a plan must hold factorizations such as CP(8), or TensorLy's CPTensor or TuckerTensor, but got a tuple."),
        (alone(CONV), ones(6, 4, 6, rank=99), "Layer 'layer': rank of CP must be at most 24, but got 99."),
    ],
)  # fmt: skip
def test_another_shape_is_refused(model, given, message):
    before = dict(model.named_modules())
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        factorize_(model, {"layer": given})
    assert dict(model.named_modules()) == before


def test_a_value_of_no_registered_method_is_refused():
    class Other(SVD):
        """A value that belongs to no registered method."""

    message = "A plan's values must have a registered method, but got .*; call ranksearch.register_method"
    with pytest.raises(PlanError, match=message):
        factorize_(alone(nn.Linear(9, 6)), {"layer": Other(2)})
