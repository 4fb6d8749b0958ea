"""Channels that can be removed from a model together, found by Torch-Pruning's dependency graph (Fang et al. 2023)."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ranksearch.compress.surgery import copied
from ranksearch.errors import ModelError, first_line
from ranksearch.support.batch import run_model
from ranksearch.support.nesting import tensors_in


@dataclass(frozen=True)
class Cut:
    """How Torch-Pruning removes channels from one side of a module, or from a parameter that no module of torch holds.

    Attributes:
        name: of the module or parameter.
        remove: Torch-Pruning's function of a module (or parameter) and the indices to remove.
        dim: the dimension of the channels, for functions that can remove them from several.
    """

    name: str
    remove: Callable[[Any, list[int]], Any]
    dim: int


Unit: TypeAlias = Mapping[Cut, Sequence[int]]


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels of several layers that can only be removed together, such as those that a residual connection adds.

    Attributes:
        units: by unit, the smallest set of channels that can be removed, the indices that each cut loses. A unit is usually one
            channel, and one of each group if a layer has groups.
        importance: of each unit (units,).
    """

    units: Sequence[Unit]
    importance: Tensor


Losses: TypeAlias = Sequence[Callable[[nn.Module], Tensor]]
"""Functions that run a model on one batch each and give the loss."""


def channel_groups(model: nn.Module, example: Any, losses: Losses) -> list[ChannelGroup]:
    """The groups of channels of a model, in the order of their first layers.

    The importance of a channel is the mean over its weights, summed over the losses, of |weight x gradient|, the first-order
    change of the loss without it (Molchanov et al. 2019).

    Raises:
        ModelError: Torch-Pruning cannot follow the model.
    """
    # Imported here, since it would take a second in every worker.
    import torch_pruning

    twin = copied(model).requires_grad_()  # the graph is made of gradient functions
    with following(), torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(
            twin, example, forward_fn=lambda net, inputs: tensors_in(run_model(net, inputs)), verbose=False
        )
        names = {id(part): name for name, part in [*twin.named_modules(), *twin.named_parameters()]}
        groups = list(graph.get_all_groups())
        counts = [max(_groups_of(graph, dep) for dep, _ in group) for group in groups]
        units = [_units(group, names, count) for group, count in zip(groups, counts, strict=True)]
        values = _importances(twin, groups, losses)
        return [
            ChannelGroup(each, value.cpu().float().view(count, -1).mean(0))
            for each, value, count in zip(units, values, counts, strict=True)
        ]


def _importances(model: nn.Module, groups: Sequence[Any], losses: Losses) -> list[Tensor]:
    """By group, the importance of each of its channels (channels,)."""
    from torch_pruning import importance

    values = [torch.zeros(len(group[0].idxs)) for group in groups]
    taylor = importance.GroupTaylorImportance(normalizer=None)
    for loss in losses:
        model.zero_grad()
        loss(model).backward()
        values = [value.to(more.device) + more for value, more in zip(values, map(taylor, groups), strict=True)]
    return values


@contextmanager
def following() -> Iterator[None]:
    """Turn errors of Torch-Pruning, which may be of any type, into a `ModelError`, and silence its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = f"Torch-Pruning cannot follow it ({type(error).__name__}: {first_line(error)})"
        raise ModelError(not_narrowed(reason)) from error


def not_narrowed(reason: str) -> str:
    """The message for a model that cannot be narrowed."""
    return f"Channels of the model must be removable to make a narrower net, but {reason}; use space.widths = [1.0]."


def _groups_of(graph: Any, dep: Any) -> int:
    """The number of groups in which a layer treats the channels of this dependency."""
    module, pruner = dep.target.module, graph.get_pruner_of_module(dep.target.module)
    if isinstance(module, nn.Module) and getattr(module, "groups", 1) == getattr(module, "out_channels", None):
        return 1  # a depthwise convolution
    side = pruner.get_out_channel_groups if graph.is_out_channel_pruning_fn(dep.handler) else pruner.get_in_channel_groups
    return int(side(module))


def _units(group: Any, names: Mapping[int, str], count: int) -> list[dict[Cut, list[int]]]:
    size = len(group[0].idxs) // count
    units: list[dict[Cut, list[int]]] = [defaultdict(list) for _ in range(size)]
    for item in group:
        if (name := names.get(id(item.dep.target.module))) is None:
            continue  # an operation, not a layer
        cut = Cut(name, item.dep.handler, item.dep.target.pruning_dim)
        for index, root in zip(item.idxs, item.root_idxs, strict=True):
            units[root % size][cut].append(index)
    return [dict(unit) for unit in units]


def without(model: nn.Module, units: Iterable[Unit]) -> nn.Module:
    """A copy of a model without the channels of these units, made by Torch-Pruning.

    Raises:
        ModelError: Torch-Pruning cannot remove them.
    """
    removed: dict[Cut, set[int]] = defaultdict(set)
    for unit in units:
        for cut, indices in unit.items():
            removed[cut].update(indices)
    model = copied(model)
    with following():
        for cut, lost in removed.items():
            cut.remove.__self__.pruning_dim = cut.dim  # type: ignore[attr-defined]
            owner, _, last = cut.name.rpartition(".")
            target = getattr(model.get_submodule(owner), last) if cut.name else model
            pruned = cut.remove(target, sorted(lost))
            if isinstance(target, nn.Parameter):
                setattr(model.get_submodule(owner), last, pruned)
    return model
