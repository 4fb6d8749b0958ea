"""The tasks on which `search.py` compares searches: real networks that are trained, and a simulated one with tabulated scores.

The result of a trial depends only on its plan and the seed of the run. Results of real networks are kept on disk, so two
searches that try the same plan under the same seed share one training, and a benchmark that was stopped resumes.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ranksearch.compress.inventory import Inventory, inventory
from ranksearch.compress.profile import Profile, profile
from ranksearch.compress.weights import weights_of
from ranksearch.compress.whitening import inputs_wanted
from ranksearch.console import Silent
from ranksearch.data import example, sample, sample_inputs
from ranksearch.methods import METHODS
from ranksearch.methods.layer import Call, Layer
from ranksearch.plan import SVD, Dense, Factorization, Plan, Tucker2
from ranksearch.results.messages import Job, Result, Stage
from ranksearch.results.record import DEFAULT_STANDARD_ERROR, Probe
from ranksearch.spec import StudySpec
from ranksearch.strategy.predicted_front import Choice
from ranksearch.strategy.sensitivity import predicted_choices, values_to_probe
from ranksearch.strategy.space import SearchSpace, make_space
from ranksearch.study.dense import load_weights, train_dense
from ranksearch.study_file import load_spec
from ranksearch.support.files import write_whole
from ranksearch.task import training
from ranksearch.task.bootstrap import standard_error
from ranksearch.task.checkpoint import Checkpoint
from ranksearch.task.evaluation import Evaluator
from ranksearch.task.task import load_task, predict

CPU = torch.device("cpu")
METHODS_SEARCHED = ("tucker2", "cp", "svd")


@dataclass(frozen=True)
class Run:
    """A finished trial: validation score after each epoch from 0 on, CPU seconds until then, and the test score."""

    scores: tuple[float, ...]
    seconds: tuple[float, ...]
    test: float


class Trained:
    """A study's task with its dense net, profile and probes. A trial is trained when it is first asked for."""

    def __init__(self, spec: StudySpec, folder: Path, *, trained_on: int) -> None:
        """Trials train on only `trained_on` inputs of the training split, so that thousands of trials are affordable."""
        torch.set_num_threads(1)
        folder.mkdir(parents=True, exist_ok=True)
        task, self.spec, self.folder = load_task(spec), spec, folder
        if not load_weights(task.model, folder / "dense.safetensors"):
            unfinished = folder / "dense.pt"
            train_dense(task, spec, CPU, Silent(), unfinished=unfinished)
            write_whole(folder / "dense.safetensors", weights_of(task.model))
            unfinished.unlink(missing_ok=True)
        training.place(task.model, CPU).eval()
        self.inventory: Inventory = inventory(task.model, example(task.data.train))
        self.space: SearchSpace = make_space(self.inventory, spec.space.methods)
        self.profile: Profile = profile(
            task.model, self.inventory, {axis.layer.name: axis.methods for axis in self.space.axes},
            inputs=sample_inputs(task.data.train, inputs_wanted(self.inventory.macs), seed=spec.seed),
            cache=folder / "profile", seed=spec.seed,
        )  # fmt: skip
        fewer = replace(task.data, train=sample(task.data.train, trained_on, seed=spec.seed))
        self._evaluate = Evaluator(replace(task, data=fewer), self.profile, spec.finetune, spec.finalists, "cpu")
        outputs, targets = predict(task.model, task.data.validation)
        self.dense_score = task.score(outputs, targets)
        self.noise = standard_error(task.score, outputs, targets, seed=spec.seed) or DEFAULT_STANDARD_ERROR
        self.dense_test = training.score(task.model, task, task.data.test, device=CPU)
        self.epochs = spec.finetune.epochs
        self.dense_loss, self.probes, self.probe_seconds = self._probed()
        self.choices = predicted_choices(self.profile, self.probes, self.dense_loss)
        self.unprobed_choices = predicted_choices(self.profile, (), self.dense_loss)
        self.vbmf = self.profile.vbmf
        self._store = folder / f"trials-{os.getpid()}.jsonl"
        self._known: dict[tuple[str, int], Run] = {}
        for path in sorted(folder.glob("trials-*.jsonl")):
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                run = Run(tuple(entry["scores"]), tuple(entry["seconds"]), entry["test"])
                self._known[str(Plan.from_dict(entry["plan"])), entry["seed"]] = run

    def run(self, plan: Plan, seed: int) -> Run:
        """The result of training a plan under a seed."""
        key = (str(plan), seed)
        if key not in self._known:
            self._known[key] = run = self._train(plan, seed)
            entry = {"plan": plan.to_dict(), "seed": seed, "scores": run.scores, "seconds": run.seconds, "test": run.test}
            with self._store.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        return self._known[key]

    def _train(self, plan: Plan, seed: int) -> Run:
        # CPU seconds, since other processes on the same cores change them little.
        start, scores, seconds = time.process_time(), [], []
        task = self._evaluate.task
        model = copy.deepcopy(task.model)
        try:
            for curve_point in self._evaluate._curve_points(model, Job(0, plan, seed), Checkpoint()):
                scores.append(curve_point.score)
                seconds.append(time.process_time() - start)
        except training.Diverged:
            scores += [0.0] * (self.epochs + 1 - len(scores))
            seconds += [time.process_time() - start] * (self.epochs + 1 - len(seconds))
        return Run(tuple(scores), tuple(seconds), training.score(model, task, task.data.test, device=CPU))

    def _probed(self) -> tuple[float, list[Probe], float]:
        path = self.folder / "probes.json"
        if not path.exists():
            start, found = time.process_time(), {}
            wanted = [Plan(), *(Plan.of({n: v}) for n, layer in self.profile.layers.items() for v in values_to_probe(layer))]
            for plan in wanted:
                (result,) = list(self._evaluate(Job(0, plan, self.spec.seed, Stage.PROBE)))
                assert isinstance(result, Result)
                found[json.dumps(plan.to_dict())] = result.loss
            path.write_text(json.dumps({"seconds": time.process_time() - start, "losses": found}))
        data = json.loads(path.read_text())
        losses = {Plan.from_dict(json.loads(text)): loss for text, loss in data["losses"].items()}
        return losses[Plan()], [Probe(*p.layers[0], loss) for p, loss in losses.items() if p.layers], data["seconds"]


def digits(folder: Path) -> Trained:
    """Task and recipes of the built-in study `lenet`: the thesis's LeNet on scikit-learn's digits."""
    return Trained(load_spec("lenet"), folder / "digits", trained_on=359)


def cifar10(folder: Path) -> Trained:
    """The thesis's LeNet on CIFAR-10 (from data/), with short training and no augmentation, to be affordable on two cores."""
    overrides = ["task.data_args.validation=2500", "task.data_args.flip=false", "task.data_args.shift=0"]
    overrides += ["dense.epochs=15", "finetune.epochs=1"]
    return Trained(load_spec("lenet-cifar10", overrides=overrides), folder / "cifar10", trained_on=9000)


class Simulated:
    """A simulated network of fifty layers with the shapes of ResNet-50. Scores come from a formula, nothing is trained.

    The singular values of each unfolding follow a power law with a random exponent, from which the error of each choice
    follows. Layers differ in how much their error lowers the trained score, errors of neighbouring layers amplify each
    other, and all scores are noisy. Probes measure the effect of errors before training, which differs from the effect
    after training by a random factor for each layer.
    """

    epochs = 3
    dense_score = dense_test = 0.9
    noise = 0.003
    """The standard deviation of the noise of a score."""
    probe_seconds = 0.0

    def __init__(self, seed: int = 0) -> None:
        draw = random.Random(seed)
        layers = tuple(Layer(name, *about) for name, about in _resnet50())
        size = sum(layer.params for layer in layers)
        self.inventory = Inventory(layers, {}, size, sum(layer.macs for layer in layers))
        self.space = make_space(self.inventory, METHODS_SEARCHED)
        self._powers = {layer.name: [draw.uniform(0.25, 0.9) for _ in range(3)] for layer in layers}
        # A layer with more weights affects the score more, but far less than in proportion.
        self._costs = {x.name: draw.lognormvariate(-3.9, 0.8) * (x.params / size * len(layers)) ** 0.3 for x in layers}
        self._couplings = {layer.name: draw.lognormvariate(-3.9, 0.8) for layer in layers}
        self._methods = {(x.name, kind): draw.lognormvariate(0.0, 0.25) for x in layers for kind in METHODS_SEARCHED}
        seen = {layer.name: draw.lognormvariate(0.0, 0.8) for layer in layers}
        self.vbmf = {layer.name: self._estimate(layer, draw) for layer in layers}
        self.choices, self.unprobed_choices = {}, {}
        for axis in self.space.axes:
            found = [m.value(axis.layer, ranks) for m in axis.methods for ranks in m.rank_grid(axis.layer)]
            name, costs = axis.layer.name, [METHODS[type(v)].params(axis.layer, v.ranks) for v in found]
            squares = [self._square(axis.layer, value) for value in found]
            loss_increase = 4 * self._costs[name] * seen[name]
            self.choices[name] = [
                Choice(v, c, loss_increase * e * (1 + e)) for v, c, e in zip(found, costs, squares, strict=True)
            ]
            self.unprobed_choices[name] = [Choice(v, c, e) for v, c, e in zip(found, costs, squares, strict=True)]

    def run(self, plan: Plan, seed: int) -> Run:
        """The result of a plan; plan and seed determine its noise."""
        draw = random.Random(f"{plan}|{seed}")
        squares = {layer.name: self._square(layer, plan[layer.name]) for layer in self.inventory.layers}
        harm, before = 0.0, 0.0
        for name, square in squares.items():
            harm += self._costs[name] * self._methods.get((name, plan[name].method), 1.0) * square
            harm += self._couplings[name] * before * square
            before = square
        last = self.dense_score * math.exp(-0.05 * harm) - 0.02 * harm**2 / (1 + harm)
        first = max(0.001, self.dense_score * math.exp(-4.0 * harm))
        # The test score is the score without the noise of the validation split.
        true = [last + (first - last) * 0.4**epoch for epoch in range(self.epochs + 1)]
        seconds = tuple(0.1 + epoch for epoch in range(self.epochs + 1))
        return Run(tuple(score + draw.gauss(0.0, self.noise) for score in true), seconds, true[-1])

    def _square(self, layer: Layer, value: Factorization) -> float:
        """The squared relative error of a choice."""
        if isinstance(value, Dense):
            return 0.0
        into, out, both = self._powers[layer.name]
        rows, columns = layer.weight[0], math.prod(layer.weight[1:])
        if isinstance(value, Tucker2):
            kept = (1 - _tail(value.rank_in, layer.weight[1], into)) * (1 - _tail(value.rank_out, rows, out))
            return 1 - kept
        full = min(rows, columns)
        # A CP term captures less than an SVD term, since it has only one direction in every mode.
        (rank,) = value.ranks
        return _tail(rank, full, both) if isinstance(value, SVD) else _tail(rank, 2 * full, 0.8 * both)

    def _estimate(self, layer: Layer, draw: random.Random) -> tuple[int | None, int | None]:
        sizes = (layer.weight[1], layer.weight[0])
        wanted = [draw.lognormvariate(math.log(0.3 * size), 0.5) for size in sizes]
        into, out = (max(1, min(size, round(rank))) if size >= 4 else None for rank, size in zip(wanted, sizes, strict=True))
        return into, out


def _tail(rank: int, full: int, power: float) -> float:
    """The share of energy beyond `rank` if the singular values fall as k^-power."""

    # Sums of k^-2p, approximated by integrals; an error of one rank does not matter here.
    def energy(count: float) -> float:
        return math.log1p(count) if abs(2 * power - 1) < 1e-9 else ((1 + count) ** (1 - 2 * power) - 1) / (1 - 2 * power)

    return max(0.0, 1 - energy(min(rank, full)) / energy(full))


def _resnet50() -> list[tuple[str, tuple[str, tuple[int, ...], bool, tuple[Call, ...]]]]:
    """Names and shapes of the layers to decompose: the stem, three convolutions in each block, the classifier."""
    found = [("stem", ("Conv2d", (64, 3, 7, 7), False, (Call((224, 224), (112, 112)),)))]
    into, side = 64, 56
    for stage, (width, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True), start=1):
        for block in range(1, blocks + 1):
            for part, (out, taken, size) in enumerate(((width, into, 1), (width, width, 3), (4 * width, width, 1)), start=1):
                about = ("Conv2d", (out, taken, size, size), False, (Call((side, side), (side, side)),))
                found.append((f"stage{stage}.{block}.conv{part}", about))
            into = 4 * width
        side //= 2
    return [*found, ("fc", ("Linear", (1000, 2048), True, (Call(),)))]
