"""Narrower nets: `narrowing_of` chooses the channels to keep, `narrow_` removes the others from a model, in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ranksearch.compress.channels import ChannelGroup, Losses, Unit, channel_groups, not_narrowed, without
from ranksearch.compress.inventory import count_macs
from ranksearch.compress.stand_ins import evaluating
from ranksearch.compress.surgery import copied
from ranksearch.errors import ModelError, PlanError, SpecError, first_line, nearest
from ranksearch.plan import Kept, Narrowing
from ranksearch.support.batch import batch_shapes, repeat_batch, run_model
from ranksearch.support.seeds import seeded

M = TypeVar("M", bound=nn.Module)


BLOCKS = (16, 8, 4)
"""Runtimes compute channels in blocks of these sizes. A LeNet of 8 and 16 channels is 1.5 times as fast as one of 8 and 20."""


def narrowing_of(model: nn.Module, example: Any, share: float, losses: Losses, *, in_blocks: bool = False) -> Narrowing:
    """Choose the channels that a narrower net keeps, so that it has at most `share` of the model's multiply-accumulates.

    The share is as near as whole channels allow. The model's outputs keep their shape, and no layer loses all of its channels.

    Args:
        model: the dense model, which is not changed.
        example: a batch of one input.
        share: above 0 and at most 1.
        losses: functions that run a model on one batch each and give the loss; the channels that change it most are kept.
        in_blocks: keep whole blocks of channels: a multiple of 16, or below 16 one of 8, below 8 one of 4.

    Raises:
        ModelError: Torch-Pruning cannot follow the model, or no channel can be removed.
        SpecError: `share` is so small that a layer would lose all of its channels.
        PlanError: `share` is not a share.
    """
    if not 0 < share <= 1:
        raise PlanError(f"The share of a narrower net must be above 0 and at most 1, but is {share!r}.")
    if share == 1:
        return Narrowing()
    groups = channel_groups(model, example, losses)
    steps = _in_order(_removable(model, example, groups), in_blocks=in_blocks)
    most = share * count_macs(model, example)

    def removed(count: int) -> list[Unit]:
        return [unit for step in steps[:count] for unit in step]

    def fits(count: int) -> bool:
        return count_macs(without(model, removed(count)), example) <= most

    _check_share(model, example, share, removed(len(steps)))
    too_few, enough = 0, len(steps)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if fits(middle) else (middle, enough)
    narrowing = _without(model, removed(enough))
    _check_running(model, narrowing, example)
    return narrowing


def check_width(model: nn.Module, example: Any, share: float) -> None:
    """Check that a narrower net can have at most `share` of the model's multiply-accumulates; weights need no training.

    Raises:
        ModelError, SpecError: as `narrowing_of` raises.
    """
    groups = _removable(model, example, channel_groups(model, example, losses=()))
    _check_share(model, example, share, [unit for group in groups for unit in group.units[1:]])


def _check_share(model: nn.Module, example: Any, share: float, most: Sequence[Unit]) -> None:
    """Raise `SpecError` if the model without `most` units, all that can be removed, has more than `share` of its MACs."""
    least = count_macs(without(model, most), example) / count_macs(model, example)
    if least > share:
        raise SpecError(
            f"A width in space.widths must leave each layer a channel, which takes {least:.2g} of this model's "
            f"multiply-accumulates, but got {share:g}; raise it."
        )


def narrow_(model: M, narrowing: Narrowing) -> M:
    """Remove, in place, all channels but those that `narrowing` keeps. All or nothing.

    Raises:
        PlanError: the narrowing was made for another model. The model is then unchanged.
    """
    tensors, modules = dict(_tensors(model)), dict(model.named_modules(remove_duplicate=False))
    for name, dims in narrowing.tensors.items():
        _check_tensor(name, tensors.get(name), {dim: narrowing.kept[at] for dim, at in dims.items()}, tensors)
    for name, values in narrowing.attributes.items():
        for attribute in values:
            if name not in modules or attribute not in vars(modules[name]):
                raise PlanError(f"A narrowing must be made for the model, but the model has no {name}.{attribute}.")
    narrowed: dict[int, Tensor] = {}  # a parameter may have several names
    for name, dims in narrowing.tensors.items():
        tensor = tensors[name]
        if id(tensor) not in narrowed:
            narrowed[id(tensor)] = _selected(tensor, {dim: narrowing.kept[at] for dim, at in dims.items()})
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, narrowed[id(tensor)])
    for name, values in narrowing.attributes.items():
        for attribute, value in values.items():
            setattr(modules[name], attribute, value)
    return model


def _check_tensor(name: str, tensor: Tensor | None, dims: Mapping[int, Kept], tensors: Mapping[str, Tensor]) -> None:
    if tensor is None:
        raise PlanError(f"A narrowing must be made for the model, but the model has no {name!r}.{nearest(name, tensors)}")
    for dim, kept in dims.items():
        if dim >= tensor.dim() or tensor.shape[dim] != kept.size:
            raise PlanError(
                f"A narrowing must be made for the model, but it keeps {len(kept.indices)} of {kept.size} channels along "
                f"dimension {dim} of {name!r}, which has the shape {tuple(tensor.shape)}."
            )


def _selected(tensor: Tensor, dims: Mapping[int, Kept]) -> Tensor:
    kept = tensor.detach()
    for dim, channels in dims.items():
        kept = kept.index_select(dim, torch.tensor(channels.indices, device=kept.device))
    return nn.Parameter(kept, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept


def _removable(model: nn.Module, example: Any, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """The groups without which the model still runs and gives outputs of the same shape, tried by removing one unit each.

    Raises:
        ModelError: there are none.
    """
    shapes, reason = _output_shapes(model, example), "no layer has channels that other layers read"
    found = []
    for group in groups:
        if len(group.units) < 2:
            continue
        try:
            fits = _output_shapes(without(model, group.units[:1]), example) == shapes
        except Exception as error:  # a forward may raise anything
            reason = f"without one of them it fails ({type(error).__name__}: {first_line(error)})"
        else:
            found += [group] if fits else []
    if not found:
        raise ModelError(not_narrowed(reason))
    return found


def _in_order(groups: Sequence[ChannelGroup], *, in_blocks: bool) -> list[list[Unit]]:
    """The units in the order of their removal: the least important first, and the same share of each group.

    Those of one step are removed together. The most important unit of each group is left out, since it is never removed.
    """
    steps = []
    for number, group in enumerate(groups):
        order, first = group.importance.argsort(stable=True).tolist(), 0
        for end in range(1, len(order)):
            if not in_blocks or _in_whole_blocks(len(order) - end):
                steps.append((end / len(order), number, order[first:end]))
                first = end
    return [[groups[number].units[unit] for unit in units] for _, number, units in sorted(steps)]


def _in_whole_blocks(channels: int) -> bool:
    size = next((block for block in BLOCKS if block <= channels), 1)
    return channels % size == 0


def _without(model: nn.Module, units: Sequence[Unit]) -> Narrowing:
    """The narrowing that keeps all but these units.

    It is read from narrowed copies whose tensors hold their own coordinates along one dimension.
    """
    tensors: dict[str, dict[int, Kept]] = defaultdict(dict)
    for dim in range(max(tensor.dim() for _, tensor in _tensors(model))):
        narrowed = dict(_tensors(without(_coordinates(model, dim), units)))
        for name, tensor in _tensors(model):
            if tensor.dim() > dim and len(line := _first_line(narrowed[name], dim)) < tensor.shape[dim]:
                tensors[name][dim] = Kept(tensor.shape[dim], tuple(map(int, line.tolist())))
    kept = list(dict.fromkeys(kept for dims in tensors.values() for kept in dims.values()))
    places = {channels: place for place, channels in enumerate(kept)}
    named = {name: {dim: places[channels] for dim, channels in dims.items()} for name, dims in tensors.items()}
    return Narrowing(tuple(kept), named, _changed_attributes(model, without(model, units)))


def _coordinates(model: nn.Module, dim: int) -> nn.Module:
    """A copy of a model in which every element of a tensor is its index along `dim`."""
    twin = copied(model)
    for name, tensor in _tensors(model):
        if tensor.dim() > dim:
            shape = [-1 if other == dim else 1 for other in range(tensor.dim())]
            values = torch.arange(tensor.shape[dim], dtype=torch.float32).view(shape).expand(tensor.shape)
            owner, _, last = name.rpartition(".")
            setattr(twin.get_submodule(owner), last, nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values)
    return twin


def _first_line(tensor: Tensor, dim: int) -> Tensor:
    """The first of the lines of a tensor along a dimension."""
    return tensor.detach().movedim(dim, 0).flatten(1)[:, 0] if tensor.dim() > 1 else tensor.detach()


def _changed_attributes(model: nn.Module, narrowed: nn.Module) -> dict[str, dict[str, int | tuple[int, ...]]]:
    found: dict[str, dict[str, int | tuple[int, ...]]] = defaultdict(dict)
    for (name, module), after in zip(model.named_modules(), narrowed.modules(), strict=True):
        for attribute, value in vars(module).items():
            if isinstance(value, int | tuple) and attribute != "training" and vars(after)[attribute] != value:
                found[name][attribute] = vars(after)[attribute]
    return dict(found)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers of a model; those with several names under each of them."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _output_shapes(model: nn.Module, example: Any) -> Any:
    with evaluating(model), torch.no_grad():
        return batch_shapes(run_model(model, example))


def _check_running(model: nn.Module, narrowing: Narrowing, example: Any) -> None:
    """Run a narrowed copy in both modes.

    Raises:
        ModelError: it fails, or its outputs have other shapes.
    """
    twin, two = narrow_(copied(model), narrowing), repeat_batch(example, 2)
    try:
        shapes = _output_shapes(twin, example)
        with seeded(0), torch.no_grad():
            run_model(twin.train(), two)
    except Exception as error:  # a forward may raise anything
        raise ModelError(not_narrowed(f"a narrowed copy fails ({type(error).__name__}: {first_line(error)})")) from error
    if shapes != _output_shapes(model, example):
        raise ModelError(not_narrowed(f"a narrowed copy gives outputs of other shapes ({shapes})"))
