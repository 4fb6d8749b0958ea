"""Prunes channels of a model: `narrowing_of` chooses the kept channels, `narrow_(model, narrowing)` keeps only them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ranksearch.compress.inventory import count_macs
from ranksearch.errors import ModelError, PlanError, first_line, nearest
from ranksearch.plan import Narrowing
from ranksearch.support.batch import batch_size, repeat_batch, run_model, tensors_in
from ranksearch.support.seeds import seeded

M = TypeVar("M", bound=nn.Module)

Importance: TypeAlias = Callable[[nn.Module], Tensor] | Literal["uniform"]
"""The loss of a model on some training data, or "uniform"; see `narrowing_of`."""
History: TypeAlias = list[Any]
"""The pruned groups of channels, as torch-pruning records them."""

STEPS = 100
"""Pruning steps from all channels to none: each removes one channel in a hundred."""
GRADIENT_STEPS = 10
"""The loss is differentiated again after so many steps, since the importance of a channel depends on the channels left."""


def narrow_(model: M, narrowing: Narrowing) -> M:
    """Keep, in place, only the channels that a narrowing names. All or nothing.

    Raises:
        PlanError: the narrowing does not fit the model, which is then unchanged.
    """
    tensors, modules = _tensors(model), dict(model.named_modules())
    for name, dims in narrowing.tensors.items():
        if name not in tensors:
            raise PlanError(
                f"A narrowing must fit the model, but {name!r} is no parameter or buffer of it.{nearest(name, tensors)}"
            )
        shape = tensors[name].shape
        for dim, position in dims.items():
            if dim >= len(shape) or narrowing.kept[position][-1] >= shape[dim]:
                raise PlanError(
                    f"A narrowing must fit the model, but keeps index {narrowing.kept[position][-1]} in dimension {dim} of "
                    f"{name!r}, whose shape is {tuple(shape)}."
                )
    for name, values in narrowing.attributes.items():
        for attribute in values:
            if name not in modules or attribute not in vars(modules[name]):
                raise PlanError(f"A narrowing must fit the model, but sets {attribute!r} of {name!r}, which has none.")
    # By identity, since a shared tensor has several names.
    for tensor, dims in {id(tensors[name]): (tensors[name], dims) for name, dims in narrowing.tensors.items()}.values():
        for dim, position in dims.items():
            tensor.data = tensor.data.index_select(dim, torch.tensor(narrowing.kept[position], device=tensor.device))
        tensor.grad = None
    for name, values in narrowing.attributes.items():
        for attribute, value in values.items():
            setattr(modules[name], attribute, value)
    return model


def narrowing_of(model: nn.Module, example: Any, share: float, *, importance: Importance) -> Narrowing:
    """Choose the channels to keep so that a model has at most `share` of its multiply-accumulates.

    Channels that depend on each other, through additions, concatenations or groups, are pruned together (Fang et al. 2023).

    Args:
        model: the dense model; not changed.
        example: a batch of one input.
        share: of the multiply-accumulates to keep, above 0 and at most 1.
        importance: the loss of a model on some training data, from whose gradients the importance of a channel is estimated
            to first order (Molchanov et al. 2019). "uniform" keeps the same share of the channels in every layer, those of
            large weights, for a net that is trained from scratch.

    Raises:
        ModelError: the model cannot be narrowed, or not that far.
    """
    if not 0 < share <= 1:
        raise PlanError(f"A width must be above 0 and at most 1, but got {share!r}.")
    if share == 1:
        return Narrowing()
    with _following():
        pruned = _copy(model)
        history = _prune(pruned, example, share, importance)
        narrowing = _read(model, pruned, example, history)
        _check(narrow_(copy.deepcopy(model), narrowing), model, example)
    return narrowing


def why_not_narrowed(model: nn.Module, example: Any) -> str | None:
    """Why channels of a model cannot be pruned, in one sentence; None if they can be."""
    try:
        narrowing_of(model, example, 0.5, importance="uniform")
    except ModelError as error:
        return str(error)
    return None


@contextmanager
def _following() -> Iterator[None]:
    """Raise a `ModelError` for whatever torch-pruning or the narrowed model raises; silence torch-pruning's warnings."""
    try:
        with warnings.catch_warnings(), seeded(0), torch.enable_grad():
            warnings.simplefilter("ignore")
            yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(_not_narrowed(f"pruning its channels raised {type(error).__name__}: {first_line(error)}")) from error


def _not_narrowed(reason: str) -> str:
    return f"The model's channels must be prunable for space.widths below 1, but {reason}; use space.widths = [1.0]."


def _copy(model: nn.Module) -> nn.Module:
    # torch-pruning follows gradients from the outputs back to the weights.
    return copy.deepcopy(model).requires_grad_().eval()


def _prune(model: nn.Module, example: Any, share: float, importance: Importance) -> History:
    """Prune `model` in place, step by step, until it has at most `share` of its multiply-accumulates."""
    import torch_pruning  # imported here, since it takes a second

    budget = share * count_macs(model, example)
    uniform = importance == "uniform"
    pruner = torch_pruning.pruner.BasePruner(
        model, example,
        importance=torch_pruning.importance.GroupMagnitudeImportance()
        if uniform else torch_pruning.importance.GroupTaylorImportance(),
        pruning_ratio=1.0, iterative_steps=STEPS, global_pruning=not uniform,
        ignored_layers=_last_layers(model, example), forward_fn=run_model, output_transform=_total,
    )  # fmt: skip
    before = macs = count_macs(model, example)
    for step in range(STEPS - 1):
        if callable(importance) and step % GRADIENT_STEPS == 0:
            model.zero_grad()
            importance(model).backward()
        near = macs - 2 * (before - macs) <= budget
        before = macs
        for group in pruner.step(interactive=True):
            group.prune()
            if near and (macs := count_macs(model, example)) <= budget:
                return pruner.pruning_history()
        if (macs := count_macs(model, example)) <= budget:
            return pruner.pruning_history()
    raise ModelError(_not_narrowed(f"only {1 - macs * share / budget:.0%} of its multiply-accumulates can be removed"))


def _last_layers(model: nn.Module, example: Any) -> list[nn.Module]:
    """The layers whose output channels are the model's outputs."""
    graph = _graph(model, example)
    last: dict[nn.Module, None] = {}
    for group in graph.get_all_groups():
        outs = [dep.target for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]
        if any(not node.outputs for node in outs):
            last.update((node.module, None) for node in outs)
    return list(last)


def _graph(model: nn.Module, example: Any) -> Any:
    import torch_pruning

    return torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs=example, forward_fn=run_model, output_transform=_total
    )


def _total(outputs: Any) -> Sequence[Tensor]:
    return tensors_in(outputs)


def _read(model: nn.Module, pruned: nn.Module, example: Any, history: History) -> Narrowing:
    """What pruning changed. The kept indices are read from copies that hold their own coordinates and are pruned alike."""
    after = _tensors(pruned)
    changed = {
        name: [dim for dim in range(tensor.dim()) if tensor.shape[dim] != after[name].shape[dim]]
        for name, tensor in _tensors(model).items()
    }
    positions: dict[tuple[int, ...], int] = {}
    tensors: dict[str, dict[int, int]] = {}
    for dim in sorted({dim for dims in changed.values() for dim in dims}):
        coordinates = _tensors(_pruned_coordinates(model, example, history, dim))
        for name, dims in changed.items():
            if dim in dims:
                row = coordinates[name].movedim(dim, 0).flatten(1)[:, 0] if len(after[name].shape) > 1 else coordinates[name]
                indices = tuple(int(index) for index in row.tolist())
                tensors.setdefault(name, {})[dim] = positions.setdefault(indices, len(positions))
    return Narrowing(tuple(positions), tensors, _attributes(model, pruned))


def _pruned_coordinates(model: nn.Module, example: Any, history: History, dim: int) -> nn.Module:
    """A copy whose tensors hold their own coordinates along one dimension, pruned by a history."""
    twin = _copy(model)
    graph = _graph(twin, example)
    for tensor in _tensors(twin).values():
        if tensor.dim() > dim and tensor.is_floating_point():
            shape = [-1 if axis == dim else 1 for axis in range(tensor.dim())]
            tensor.data = torch.arange(tensor.shape[dim], dtype=tensor.dtype).view(shape).expand(tensor.shape).clone()
    graph.load_pruning_history(history)
    return twin


def _attributes(model: nn.Module, pruned: nn.Module) -> dict[str, dict[str, int]]:
    """By module, the whole numbers among its attributes that pruning changed."""
    after = dict(pruned.named_modules())
    changed = {
        name: {
            key: vars(after[name])[key]
            for key, value in vars(module).items()
            if isinstance(value, int) and not isinstance(value, bool) and vars(after[name])[key] != value
        }
        for name, module in model.named_modules()
    }
    return {name: values for name, values in changed.items() if values}


def _check(narrowed: nn.Module, model: nn.Module, example: Any) -> None:
    """Run the narrowed model in both modes and compare the shapes of its outputs with those of the dense model."""
    two = repeat_batch(example, 2) if batch_size(example) == 1 else example
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for training in (False, True):
            shapes = [[tuple(t.shape) for t in tensors_in(run_model(net.train(training), two))] for net in (dense, narrowed)]
            if shapes[0] != shapes[1]:
                raise ModelError(_not_narrowed(f"a narrowed copy gave outputs of shape {shapes[1]} instead of {shapes[0]}"))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name; a shared one under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
