"""The database behind a storage: masks the password in its address, opens it, and locks a study in it for one run."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import filelock
from optuna.exceptions import StorageInternalError
from sqlalchemy import create_engine, event, func, select
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from ranksearch.errors import StudyError, first_line
from ranksearch.study.storage import (
    BUSY_TIMEOUT_SECONDS,
    LOCKED,
    POSTGRES_OPTIONS,
    Patience,
    PatientStorage,
    Unusable,
    cause_of,
)

Announce = Callable[[str], None]
"""Called with a message when a run starts to wait for its storage, and when the wait is over."""
OPEN_ATTEMPTS = 3
"""How often to try to open a storage whose tables another run is creating."""


def silent(text: str) -> None:
    """Ignore the announcement."""


def check_storage(url: str, announce: Announce = silent) -> PatientStorage:
    """Open the Optuna storage at a database address. Waits while another program locks it.

    Raises:
        StudyError: the address is invalid, or the storage cannot be reached or is not an Optuna storage. The message never
            shows a password.
    """
    address = address_of(url)
    patience = Patience(masked(url), announce)
    for attempt in range(1, OPEN_ATTEMPTS + 1):
        try:
            return patience(lambda again: _connect(address, patience))
        except (ImportError, SQLAlchemyError, StorageInternalError, RuntimeError) as error:
            # Another run that starts at the same time creates the same tables.
            if "already exists" not in str(error) or attempt == OPEN_ATTEMPTS:
                raise _storage_error(url, error) from None
        time.sleep(attempt)
    raise AssertionError("the last attempt returns or raises")


def masked(url: str) -> str:
    """A storage's address without its password and without its options, which may also contain a password."""
    with suppress(ArgumentError, ValueError):
        address = make_url(url)
        if "@" not in (address.host or ""):
            return address.set(query={}).render_as_string(hide_password=True)
    # Even an invalid address may contain a password, so leave out everything before the last @.
    _, at, tail = url.partition("?")[0].rpartition("@")
    return f"***@{tail}" if at else tail


def address_of(url: str) -> URL:
    """Parse a storage's address. A PostgreSQL address without a driver gets psycopg 3.

    Raises:
        StudyError: the address is invalid, names a database in memory, or has an unescaped @ in its password.
    """
    try:
        address = make_url(url)
        if address.get_backend_name() == "sqlite" and address.database in (None, "", ":memory:"):
            raise StudyError(
                f"A storage must be kept after the run, but {masked(url)} is in memory; name a file, such as sqlite:///study.db."
            )
        if "@" in (address.host or ""):
            raise StudyError(f"An @ in a storage's password must be written as %40, but {masked(url)!r} has two.")
        return address.set(drivername="postgresql+psycopg") if address.drivername == "postgresql" else address
    except (ArgumentError, ValueError):
        raise StudyError(f"A storage must be a database URL such as sqlite:///study.db, but got {masked(url)!r}.") from None


def _connect(address: URL, patience: Patience) -> PatientStorage:
    url = address.render_as_string(hide_password=False)
    options: dict[str, Any] = {"pool_pre_ping": True}
    if address.get_backend_name() == "postgresql":
        options["connect_args"] = POSTGRES_OPTIONS
    if address.get_backend_name() != "sqlite":
        return PatientStorage(url, patience, engine_kwargs=options)
    options["connect_args"] = {"timeout": BUSY_TIMEOUT_SECONDS}
    try:
        storage = PatientStorage(url, patience, engine_kwargs=options)
    except (SQLAlchemyError, StorageInternalError) as error:
        if cause_of(error) == LOCKED:
            raise Unusable(LOCKED) from error
        raise
    event.listen(storage.engine, "connect", _quick_commits)
    storage.engine.dispose()  # drop the connections that were made without `_quick_commits`
    return storage


def _quick_commits(connection: sqlite3.Connection, record: object) -> None:
    """Let SQLite append to a log instead of waiting for the disk twice at each of a trial's twenty commits.

    A killed process loses nothing. After a power failure the last commits may be missing, but no record is corrupted.
    """
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _storage_error(url: str, error: Exception) -> StudyError:
    if isinstance(error, ImportError) and error.name:
        reason = f"the Python package {error.name!r} is not installed"
    else:
        reason = first_line(getattr(error, "orig", None) or error)
    fix = "the free space on its disk" if address_of(url).get_backend_name() == "sqlite" else "that its server is running"
    return StudyError(
        f"The storage {masked(url)} cannot be used: {_without_password(reason, url)}; check its address and {fix}."
    )


def _without_password(text: str, url: str) -> str:
    """Mask the address, or `:password@`, in a text. The bare password is not replaced: it may be a common word."""
    address = address_of(url)
    for full_address in (url, address.render_as_string(hide_password=False)):
        text = text.replace(full_address, masked(url))
    for password in {address.password, quote(str(address.password), safe="")} if address.password else set():
        text = text.replace(f":{password}@", ":***@")
    return text


@contextmanager
def study_lock(name: str, url: str) -> Iterator[None]:
    """Lock the study of that name in its storage for this run. Several folders or machines may share the storage.

    For SQLite this locks a hidden file beside the database, for PostgreSQL it takes an advisory lock. Both are released when
    the process ends, however it ends; PostgreSQL's also when the server ends. In other databases nothing is locked.

    Raises:
        StudyError: another run holds the lock, or the storage cannot be used.
    """
    address = address_of(url)
    with ExitStack() as release:
        try:
            locked = _try_lock(name, address, release)
        except (OSError, SQLAlchemyError) as error:
            raise _storage_error(url, error) from None
        if not locked:
            raise StudyError(
                f"Only one run at a time may use a study, but {name!r} in {masked(url)} is in use; wait for that run, give it "
                "more --workers, or choose another name."
            )
        yield


def _try_lock(name: str, address: URL, release: ExitStack) -> bool:
    """Try to lock the study and return whether that succeeded. Closing `release` releases the lock."""
    if address.get_backend_name() == "sqlite":
        database = Path(address.database or "").resolve()
        try:
            release.enter_context(filelock.FileLock(database.with_name(f".{database.name}.{name}.lock"), timeout=0))
        except filelock.Timeout:
            return False
    elif address.get_backend_name() == "postgresql":
        # The lock belongs to its connection, so keep one open for the whole run, without a transaction.
        engine = create_engine(address, connect_args=POSTGRES_OPTIONS, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        connection = engine.connect()
        release.callback(_close, connection)
        # By default the server notices a lost client only after two hours.
        for setting, value in (("idle", "20"), ("interval", "5"), ("count", "3")):
            connection.execute(select(func.set_config(f"tcp_keepalives_{setting}", value, False)))
        key = func.hashtextextended(f"ranksearch:{name}", 0)
        return bool(connection.scalar(select(func.pg_try_advisory_lock(key))))
    return True


def _close(connection: Connection) -> None:
    with suppress(SQLAlchemyError):  # the server may be unreachable
        connection.close()
