"""Evaluate one plan in a worker: copy the dense model, factorize it, fine-tune it, score it."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ranksearch.compress.preparing import kernel
from ranksearch.compress.profile import Profile
from ranksearch.compress.scratch import scratch_
from ranksearch.compress.surgery import factorize_
from ranksearch.compress.weights import digest_of, weights_of
from ranksearch.compress.widths import redraw_, scale_width_
from ranksearch.data import example, sample
from ranksearch.methods import METHODS, Method, register_method
from ranksearch.plan import Plan
from ranksearch.results.messages import CurvePoint, Difference, Job, Outcome, Result, Stage
from ranksearch.spec import Finalists, Recipe
from ranksearch.support.copies import deep_copy
from ranksearch.task import training
from ranksearch.task.bootstrap import difference
from ranksearch.task.checkpoint import Checkpoint
from ranksearch.task.task import Task
from ranksearch.task.training import Diverged

CONTROLS = "controls"
"""The folder of the checkpoints of controls, in that of all checkpoints."""
MAX_PROBE_INPUTS = 2048
"""The largest number of validation inputs that a probe uses. Not all, since each layer has several probes."""


@dataclass(frozen=True)
class Evaluator:
    """Evaluates jobs. It holds everything that a study's trials share; made once and sent once to each worker."""

    task: Task
    profile: Profile
    finetune: Recipe
    finalists: Finalists
    device: str
    scratch: bool = False
    """Train trials and finalists from random weights. Probes use decomposed weights in any case."""
    narrow: Mapping[float, tuple[nn.Module, Profile]] = field(default_factory=dict)
    """By width, the narrower nets that plans may start from, each with the factors of its layers."""
    narrow_recipe: Recipe = Recipe(0)
    """How narrower nets are trained."""
    controls: Recipe | None = None
    """How controls are trained, if there are any."""
    unfinished: Path | None = None
    """The folder for checkpoints of finalists and controls. A worker that cannot write to it, such as one on another machine,
    keeps none."""
    methods: tuple[Method, ...] = field(default_factory=lambda: tuple(METHODS.values()))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # A worker process knows only this package's methods; register those that were registered in the driver.
        for method in self.methods:
            register_method(method)

    def __call__(self, job: Job) -> Iterator[CurvePoint | Result]:
        """Evaluate a job: yield a learning-curve point before training and after each epoch, and at the end the result.

        A finalist that resumes from a checkpoint yields only the remaining points; its result has all of them.
        """
        checkpoint, outcome, fields = self._checkpoint(job), Outcome.DONE, dict[str, Any]()
        try:
            if job.stage is Stage.PROBE:
                fields = {"loss": self._loss(self.compressed(job.plan), job.seed)}
            else:
                fields = yield from self._trained(job, checkpoint)
        except Diverged:
            outcome = Outcome.DIVERGED
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            outcome = Outcome.OUT_OF_MEMORY
        training.release(torch.device(self.device))
        yield Result(outcome, tuple(checkpoint.curve_points), checkpoint.seconds(), **fields)

    def _trained(self, job: Job, checkpoint: Checkpoint) -> Generator[CurvePoint, None, dict[str, Any]]:
        """Yield the remaining learning-curve points; returns the test score and the weights of a long job."""
        model = deep_copy(self._start(job.plan)[0])
        for curve_point in self._curve_points(model, job, checkpoint):
            checkpoint.curve_points.append(curve_point)
            yield curve_point
        if job.stage is Stage.NARROW:
            return {"weights": weights_of(model)}
        if job.stage is Stage.TRIAL:
            return {}
        score_test = self._score(model, self.task.data.test)
        if job.stage is Stage.CONTROL:
            return {"score_test": score_test}
        return {"score_test": score_test, "weights": weights_of(model), **self._differences(model, job.seed)}

    def _differences(self, model: nn.Module, seed: int) -> dict[str, Difference | None]:
        """How the model's scores differ from those of the dense model, by the field of the result."""
        dense, data, differences = self._placed(deep_copy(self.task.model)), self.task.data, {}
        # The outputs of one split at a time: those of whole images may take gigabytes.
        for name, split in {"validation": data.validation, "test": data.test}.items():
            outputs, targets = self._predictions(model, split)
            dense_outputs, _ = self._predictions(dense, split)
            differences[f"difference_{name}"] = difference(self.task.score, outputs, dense_outputs, targets, seed=seed)
        return differences

    def _predictions(self, model: nn.Module, split: Dataset[Any]) -> tuple[Any, Any]:
        return training.predictions(model, self.task, split, device=torch.device(self.device))

    def _start(self, plan: Plan) -> tuple[nn.Module, Profile]:
        """The net that a plan factorizes, and the factors of its layers."""
        return self.narrow.get(plan.width, (self.task.model, self.profile))

    def compressed(self, plan: Plan) -> nn.Module:
        """A copy of the dense model, factorized as `plan` says, before any fine-tuning."""
        model, profile = self._start(plan)
        return self._factorized(deep_copy(model), profile, plan, 0)

    def _factorized(self, model: nn.Module, layers: Profile, plan: Plan, sweeps: int) -> nn.Module:
        factors = layers.factors(plan, sweeps=sweeps)
        factorize_(model, plan, factors=factors, bias_corrections=layers.bias_corrections(plan, factors))
        return self._placed(model)

    def _placed(self, model: nn.Module) -> nn.Module:
        return training.place(model, torch.device(self.device), channels_last=self.task.channels_last)

    def _steps(self, model: nn.Module, job: Job) -> Iterator[None]:
        """Factorize `model` in place as the job's plan says, all layers in one step or one layer a step; yields after each."""
        final = job.stage is Stage.FINALIST
        sweeps, profile = self.finalists.sweeps if final else 0, self._start(job.plan)[1]
        if job.stage is Stage.CONTROL:
            self._placed(redraw_(scale_width_(model, example(self.task.data.train), job.share), seed=job.seed))
            yield
        elif self.scratch:
            self._placed(scratch_(model, job.plan, seed=job.seed))
            yield
        elif final and self.finalists.schedule == "layerwise":
            values = dict(job.plan)
            for name in reversed([name for name in profile.layers if name in values]):
                # Decompose the layer's current weights, which the steps before have fine-tuned, not the dense model's.
                dense_profile = profile.layers[name]
                layers = Profile({name: dense_profile.of(kernel(model, dense_profile.layer), values[name])})
                self._factorized(model, layers, Plan.of({name: values[name]}), sweeps)
                yield
        else:
            self._factorized(model, profile, job.plan, sweeps)
            yield

    def _loss(self, model: nn.Module, seed: int) -> float:
        device = torch.device(self.device)
        training.recalibrate(model, self.task, seed=seed, device=device)
        inputs = sample(self.task.data.validation, MAX_PROBE_INPUTS, seed=seed)
        return training.loss_on(model, self.task, inputs, seed=seed, device=device)

    def _score(self, model: nn.Module, split: Dataset[Any]) -> float:
        score = training.score(model, self.task, split, device=torch.device(self.device))
        if not math.isfinite(score):
            raise Diverged("the score became NaN or infinite")
        return score

    def _curve_points(self, model: nn.Module, job: Job, checkpoint: Checkpoint) -> Iterator[CurvePoint]:
        """The remaining learning-curve points; `checkpoint` has the earlier ones."""
        device = torch.device(self.device)
        recipe = self._recipe(job.stage)
        done = checkpoint.curve_points[-1].epochs if checkpoint.curve_points else -1
        for step, _ in enumerate(self._steps(model, job)):
            before = step * recipe.epochs
            if done > before + recipe.epochs:
                continue  # An earlier run trained this step. Only the structure is needed: the checkpoint has the weights.
            if done <= before:
                training.recalibrate(model, self.task, seed=job.seed, device=device)
            if step == 0 and done < 0:
                yield CurvePoint(0, self._score(model, self.task.data.validation))
            seed = job.seed + before
            for epoch in training.fit(model, self.task, recipe, seed=seed, device=device, checkpoint=checkpoint):
                yield CurvePoint(before + epoch, self._score(model, self.task.data.validation))

    def _recipe(self, stage: Stage) -> Recipe:
        if stage is Stage.CONTROL:
            assert self.controls is not None
            return self.controls
        return {Stage.FINALIST: self.finalists, Stage.NARROW: self.narrow_recipe}.get(stage, self.finetune)

    def _checkpoint(self, job: Job) -> Checkpoint:
        """The checkpoint of a finalist, a control or a narrower net. Other jobs are too short for one; theirs has no file."""
        long = job.stage in (Stage.FINALIST, Stage.CONTROL, Stage.NARROW)
        if not long or self.unfinished is None or not os.access(self.unfinished, os.W_OK):
            return Checkpoint()
        setup = f"{self._recipe(job.stage)}, scratch {self.scratch}, from {digest_of(self._start(job.plan)[0])}"
        structure = f"share {job.share}" if job.stage is Stage.CONTROL else job.plan.to_json()
        return Checkpoint(checkpoint_file(self.unfinished, job), f"{structure}, seed {job.seed}, {setup}")


def checkpoint_file(unfinished: Path, job: Job) -> Path:
    """The checkpoint file of a job."""
    folder = unfinished / CONTROLS if job.stage is Stage.CONTROL else unfinished
    return folder / (f"width-{job.plan.width:g}.pt" if job.stage is Stage.NARROW else f"{job.key}.pt")


def remove_checkpoints(unfinished: Path) -> None:
    """Delete the checkpoints in a folder, and the folder unless it holds checkpoints of another stage."""
    for path in unfinished.iterdir():
        if not path.is_dir():
            path.unlink(missing_ok=True)
    with suppress(OSError):
        unfinished.rmdir()


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory. Only its GPU allocator has an exception type; other sources are known by their text."""
    words = "out of memory", "ALLOC_FAILED", "can't allocate memory"
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in words)
