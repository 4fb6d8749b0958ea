"""The life of a local worker process: it loads what jobs are evaluated by, once, and then does one job at a time."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from multiprocessing.connection import Connection

import torch

from ranksearch.engines.base import Crash, Evaluate, Messages
from ranksearch.engines.shared import unpack
from ranksearch.errors import described, unloadable


def serve(driver: Connection, file: int, start: int, threads: int) -> None:
    """Do what the driver sends until it closes the pipe. `file` and `start` are of `Packed`."""
    threading.Thread(target=_end_with_driver, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        evaluate: Evaluate = unpack(file, start)
    except Exception as error:
        with suppress(OSError):
            driver.send(unloadable("a worker process", described(error)))
        return
    # Only the driver's end of the pipe raises these: a job's own errors are sent.
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
    """The standard input is a pipe that nobody writes to: it ends when the driver does. A job may be hours from the message
    that finds nobody there."""
    os.read(0, 1)
    os._exit(1)


class _DriverGone(Exception):
    """Nobody reads any more; apart from the errors of a job, which may be of pipes and files as well."""


def _report(messages: Messages, driver: Connection) -> None:
    """Send the driver every message of a job."""
    for message in messages:
        try:
            driver.send(message)
        except OSError:
            raise _DriverGone from None
