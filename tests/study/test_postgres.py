"""A PostgreSQL server as storage: restarts and lost answers do no harm, bad addresses give a message of one sentence."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import optuna
import pytest

from ranksearch.console import Silent
from ranksearch.errors import StudyError
from ranksearch.results.messages import Outcome
from ranksearch.results.objectives import Objectives
from ranksearch.study import database, folder, storage
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from tests.books import Books
from tests.conftest import refuse, tiny_spec

BINARIES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
INITDB = shutil.which("initdb") or (BINARIES and str(BINARIES / "initdb"))

AWAY = 1
"""Seconds without the server. 20 passed too."""

pytestmark = [
    pytest.mark.skipif(not INITDB, reason="there is no initdb, of PostgreSQL's server"),
    pytest.mark.slow,
    pytest.mark.usefixtures("bare"),
]


class Server:
    """A PostgreSQL server for the tests. PostgreSQL refuses to run as root, so root runs it as the user nobody."""

    def __init__(self, place: Path) -> None:
        self._binaries, self._data = Path(INITDB).parent, place / "data"
        self._user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.getuid() == 0 else {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        secret = place / "secret"
        secret.write_text("s3cret")
        if self._user:
            shutil.chown(place, "nobody", "nogroup")
            shutil.chown(secret, "nobody", "nogroup")
        self._run("initdb", "--no-sync", "--auth=scram-sha-256", "--username=me", f"--pwfile={secret}", "-D", self._data)
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql://me:s3cret@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -k {self._data} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run("pg_ctl", "-w", "-D", self._data, "-l", self._data / "log", "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-w", "-D", self._data, "-m", "fast", "stop")

    def _run(self, command: str, *arguments: object) -> None:
        words = [str(self._binaries / command), *map(str, arguments)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd="/", **self._user)


@pytest.fixture(scope="module")
def server():
    with tempfile.TemporaryDirectory(prefix="ranksearch-postgres-") as place:
        server = Server(Path(place))
        yield server
        server.stop()


class Heard(Silent):
    """A view that keeps the notes of a study."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.trials = threading.Semaphore(0)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def trial(self, record, trials) -> None:
        self.trials.release()


def test_a_study_outlives_a_restart_of_its_database(server, tmp_path):
    """The server is away for a while between trials: all trials run, none twice, and two notes tell of it."""
    view = Heard()

    def restart():
        for _ in range(3):
            view.trials.acquire()
        server.stop()
        time.sleep(AWAY)
        server.start()

    restarting = threading.Thread(target=restart)
    restarting.start()
    spec = tiny_spec("name=restarted", "search.trials=7", "finalists.count=2", "search.sampler=random")
    record = run_study(spec, tmp_path / "restarted", Options(Local(0), storage=server.url), view=view)
    restarting.join()
    assert sorted(trial.index for trial in record.trials) == list(range(7))
    assert all(trial.outcome is Outcome.DONE for trial in record.trials)
    assert sum(trial.finalist is not None for trial in record.trials) == 2
    away, back = view.notes
    assert (
        away == f"the storage postgresql://me:***@127.0.0.1:{server.port}/postgres is unreachable; trying again for 5 minutes"
    )
    assert back.startswith("the storage is back after ")
    study = folder.open_study("restarted", server.url)
    assert {trial.state.name for trial in study.trials} == {"COMPLETE"}


@pytest.mark.parametrize("loses", ["before", "after"])
def test_a_commit_without_an_answer_is_made_once(server, loses, monkeypatch):
    """Every third commit loses its connection, before or after it is made; the record is that of an undisturbed run."""
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr("random.random", lambda: 0.0)  # no sleep between Optuna's own attempts
    quiet, torn = Books(), Books()
    store = database.check_storage(server.url)
    torn.study = optuna.create_study(study_name=f"torn {loses}", storage=store, directions=Objectives().directions)
    quiet.run(8)
    commits = 0
    engine = store.engine
    whole = engine.dialect.do_commit

    def lose(connection):
        nonlocal commits
        commits += 1
        if commits % 3 == 0:
            if loses == "after":
                whole(connection)
            connection.driver_connection.close()
        whole(connection)

    monkeypatch.setattr(engine.dialect, "do_commit", lose)
    torn.run(8)
    assert commits > 100
    assert [record.plan for record in torn.trained] == [record.plan for record in quiet.trained]
    states = [trial.state.name for trial in torn.study.get_trials()]
    assert states == [trial.state.name for trial in quiet.study.get_trials()]


def test_a_database_that_stays_away_ends_the_study(server, monkeypatch):
    monkeypatch.setattr(storage, "MAX_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.2)
    study = folder.create_study("away", server.url, Objectives())
    server.stop()
    try:
        with pytest.raises(
            StudyError,
            match=r"The storage postgresql.*me:\*\*\*@.* must stay usable while a study runs, but has been unreachable for",
        ):
            study.set_user_attr("key", 1)
    finally:
        server.start()


def test_bad_addresses_are_one_sentence(server, study_file, capsys):
    for url, reason in {
        server.url.replace("s3cret", "pa55word"): 'password authentication failed for user "me"',
        server.url.replace(str(server.port), "1"): "Connection refused",
        server.url.replace("postgresql://", "postgres://"): "Can't load plugin: sqlalchemy.dialects:postgres",
        server.url.replace("/postgres", "/nowhere"): 'database "nowhere" does not exist',
    }.items():
        start = time.monotonic()
        told = refuse(capsys, "study", "small.toml", "--storage", url)
        assert time.monotonic() - start < 30
        assert told.startswith("The storage postgres")
        assert reason in told
        assert "pa55word" not in told
        assert "s3cret" not in told


def test_one_run_at_a_time_holds_a_study(server):
    words = rf"Only one run at a time may use a study, but 'alone' in postgresql://me:\*\*\*@127.0.0.1:{server.port}/postgres is in use"
    again = database.study_lock("alone", server.url)
    with (
        database.study_lock("alone", server.url),
        database.study_lock("other", server.url),
        pytest.raises(StudyError, match=words),
    ):
        again.__enter__()
    with database.study_lock("alone", server.url):
        server.stop()  # which releases the lock
        server.start()
    with database.study_lock("alone", server.url):
        pass
    server.stop()
    try:
        with pytest.raises(StudyError, match=r"The storage postgresql://me:\*\*\*@.* cannot be used: .*refused"):
            database.study_lock("alone", server.url).__enter__()
    finally:
        server.start()
