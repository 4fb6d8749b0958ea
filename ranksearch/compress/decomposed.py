"""Converts kernels that a user decomposed with TensorLy to a plan's factorizations and their factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from ranksearch.errors import PlanError
from ranksearch.methods.layer import groups_of, kernel_shape
from ranksearch.plan import CP, CP4, Factorization, Tucker2

if TYPE_CHECKING:
    from tensorly.cp_tensor import CPTensor

Factors: TypeAlias = tuple[Tensor, ...]


def from_tensorly(name: str, layer: nn.Module, decomposition: Any) -> tuple[Factorization, Factors]:
    """Convert TensorLy's decomposition of a layer's kernel (out, in, *kernel) to a factorization and its factors.

    A `CPTensor` of the kernel with merged positions, (out, in, positions), becomes CP; one of four modes becomes CP-4. A
    `TuckerTensor`, or the pair (core, factors) from `partial_tucker` on modes 0 and 1, becomes Tucker-2, with the factors of
    further modes multiplied into the core. The kernel of a fully connected layer is its weight as (out, channels, *map),
    that of a transposed convolution its weight with the first two axes swapped.

    Raises:
        PlanError: `decomposition` has another type, or another shape than the layer's kernel, or the layer has groups.
    """
    # Imported here, since it takes half a second.
    from tensorly.cp_tensor import CPTensor
    from tensorly.tucker_tensor import TuckerTensor

    if (groups := groups_of(layer)) > 1:
        raise PlanError(
            f"Layer {name!r}: TensorLy's decomposition must be of a layer without groups, but this one has {groups}; give a "
            "factorization such as CP(8)."
        )
    if isinstance(decomposition, CPTensor):
        return _cp(name, layer, decomposition)
    if isinstance(decomposition, TuckerTensor) or _is_partial(decomposition):
        return _tucker(name, layer, decomposition)
    raise PlanError(
        f"Layer {name!r}: a plan must hold factorizations such as CP(8), or TensorLy's CPTensor or TuckerTensor, but got a "
        f"{type(decomposition).__name__}."
    )


def _is_partial(decomposition: Any) -> bool:
    """Whether this is a pair (core, [factor, factor]), as `partial_tucker` returns it."""
    return (
        isinstance(decomposition, tuple)
        and len(decomposition) == 2
        and isinstance(decomposition[1], list)
        and len(decomposition[1]) == 2
    )


def _cp(name: str, layer: nn.Module, decomposition: CPTensor) -> tuple[Factorization, Factors]:
    rank, factors = int(decomposition.rank), [torch.as_tensor(factor) for factor in decomposition.factors]
    shape = tuple(len(factor) for factor in factors)
    kernel = _kernel(name, layer, shape, longest=4)
    out, into, *modes = (factor.reshape(-1, rank) for factor in factors)
    out = out * torch.as_tensor(decomposition.weights)
    if len(modes) == 2:
        return CP4(rank, kernel=kernel), (into.T, modes[0].T, modes[1].T, out)
    return CP(rank, kernel=kernel), (into.T, modes[0].T.reshape(rank, *_positions(layer, kernel)), out)


def _tucker(name: str, layer: nn.Module, decomposition: Any) -> tuple[Factorization, Factors]:
    core, (out, into, *others) = torch.as_tensor(decomposition[0]), [torch.as_tensor(factor) for factor in decomposition[1]]
    for mode, factor in enumerate(others, start=2):
        core = torch.tensordot(core, factor, dims=([mode], [1])).movedim(-1, mode)
    kernel = _kernel(name, layer, (len(out), len(into), *core.shape[2:]), longest=5)
    rank_out, rank_in = core.shape[:2]
    return Tucker2(rank_in, rank_out, kernel=kernel), (into.T, core.reshape(rank_out, rank_in, *_positions(layer, kernel)), out)


def _kernel(name: str, layer: nn.Module, shape: tuple[int, ...], *, longest: int) -> tuple[int, ...] | None:
    """The size of the map in a fully connected layer's kernel; None for a convolution.

    Raises:
        PlanError: `shape` is not that of the layer's kernel.
    """
    weight = kernel_shape(layer)
    if isinstance(layer, nn.Linear):
        wanted, fits = f"({weight[0]}, channels, *map) of {weight[1]} inputs", (shape[0], math.prod(shape[1:])) == weight
    else:
        whole, merged = weight, (*weight[:2], math.prod(weight[2:]))
        wanted = " or ".join(map(str, dict.fromkeys(each for each in (whole, merged) if len(each) <= longest)))
        fits = shape in (whole, merged)
    if not fits or not 3 <= len(shape) <= longest:
        raise PlanError(f"Layer {name!r}: the decomposed kernel must have the shape {wanted}, but has {shape}.")
    return shape[2:] if isinstance(layer, nn.Linear) else None


def _positions(layer: nn.Module, kernel: tuple[int, ...] | None) -> tuple[int, ...]:
    assert isinstance(layer.weight, Tensor)
    return kernel or tuple(layer.weight.shape[2:])
