"""Batches: one tensor, or tensors nested in tuples, lists and dicts; the first dimension of each is the batch dimension.

Other values in a batch, such as numbers, are passed on unchanged. The package calls models only through `run_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten


def run_model(model: Callable[[Any], Any], inputs: Any) -> Any:
    """Call the model with the batch as its only argument, and return its outputs."""
    return model(inputs)


def tensors_in(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in a fixed order."""
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


def batch_size(batch: Any) -> int:
    """Number of inputs in a batch: the first dimension of its tensors.

    Raises:
        ValueError: the first dimensions of the tensors differ, or there are no tensors.
    """
    sizes = {len(tensor) for tensor in tensors_in(batch) if tensor.dim()}
    if len(sizes) != 1:
        raise ValueError(f"The tensors of a batch must all have the same first size, but have shapes {batch_shapes(batch)}.")
    return sizes.pop()


def batch_to(batch: Any, device: torch.device) -> Any:
    """Move every tensor of the batch to the device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def split_batch(batch: Any, size: int) -> Iterator[Any]:
    """Split the batch into parts of at most `size` inputs."""
    for start in range(0, batch_size(batch), size):
        yield tree_map_only(Tensor, lambda tensor: tensor[start : start + size] if tensor.dim() else tensor, batch)  # noqa: B023


def concatenate(batches: Sequence[Any]) -> Any:
    """Join several batches of the same nesting into one."""
    flat = [tree_flatten(batch) for batch in batches]
    leaves = zip(*(leaves for leaves, _ in flat), strict=True)
    joined = [torch.cat(parts) if isinstance(parts[0], Tensor) and parts[0].dim() else parts[0] for parts in leaves]
    return tree_unflatten(joined, flat[0][1])


def repeat_batch(batch: Any, times: int) -> Any:
    """The batch so many times in a row, as one batch."""
    return concatenate([batch] * times)


def batch_shapes(batch: Any) -> Any:
    """The batch with every tensor replaced by its shape."""
    return tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), batch)
