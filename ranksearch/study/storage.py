"""The Optuna storage of a study: it waits while its database is temporarily unusable."""

from __future__ import annotations

import copy
import functools
import itertools
import sqlite3
import time
import weakref
from collections.abc import Callable, Container, Sequence
from typing import Any, TypeVar, cast

from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import InterfaceError, OperationalError

from ranksearch.errors import StudyError
from ranksearch.study.rows import read_trials

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
        return self._patience(lambda again: method(self._optuna, *args, **kwargs))

    return cast("M", call)


class PatientStorage(BaseStorage):
    """Waits while the database is temporarily unusable: locked by another program, on a full disk, or on an unreachable server.

    If the connection is lost during a commit, the commit may have succeeded or not. Setting an attribute or a parameter twice
    does no harm. For new trials and trial states the storage first looks up whether the commit succeeded; that works because
    only one driver writes to a study.
    """

    # Not a subclass of `RDBStorage`: Optuna would put its own cache in front, which calls private methods.
    def __init__(self, url: str, patience: Patience, **kwargs: Any) -> None:
        self._patience = patience
        self._optuna = RDBStorage(url, **kwargs)
        self.engine = self._optuna.engine
        self._finished: dict[int, dict[int, FrozenTrial]] = {}
        """By study id and trial id, the trials before the first unfinished one. They do not change any more."""
        event.listen(self.engine, "handle_error", _as_unusable)
        weakref.finalize(self, self.engine.dispose)  # nothing else closes the connections

    create_new_study = _retried(RDBStorage.create_new_study)
    set_study_user_attr = _retried(RDBStorage.set_study_user_attr)
    set_study_system_attr = _retried(RDBStorage.set_study_system_attr)
    get_study_id_from_name = _retried(RDBStorage.get_study_id_from_name)
    get_study_name_from_id = _retried(RDBStorage.get_study_name_from_id)
    get_study_directions = _retried(RDBStorage.get_study_directions)
    get_study_user_attrs = _retried(RDBStorage.get_study_user_attrs)
    get_study_system_attrs = _retried(RDBStorage.get_study_system_attrs)
    get_all_studies = _retried(RDBStorage.get_all_studies)
    set_trial_param = _retried(RDBStorage.set_trial_param)
    set_trial_intermediate_value = _retried(RDBStorage.set_trial_intermediate_value)
    set_trial_user_attr = _retried(RDBStorage.set_trial_user_attr)
    set_trial_system_attr = _retried(RDBStorage.set_trial_system_attr)
    get_trial = _retried(RDBStorage.get_trial)

    def delete_study(self, study_id: int) -> None:
        self._finished.pop(study_id, None)
        self._patience(lambda again: self._optuna.delete_study(study_id))

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = self._patience(lambda again: self._trials(study_id)).values()
        wanted = [trial for trial in trials if states is None or trial.state in states]
        return copy.deepcopy(wanted) if deepcopy else wanted

    def _trials(self, study_id: int) -> dict[int, FrozenTrial]:
        """All trials of a study by id, in order of creation."""
        finished = self._finished.setdefault(study_id, {})
        with self.engine.connect() as connection:
            others = read_trials(connection, study_id, after=max(finished, default=-1))
        finished |= itertools.takewhile(lambda entry: entry[1].state.is_finished(), others.items())
        return finished | others

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        before = self.get_n_trials(study_id)

        def create(again: bool) -> int:
            # Bypasses `_patience`: a locked SQLite file can still be read, which would look like the end of the wait.
            created = list(self._trials(study_id))[before:] if again else []
            return created[0] if created else self._optuna.create_new_trial(study_id, template_trial)

        return self._patience(create)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        def tell(again: bool) -> bool:
            if again and self._optuna.get_trial(trial_id).state is state:
                return True
            return self._optuna.set_trial_state_values(trial_id, state, values)

        return self._patience(tell)
