"""A study's folder and its Optuna storage: checks that they belong to this study, and lets one run at a time use them."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import optuna
from sqlalchemy.engine import URL, make_url

from ranksearch.errors import MissingCodeError, SpecError, StudyError
from ranksearch.report.pictures import PICTURES
from ranksearch.results.costs import COSTS
from ranksearch.results.objectives import Objectives
from ranksearch.spec import StudySpec
from ranksearch.study.database import Announce, address_of, check_storage, masked, silent, study_lock
from ranksearch.study.storage import PatientStorage
from ranksearch.study_file import parse_spec
from ranksearch.support.files import write_whole, writing

SPEC, DATABASE, DENSE_FILE = "spec.toml", "study.db", "dense.safetensors"
UNFINISHED = "unfinished"
"""The folder of the checkpoints of unfinished trainings."""
REPORT = ("report.html", "report.md", "front.*", "front-*.png", "trials.csv", "controls.csv")
NARROW = "narrow"
STUDY_FILES = ("study.db*", DENSE_FILE, UNFINISHED, NARROW, "profile", "models", "export", PICTURES, *REPORT, SPEC)
"""Everything that a study writes into its folder and `--fresh` deletes. The spec is deleted last, since it marks the folder."""
SPEC_HEADER = "# Written by ranksearch: the study of this folder, as resolved."
START_OVER = "choose another --out or name, or --fresh to start over"
ANOTHER_OR_START_OVER = "choose another --out, or --fresh to start over"
USE_OR_START_OVER = "use that release, or start over by `ranksearch study` with --fresh"
STORAGE_LINE = "# storage: "
"""Start of the line in spec.toml that names the storage, if it is not the SQLite file in the folder."""
ATTRIBUTE_PREFIX, IDENTITY = "ranksearch:", "ranksearch:study"
"""The prefix of our study attributes, and the attribute that identifies the study."""
RECORD_FORMAT = 2
"""Version of the records in a storage. Raise it with each change after which older records cannot be read or resumed."""
WEIGHTS_KEY = "dense.weights"
RMS_TOLERANCE = 1e-3
"""Relative tolerance of a root mean square. The same images, decoded by other releases of a library, differ by less."""
INPUTS_WORDS = {
    "count": "the number of inputs in split {!r} is",
    "inputs": "the root mean square of some inputs in split {!r} is",
    "targets": "the root mean square of some targets in split {!r} is",
}
"""How an error message names each statistic of `inputs_of`."""


@contextmanager
def folder_lock(
    folder: Path, spec: StudySpec, storage: str | None, *, fresh: bool, announce: Announce = silent
) -> Iterator[None]:
    """Lock the study and its folder for this run. `fresh` first deletes the files of the earlier study, and only these.

    Raises:
        StudyError: the folder is a file, cannot be written, or holds other files, another study, or a study with its record in
            another storage; or another run is using the folder or the study.
        SpecError: the spec in the folder is damaged or from another release.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise StudyError(f"The output folder's name must be UTF-8, but is {str(folder)!r}; choose another --out.") from None
    if folder.exists() and not folder.is_dir():
        raise StudyError(f"The output must be a folder, but {folder} is a file; choose another --out.")
    ours = _is_study_folder(folder)
    # Hidden files are allowed: the lock, and temporary files of a killed run.
    if not ours and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise StudyError(
            f"The output folder must belong to a study or be empty, but {folder} holds other files; choose another --out."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise StudyError(
            f"Only one run at a time may use a folder, but {folder} is in use; wait for that run or choose another --out."
        ) from None
    except OSError as error:
        raise StudyError(f"The output folder {folder} cannot be written: {error.strerror}; choose another --out.") from None
    try:
        if ours and not fresh:
            _check_same_study(f"The folder {folder}", read_spec(folder, fix=ANOTHER_OR_START_OVER).identity(), spec)
            _check_storage_holds_study(folder, spec, storage, announce)
        with study_lock(spec.name, storage_url(folder, storage)):
            if fresh:
                with writing(f"The output folder {folder}", "choose another --out"):
                    _delete_study_files(folder)
            yield
    finally:
        lock.release()


def read_spec(folder: Path, *, fix: str = USE_OR_START_OVER) -> StudySpec:
    """Read the resolved spec of the study in a folder.

    Raises:
        StudyError: the folder has no spec.
        SpecError: the spec is damaged or from another release; the message recommends `fix`.
    """
    try:
        text = (folder / SPEC).read_text(encoding="utf-8")
    except OSError:
        raise StudyError(f"A study's folder must hold {SPEC}, but {folder} does not; name a folder under runs/.") from None
    try:
        return parse_spec(text, source=str(folder / SPEC))
    except MissingCodeError as error:
        raise SpecError(
            f"{error} The study in {folder} uses code of its own: run from the folder that holds it; methods that a script "
            "defines must move to a module, named in space.plugins."
        ) from None
    except SpecError as error:
        raise SpecError(f"{error} The file is damaged or was written by another release; {fix}.") from None


def write_spec(folder: Path, spec: StudySpec, storage: str | None) -> None:
    """Write the resolved spec, with the address of `storage` (without its password) if one is given."""
    note = f"{STORAGE_LINE}{_public_address(storage)}\n" if storage else ""
    with writing(f"The study's {folder / SPEC}"):
        write_whole(folder / SPEC, f"{SPEC_HEADER}\n{note}{spec.to_toml()}")


def storage_in_spec(folder: Path) -> str:
    """The address, without its password, of the storage that spec.toml names; empty if the storage is in the folder."""
    lines = (line for line in _spec_text(folder).splitlines() if line.startswith(STORAGE_LINE))
    return next(lines, "").removeprefix(STORAGE_LINE)


def storage_url(folder: Path, storage: str | None) -> str:
    """The address of the study's Optuna storage: the one given, or the SQLite file in its folder."""
    # Built by `URL.create`, since a folder's name may contain characters such as ? that would start the options of a URL.
    return storage or URL.create("sqlite", database=str(folder / DATABASE)).render_as_string()


def open_study(name: str, url: str, *, announce: Announce = silent) -> optuna.Study:
    """Open the existing Optuna study of that name.

    Raises:
        StudyError: the storage cannot be reached or is not an Optuna storage; or it has no such study, or one that another
            release wrote in another format.
    """
    address = address_of(url)
    if address.drivername == "sqlite" and not Path(address.database or "").exists():
        raise StudyError(f"The storage {address.database} does not exist; run `ranksearch study` first, or give --storage.")
    study = _load_or_none(name, check_storage(url, announce))
    if study is None:
        raise StudyError(f"The storage {masked(url)} holds no study {name!r}; run `ranksearch study` first.")
    _check_readable(study, USE_OR_START_OVER)
    return study


def create_study(name: str, url: str, objectives: Objectives, *, announce: Announce = silent) -> optuna.Study:
    """Open the Optuna study of that name, or create it with these objectives.

    Raises:
        StudyError: the storage cannot be reached or is not an Optuna storage.
    """
    storage = check_storage(url, announce)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))  # or it would print that there is a new study
    try:
        return optuna.create_study(study_name=name, storage=storage, directions=objectives.directions, load_if_exists=True)
    finally:
        optuna.logging.set_verbosity(verbosity)


def check_study(spec: StudySpec, url: str, inputs: Mapping[str, Any], *, fresh: bool, announce: Announce = silent) -> None:
    """Check, before anything is written, that a study of that name in the storage is this study.

    With `fresh`, any study of ranksearch's is accepted, since it will be deleted. `inputs` comes from `inputs_of`.

    Raises:
        StudyError: the storage cannot be used, or its study of that name is another one, was written by another release in
            another format, or belongs to another program.
    """
    study = _load_or_none(spec.name, check_storage(url, announce))
    if study is not None:
        _check_ours(study, spec, inputs, fresh=fresh)


def delete_study(name: str, url: str, *, announce: Announce = silent) -> None:
    """Delete the study of that name from its storage, if it exists."""
    with suppress(KeyError):
        optuna.delete_study(study_name=name, storage=check_storage(url, announce))


def write_identity(study: optuna.Study, spec: StudySpec, inputs: Mapping[str, Any]) -> None:
    """Write the identity of a new study to its storage; raises `StudyError` as `check_study` does if it is another study.

    Several folders may share a storage, but not a study.
    """
    _check_ours(study, spec, inputs, fresh=False)
    if not study.metric_names:
        with warnings.catch_warnings():
            # Optuna has marked this as experimental since 3.2. It only names the axes in optuna-dashboard.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(["validation score", *(f"log10 {COSTS[cost].short_ratio}" for cost in spec.search.minimize)])
    if IDENTITY not in study.user_attrs:
        study.set_user_attr(IDENTITY, {"format": RECORD_FORMAT, "identity": spec.identity(), "inputs": dict(inputs)})


def _check_same_study(place: str, there: Mapping[str, Any], spec: StudySpec) -> None:
    here = spec.identity()
    for key in sorted({*there, *here}):
        # The path of the dense weights may change: `input_difference` compares the weights themselves.
        if key == WEIGHTS_KEY and there.get(key) and here[key] and Path(here[key]).exists():
            continue
        if there.get(key) != here.get(key):
            raise StudyError(
                f"{place} is another study ({key} is {there.get(key)!r} there and {here.get(key)!r} here); {START_OVER}."
            )


def input_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """How two results of `inputs_of` differ, in words; empty if all values that both have agree."""
    was, now = there.get("dense"), here.get("dense")
    if was and now and was != now:
        return f"another dense model (the SHA-256 of its weights is {was[:8]}... there and {now[:8]}... here)"
    for name in ("train", "validation", "test"):
        for key, words in INPUTS_WORDS.items():
            was, now = there[name].get(key), here[name].get(key)
            if None not in (was, now) and not math.isclose(was, now, rel_tol=0 if key == "count" else RMS_TOLERANCE):
                return f"other data ({words.format(name)} {was:.6g} there and {now:.6g} here)"
    return ""


def _load_or_none(name: str, storage: PatientStorage) -> optuna.Study | None:
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return None


def _check_ours(study: optuna.Study, spec: StudySpec, inputs: Mapping[str, Any], *, fresh: bool) -> None:
    place = f"The storage's study {spec.name!r}"
    if not _is_ours(study):
        # A run that was killed as it began leaves an empty study, which may be used.
        ours = study.directions == [optuna.study.StudyDirection.MAXIMIZE] * (1 + len(spec.search.minimize))
        if study.user_attrs or study.get_trials(deepcopy=False) or not ours:
            raise StudyError(
                f"{place} must belong to ranksearch, but belongs to another program; choose another name or --storage."
            )
    elif not fresh:
        _check_readable(study, START_OVER)
        identity = study.user_attrs[IDENTITY]
        _check_same_study(place, identity["identity"], spec)
        if difference := input_difference(identity["inputs"], inputs):
            raise StudyError(f"{place} was started from {difference}; {START_OVER}.")


def _is_ours(study: optuna.Study) -> bool:
    return any(name.startswith(ATTRIBUTE_PREFIX) for name in study.user_attrs)


def _check_readable(study: optuna.Study, fix: str) -> None:
    """Raise `StudyError` if another release of ranksearch wrote the study in another format."""
    if _is_ours(study) and study.user_attrs.get(IDENTITY, {}).get("format") != RECORD_FORMAT:
        raise StudyError(
            f"The storage's study {study.study_name!r} must have a format that this release of ranksearch reads, but another "
            f"release wrote it; {fix}."
        )


def _check_storage_holds_study(folder: Path, spec: StudySpec, storage: str | None, announce: Announce) -> None:
    """Check that the storage is the one that the study was started in, or at least holds the study, as after a move.

    Otherwise a forgotten --storage would silently start the study from nothing.
    """
    noted = storage_in_spec(folder)
    was = noted or ("the folder's own" if (folder / DATABASE).exists() else None)
    now = _public_address(storage) if storage else "the folder's own"
    if was is None or was == now:
        return
    if storage is None:
        has_study = (folder / DATABASE).exists()
    else:
        has_study = _load_or_none(spec.name, check_storage(storage, announce)) is not None
    if has_study:
        return
    fix = f"give --storage {noted}" if noted else "leave out --storage"
    raise StudyError(
        f"The study in {folder} must continue in its storage, {was}, but {now} does not hold it; {fix}, or --fresh to start "
        "over."
    )


def _public_address(storage: str) -> str:
    """A storage's address without its password and options, independent of the current folder."""
    address = make_url(storage)
    if address.get_backend_name() == "sqlite":
        address = address.set(database=str(Path(address.database or "").resolve()))
    return address.set(query={}).render_as_string()


def _is_study_folder(folder: Path) -> bool:
    """Whether ranksearch wrote the folder. A spec.toml of the user's own lacks the mark in its first line."""
    return _spec_text(folder).startswith(SPEC_HEADER)


def _spec_text(folder: Path) -> str:
    try:
        return (folder / SPEC).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _delete_study_files(folder: Path) -> None:
    for pattern in STUDY_FILES:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
