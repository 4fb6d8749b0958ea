"""Errors that a user can cause. Each message states the rule, the value and the fix in one sentence."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path

MAX_LISTED = 30
"""How many valid names a message lists at most."""


class RankSearchError(Exception):
    """Bad input: the command line prints the message on stderr and exits with code 2. Any other exception is a bug."""


class SpecError(RankSearchError):
    """A study file, a `--set` override or a `package.module:name` reference cannot be used."""


class MissingCodeError(SpecError):
    """A study names a module that cannot be imported here, or a method that nothing has registered here."""


class PlanError(RankSearchError):
    """A plan does not fit the model, or a factorization does not fit its layer."""


class ModelError(RankSearchError):
    """The dense model cannot be searched: it does not accept its input, has nothing to decompose, or holds NaN."""


class DataError(RankSearchError):
    """The data cannot be used: files are missing, or targets lie outside the classes."""


class StudyError(RankSearchError):
    """The study's folder or storage cannot be used."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; errors of other packages may have a long message, or none."""
    return (str(error).strip() or "no message").splitlines()[0].strip()


def described(error: Exception) -> str:
    """An error of foreign code in one line: its type, the first line of its message, and where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    inside = last.filename.startswith(("<", str(Path(__file__).parent)))  # the import system or our unpickling
    return f"{type(error).__name__}: {first_line(error)}" + ("" if inside else f", in {last.filename} line {last.lineno}")


def unloadable(place: str, why: str) -> str:
    """The message for a worker that cannot load the model or the data."""
    return (
        f"Every worker must be able to load the model and the data, but {place} cannot ({why}); fix this, or install the "
        "missing package there, or run without workers by --engine local --workers 0."
    )


def last_line(error: BaseException) -> str:
    """The last line of an error's message; torch puts the mismatch there, below a headline."""
    return (str(error).strip() or "no message").splitlines()[-1].strip()


def nearest(name: str, valid: Iterable[str]) -> str:
    """` Did you mean 'x'?` with the closest valid name, or the list of valid names if none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f" Valid: {', '.join(names[:MAX_LISTED])}{more}." if names else ""
