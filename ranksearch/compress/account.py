"""Where all parameters and multiply-accumulates of a model are: layers, skipped ones, and the rest, module by module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from ranksearch.compress.watch import Watch
from ranksearch.methods.layer import Layer
from ranksearch.results.account import Entry


def account_of(
    watch: Watch, layers: Iterable[Layer], skipped: Mapping[str, str], used: Collection[str], batch: int
) -> tuple[Entry, ...]:
    """The account of a model that was run, in the order of its modules. One without parameters and operations has no entry.

    Args:
        watch: the run.
        layers: the decomposable layers.
        skipped: the reasons for skipping other ones, by name.
        used: the names of the parameters that a pass uses.
        batch: the inputs of the run.
    """
    found = {layer.name: layer for layer in layers}
    whole = {*found, *skipped}
    params, unused, flops = (defaultdict[str, int](int) for _ in range(3))
    for name, parameter in watch.model.named_parameters():
        owner = _owner(name.rpartition(".")[0], whole)
        params[owner] += parameter.numel()
        unused[owner] += 0 if name in used else parameter.numel()
    for name, count in watch.operations.flops.items():
        flops[_owner(name, whole)] += count
    entries = []
    for name, module in watch.model.named_modules():
        # What a layer computes its weight by is left out: that is done once, if the weight is to stay.
        macs = found[name].macs if name in found else flops[name] // 2 // batch
        if name in whole or params[name] or macs:
            entry = Entry(name, type(module).__name__, params[name], macs, unused[name], name in found, skipped.get(name))
            entries.append(entry)
    return tuple(entries)


def _owner(name: str, whole: Collection[str]) -> str:
    """The layer, one of `whole`, that a module lies in, or else the module itself."""
    parts = name.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((path for path in paths if path in whole), name)
