"""Merges the layers of a finalist that are faster dense, in the study's runtime."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ranksearch.compress.inventory import count_params, inventory
from ranksearch.compress.merging import merge_
from ranksearch.compress.narrowing import narrow_
from ranksearch.compress.surgery import copied
from ranksearch.data import example
from ranksearch.latency.forms import time_forms
from ranksearch.latency.runtimes import runtime_of
from ranksearch.plan import Plan
from ranksearch.results.costs import Sized
from ranksearch.results.trials import TrialRecord
from ranksearch.spec import StudySpec
from ranksearch.strategy.space import Size, size_of
from ranksearch.study.timing import about
from ranksearch.support.batch import repeat_batch
from ranksearch.task.task import Task


@dataclass(frozen=True)
class Merged:
    """A finalist's model with the layers merged that are faster dense, its plan and size, and a line about what was merged."""

    model: nn.Module
    plan: Plan
    size: Sized
    words: str = ""


def merge_faster(spec: StudySpec, task: Task, trial: TrialRecord, loaded: Merged, device: torch.device) -> Merged:
    """Merge the layers of a copy of a finalist's model, as `loaded`, that are faster dense.

    Raises:
        ModelError, StudyError, SpecError: the runtime that the study names does not take the model, or gives no time.
    """
    runtime = runtime_of(spec.latency, device, channels_last=task.channels_last)
    one, batch = example(task.data.validation), spec.latency.batch_size
    given, start = count_params(task.model), copied(task.model)
    if loaded.plan.narrowing is not None:
        narrow_(start, loaded.plan.narrowing)
    layers = inventory(start, one)
    forms = time_forms(loaded.model, loaded.plan, layers, runtime, repeat_batch(one, batch))
    twin = copied(loaded.model)
    plan = merge_(twin, loaded.plan, forms.to_merge)
    costs = size_of(plan, layers).costs
    # No slower than before, so the latency stays the trial's.
    return Merged(twin, plan, Size({**trial.costs, **costs}, given / costs["params"]), forms.words(about(runtime, batch)))
