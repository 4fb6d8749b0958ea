"""Atomic file writes: write a temporary file beside the target, flush it to the disk, rename it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ranksearch.errors import StudyError

RESUME_HINT = "fix this and run the same command again"


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace the content of `path` in one step: a reader, or a crash, sees the old file or the new one, never a part of it.

    Creates missing parent folders. Raises OSError if the write fails, and then leaves the old file as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def writing(target: str, fix: str = RESUME_HINT) -> Iterator[None]:
    """Turn an OSError inside the block, such as a full disk or a protected folder, into a `StudyError` that names `target`."""
    try:
        yield
    except OSError as error:
        raise StudyError(f"{target} cannot be written: {error.strerror}; {fix}.") from None
