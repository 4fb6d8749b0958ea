"""Costs of a model, such as parameters and MACs. A study can minimise each of them, and limit it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ranksearch.errors import StudyError


@dataclass(frozen=True)
class Cost:
    """One cost of a model; smaller is better.

    Study files use its `name` in `search.minimize` and `search.max_<name>`; records store its value under that name.
    """

    name: str
    title: str
    """Heading of a column of its values, such as `parameters`."""
    ratio: str
    """Name of the ratio dense model / compressed model, such as `compression ratio`."""
    fewer: str
    """Words after that ratio: `smaller` in `25.5x smaller`."""
    suffix: str = ""
    """Short form of those words, with a leading space: ` MACs` in `12.0x MACs`."""
    unit: str = ""
    """Unit of its values, such as `ms`; empty for a count."""
    about: str = ""
    """Explanation of the title, if it needs one."""
    limit_key: str = ""
    """The key of its limit in the section `search`, if that is not `max_<name>`."""

    @property
    def column(self) -> str:
        """Name of its column in tables of data, with the unit: `latency_ms`."""
        return self.limit.removeprefix("max_")

    @property
    def limit(self) -> str:
        """The key of its largest allowed value in the section `search` of a study."""
        return self.limit_key or f"max_{self.name}"

    @property
    def short_ratio(self) -> str:
        """Heading of a column of its ratios: `MACs ratio`."""
        return f"{self.suffix} ratio".strip()

    def text(self, value: float | None) -> str:
        """A value as people read it: `1,250,282`, `3.14 ms`; a dash for None."""
        if value is None:
            return "\N{EN DASH}"
        return f"{value:#.3g} {self.unit}" if self.unit else f"{round(value):,}"


COSTS: dict[str, Cost] = {}
"""All costs by name, in display order."""


def register_cost(cost: Cost) -> Cost:
    """Register a cost, so that limits, fronts, reports and the screen use it wherever a record holds its value.

    Raises:
        StudyError: a different cost has the same name.
    """
    if COSTS.setdefault(cost.name, cost) != cost:
        raise StudyError(f"A cost must have a unique name, but {cost.name!r} is registered for {COSTS[cost.name].title}.")
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
    """An object with costs by name: a layer, a factorization of it, a whole model."""

    @property
    def costs(self) -> Mapping[str, float]: ...


class Sized(Costed, Protocol):
    """A whole model with a known compression ratio."""

    @property
    def ratio(self) -> float: ...


class Counts:
    """Properties for the two costs that every record has."""

    costs: Mapping[str, float]

    @property
    def params(self) -> int:
        """Number of parameters."""
        return int(self.costs["params"])

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one input."""
        return int(self.costs["macs"])


def costs_of(costed: Costed) -> list[Cost]:
    """The costs that an object has a value for, in display order."""
    return [cost for name, cost in COSTS.items() if name in costed.costs]
