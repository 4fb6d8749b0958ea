"""What a model costs: each cost that a study can minimise and limit is one value here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ranksearch.errors import StudyError


@dataclass(frozen=True)
class Cost:
    """One cost of a model, the smaller the better.

    Study files name it in `search.minimize` and `search.max_<name>`; records keep a number for it under its name.
    """

    name: str
    title: str
    """Of a column of its numbers, such as `parameters`."""
    ratio: str
    """Of how many times smaller than the dense model, such as `compression ratio`."""
    fewer: str
    """After such a ratio: `25.5x smaller`."""
    suffix: str = ""
    """After a ratio where there is little room: `12.0x MACs`."""
    unit: str = ""
    """After a number, such as `ms`; a cost without one is a count."""
    about: str = ""
    """What is counted or measured, where the title does not say it."""
    limit_key: str = ""
    """The key of its limit in the section `search`, where that is not `max_<name>`."""

    @property
    def limit(self) -> str:
        """The key of its largest allowed value in the section `search` of a study."""
        return self.limit_key or f"max_{self.name}"

    @property
    def short_ratio(self) -> str:
        """Of a column of its ratios: `MACs ratio`."""
        return f"{self.suffix} ratio".strip()

    def text(self, value: float | None) -> str:
        """A number of it for people: `1,250,282`, `3.14 ms`."""
        if value is None:
            return "\N{EN DASH}"
        return f"{value:#.3g} {self.unit}" if self.unit else f"{round(value):,}"


COSTS: dict[str, Cost] = {}
"""Every cost by its name, in the order in which they are shown."""


def register_cost(cost: Cost) -> Cost:
    """Make a cost known: to limits, fronts, reports and the screen, wherever a record has a number for it.

    Raises:
        StudyError: there is another of that name.
    """
    if COSTS.setdefault(cost.name, cost) != cost:
        raise StudyError(f"A cost must have a name of its own, but {cost.name!r} is {COSTS[cost.name].title}.")
    return cost


PARAMS = register_cost(Cost("params", title="parameters", ratio="compression ratio", fewer="smaller"))
MACS = register_cost(
    Cost(
        "macs", title="MACs", ratio="MACs ratio", fewer="fewer MACs", suffix=" MACs",
        about="multiply-accumulates for one input",
    )
)  # fmt: skip
LATENCY = register_cost(
    Cost(
        "latency", title="latency", ratio="speed-up", fewer="faster", suffix=" speed", unit="ms",
        about="milliseconds in the study's runtime, measured for finalists and predicted for other trials",
        limit_key="max_latency_ms",
    )
)  # fmt: skip


class Costed(Protocol):
    """Something with costs, by name: a layer, a way to store it, a whole model."""

    @property
    def costs(self) -> Mapping[str, float]: ...


class Sized(Costed, Protocol):
    """A whole model, whose compression ratio is known."""

    @property
    def ratio(self) -> float: ...


class Counts:
    """Shorthand for the two counts that every record of a model has."""

    costs: Mapping[str, float]

    @property
    def params(self) -> int:
        """Parameters."""
        return int(self.costs["params"])

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one input."""
        return int(self.costs["macs"])


def costs_of(costed: Costed) -> list[Cost]:
    """The costs that something has a number for, in the order in which they are shown."""
    return [cost for name, cost in COSTS.items() if name in costed.costs]
