"""A local worker process: loads the function that evaluates jobs, once, and then runs one job at a time."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from multiprocessing.connection import Connection

import torch

from ranksearch.engines.base import Crash, Evaluate, Messages
from ranksearch.engines.shared_memory import unpack
from ranksearch.errors import described, unloadable


def serve(driver: Connection, file: int, start: int, threads: int) -> None:
    """Run the jobs that the driver sends until it closes the pipe. `file` (a descriptor) and `start` are those of `Packed`."""
    threading.Thread(target=_end_with_driver, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        evaluate: Evaluate = unpack(file, start)
    except Exception as error:
        with suppress(OSError):
            driver.send(unloadable("a worker process", described(error)))
        return
    # Only the pipe to the driver raises these here: a job's own errors are caught and sent.
    with suppress(EOFError, OSError):
        while True:
            job = driver.recv()
            try:
                _report(evaluate(job), driver)
            except _DriverGone:
                return
            except Exception as error:
                driver.send(Crash.of(error))


def _end_with_driver() -> None:
    """Exit when the driver ends: standard input is a pipe from the driver that nobody writes to.

    Without this, a job could run for hours before its next message fails.
    """
    os.read(0, 1)
    os._exit(1)


class _DriverGone(Exception):
    """The driver no longer reads. A type of its own, since a job may itself raise errors of pipes and files."""


def _report(messages: Messages, driver: Connection) -> None:
    """Send the driver every message of a job."""
    for message in messages:
        try:
            driver.send(message)
        except OSError:
            raise _DriverGone from None
