"""Batches: tensors nested in any way, and how a model is called on one.

The first dimension of each tensor counts the inputs. A `PerInput` list has one entry for each input instead. Other values,
such as numbers, are passed on unchanged. The package calls models only through `run_model`, or with `arguments_of`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ranksearch.errors import DataError
from ranksearch.support.nesting import PerInput, map_tensors, parts_of, rebuilt, tensors_in


def run_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Call the model with a batch of inputs, as `arguments_of` says, and return its outputs."""
    args, kwargs = arguments_of(model, inputs)
    return model(*args, **kwargs)


def arguments_of(model: Callable[..., Any], inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with a batch of inputs.

    A tuple holds the arguments of the model's forward, a dict its arguments by name. If the forward does not take them so but
    takes one argument, the whole tuple or dict is that argument, as any other value is.

    Raises:
        DataError: the forward takes the tuple or the dict in neither way.
    """
    if not isinstance(inputs, (tuple, MutableMapping)):
        return (inputs,), {}
    forward = getattr(model, "forward", model)
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):  # code that is not Python's
        signature = inspect.signature(lambda *args, **kwargs: None)
    if isinstance(inputs, tuple):
        if _binds(signature, *inputs):
            return inputs, {}
    elif all(isinstance(name, str) for name in inputs) and _binds(signature, **inputs):
        return (), dict(inputs)
    # A forward with a parameter of the name of a key takes the dict by name, so another key is an error.
    by_name = isinstance(inputs, Mapping) and set(inputs) & set(signature.parameters)
    if by_name or not _binds(signature, inputs):
        raise DataError(_not_taken(signature, inputs))
    return (inputs,), {}


def named_arguments(model: Callable[..., Any], inputs: Any) -> dict[str, Any]:
    """The arguments of `arguments_of` by name, in the order of the inputs; a single argument is called `input`."""
    args, kwargs = arguments_of(model, inputs)
    if kwargs or len(args) == 1:
        return kwargs or {"input": args[0]}
    return dict(inspect.signature(getattr(model, "forward", model)).bind(*args).arguments)


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _not_taken(signature: inspect.Signature, inputs: Any) -> str:
    names = ", ".join(signature.parameters)
    if isinstance(inputs, tuple):
        return (
            f"A tuple of inputs must hold the arguments of the model's forward ({names}), but holds {len(inputs)} values; "
            "change the data set, or wrap the model."
        )
    return (
        f"A dict of inputs must hold the arguments of the model's forward ({names}) by name, but has the keys "
        f"{', '.join(map(str, inputs))}; rename its keys, or wrap the model."
    )


def batch_size(batch: Any) -> int:
    """Number of inputs in a batch.

    Raises:
        ValueError: parts of the batch have other numbers of inputs, or there are neither tensors nor `PerInput` lists.
    """
    sizes = sizes_in(batch)
    if len(sizes) != 1:
        raise ValueError(f"The tensors of a batch must all have the same first size, but have shapes {batch_shapes(batch)}.")
    return sizes.pop()


def sizes_in(batch: Any) -> set[int]:
    """The numbers of inputs that the tensors and `PerInput` lists of a batch have."""
    sizes = set[int]()
    _map_counted(lambda part: sizes.add(len(part)), batch)
    return sizes


def batch_to(batch: Any, device: torch.device) -> Any:
    """Move every tensor of the batch to the device."""
    return map_tensors(lambda tensor: tensor.to(device), batch)


def split_batch(batch: Any, size: int) -> Iterator[Any]:
    """Split the batch into parts of at most `size` inputs."""
    for start in range(0, batch_size(batch), size):
        yield first_inputs(batch, size, start)


def first_inputs(batch: Any, count: int, start: int = 0) -> Any:
    """The first `count` inputs of a batch, or those from `start` on."""
    chosen = slice(start, start + count)
    return _map_counted(lambda part: PerInput(part[chosen]) if isinstance(part, PerInput) else part[chosen], batch)


def select_inputs(batch: Any, chosen: Tensor) -> Any:
    """The inputs of a batch with these indices (count,), of which some may be equal."""
    entries = chosen.tolist()
    return _map_counted(
        lambda part: PerInput(part[entry] for entry in entries) if isinstance(part, PerInput) else part[chosen], batch
    )


def one_input(batch: Any, index: int) -> Any:
    """One input of a batch, without the batch dimension; of a `PerInput` list its entry."""
    return _map_counted(lambda part: part[index], batch)


def concatenate(batches: Sequence[Any]) -> Any:
    """Join several batches of the same nesting into one. A value that has no batch dimension is that of the first batch.

    Raises:
        ValueError: their nestings differ.
    """
    first = batches[0]
    if isinstance(first, PerInput):
        return PerInput(entry for batch in batches for entry in batch)
    if isinstance(first, Tensor):
        return torch.cat(list(batches)) if first.dim() else first
    parts = [parts_of(batch) for batch in batches]
    if parts[0] is None:
        return first
    if any(each is None or each.keys() != parts[0].keys() for each in parts):
        raise ValueError("Batches must have the same nesting to be joined, but differ.")
    return rebuilt(first, {name: concatenate([each[name] for each in parts if each is not None]) for name in parts[0]})


def join_outputs(outputs: Sequence[Any], sizes: Sequence[int], *, per_input: bool = False) -> Any:
    """Join a model's outputs for several batches, of these numbers of inputs, into one.

    A list of outputs is joined entry by entry, as of several scales, or one after the other if it has one entry for each input,
    as the boxes that a detector finds: as many entries in every batch as inputs, of which not all are batches themselves. If
    `per_input`, as where the inputs are such lists, every list of as many entries as inputs counts so.

    Raises:
        ValueError: the outputs of two batches are nested differently.
    """
    return concatenate(_marked(outputs, sizes, per_input))


def _marked(outputs: Sequence[Any], sizes: Sequence[int], per_input: bool) -> list[Any]:
    """The outputs with `PerInput` in the place of every list that has one entry for each input."""
    pairs = list(zip(outputs, sizes, strict=True))
    by_scale = not per_input and all(tensors_in(output) and sizes_in(output) == {size} for output, size in pairs)
    if all(type(output) is list and len(output) == size for output, size in pairs) and not by_scale:
        return [PerInput(output) for output in outputs]
    parts = [parts_of(output) for output in outputs]
    if any(each is None or parts[0] is None or each.keys() != parts[0].keys() for each in parts):
        return list(outputs)
    columns = {name: _marked([each[name] for each in parts if each], sizes, per_input) for name in parts[0] or {}}
    return [rebuilt(output, {name: column[row] for name, column in columns.items()}) for row, output in enumerate(outputs)]


def repeat_batch(batch: Any, times: int) -> Any:
    """The batch so many times in a row, as one batch."""
    return concatenate([batch] * times)


def batch_shapes(batch: Any) -> Any:
    """The batch with every tensor replaced by its shape."""
    return map_tensors(lambda tensor: tuple(tensor.shape), batch)


def input_shapes(batch: Any) -> Any:
    """The batch with every tensor replaced by its shape without the batch dimension."""
    return _map_counted(lambda part: batch_shapes(list(part)) if isinstance(part, PerInput) else tuple(part.shape[1:]), batch)


def _map_counted(function: Callable[[Any], Any], batch: Any) -> Any:
    """The batch with every tensor that has a batch dimension, and every `PerInput` list, replaced by the function's result."""
    if isinstance(batch, PerInput) or (isinstance(batch, Tensor) and batch.dim()):
        return function(batch)
    parts = parts_of(batch)
    return batch if parts is None else rebuilt(batch, {name: _map_counted(function, part) for name, part in parts.items()})
