"""The folder of a study: whose it is, that one run at a time has it, and the Optuna storage inside or outside it."""

from __future__ import annotations

import shutil
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import filelock
import optuna
from optuna.exceptions import StorageInternalError
from sqlalchemy import create_engine, event, func, select
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from ranksearch.errors import SpecError, StudyError, first_line
from ranksearch.files import write_whole, writing
from ranksearch.objectives import Objectives
from ranksearch.spec import StudySpec, complete_identity, parse_spec
from ranksearch.storage import BUSY_TIMEOUT, CONNECT, LOCKED, Patience, PatientStorage, Unusable, cause_of

SPEC, DATABASE, DENSE = "spec.toml", "study.db", "dense.safetensors"
UNFINISHED = "unfinished"
"""The folder with the checkpoints of what is being trained."""
REPORT = ("report.html", "report.md", "front.*", "front-*.png", "trials.csv")
OURS = ("study.db*", DENSE, UNFINISHED, "profile", "models", "export", *REPORT, SPEC)
"""All that a study writes into its folder, and all that `--fresh` deletes; the spec goes last, since it marks the folder."""
MARK = "# Written by ranksearch: the study of this folder, as resolved."
ELSEWHERE = "# storage: "
"""Of the spec, the line with the storage's address where it is not the folder's own."""
IDENTITY = "ranksearch:identity"
Announce = Callable[[str], None]
"""Is told when a run has to wait for its storage, and when it waits no more."""
ATTEMPTS = 3
"""At a storage whose tables another run is making."""
NAMES = {"params": "log10 ratio", "macs": "log10 MACs ratio"}
"""Of the costs, on the axes of optuna-dashboard."""


def _nothing(text: str) -> None:
    """Announces nothing."""


@contextmanager
def claimed(
    folder: Path, spec: StudySpec, storage: str | None, *, fresh: bool, announce: Announce = _nothing
) -> Iterator[None]:
    """Hold the study's folder, and its study, for this run; `fresh` first deletes what a study wrote there, and nothing else.

    Raises:
        StudyError: the folder is a file, holds something else, another study or one whose record is in another storage, cannot
            be written, or it or the study is in use.
        SpecError: the spec in it is damaged, or of another release.
    """
    if folder.exists() and not folder.is_dir():
        raise StudyError(f"The output must be a folder, but {folder} is a file; choose another --out.")
    ours = _is_a_studys(folder)
    # Hidden files are the lock, and what a killed run was about to write.
    if not ours and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise StudyError(f"The output folder must be a study's or empty, but {folder} holds other files; choose another --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise StudyError(
            f"One run at a time may use a folder, but {folder} is in use; wait for it or choose another --out."
        ) from None
    except OSError as error:
        raise StudyError(f"The output folder {folder} cannot be written: {error.strerror}; choose another --out.") from None
    try:
        if ours and not fresh:
            _same_study(f"The folder {folder}", _spec_of_a_run(folder).identity(), spec)
            _check_place(folder, spec, storage, announce)
        with held_alone(spec.name, storage_url(folder, storage)):
            if fresh:
                with writing(f"The output folder {folder}", "choose another --out"):
                    _empty(folder)
            yield
    finally:
        lock.release()


@contextmanager
def held_alone(name: str, url: str) -> Iterator[None]:
    """Hold the study of that name in its storage, which several folders or machines may share, for this run.

    By a lock on a hidden file beside an SQLite database, or an advisory lock of PostgreSQL, which both end with their process,
    however that ends; PostgreSQL's ends with the server too. In other servers a study is not held.

    Raises:
        StudyError: another run holds it, or the storage cannot be used.
    """
    address = _address(url)
    with ExitStack() as held:
        try:
            taken = _take(name, address, held)
        except (OSError, SQLAlchemyError) as error:
            raise _unusable(url, error) from None
        if not taken:
            raise StudyError(
                f"One run at a time may go on with a study, but {name!r} in {masked(url)} is in use; wait for it, give it more "
                "--workers, or choose another name."
            )
        yield


def _take(name: str, address: URL, held: ExitStack) -> bool:
    """Whether the study could be taken; `held` gives it back."""
    if address.get_backend_name() == "sqlite":
        database = Path(address.database or "").resolve()
        try:
            held.enter_context(filelock.FileLock(database.with_name(f".{database.name}.{name}.lock"), timeout=0))
        except filelock.Timeout:
            return False
    elif address.get_backend_name() == "postgresql":
        # One connection for the whole run, in no transaction: the lock is the connection's.
        engine = create_engine(address, connect_args=CONNECT, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        connection = engine.connect()
        held.callback(_close, connection)
        # The server's own idea of when a client is gone is two hours.
        for setting, value in (("idle", "20"), ("interval", "5"), ("count", "3")):
            connection.execute(select(func.set_config(f"tcp_keepalives_{setting}", value, False)))
        key = func.hashtextextended(f"ranksearch:{name}", 0)
        return bool(connection.scalar(select(func.pg_try_advisory_lock(key))))
    return True


def _close(connection: Connection) -> None:
    with suppress(SQLAlchemyError):  # the server may have been away
        connection.close()


def read_spec(folder: Path) -> StudySpec:
    """The resolved spec of the study in a folder.

    Raises:
        StudyError: there is none.
        SpecError: it is damaged.
    """
    try:
        text = (folder / SPEC).read_text(encoding="utf-8")
    except OSError:
        raise StudyError(f"A study's folder must hold {SPEC}, but {folder} does not; name a folder under runs/.") from None
    return parse_spec(text, source=str(folder / SPEC), resolved=True)


def write_spec(folder: Path, spec: StudySpec, storage: str | None) -> None:
    """Keep the resolved spec, and the storage's address (without its password) where it is not the folder's own."""
    note = f"{ELSEWHERE}{_place(storage)}\n" if storage else ""
    with writing(f"The study's {folder / SPEC}"):
        write_whole(folder / SPEC, f"{MARK}\n{note}{spec.to_toml()}")


def noted_storage(folder: Path) -> str:
    """The address, without its password, of the storage that the folder's study has elsewhere; empty where it has none."""
    return next((line for line in _text(folder).splitlines() if line.startswith(ELSEWHERE)), "").removeprefix(ELSEWHERE)


def storage_url(folder: Path, storage: str | None) -> str:
    """The address of the study's Optuna storage: the one given, or the SQLite file in its folder."""
    # Not by pasting text together: a folder's name may hold what an address would read as its options.
    return storage or URL.create("sqlite", database=str(folder / DATABASE)).render_as_string()


def open_study(name: str, url: str, *, announce: Announce = _nothing) -> optuna.Study:
    """The Optuna study of that name.

    Raises:
        StudyError: the storage cannot be reached, is no Optuna storage, or has no such study.
    """
    address = _address(url)
    if address.drivername == "sqlite" and not Path(address.database or "").exists():
        raise StudyError(f"The storage {address.database} does not exist; run `ranksearch study` first, or give --storage.")
    study = _find(name, check_storage(url, announce))
    if study is None:
        raise StudyError(f"The storage {masked(url)} holds no study {name!r}; run `ranksearch study` first.")
    return study


def create_study(name: str, url: str, objectives: Objectives, *, announce: Announce = _nothing) -> optuna.Study:
    """The Optuna study of that name; made, with these objectives, where it is not there.

    Raises:
        StudyError: the storage cannot be reached or is no Optuna storage.
    """
    storage = check_storage(url, announce)
    return optuna.create_study(study_name=name, storage=storage, directions=objectives.directions, load_if_exists=True)


def check_storage(url: str, announce: Announce = _nothing) -> PatientStorage:
    """The Optuna storage at a database address. Waits where another program locks it.

    Raises:
        StudyError: the address is none, or the storage cannot be reached or is no Optuna storage. Never shows a password.
    """
    address = _address(url)
    patience = Patience(masked(url), announce)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return patience(lambda again: _connected(address, patience))
        except (ImportError, SQLAlchemyError, StorageInternalError, RuntimeError) as error:
            # Another run that starts at the same time makes the same tables.
            if "already exists" not in str(error) or attempt == ATTEMPTS:
                raise _unusable(url, error) from None
        time.sleep(attempt)
    raise AssertionError("the last attempt returns or raises")


def _unusable(url: str, error: Exception) -> StudyError:
    if isinstance(error, ImportError) and error.name:
        reason = f"the Python package {error.name!r} is not installed"
    else:
        reason = first_line(getattr(error, "orig", None) or error)
    fix = "and the room on its disk" if _address(url).get_backend_name() == "sqlite" else "and that it is up"
    return StudyError(f"The storage {masked(url)} cannot be used: {_without_password(reason, url)}; check its address, {fix}.")


def _without_password(text: str, url: str) -> str:
    """The text with the address masked, whole or in part. The password alone may be a word, or a letter, of the text."""
    address = _address(url)
    for whole in (url, address.render_as_string(hide_password=False)):
        text = text.replace(whole, masked(url))
    for password in {address.password, quote(str(address.password), safe="")} if address.password else set():
        text = text.replace(f":{password}@", ":***@")
    return text


def _connected(address: URL, patience: Patience) -> PatientStorage:
    url = address.render_as_string(hide_password=False)
    options: dict[str, Any] = {"pool_pre_ping": True}
    if address.get_backend_name() == "postgresql":
        options["connect_args"] = CONNECT
    if address.get_backend_name() != "sqlite":
        return PatientStorage(url, patience, engine_kwargs=options)
    options["connect_args"] = {"timeout": BUSY_TIMEOUT}
    try:
        storage = PatientStorage(url, patience, engine_kwargs=options)
    except (SQLAlchemyError, StorageInternalError) as error:
        if cause_of(error) == LOCKED:
            raise Unusable(LOCKED) from error
        raise
    event.listen(storage.engine, "connect", _quick_commits)
    storage.engine.dispose()  # it has connected before
    return storage


def _quick_commits(connection: sqlite3.Connection, about: object) -> None:
    """Appends to a log instead of waiting for the disk twice at each of a trial's twenty commits. A killed process loses
    nothing by it; a machine without power may lose the last commits, but no record is torn."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def check_study(spec: StudySpec, url: str, *, fresh: bool, announce: Announce = _nothing) -> None:
    """Refuse a storage whose study of that name is not this one, before anything is written; `fresh` may delete one of ours.

    Raises:
        StudyError: the storage cannot be used, or its study of that name is another, or none of ranksearch's.
        SpecError: it was begun with keys that this release does not know.
    """
    study = _find(spec.name, check_storage(url, announce))
    if study is not None:
        _check_ours(study, spec, fresh=fresh)


def delete_study(name: str, url: str, *, announce: Announce = _nothing) -> None:
    """Remove the study of that name from its storage, if it is there."""
    with suppress(KeyError):
        optuna.delete_study(study_name=name, storage=check_storage(url, announce))


def own_study(study: optuna.Study, spec: StudySpec) -> None:
    """Keep in the storage what the study is, where it is new; raises as `check_study` does: folders may share a storage, not a
    study."""
    _check_ours(study, spec, fresh=False)
    if not study.metric_names:
        with warnings.catch_warnings():
            # Marked experimental in Optuna since 3.2; it only names the axes of optuna-dashboard.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(["validation score", *(NAMES[cost] for cost in spec.search.minimize)])
    if IDENTITY not in study.user_attrs:
        study.set_user_attr(IDENTITY, spec.identity())


def masked(url: str) -> str:
    """A storage's address without its password and its options, which may hold one too."""
    try:
        return make_url(url).set(query={}).render_as_string(hide_password=True)
    except ArgumentError:
        # What is no address may hold a password all the same: all before the last @ is left out.
        _, at, tail = url.rpartition("@")
        return f"***@{tail}" if at else url


def _address(url: str) -> URL:
    """The address taken apart; PostgreSQL's is of psycopg 3 where it names no driver."""
    try:
        address = make_url(url)
        if address.get_backend_name() == "sqlite" and address.database in (None, "", ":memory:"):
            raise StudyError(
                f"A storage must outlive its run, but {masked(url)} is in memory; name a file, such as sqlite:///study.db."
            )
        return address.set(drivername="postgresql+psycopg") if address.drivername == "postgresql" else address
    except ArgumentError:
        raise StudyError(f"A storage must be a database URL such as sqlite:///study.db, but got {masked(url)!r}.") from None


def _same_study(place: str, there: Mapping[str, Any], spec: StudySpec) -> None:
    here = spec.identity()
    for key in sorted({*there, *here}):
        if there.get(key) != here.get(key):
            raise StudyError(
                f"{place} is another study ({key} is {there.get(key)!r} there and {here.get(key)!r} here); "
                "choose another --out or name, or --fresh to start over."
            )


def _find(name: str, storage: PatientStorage) -> optuna.Study | None:
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return None


def _check_ours(study: optuna.Study, spec: StudySpec, *, fresh: bool) -> None:
    known = study.user_attrs.get(IDENTITY)
    place = f"The storage's study {spec.name!r}"
    if known is None:
        # An empty one is what a run leaves that was killed as it began.
        ours = study.directions == [optuna.study.StudyDirection.MAXIMIZE] * (1 + len(spec.search.minimize))
        if study.user_attrs or study.get_trials(deepcopy=False) or not ours:
            raise StudyError(
                f"{place} must be one of ranksearch's, but is another program's; choose another name or --storage."
            )
    elif not fresh:
        _same_study(place, complete_identity(known, source=place), spec)


def _spec_of_a_run(folder: Path) -> StudySpec:
    try:
        return read_spec(folder)
    except SpecError as error:
        raise SpecError(
            f"{error} The file is damaged or another release's; choose another --out, or --fresh to start over."
        ) from None


def _check_place(folder: Path, spec: StudySpec, storage: str | None, announce: Announce) -> None:
    """Refuse to begin a study anew beside its record, as when an option was forgotten; a record that was moved is taken."""
    noted = noted_storage(folder)
    was = noted or ("the folder's own" if (folder / DATABASE).exists() else None)
    now = _place(storage) if storage else "the folder's own"
    if was is None or was == now:
        return
    if (folder / DATABASE).exists() if storage is None else _find(spec.name, check_storage(storage, announce)) is not None:
        return
    fix = f"give --storage {noted}" if noted else "leave out --storage"
    raise StudyError(
        f"The study in {folder} must go on in the storage that it was begun in, {was}, but {now} holds none of it; {fix}, or "
        "--fresh to start over."
    )


def _place(storage: str) -> str:
    """A storage's address, without its password, from wherever a run may start."""
    address = make_url(storage)
    if address.get_backend_name() == "sqlite":
        address = address.set(database=str(Path(address.database or "").resolve()))
    return address.set(query={}).render_as_string()


def _is_a_studys(folder: Path) -> bool:
    """Whether a run of ours wrote the folder; a user's own spec.toml among other files is none of ours."""
    return _text(folder).startswith(MARK)


def _text(folder: Path) -> str:
    try:
        return (folder / SPEC).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _empty(folder: Path) -> None:
    for pattern in OURS:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
