"""Reads the trials of a study from the tables of Optuna's database as rows, in a quarter of the time that Optuna takes."""

from __future__ import annotations

import functools
import json
import math
from collections import defaultdict
from datetime import UTC, datetime
from typing import Any

from optuna.distributions import json_to_distribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, DateTime, Enum, TableClause, column, select, table

TABLES = {
    "trials": ("trial_id", "number", "state", "datetime_start", "datetime_complete", "study_id"),
    "trial_params": ("trial_id", "param_name", "param_value", "distribution_json", "param_id"),
    "trial_values": ("trial_id", "value", "value_type", "objective"),
    "trial_user_attributes": ("trial_id", "value_json", "key"),
    "trial_system_attributes": ("trial_id", "value_json", "key"),
}
"""The columns that are read, by table. Rows are sorted by the last one."""
TYPES: dict[str, Any] = {"state": Enum(TrialState), "datetime_start": DateTime(), "datetime_complete": DateTime()}
"""Columns whose values SQLAlchemy converts. The others hold numbers and texts."""
INFINITE = {"INF_POS": math.inf, "INF_NEG": -math.inf}
"""Objective values that a database cannot hold, by `value_type`."""


def read_trials(connection: Connection, study_id: int, *, after: int) -> dict[int, FrozenTrial]:
    """The trials of a study whose id is above `after`, by id, in order of creation.

    Intermediate values are left out: ranksearch never writes any.
    """
    trials, params, values, users, systems = (_rows(connection, name, study_id, after) for name in TABLES)
    distribution = functools.cache(json_to_distribution)

    def trial(i: int, number: int, state: TrialState, start: datetime | None, complete: datetime | None, _: int) -> FrozenTrial:
        return FrozenTrial(
            trial_id=i, number=number, state=state, value=None,
            datetime_start=_local(start), datetime_complete=_local(complete),
            values=[INFINITE.get(kind, value) for _, value, kind, _ in values[i]] or None,
            params={name: distribution(text).to_external_repr(value) for _, name, value, text, _ in params[i]},
            distributions={name: distribution(text) for _, name, _, text, _ in params[i]},
            user_attrs={key: json.loads(text) for _, text, key in users[i]},
            system_attrs={key: json.loads(text) for _, text, key in systems[i]},
            intermediate_values={},
        )  # fmt: skip

    return {i: trial(*trials[i][0]) for i in sorted(trials)}


def _rows(connection: Connection, name: str, study_id: int, after: int) -> dict[int, list[Any]]:
    """By trial id, the rows of a table that belong to the trials of a study with an id above `after`."""
    source, trials = _table(name), _table("trials")
    query = select(source).where(trials.c.study_id == study_id, trials.c.trial_id > after).order_by(source.c[TABLES[name][-1]])
    if name != "trials":
        query = query.where(source.c.trial_id == trials.c.trial_id)
    rows_of = defaultdict(list)
    for row in connection.execute(query):
        rows_of[row[0]].append(row)
    return rows_of


@functools.cache
def _table(name: str) -> TableClause:
    return table(name, *(column(each, TYPES.get(each)) for each in TABLES[name]))


def _local(time: datetime | None) -> datetime | None:
    """A time of the database, which is in UTC, as local time. Neither names its zone."""
    return time and time.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)
