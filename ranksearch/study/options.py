"""How a study is run: what may differ from run to run and make no other study."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ranksearch.errors import StudyError


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run may change without making another study."""

    workers: int | None = None
    """Trials at a time; by default one a core, one on a GPU, as many as a Ray cluster holds. 0 runs them in this process."""
    engine: str = "local"
    """`local`: processes on this machine; `ray`: Ray Tune."""
    address: str | None = None
    """The Ray cluster, `auto` or HOST:PORT; by default Ray is started on this machine and stopped at the end."""
    cpus_per_trial: int = 1
    """CPUs of a trial on Ray, and its threads."""
    gpus_per_trial: float = 0.0
    """GPUs of a trial on Ray, whole or a fraction."""
    device: str = "auto"
    """Where to train: `cpu`, `cuda`, one GPU of several such as `cuda:1`, `mps`, or `auto`: CUDA if it is there. On Ray, trials
    are on a GPU where `gpus_per_trial` says so."""
    storage: str | None = None
    """An Optuna database address; the folder's own SQLite file by default."""
    fresh: bool = False
    """Start over: what the folder and the storage hold of the study is deleted."""
    command: str = "ranksearch.search(...)"
    """What makes the study again, for the report."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise StudyError(f"--workers must be at least 0, but got {self.workers}.")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise StudyError(f"--device must be auto, cpu, cuda, cuda:N or mps, but got {self.device!r}.")
        if self.engine not in ("local", "ray"):
            raise StudyError(f"--engine must be local or ray, but got {self.engine!r}.")
        if self.engine == "ray" and self.workers == 0:
            raise StudyError("--workers must be at least 1 for --engine ray, but got 0.")
        if self.engine == "local" and (self.address, self.cpus_per_trial, self.gpus_per_trial) != (None, 1, 0):
            raise StudyError("--address, --cpus-per-trial and --gpus-per-trial are for --engine ray, but the engine is local.")
        if self.cpus_per_trial < 1:
            raise StudyError(f"--cpus-per-trial must be at least 1, but got {self.cpus_per_trial}.")
        if not (0 <= self.gpus_per_trial < 1 or (self.gpus_per_trial >= 1 and float(self.gpus_per_trial).is_integer())):
            raise StudyError(f"--gpus-per-trial must be whole or a fraction of one, but got {self.gpus_per_trial:g}.")
        if self.engine == "ray" and self.device.startswith("cuda") and not self.gpus_per_trial:
            raise StudyError(f"--gpus-per-trial must be above 0 for --device {self.device} with --engine ray, but got 0.")
        if self.engine == "ray" and self.device == "mps":
            raise StudyError("--device must be auto, cpu or cuda for --engine ray, which has no other GPUs, but got mps.")
        if self.device == "cpu" and self.gpus_per_trial:
            raise StudyError(f"--gpus-per-trial must be 0 for --device cpu, but got {self.gpus_per_trial:g}.")


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA where there is a GPU. Raises `StudyError` for a device that is not there."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    there = ["cpu", *(f"cuda:{index}" for index in range(cuda)), *(["mps"] if torch.backends.mps.is_available() else [])]
    if name not in there and not (name == "cuda" and cuda):
        raise StudyError(f"--device must be one that torch finds on this machine ({', '.join(there)}), but got {name}.")
    return torch.device(name)
