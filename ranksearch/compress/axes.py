"""Follows the axes of feature maps through permutations and reshapes while a model runs, to know where the channels are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

Atom: TypeAlias = tuple[int, int]
"""An axis of a map, or a piece of one, and its size. Axis 0 is the batch, 1 the channels, 2 and up are the positions."""
Layout: TypeAlias = tuple[tuple[Atom, ...], ...]
"""For each dimension of a tensor, the atoms merged into it, slowest first."""

BATCH, CHANNELS = 0, 1

RESHAPES = frozenset(
    {
        torch.flatten, Tensor.flatten, Tensor.view, Tensor.view_as, Tensor.reshape, Tensor.reshape_as, torch.reshape,
        torch.unflatten, Tensor.unflatten, torch.squeeze, Tensor.squeeze, Tensor.squeeze_, torch.unsqueeze, Tensor.unsqueeze,
        Tensor.unsqueeze_, torch.ravel, Tensor.ravel,
    }
)  # fmt: skip
PERMUTATIONS = frozenset(
    {
        torch.permute, Tensor.permute, torch.transpose, Tensor.transpose, Tensor.transpose_, torch.swapaxes, Tensor.swapaxes,
        Tensor.swapaxes_, torch.swapdims, Tensor.swapdims, Tensor.swapdims_, torch.movedim, Tensor.movedim, torch.moveaxis,
        Tensor.moveaxis, torch.t, Tensor.t, Tensor.t_, torch.adjoint, Tensor.adjoint,
        *(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")),
    }
)  # fmt: skip
CONVOLUTIONS = frozenset({F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d})
ELEMENTWISE = frozenset(
    {
        F.relu, torch.relu, Tensor.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardtanh, F.hardswish, F.mish,
        torch.tanh, Tensor.tanh, torch.sigmoid, Tensor.sigmoid, F.dropout, F.alpha_dropout, F.batch_norm, F.layer_norm,
        Tensor.contiguous, Tensor.clone,
    }
)  # fmt: skip
"""Functions that leave each value of a flattened map in its place."""
SCRAMBLING = frozenset({torch.einsum, torch.tensordot, torch.as_strided, Tensor.as_strided, F.unfold, F.fold})
"""Functions that may move axes in ways that shapes do not show."""


@dataclass(frozen=True)
class Flattened:
    """The map that a row of features was flattened from: its size (channels, *size), and the order of its axes in the row.

    `order` lists the axes from slowest to fastest, 0 for the channels and 1 and up for the positions: (0, 1, 2) after
    `x.flatten(1)`, (1, 2, 0) after `x.permute(0, 2, 3, 1).flatten(1)`.
    """

    size: tuple[int, ...]
    order: tuple[int, ...]


class Axes(TorchFunctionMode):
    """Follows the axes of every tensor in a forward pass.

    An unknown tensor is taken for (batch, channels, *size), as convolutions return it. If a fully connected layer returns three
    or more dimensions, the last one holds the channels. A tensor whose axes cannot be followed has no layout.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: set[int] = set()
        """The ids of all parameters passed to functions."""
        # None for a tensor that cannot be followed. Tensors with the usual layout, which are most, have no entry.
        self._layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def flattened_map(self, row: Tensor) -> Flattened | None:
        """The map that a tensor (batch, features) was flattened from; None if it was not a map, or cannot be followed."""
        layout = self._layout(row)
        if layout is None or row.dim() != 2 or any(axis != BATCH for axis, _ in layout[0]):
            return None
        atoms = _merged(layout[1])
        size = dict(atoms)
        if len(size) != len(atoms) or set(size) != set(range(1, len(atoms) + 1)):
            return None
        return Flattened(tuple(size[axis] for axis in sorted(size)), tuple(axis - 1 for axis, _ in atoms))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        inputs = [leaf for leaf in tree_leaves((args, keywords)) if isinstance(leaf, Tensor)]
        self.used.update(id(leaf) for leaf in inputs if isinstance(leaf, torch.nn.Parameter))
        # Read the inputs before the call, which may change them in place.
        before = [_Input(leaf, tuple(leaf.shape), self._layout(leaf), leaf in self._layouts) for leaf in inputs]
        result = func(*args, **keywords)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and before:
                self._note(leaf, _layout_after(func, args, keywords, before, leaf))
        return result

    def _layout(self, tensor: Tensor) -> Layout | None:
        return self._layouts.get(tensor, usual_layout(tensor.shape))

    def _note(self, tensor: Tensor, layout: Layout | None) -> None:
        if layout == usual_layout(tensor.shape):
            self._layouts.pop(tensor, None)
        else:
            self._layouts[tensor] = layout


@dataclass(frozen=True)
class _Input:
    """A tensor argument of a function, as it was before the call."""

    tensor: Tensor
    shape: tuple[int, ...]
    layout: Layout | None
    unusual: bool


def _layout_after(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], before: Sequence[_Input], result: Tensor
) -> Layout | None:
    first, unusual = before[0], any(tensor.unusual for tensor in before)
    if func in RESHAPES:
        return reshaped(first.layout, result.shape) if unusual or len(first.shape) > 2 else usual_layout(result.shape)
    if func in PERMUTATIONS:
        return permuted(func, args, kwargs, first.layout)
    if func in (F.linear, F.embedding):
        return channels_last(result.shape) if result.dim() > 2 else usual_layout(result.shape)
    if func in SCRAMBLING:
        return None
    if func in CONVOLUTIONS or not unusual or result.dim() < 2:
        return usual_layout(result.shape)
    if result.dim() > 2 or func in ELEMENTWISE or any(result is each.tensor for each in before):
        return next((each.layout for each in before if each.shape == tuple(result.shape)), None)
    return None


def usual_layout(shape: Sequence[int]) -> Layout:
    """The layout (batch, channels, *size)."""
    return tuple(((axis, size),) for axis, size in enumerate(shape))


def channels_last(shape: Sequence[int]) -> Layout:
    """The layout (batch, *size, channels)."""
    last = len(shape) - 1
    return tuple(((axis if axis == BATCH else CHANNELS if axis == last else axis + 1, n),) for axis, n in enumerate(shape))


def permuted(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], layout: Layout | None) -> Layout | None:
    """The layout after a function that permutes dimensions, found by calling it on a tensor whose sizes all differ."""
    if layout is None:
        return None
    rest = {name: value for name, value in kwargs.items() if name != "input"}
    # Sizes start at 2, since a function may treat dimensions of size 1 specially.
    probe = torch.empty(tuple(range(2, len(layout) + 2)), device="meta")
    after = func(probe, *(args[1:] if args else ()), **rest)
    return tuple(layout[size - 2] for size in after.shape)


def reshaped(layout: Layout | None, shape: Sequence[int]) -> Layout | None:
    """The layout after a reshape that keeps the order of the values; None if the new sizes cut an axis unevenly.

    An axis merged into the batch is no longer an axis of the map: each of its slices becomes a map.
    """
    if layout is None:
        return None
    left = [atom for dimension in layout for atom in dimension][::-1]
    if not shape or math.prod(shape) != math.prod(size for _, size in left) or 0 in shape:
        return None
    dims = []
    for size in shape:
        taken = _take(left, size)
        if taken is None:
            return None
        dims.append(taken)
    dims[-1] += tuple(left[::-1])  # axes of size 1
    if len(dims) > 2 and {axis for axis, _ in dims[0]} != {BATCH}:
        return usual_layout(shape) if _is_usual(layout) else None
    return tuple(dims)


def _take(left: list[Atom], size: int) -> tuple[Atom, ...] | None:
    """Pop the atoms from the end of `left` that make up a dimension of this size. The last one may be cut in two."""
    taken: list[Atom] = []
    # A dimension of size 1 takes the next axis if its size is 1, too, so that the batch axis of a single input keeps its place.
    while left and (size > 1 or (not taken and left[-1][1] == 1)):
        axis, n = left.pop()
        part = min(n, size)
        if n % part or size % part:
            return None
        if n > part:
            left.append((axis, n // part))
        taken.append((axis, part))
        size //= part
    return tuple(taken)


def _is_usual(layout: Layout) -> bool:
    return [axis for dimension in layout for axis, _ in dimension] == list(range(len(layout)))


def _merged(atoms: Sequence[Atom]) -> list[Atom]:
    """Merge adjacent atoms of the same axis. The order of the channels among themselves does not matter."""
    merged: list[Atom] = []
    for axis, size in atoms:
        if merged and merged[-1][0] == axis:
            merged[-1] = (axis, merged[-1][1] * size)
        else:
            merged.append((axis, size))
    return merged


def as_maps(rows: Tensor, size: Sequence[int], order: Sequence[int] | None) -> Tensor:
    """Reshape rows (count, features) to maps (count, channels, *size). `order` is that of `Flattened`; None: channels first."""
    if order is None:
        return rows.reshape(len(rows), *size)
    return rows.reshape(len(rows), *(size[axis] for axis in order)).permute(usual_order(order))


def usual_order(order: Sequence[int]) -> tuple[int, ...]:
    """The permutation that brings a tensor (count, *axes in this order) into the usual order of axes."""
    return 0, *(1 + list(order).index(axis) for axis in range(len(order)))
