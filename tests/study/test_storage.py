"""The storage reads the same record as Optuna's, faster, and waits for a database that cannot be used for now."""

import math
import re
import sqlite3
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import event, inspect, text
from sqlalchemy.exc import OperationalError

from ranksearch.console import Silent
from ranksearch.errors import StudyError
from ranksearch.results.objectives import Objectives
from ranksearch.strategy import ledger
from ranksearch.study import database, folder, rows, storage
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


def test_trials_that_finish_later_and_other_programs_trials_are_seen(tmp_path):
    url = folder.storage_url(tmp_path, None)
    ours = folder.create_study("shared", url, Objectives())
    fill(ours)
    theirs = optuna.load_study(study_name="shared", storage=RDBStorage(url))
    assert ours.trials == theirs.trials
    theirs.tell(4, (0.25, 2.0))
    theirs.enqueue_trial({"rank": 2})
    assert ours.trials == theirs.trials
    assert [trial.state.name for trial in ours.trials[4:]] == ["COMPLETE", "WAITING", "WAITING"]


def test_a_new_study_does_not_have_the_trials_of_a_deleted_one(tmp_path):
    """SQLite gives the id of a deleted study to the next one."""
    store = database.check_storage(folder.storage_url(tmp_path, None))
    fill(optuna.create_study(study_name="one", storage=store, directions=Objectives().directions))
    optuna.delete_study(study_name="one", storage=store)
    assert optuna.create_study(study_name="two", storage=store, directions=Objectives().directions).trials == []


@pytest.mark.parametrize("name", rows.TABLES)
def test_optuna_has_the_table(name, tmp_path):
    """`read_trials` reads these tables and columns, which Optuna does not document."""
    engine = RDBStorage(folder.storage_url(tmp_path, None)).engine
    there = {column["name"] for column in inspect(engine).get_columns(name)} if inspect(engine).has_table(name) else set()
    engine.dispose()
    lacking = set(rows.TABLES[name]) - there
    assert not lacking, f"Optuna's table {name} lacks the columns {sorted(lacking)} that ranksearch/study/rows.py reads"


@pytest.mark.parametrize("stored", ["FINITE", *rows.INFINITE])
def test_optuna_writes_the_value_type(stored, tmp_path):
    """`read_trials` reads `trial_values.value_type`, which Optuna does not document."""
    study = optuna.create_study(storage=(theirs := RDBStorage(folder.storage_url(tmp_path, None))))
    study.add_trial(optuna.trial.create_trial(value=rows.INFINITE.get(stored, 0.5)))
    with theirs.engine.connect() as connection:
        written = connection.scalar(text("SELECT value_type FROM trial_values"))
    theirs.engine.dispose()
    assert written == stored, "Optuna writes another trial_values.value_type than ranksearch/study/rows.py reads"


def test_optuna_writes_times_in_utc(tmp_path, monkeypatch):
    """`read_trials` converts `trials.datetime_start` to local time as Optuna does, which it does not document."""
    monkeypatch.setenv("TZ", "XYZ-5")
    time.tzset()
    theirs = RDBStorage(folder.storage_url(tmp_path, None))
    optuna.create_study(storage=theirs).ask()
    with theirs.engine.connect() as connection:
        written = datetime.fromisoformat(connection.scalar(text("SELECT datetime_start FROM trials")))
    theirs.engine.dispose()
    monkeypatch.undo()
    time.tzset()
    assert abs(datetime.now(UTC).replace(tzinfo=None) - written) < timedelta(minutes=10), (
        "Optuna writes trials.datetime_start in another time than UTC, which ranksearch/study/rows.py expects"
    )


def test_optuna_calls_no_private_method_of_the_storage():
    """Optuna puts its cache, which calls private methods, only in front of an `RDBStorage`."""
    assert not issubclass(storage.PatientStorage, RDBStorage)


def test_optuna_keeps_queued_parameters_as_fixed_params():
    """The ledger queues interrupted trials again from this attribute, which Optuna does not document."""
    study = optuna.create_study()
    study.enqueue_trial({"rank": 3})
    assert study.trials[0].system_attrs.get(ledger.QUEUED_PARAMS) == {"rank": 3}, (
        "Optuna keeps the parameters of a queued trial elsewhere than ranksearch/strategy/ledger.py reads them"
    )


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

    store = database.check_storage(url, announce)
    locked.study = optuna.create_study(study_name="locked", storage=store, directions=Objectives().directions)
    commits = 0

    @event.listens_for(store.engine, "before_cursor_execute")
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
    assert all(re.fullmatch(r"the storage is back after \d+ s", note) for note in notes[1::2])


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

    store = database.check_storage(url, announce)
    study = optuna.create_study(study_name="full", storage=store, directions=Objectives().directions)

    def room(pages):
        with store.engine.connect() as connection:
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
    with pytest.raises(StorageInternalError, match="An exception is raised during the commit"):
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
