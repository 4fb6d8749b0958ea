"""A killed and resumed training equals an uninterrupted one, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ranksearch.console import Silent
from ranksearch.errors import StudyError
from ranksearch.results.messages import CurvePoint, Job, Outcome, Result, Stage
from ranksearch.study.options import Local, Options
from ranksearch.study.study import Stopped, run_study
from ranksearch.task import checkpoint, training
from ranksearch.task.checkpoint import Checkpoint
from ranksearch.task.evaluation import Evaluator
from ranksearch.task.task import Task
from ranksearch.task.training import Recipe
from tests import nets
from tests.conftest import PLAN, essence, least_spec, make_bare, small_spec

pytestmark = pytest.mark.usefixtures("bare")

CPU = torch.device("cpu")


@pytest.fixture
def always(monkeypatch):
    """Write a checkpoint after every epoch, however short it is."""
    monkeypatch.setattr(checkpoint, "MIN_SECONDS_BETWEEN", 0.0)


def forgetful():
    """A net whose training draws random numbers and changes buffers."""
    torch.manual_seed(0)
    model = nets.small()
    model.relu3 = nn.Dropout(0.5)
    return Task(model, nets.few_digits())


def fitted(task, recipe, path, *, stop_after=99, of="this"):
    """Train for at most `stop_after` epochs; the list of epochs done."""
    told = []
    for epoch in training.fit(task.model, task, recipe, seed=3, device=CPU, checkpoint=Checkpoint(path, of)):
        torch.rand(2)
        told.append(epoch)
        if len(told) > stop_after:
            break
    return told


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stop_after", [1, 3])
def test_resumed_equals_uninterrupted(always, tmp_path, precision, stop_after):
    recipe = Recipe(4, batch_size=32, learning_rate=1e-2, precision=precision)
    whole, first, second = forgetful(), forgetful(), forgetful()
    assert fitted(whole, recipe, None) == [1, 2, 3, 4]
    path = tmp_path / "deep" / "net.pt"
    assert fitted(first, recipe, path, stop_after=stop_after)[-1] == stop_after + 1
    with torch.no_grad():
        second.model.conv1.weight.zero_()  # the whole state must come from the file
    assert Checkpoint(path, "this").epochs == stop_after
    assert fitted(second, recipe, path) == list(range(stop_after + 1, 5))
    expected, got = whole.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_module_is_told_the_version_that_its_checkpoint_was_written_by(always, tmp_path):
    def task():
        return Task(nets.versioned(), nets.few_digits())

    fitted(task(), Recipe(3), tmp_path / "net.pt", stop_after=1)
    second = task()
    fitted(second, Recipe(3), tmp_path / "net.pt")
    assert second.model.loaded == 2


def test_a_short_training_writes_nothing(tmp_path):
    fitted(forgetful(), Recipe(2), tmp_path / "net.pt")
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_training_is_passed_over(always, tmp_path):
    path = tmp_path / "net.pt"
    fitted(forgetful(), Recipe(3), path, stop_after=2)
    assert Checkpoint(path, "this").epochs == 2
    assert Checkpoint(path, "that").epochs == 0
    assert fitted(forgetful(), Recipe(3), path, of="that") == [1, 2, 3]


def test_a_damaged_file_is_told(tmp_path):
    path = tmp_path / "net.pt"
    path.write_bytes(b"no checkpoint")
    with pytest.raises(StudyError, match=r"A checkpoint must be readable, but .*net.pt is not \(\w+\); delete it\."):
        Checkpoint(path, "this")


def test_learning_curve_and_seconds_continue(always, tmp_path, monkeypatch):
    path, model = tmp_path / "net.pt", nets.small()
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    kept = Checkpoint(path, "this")
    kept.curve_points.append(CurvePoint(0, 0.25))
    now[0] = 107.0
    kept.save(1, torch.Generator(), model=model)
    now[0] = 200.0
    again = Checkpoint(path, "this")
    now[0] = 201.0
    assert again.curve_points == [CurvePoint(0, 0.25)]
    assert again.seconds() == 8.0


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"scratch": True}, {"schedule": "layerwise"}, {"sweeps": 2}], ids=str)
def test_a_finalist_goes_on_wherever_it_was_killed(always, tmp_path, evaluator, options):
    job = Job(7, PLAN, 0, Stage.FINALIST)
    *curve_points, whole = evaluator(**options)(job)
    assert isinstance(whole, Result)
    for killed_at in range(1, len(curve_points) + 1):
        folder = tmp_path / str(killed_at)
        folder.mkdir()
        messages = evaluator(**options, unfinished=folder)(job)
        for _ in range(killed_at):
            next(messages)
        del messages
        *again, result = evaluator(**options, unfinished=folder)(job)
        held = killed_at - 1 if killed_at > 2 else 0  # an epoch's checkpoint is written after its score is passed on
        assert again == curve_points[held:]
        assert result.curve == whole.curve
        assert result.weights == whole.weights
        assert result.score_test == whole.score_test


def test_a_worker_without_the_folder_keeps_no_checkpoint(always, tmp_path, evaluator):
    *_, result = evaluator(unfinished=tmp_path / "not here")(Job(7, PLAN, 0, Stage.FINALIST))
    assert result.score_test is not None
    assert not list(tmp_path.iterdir())


class Stopping(Silent):
    """A view that raises Ctrl-C at the nth message of one stage."""

    def __init__(self, stage, at):
        self.wanted, self.left, self.now, self.done, self.curve_points = stage, at, "", [], []

    def stage(self, name, total, done=0):
        self.now = name
        self.done.append((name, done))

    def tick(self):
        if self.now == self.wanted:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    def step(self, text=""):
        self.tick()

    def curve_point(self, key, curve_point):
        if self.now == "finalists":
            self.curve_points.append(curve_point.epochs)
        self.tick()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The spec, the folder and the record of a study that was never stopped."""
    out = tmp_path_factory.mktemp("undisturbed") / "small"
    spec = small_spec("search.trials=2", "finalists.count=1", "finalists.epochs=5", "dense.epochs=10")
    with pytest.MonkeyPatch.context() as patch:
        make_bare(patch)
        return spec, out, run_study(spec, out, Options(Local(0)))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "at"), [("training the dense net", 8), ("finalists", 4)])
def test_a_study_goes_on_in_the_midst_of_a_training(always, undisturbed, tmp_path, stage, at):
    spec, kept, whole = undisturbed
    out = tmp_path / "small"
    with pytest.raises(Stopped) as stopped:
        run_study(spec, out, Options(Local(0)), view=Stopping(stage, at))
    assert (stopped.value.record is None) == (stage != "finalists"), "nothing is known before the dense net is trained"
    assert [path.suffix for path in (out / "unfinished").iterdir()] == [".pt"]
    view = Stopping("", 0)
    record = run_study(spec, out, Options(Local(0)), view=view)
    assert essence(record.trials) == essence(whole.trials)
    assert record.facts.dense.score_test == whole.facts.dense.score_test
    assert not (out / "unfinished").exists()
    assert (out / "dense.safetensors").read_bytes() == (kept / "dense.safetensors").read_bytes()
    assert (stage, 7) in view.done if stage != "finalists" else view.curve_points == [3, 4, 5]


@pytest.mark.slow
def test_a_finalist_that_ran_out_of_memory_goes_on(always, tmp_path, monkeypatch):
    spec, out = least_spec("finalists.epochs=4"), tmp_path / "small"
    curve_points = Evaluator._curve_points

    def short_of_memory(self, model, job, checkpoint):
        for curve_point in curve_points(self, model, job, checkpoint):
            if job.stage is Stage.FINALIST and curve_point.epochs == 3:
                raise RuntimeError("CUDA error: out of memory")
            yield curve_point

    monkeypatch.setattr(Evaluator, "_curve_points", short_of_memory)
    (trial,) = run_study(spec, out, Options(Local(0))).trials
    assert trial.failed is Outcome.OUT_OF_MEMORY
    monkeypatch.setattr(Evaluator, "_curve_points", curve_points)
    view = Stopping("", 0)
    (trial,) = run_study(spec, out, Options(Local(0)), view=view).trials
    assert view.curve_points == [3, 4]
    assert [curve_point.epochs for curve_point in trial.finalist.curve] == [0, 1, 2, 3, 4]
    assert not (out / "unfinished").exists()


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "MPS backend out of memory (MPS allocated: 17.50 GiB, max allowed: 18.13 GiB). Tried to allocate 1.00 GiB on private pool.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    ],
)
def test_an_out_of_memory_error_is_known_by_its_text(evaluator, trained, message):
    def failing(outputs, targets):
        raise RuntimeError(message)

    *_, result = replace(evaluator(), task=replace(trained, loss=failing))(Job(0, PLAN, 0))
    assert result.outcome is Outcome.OUT_OF_MEMORY
    assert [curve_point.epochs for curve_point in result.curve] == [0]


def test_another_runtime_error_is_raised(evaluator, trained):
    def failing(outputs, targets):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        list(replace(evaluator(), task=replace(trained, loss=failing))(Job(0, PLAN, 0)))


@pytest.mark.slow
def test_a_study_started_over_trains_from_the_beginning(always, tmp_path):
    out, spec = tmp_path / "small", small_spec("search.trials=1", "finalists.count=1")
    with pytest.raises(Stopped) as stopped:
        run_study(spec, out, Options(Local(0)), view=Stopping("training the dense net", 8))
    assert stopped.value.record is None
    view = Stopping("", 0)
    run_study(spec, out, Options(Local(0), fresh=True), view=view)
    assert ("training the dense net", 0) in view.done


def test_a_full_disk_costs_the_checkpoint_and_not_the_training(always, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_whole", full)
    assert fitted(forgetful(), Recipe(2), tmp_path / "net.pt") == [1, 2]


def test_a_finalist_of_another_dense_net_starts_anew(always, tmp_path, evaluator, trained):
    job = Job(7, PLAN, 0, Stage.FINALIST)
    messages = evaluator(unfinished=tmp_path)(job)
    for _ in range(3):
        next(messages)
    other = replace(evaluator(unfinished=tmp_path), task=replace(trained, model=nets.small()))
    assert next(other(job)).epochs == 0
    assert next(evaluator(unfinished=tmp_path)(job)).epochs == 2
