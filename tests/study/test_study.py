"""Whole studies: folder, trials, finalists, devices and dense weights."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import optuna
import pytest
import torch

import ranksearch
from ranksearch import Splits
from ranksearch.compress.saved import load_model
from ranksearch.console import Silent, next_steps
from ranksearch.errors import ModelError, SpecError, StudyError
from ranksearch.report import write_report
from ranksearch.results.choosing import choose
from ranksearch.results.messages import Outcome
from ranksearch.settings import fields
from ranksearch.strategy.finalists import MAX_FINALIST_SCORE_DROP
from ranksearch.study import study
from ranksearch.study.checking import choose_device
from ranksearch.study.dense import train_dense
from ranksearch.study.options import Local, Options, Ray, check_engine, option_of
from ranksearch.study.probing import MAX_PREDICTED_PLANS
from ranksearch.study.study import Stopped, run_study
from ranksearch.task.checks import check_float32
from ranksearch.task.task import Task, predict
from tests import nets
from tests.conftest import small_spec, stored, tiny_spec


def test_the_folder_holds_what_is_promised(finished):
    out, record = finished
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "study.db", "spec.toml", "dense.safetensors", "profile", "models",
        "report.html", "report.md", "front.csv", "front.json", "front.png", "trials.csv",
    }  # fmt: skip
    front = json.loads((out / "front.json").read_text())
    assert [point["trial"] for point in front["front"]] == [trial.number for trial in record.front]
    for point in front["front"]:
        assert {"trial", "score_validation", "score_test", "ratio", "params", "macs", "plan"} <= set(point)
        assert point["score_test"] is not None
        assert point["ratio"] == pytest.approx(front["dense"]["params"] / point["params"])
    assert {"dense", "versions", "seed", "seconds"} <= set(front)
    assert len(record.trials) == 8
    assert sum(trial.finalist is not None for trial in record.trials) == 3


def test_the_first_trials_are_of_the_predicted_front_then_those_of_vbmf(finished):
    _, record = finished
    origins = [trial.origin for trial in record.trials]
    first = origins.index("vbmf tucker2 x1")
    assert origins[:first] == ["frontier"] * first
    assert 1 <= first <= MAX_PREDICTED_PLANS
    assert origins[first + 1] == "vbmf cp x1"


def test_trials_far_below_dense_are_infeasible(finished):
    out, record = finished
    scores = {trial.number: trial.score for trial in record.trials if trial.score is not None}
    told = [trial for trial in sorted(stored(out).trials, key=lambda t: t.datetime_complete) if trial.number in scores]
    assert told
    for at, trial in enumerate(told, start=1):
        best = max(scores[other.number] for other in told[:at])
        floor = min(record.facts.dense.score_validation, best) - MAX_FINALIST_SCORE_DROP
        assert trial.constraints == {"worth taking home": pytest.approx(floor - scores[trial.number])}


def test_trials_are_plain_optuna_trials(finished):
    out, record = finished
    study = optuna.load_study(study_name="small", storage=f"sqlite:///{out / 'study.db'}")
    done = [trial for trial in study.trials if trial.state is optuna.trial.TrialState.COMPLETE]
    assert [(t.number, t.values[0]) for t in done] == [(t.number, t.score) for t in record.trials if t.score is not None]
    assert study.directions == [optuna.study.StudyDirection.MAXIMIZE] * 2


def test_a_finalists_files_give_its_outputs_and_its_scores(finished):
    out, record = finished
    data = nets.few_digits()
    for trial in (trial for trial in record.trials if trial.finalist):
        model = load_model(nets.small(), out / "models" / str(trial.number))
        assert sum(p.numel() for p in model.parameters()) == trial.params
        outputs, targets = predict(model, data.test, device=torch.device("cpu"))
        assert float((outputs.argmax(1) == targets).float().mean()) == pytest.approx(trial.finalist.score_test)


@pytest.mark.slow
def test_minutes_end_the_search(bare, tmp_path):
    record = run_study(small_spec("search.trials=1000", "search.minutes=0.01"), tmp_path / "small", Options(Local(0)))
    assert 1 <= len(record.trials) < 200


@pytest.mark.slow
def test_another_seed_gives_other_plans(bare, finished, tmp_path):
    _, record = finished
    other = run_study(small_spec("seed=1", "finalists.count=1"), tmp_path / "small", Options(Local(0)))
    assert [t.plan for t in other.trials] != [t.plan for t in record.trials]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["nsga2", "random"])
def test_every_sampler_serves(bare, sampler, tmp_path):
    spec = tiny_spec(f"search.sampler={sampler}", "search.trials=12")
    record = run_study(spec, tmp_path / "small", Options(Local(0)))
    assert [trial.origin for trial in record.trials][-1] == sampler


@pytest.mark.slow
def test_a_diverged_trial_is_a_record(tmp_path):
    spec = tiny_spec("finetune.learning_rate=1e30", "search.trials=3", "finalists.learning_rate=1e30")
    record = run_study(spec, tmp_path / "small", Options(Local(0)))
    assert {trial.outcome for trial in record.trials} == {Outcome.DIVERGED}
    assert record.front == []
    assert stored(tmp_path / "small").trials[0].state is optuna.trial.TrialState.PRUNED
    told = (tmp_path / "small" / "report.md").read_text()
    assert "No trial of 3 has a score. 3 diverged: the loss or the score became NaN" in told
    assert "a lower finetune.learning_rate helps" in told
    assert "ranksearch export" not in next_steps(tmp_path, record, "")
    with pytest.raises(StudyError, match="Only finalists can be exported, but no trial has a score; the report says why"):
        choose(record.trials, record.facts.objectives, dense_score=record.facts.dense.score_validation)


class Counted(Silent):
    """A view that counts the steps of each stage of a run."""

    def __init__(self):
        self.stages, self.notes = {}, []

    def stage(self, text, total, done=0):
        self.stages[text] = total - done

    def note(self, text):
        self.notes.append(text)


@pytest.mark.slow
def test_a_finalist_that_diverges_is_known_and_not_tried_again(bare, tmp_path):
    out, spec = tmp_path / "small", tiny_spec("search.trials=2", "finalists.learning_rate=1e30")
    first, again = Counted(), Counted()
    record = run_study(spec, out, Options(Local(0)), view=first)
    assert run_study(spec, out, Options(Local(0)), view=again).trials == record.trials
    (failed,) = [trial for trial in record.trials if trial.failed]
    assert failed.failed is Outcome.DIVERGED
    assert failed.finalist is None
    assert first.notes == [f"finalist {failed.number}: {Outcome.DIVERGED.value.replace('finetune', 'finalists')}"]
    assert again.notes == []
    (note,) = [note for note in record.notes if "finalist" in note]
    assert note.startswith(f"Trial {failed.number} failed as a finalist, diverged: the loss")
    assert "finalists.learning_rate" in note
    with pytest.raises(
        StudyError, match=r"Only finalists can be exported, but there are none yet \(1 failed, see the report\); finish the"
    ):
        choose(record.trials, record.facts.objectives, dense_score=record.facts.dense.score_validation)


@pytest.mark.slow
def test_a_finalist_that_runs_out_of_memory_on_the_test_split_is_tried_again(bare, tmp_path, trained):
    def search(score):
        return ranksearch.search(
            replace(trained, score=score), out=tmp_path / "mine", search=ranksearch.Search(trials=1), finetune=ranksearch.Recipe(1),
            finalists=ranksearch.Finalists(1, count=1), engine=Local(0),
        )  # fmt: skip

    # The check, the dense net twice, two scores each of a trial and a finalist.
    counted = nets.scores_of_whole_splits(trained.data, range(7), -1)

    def score(outputs, targets):
        if counted(outputs, targets) == 6:
            asked.append(0)
        elif asked and len(asked) < 2:
            asked.append(0)
            raise torch.OutOfMemoryError
        return 0.5

    asked = []
    assert [trial.failed for trial in search(score).trials] == [Outcome.OUT_OF_MEMORY]
    (trial,) = search(score).trials
    assert trial.finalist
    assert trial.failed is None


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_finalist_is_made_again(bare, finished, tmp_path, damage):
    out = shutil.copytree(finished[0], tmp_path / "small")
    number = finished[1].front[0].number
    weights = out / "models" / str(number) / "weights.safetensors"
    before = weights.read_bytes()
    weights.unlink() if damage == "gone" else weights.write_bytes(before[: len(before) // 2])
    run_study(small_spec(), out, Options(Local(0)))
    assert weights.read_bytes() == before


@pytest.mark.slow
def test_a_study_of_volumes(bare, tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(8, 8, 3), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(64, 2),
    )  # fmt: skip
    split = torch.utils.data.TensorDataset(torch.randn(24, 1, 4, 4, 4), torch.arange(24) % 2)
    record = ranksearch.search(
        Task(net, Splits(split, split, split, 2, "noise")), out=tmp_path / "mine", search=ranksearch.Search(trials=2), finetune=ranksearch.Recipe(1),
        finalists=ranksearch.Finalists(1, count=1), engine=Local(0),
    )  # fmt: skip
    assert record.front[0].finalist


@pytest.mark.slow
def test_a_kill_before_the_dense_weights_are_kept_costs_only_their_training(bare, tmp_path, monkeypatch):
    """The weights are trained again, perhaps to other last bits, and become the study's."""
    out, spec = tmp_path / "small", tiny_spec()

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ranksearch.study.dense.write_whole", killed)
        with pytest.raises(Stopped) as stopped:
            run_study(spec, out, Options(Local(0)))
        assert stopped.value.record is None, "nothing is known of the dense net yet"

    def trained_elsewhere(task, *args, **kwargs):
        train_dense(task, *args, **kwargs)
        with torch.no_grad():
            next(task.model.parameters()).mul_(1.001)

    monkeypatch.setattr("ranksearch.study.dense.train_dense", trained_elsewhere)
    assert run_study(spec, out, Options(Local(0))).trials


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_last_report_too(tmp_path, bare, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "_report", killed)
    with pytest.raises(Stopped) as stopped:
        run_study(tiny_spec(), tmp_path / "small", Options(Local(0)))
    assert stopped.value.record is None


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Local(-1), "{workers} must be at least 0, but got -1."),
        (Local("2"), "{workers} must be a whole number, but got '2'."),
        (Local(device="cuda:"), "{device} must be auto, cpu, cuda, cuda:N or mps, but got 'cuda:'."),
        (Local(device="cdua"), "{device} must be auto, cpu, cuda, cuda:N or mps, but got 'cdua'."),
        (Ray(workers=0), "{workers} must be at least 1 on Ray, but got 0."),
        (Ray(cpus_per_trial=0), "{cpus_per_trial} must be at least 1, but got 0."),
        (Ray(gpus_per_trial=1.5), "{gpus_per_trial} must be whole or a fraction of one, but got 1.5."),
        (Ray(gpus_per_trial=-1), "{gpus_per_trial} must be whole or a fraction of one, but got -1."),
        (Ray(device="cuda:1"), "{gpus_per_trial} must be above 0 for {device} cuda:1 on Ray, but got 0."),
        (Ray(device="mps"), "{device} must be auto, cpu, cuda or cuda:N on Ray, but got 'mps'."),
        (Ray(device="cpu", gpus_per_trial=1), "{gpus_per_trial} must be 0 for {device} cpu, but got 1."),
    ],
)
def test_engines_are_checked_in_the_words_of_their_user(trained, tmp_path, engine, message):
    with pytest.raises(SpecError) as told:
        check_engine(engine, option_of)
    assert str(told.value) == message.format_map({name: option_of(name) for name in fields(Ray)})
    with pytest.raises(SpecError) as told:
        ranksearch.search(trained, out=tmp_path / "mine", engine=engine)
    assert str(told.value) == message.format_map({name: f"engine.{name}" for name in fields(Ray)})
    assert not list(tmp_path.iterdir())


def test_an_engine_is_a_value(trained, tmp_path):
    with pytest.raises(SpecError, match=r"^engine must be a ranksearch.Local or a ranksearch.Ray, but got 'ray'\.$"):
        ranksearch.search(trained, out=tmp_path / "mine", engine="ray")


@pytest.mark.parametrize(
    ("gpus", "mps", "name", "expected"),
    [
        (0, False, "auto", "cpu"), (2, False, "auto", "cuda"), (0, True, "auto", "cpu"), (2, True, "cpu", "cpu"),
        (2, False, "cuda", "cuda"), (2, False, "cuda:1", "cuda:1"), (0, True, "mps", "mps"),
    ],
)  # fmt: skip
def test_a_device_by_its_name(there, gpus, mps, name, expected):
    there(gpus, mps)
    assert str(choose_device(name)) == expected


@pytest.mark.parametrize(
    ("gpus", "mps", "name", "found"),
    [
        (0, False, "cuda", "cpu"),
        (0, True, "cuda:0", "cpu, mps"),
        (2, False, "cuda:2", "cpu, cuda:0, cuda:1"),
        (2, False, "cuda:01", "cpu, cuda:0, cuda:1"),
        (1, False, "mps", "cpu, cuda:0"),
    ],
)
def test_a_device_that_is_not_there(there, gpus, mps, name, found):
    there(gpus, mps)
    with pytest.raises(
        StudyError, match=rf"^--device must be one that torch finds on this machine \({found}\), but got {name}\.$"
    ):
        choose_device(name)


@pytest.fixture
def there(monkeypatch):
    def there(gpus, mps):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return there


def test_apples_gpus_take_no_float64(there, trained, tmp_path):
    def told(what):
        return f"--device mps does not support float64, but {what} float64; use float32, or --device cpu"

    wide = copy.deepcopy(trained.model)
    wide.norm1.running_mean = wide.norm1.running_mean.double()
    numbers = torch.utils.data.TensorDataset(torch.rand(4, 1, 8, 8), torch.rand(4, dtype=torch.float64))
    weighted = torch.nn.CrossEntropyLoss(weight=torch.ones(10, dtype=torch.float64))
    for task, what in (
        (replace(trained, model=wide), "norm1.running_mean is"),
        (replace(trained, data=Splits(numbers, numbers, numbers, None, "numbers")), "the targets are"),
        (replace(trained, loss=weighted), "weight is"),
    ):
        with pytest.raises(ModelError, match=told(what)):
            check_float32(task)
    check_float32(trained)

    there(0, True)
    split = torch.utils.data.TensorDataset(torch.rand(4, 1, 8, 8).double(), torch.arange(4))
    task = Task(nets.small().double(), Splits(split, split, split, 10, "noise"))
    with pytest.raises(ModelError, match=told("the inputs are")):
        ranksearch.search(task, out=tmp_path / "mine", engine=Local(0, "mps"))
    assert not list(tmp_path.iterdir())


def test_the_report_is_made_again_from_the_storage(finished, tmp_path):
    out, record = finished
    write_report(record, tmp_path)
    for name in ("front.json", "front.csv", "trials.csv", "report.md", "report.html"):
        # The page names the study's folder, in the commands that export its models.
        here, there = ((folder / name).read_bytes().replace(bytes(folder), b"") for folder in (tmp_path, out))
        assert here == there, name


def test_a_dense_net_that_diverges(tmp_path):
    with pytest.raises(ModelError, match="The dense net must train, but its loss became NaN or infinite at learning rate"):
        run_study(small_spec("dense.learning_rate=1e30"), tmp_path / "small", Options(Local(0)))


@pytest.mark.slow
def test_given_dense_weights_are_used(bare, finished, tmp_path):
    out, record = finished
    spec = small_spec("dense.epochs=0", f"dense.weights='{out / 'dense.safetensors'}'", "search.trials=1", "finalists.count=1")
    again = run_study(spec, tmp_path / "small", Options(Local(0)))
    assert again.facts.dense.score_test == record.facts.dense.score_test


def test_given_dense_weights_must_fit(tmp_path):
    spec = small_spec("dense.weights=nowhere.pt")
    with pytest.raises(ModelError, match=r"dense.weights must be a state dict of the model, but nowhere.pt does not exist"):
        run_study(spec, tmp_path / "small", Options(Local(0)))
    (tmp_path / "bad.pt").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match=r"bad.pt must be a state dict, but cannot be read: it is damaged"):
        run_study(small_spec(f"dense.weights='{tmp_path / 'bad.pt'}'"), tmp_path / "two", Options(Local(0)))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(
        ModelError, match=r"other.pt must be a state dict of the model, but it lacks conv1.bias and 11 more, conv1.weight is"
    ):
        run_study(small_spec(f"dense.weights='{tmp_path / 'other.pt'}'"), tmp_path / "three", Options(Local(0)))


def test_workers_share_the_cores_but_not_a_gpu_unless_asked(monkeypatch):
    monkeypatch.setattr(study.processes, "engine", lambda workers: workers)
    monkeypatch.setattr(study, "usable_cores", lambda: 8)
    devices = [torch.device(name) for name in ("cpu", "cuda", "cuda:1", "mps")]
    assert [study._engine(Options(), device) for device in devices] == [8, 1, 1, 1]
    assert [study._engine(Options(Local(3)), device) for device in devices] == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        ("cpu", Options(), "cpu"),
        ("cuda", Options(), "cuda"),
        ("cuda:1", Options(Local(device="cuda:1")), "cuda:1"),
        ("mps", Options(Local(device="mps")), "mps"),
        ("cuda:1", Options(Ray(device="cuda:1", gpus_per_trial=1)), "cuda"),
        ("cpu", Options(Ray()), "cpu"),
    ],
)
def test_workers_train_where_the_driver_does_and_on_ray_where_the_cluster_says(device, options, expected):
    assert study._worker_device(torch.device(device), options.engine) == expected
