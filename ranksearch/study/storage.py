"""The Optuna storage of a study: reads long records quickly, and waits while its database is temporarily unusable."""

from __future__ import annotations

import functools
import json
import sqlite3
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from typing import Any, TypeVar, cast

from optuna.distributions import json_to_distribution
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Select, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from ranksearch.errors import StudyError

T = TypeVar("T")
M = TypeVar("M", bound=Callable[..., Any])

MAX_WAIT_SECONDS = 300.0
"""How long a study waits for its database."""
RETRY_SECONDS = 2.0
"""Time between two attempts."""
BUSY_TIMEOUT_SECONDS = 2.0
"""Seconds that SQLite itself waits for a lock. During them nothing is announced and Ctrl-C has no effect."""
LOCKED, FULL, UNREACHABLE = "locked by another program", "on a full disk", "unreachable"
CAUSES = {
    "SQLITE_BUSY": LOCKED,
    "SQLITE_LOCKED": LOCKED,
    "SQLITE_PROTOCOL": LOCKED,
    "SQLITE_FULL": FULL,
    "SQLITE_IOERR": "on a failing disk",
    "SQLITE_CANTOPEN": UNREACHABLE,
    "SQLITE_READONLY": "read-only",
}
"""SQLite errors that may pass, and how a message describes the database then. SQLite's other errors are bugs."""
DISK_FULL = "53100"
"""PostgreSQL's error code for a full disk."""
POSTGRES_OPTIONS = {"connect_timeout": 10, "keepalives_idle": 20, "keepalives_interval": 5, "keepalives_count": 3}
"""PostgreSQL connection options, in seconds (but for the count). They detect a server that vanished without closing."""
UNFINISHED_STATES = (TrialState.RUNNING, TrialState.WAITING)


class QuickStorage(RDBStorage):
    """Reads all trials of a study, as each run does once, in a quarter of Optuna's time: as rows, not an object per value."""

    def _get_trials(
        self, study_id: int, states: Container[TrialState] | None, included_trial_ids: set[int], trial_id_greater_than: int
    ) -> list[FrozenTrial]:
        if trial_id_greater_than >= 0:
            return super()._get_trials(study_id, states, included_trial_ids, trial_id_greater_than)
        with _create_scoped_session(self.scoped_session) as session:
            models.StudyModel.find_or_raise_by_id(study_id, session)
            trials = _all_trials(session, study_id)
        return [trial for trial in trials if states is None or trial.state in states]


def _all_trials(session: Session, study_id: int) -> list[FrozenTrial]:
    """All trials of a study in order of creation. Intermediate values are left out: ranksearch never writes any."""
    trial, param, value = models.TrialModel, models.TrialParamModel, models.TrialValueModel
    user, system = models.TrialUserAttributeModel, models.TrialSystemAttributeModel

    def rows(order: Any, *columns: Any) -> dict[int, list[Any]]:
        """By trial id, the values of these columns in the trial's rows."""
        rows_of = defaultdict(list)
        wanted: Any = Select(trial.trial_id, *columns).join(trial).where(trial.study_id == study_id).order_by(order)
        for trial_id, *row in session.execute(wanted):
            rows_of[trial_id].append(row)
        return rows_of

    params = rows(param.param_id, param.param_name, param.param_value, param.distribution_json)
    values = rows(value.objective, value.value, value.value_type)
    users, systems = rows(user.key, user.key, user.value_json), rows(system.key, system.key, system.value_json)
    kind = functools.cache(json_to_distribution)

    def read(trial_row: Any) -> FrozenTrial:
        i = trial_row.trial_id
        return FrozenTrial(
            trial_id=i, number=trial_row.number, state=trial_row.state, value=None,
            datetime_start=trial_row.datetime_start, datetime_complete=trial_row.datetime_complete,
            values=[value.stored_repr_to_value(*row) for row in values[i]] or None,
            params={name: kind(text).to_external_repr(inner) for name, inner, text in params[i]},
            distributions={name: kind(text) for name, _, text in params[i]},
            user_attrs={key: json.loads(text) for key, text in users[i]},
            system_attrs={key: json.loads(text) for key, text in systems[i]},
            intermediate_values={},
        )  # fmt: skip

    return [read(trial_row) for trial_row in session.query(trial).filter(trial.study_id == study_id).order_by(trial.trial_id)]


class Unusable(Exception):
    """The database is temporarily unusable. `cause` completes "the database is ...", such as "locked by another program"."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def cause_of(error: BaseException | None) -> str | None:
    """Why the database is temporarily unusable, from an SQLAlchemy error or one that it caused; None for other errors."""
    while error is not None:
        if isinstance(error, OperationalError | InterfaceError):
            if isinstance(error.orig, sqlite3.Error):
                name = getattr(error.orig, "sqlite_errorname", "")  # SQLITE_IOERR_WRITE is a kind of SQLITE_IOERR
                return CAUSES.get("_".join(name.split("_")[:2]))
            return FULL if getattr(error.orig, "sqlstate", None) == DISK_FULL else UNREACHABLE
        error = error.__cause__ or error.__context__
    return None


def _as_unusable(context: ExceptionContext) -> None:
    """Raise `Unusable` in place of a driver's error.

    Optuna would take the driver's error for invalid data, and repeat some calls without checking whether the first succeeded.
    """
    cause = cause_of(context.sqlalchemy_exception)
    # SQLAlchemy itself replaces a connection that fails its test before use.
    if cause and not context.is_pre_ping:
        raise Unusable(cause)


class Patience:
    """Repeats a call while the database is temporarily unusable, for at most `MAX_WAIT_SECONDS`, and announces the wait."""

    def __init__(self, address: str, announce: Callable[[str], None]) -> None:
        """`address` is that of the storage, without its password."""
        self._address, self._announce = address, announce
        self._since: float | None = None
        """The `time.monotonic()` at which the database became unusable; None while it is usable."""
        self._interrupted = False
        """Whether Ctrl-C was pressed during a wait. Later calls, which write the end of the study, then do not wait."""

    def __call__(self, call: Callable[[bool], T]) -> T:
        """The result of `call(again)`, where `again` says whether the call was tried before.

        Raises:
            StudyError: the database stays unusable for `MAX_WAIT_SECONDS`.
        """
        try:
            return self._repeated(call)
        except KeyboardInterrupt:
            self._interrupted = self._since is not None
            raise

    def _repeated(self, call: Callable[[bool], T]) -> T:
        again = False
        while True:
            try:
                result = call(again)
            except Unusable as error:
                again = True
                self._wait(error.cause)
            else:
                if self._since is not None and not self._interrupted:
                    self._announce(f"the storage is back after {time.monotonic() - self._since:.0f} s")
                    self._since = None
                return result

    def _wait(self, cause: str) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        if self._since is None:
            self._since = time.monotonic()
            self._announce(f"the storage {self._address} is {cause}; trying again for {MAX_WAIT_SECONDS / 60:g} minutes")
        elif time.monotonic() - self._since > MAX_WAIT_SECONDS:
            raise StudyError(
                f"The storage {self._address} must stay usable while a study runs, but has been {cause} for "
                f"{MAX_WAIT_SECONDS:.0f} s; all finished work is saved: run the same command again once the storage is usable."
            )
        time.sleep(RETRY_SECONDS)


def _retried(method: M) -> M:
    """A method of `RDBStorage` that waits for the database. Repeating the method must do no harm."""

    @functools.wraps(method)
    def call(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        return self._patience(lambda again: method(self, *args, **kwargs))

    return cast("M", call)


class PatientStorage(QuickStorage):
    """Waits while the database is temporarily unusable: locked by another program, on a full disk, or on an unreachable server.

    If the connection is lost during a commit, the commit may have succeeded or not. Setting an attribute or a parameter twice
    does no harm. For new trials and trial states the storage first looks up whether the commit succeeded; that works because
    only one driver writes to a study.
    """

    def __init__(self, url: str, patience: Patience, **kwargs: Any) -> None:
        self._patience = patience
        super().__init__(url, **kwargs)
        event.listen(self.engine, "handle_error", _as_unusable)
        weakref.finalize(self, self.engine.dispose)  # nothing else closes the connections

    create_new_study = _retried(RDBStorage.create_new_study)
    delete_study = _retried(RDBStorage.delete_study)
    set_study_user_attr = _retried(RDBStorage.set_study_user_attr)
    set_study_system_attr = _retried(RDBStorage.set_study_system_attr)
    get_study_id_from_name = _retried(RDBStorage.get_study_id_from_name)
    get_study_name_from_id = _retried(RDBStorage.get_study_name_from_id)
    get_study_directions = _retried(RDBStorage.get_study_directions)
    get_study_user_attrs = _retried(RDBStorage.get_study_user_attrs)
    get_study_system_attrs = _retried(RDBStorage.get_study_system_attrs)
    get_trial = _retried(RDBStorage.get_trial)
    get_all_trials = _retried(RDBStorage.get_all_trials)
    set_trial_user_attr = _retried(RDBStorage.set_trial_user_attr)
    set_trial_system_attr = _retried(RDBStorage.set_trial_system_attr)
    # Called by Optuna's cache in front of the storage.
    _get_trials = _retried(QuickStorage._get_trials)
    _set_trial_param = _retried(RDBStorage._set_trial_param)

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        before = {trial._trial_id for trial in self.get_all_trials(study_id, deepcopy=False, states=UNFINISHED_STATES)}

        def create(again: bool) -> FrozenTrial:
            # Bypasses `_patience`: a locked SQLite file can still be read, which would look like the end of the wait.
            created = QuickStorage._get_trials(self, study_id, UNFINISHED_STATES, set(), -1) if again else []
            created = [trial for trial in created if trial._trial_id not in before]
            return created[0] if created else RDBStorage._create_new_trial(self, study_id, template_trial)

        return self._patience(create)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        def tell(again: bool) -> bool:
            if again and RDBStorage.get_trial(self, trial_id).state is state:
                return True
            return RDBStorage.set_trial_state_values(self, trial_id, state, values)

        return self._patience(tell)
