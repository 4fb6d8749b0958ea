"""The storage reads the same record as Optuna's, faster, and waits for a database that cannot be used for now."""

import math
import sqlite3
from contextlib import closing

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from ranksearch.console import Silent
from ranksearch.errors import StudyError
from ranksearch.results.objectives import Objectives
from ranksearch.study import database, folder, storage
from ranksearch.study.options import Local, Options
from ranksearch.study.study import Stopped, run_study
from tests.books import Books
from tests.conftest import tiny_spec

pytestmark = pytest.mark.usefixtures("bare")

SPACE = {
    "method": CategoricalDistribution(["dense", "cp"]),
    "level": FloatDistribution(0.0, 1.0),
    "rank": IntDistribution(1, 8),
}


def test_all_trials_are_those_that_optuna_reads(tmp_path):
    url = folder.storage_url(tmp_path, None)
    for name in ("one", "other"):
        fill(folder.create_study(name, url, Objectives()))
    for name in ("one", "other"):
        theirs = optuna.load_study(study_name=name, storage=RDBStorage(url)).trials
        assert folder.open_study(name, url).trials == theirs
        assert [trial.number for trial in theirs] == list(range(6))
    waiting = folder.open_study("one", url).get_trials(states=(TrialState.WAITING,))
    assert [trial.number for trial in waiting] == [5]


def fill(study):
    """Add trials in every state that our studies have, one with an infinite value."""
    for values, state in (
        ((0.5, 1.0), TrialState.COMPLETE),
        ((math.inf, -math.inf), TrialState.COMPLETE),
        (None, TrialState.PRUNED),
        (None, TrialState.FAIL),
        (None, None),
    ):
        trial = study.ask(SPACE)
        trial.set_user_attr("about", {"curve": [[0, 0.25]], "score": None})
        trial.set_constraint("worth", 0.1)
        if state is not None:
            study.tell(trial, values, state=state)
    study.enqueue_trial({"method": "cp", "level": 0.5, "rank": 3}, user_attrs={"place": 6})


@pytest.fixture
def hurried(monkeypatch):
    """Make all waits short."""
    monkeypatch.setattr(storage, "MAX_WAIT_SECONDS", 60)
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(database, "BUSY_TIMEOUT_SECONDS", 0.02)


class Lock:
    """A write lock of another program on an SQLite database."""

    def __init__(self, path):
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)

    def __enter__(self):
        self._connection.execute("BEGIN EXCLUSIVE")

    def __exit__(self, *error):
        self._connection.execute("ROLLBACK")

    def close(self):
        self._connection.close()


def test_the_record_is_the_same_whenever_another_program_locks_the_database(tmp_path, hurried):
    """The database is locked before every third commit, until the wait is announced."""
    quiet, locked, notes = Books(), Books(), []
    quiet.run(8)
    url, lock = folder.storage_url(tmp_path, None), Lock(tmp_path / "study.db")

    def announce(text):
        notes.append(text)
        if "locked" in text:
            lock.__exit__()

    locked.study = folder.create_study("locked", url, Objectives(), announce=announce)
    commits = 0

    @event.listens_for(locked.study._storage._backend.engine, "before_cursor_execute")
    def every_third(connection, cursor, statement, *more):
        nonlocal commits
        if statement.startswith(("INSERT", "UPDATE")):
            commits += 1
            if commits % 3 == 0 and not connection.connection.driver_connection.in_transaction:
                lock.__enter__()

    locked.run(8)
    lock.close()
    assert [record.plan for record in locked.trained] == [record.plan for record in quiet.trained]
    states = [trial.state.name for trial in locked.study.get_trials()]
    assert states == [trial.state.name for trial in quiet.study.get_trials()]
    assert len(notes) > 20
    assert set(notes[::2]) == {f"the storage {url} is locked by another program; trying again for 1 minutes"}
    assert set(notes[1::2]) == {"the storage is back after 0 s"}


def test_a_lock_that_stays_is_one_sentence_wherever_it_is_met(tmp_path, hurried, monkeypatch):
    monkeypatch.setattr(storage, "MAX_WAIT_SECONDS", 0.1)
    url = folder.storage_url(tmp_path, None)
    words = (
        rf"The storage {url} must stay usable while a study runs, but has been locked by another program for 0 s; all finished"
    )
    lock = Lock(tmp_path / "study.db")
    with lock, pytest.raises(StudyError, match=words):
        folder.create_study("begun", url, Objectives())
    study = folder.create_study("begun", url, Objectives())
    for change in (
        lambda: study.set_user_attr("key", 1),
        lambda: study.ask(SPACE),
        lambda: study.enqueue_trial({"rank": 1}),
        lambda: folder.delete_study("begun", url),
        lambda: folder.create_study("second", url, Objectives()),
    ):
        with lock, pytest.raises(StudyError, match=words):
            change()
    with lock:  # reading does not wait
        assert folder.open_study("begun", url).get_trials() == []
    lock.close()


def test_a_full_disk_is_waited_for(tmp_path, hurried):
    """A limit of SQLite on the file's size stands in for a full disk."""
    notes, url = [], folder.storage_url(tmp_path, None)

    def announce(text):
        notes.append(text)
        room(1 << 30)

    study = folder.create_study("full", url, Objectives(), announce=announce)
    engine = study._storage._backend.engine

    def room(pages):
        with engine.connect() as connection:
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    room(1)
    study.set_user_attr("long", "x" * 100_000)
    assert folder.open_study("full", url).user_attrs == {"long": "x" * 100_000}
    assert notes == [f"the storage {url} is on a full disk; trying again for 1 minutes", "the storage is back after 0 s"]


def test_an_error_that_will_not_pass_is_not_waited_for(tmp_path):
    url = folder.storage_url(tmp_path, None)
    study = folder.create_study("torn", url, Objectives(), announce=pytest.fail)
    with closing(sqlite3.connect(tmp_path / "study.db")) as connection:
        connection.execute("DROP TABLE study_user_attributes")
    with pytest.raises(StorageInternalError):
        study.set_user_attr("key", 1)


@pytest.mark.parametrize(("code", "cause"), [("53100", "on a full disk"), ("08006", "unreachable"), (None, "unreachable")])
def test_the_code_of_a_servers_error_tells_the_cause(code, cause):
    error = Exception("a driver's")
    error.sqlstate = code
    assert storage.cause_of(OperationalError("INSERT", {}, error)) == cause


@pytest.mark.slow
def test_ctrl_c_ends_the_wait_and_all_that_would_follow(tmp_path, monkeypatch):
    """The database is locked from the second trial on. One Ctrl-C ends the study; it resumes once the lock is released."""
    monkeypatch.setattr(database, "BUSY_TIMEOUT_SECONDS", 0.02)
    out, spec, locks = tmp_path / "small", tiny_spec("search.trials=3"), []

    class Impatient(Silent):
        def trial(self, record, trials):
            locks.append(Lock(out / "study.db"))
            locks[0].__enter__()

        def note(self, text):
            assert "is locked by another program; trying again" in text, "nothing else is told"
            raise KeyboardInterrupt

    with pytest.raises(Stopped) as stopped:
        run_study(spec, out, Options(Local(0)), view=Impatient())
    assert len(stopped.value.record.trials) == 1
    (lock,) = locks
    lock.__exit__()
    lock.close()
    record = run_study(spec, out, Options(Local(0)))
    assert sorted(trial.index for trial in record.trials) == [0, 1, 2]
