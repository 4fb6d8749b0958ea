"""A search from Python: accepted and refused arguments; the user's model is unchanged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import ranksearch
from ranksearch.errors import ModelError, SpecError, StudyError
from ranksearch.results.messages import Outcome
from ranksearch.spec import Finalists, Latency, Recipe, Search, Space
from ranksearch.study.options import Local
from ranksearch.task.task import Task
from tests import nets
from tests.conftest import essence

pytestmark = pytest.mark.usefixtures("bare")


@pytest.mark.slow
def test_from_python(trained, tmp_path):
    record = ranksearch.search(
        trained, out=tmp_path / "mine", search=ranksearch.Search(trials=3), finetune=ranksearch.Recipe(1), finalists=ranksearch.Finalists(1, count=1), engine=ranksearch.Local(1),
    )  # fmt: skip
    best = record.front[0]
    model = ranksearch.load_model(trained.model, tmp_path / "mine" / "models" / str(best.number))
    assert sum(p.numel() for p in model.parameters()) == best.params
    again = ranksearch.search(
        trained, out=tmp_path / "mine", search=ranksearch.Search(trials=3), finetune=ranksearch.Recipe(1), finalists=ranksearch.Finalists(1, count=1), engine=ranksearch.Local(0),
    )  # fmt: skip
    assert essence(again.trials) == essence(record.trials)


@pytest.mark.slow
def test_a_search_from_python_prints_nothing(trained, tmp_path, capfd):
    ranksearch.search(
        trained, out=tmp_path / "mine", search=Search(trials=1), finetune=ranksearch.Recipe(0),
        finalists=ranksearch.Finalists(0, count=1), engine=Local(0),
    )  # fmt: skip
    assert capfd.readouterr() == ("", "")


def test_any_model_and_folder_name_from_python(tmp_path):
    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nets.small()

        def forward(self, inputs):
            return self.net(inputs)

    task = Task(Mine(), nets.few_digits(), loss=lambda outputs, targets: torch.nn.functional.cross_entropy(outputs, targets))
    record = ranksearch.search(
        task, out=tmp_path / "my runs?", search=ranksearch.Search(trials=1), finetune=ranksearch.Recipe(1), finalists=ranksearch.Finalists(1),
        engine=ranksearch.Local(0),
    )  # fmt: skip
    assert len(record.trials) == 1
    assert (tmp_path / "my runs?" / "study.db").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["my runs?"]


def test_another_score_is_another_study(trained, tmp_path):
    def go(score):
        return ranksearch.search(
            replace(trained, score=score), out=tmp_path / "mine", search=ranksearch.Search(trials=1), finetune=ranksearch.Recipe(1),
            finalists=ranksearch.Finalists(1), engine=ranksearch.Local(0),
        )  # fmt: skip

    def other(outputs, targets):
        return 0.5

    go(trained.score)
    with pytest.raises(StudyError, match=r"is another study .task.score is 'python:accuracy' there and 'python:other' here"):
        go(other)


def test_python_may_give_one_name_and_numbers_of_numpy(trained, tmp_path):
    record = ranksearch.search(
        trained, out=tmp_path / "mine", space=Space(methods="svd", skip="fc1"),
        search=Search(minimize="params", trials=np.int64(1)),
        finetune=ranksearch.Recipe(1), finalists=ranksearch.Finalists(1, count=1), engine=Local(0),
    )  # fmt: skip
    assert {name for trial in record.trials for name, _ in trial.plan} == {"fc2"}
    with pytest.raises(SpecError, match=r"space.layers must name layers that can be decomposed, but 'fc9' matches none"):
        ranksearch.search(trained, out=tmp_path / "two", space=Space(layers="fc9"))


@pytest.mark.slow
def test_the_latency_is_searched_where_python_says(trained, tmp_path):
    record = ranksearch.search(
        trained, out=tmp_path / "mine", search=Search(minimize="latency", trials=1), latency=Latency(runtime="torch", batch_size=2),
        finetune=ranksearch.Recipe(0), finalists=ranksearch.Finalists(0, count=1), engine=Local(0),
    )  # fmt: skip
    assert record.facts.spec["latency"] == {"runtime": "torch", "threads": 1, "batch_size": 2}
    assert all(trial.costs["latency"] > 0 for trial in record.trials)


def test_a_score_that_is_no_share(trained, tmp_path):
    percent = replace(trained, score=lambda outputs, targets: 93.5)
    with pytest.raises(
        ModelError, match=r"Scores should lie in \[0, 1\], .* but <lambda> returned 93.5 for the dense net; divide it"
    ):
        ranksearch.search(percent, out=tmp_path / "mine", engine=Local(0))


@pytest.mark.slow
def test_a_score_that_is_no_number(trained, tmp_path):
    # The check, the dense net twice, the first trial.
    task = replace(trained, score=nets.scores_of_whole_splits(trained.data, [0.5, 0.5, 0.5, float("nan")], 0.5))
    record = ranksearch.search(
        task, out=tmp_path / "mine", search=ranksearch.Search(trials=2), finetune=ranksearch.Recipe(1), finalists=ranksearch.Finalists(1),
        engine=ranksearch.Local(0),
    )  # fmt: skip
    assert [trial.outcome for trial in record.trials] == [Outcome.DIVERGED, Outcome.DONE]
    with pytest.raises(ModelError, match="The dense net's score must be finite, but <lambda> returned nan on validation"):
        ranksearch.search(replace(trained, score=lambda o, t: float("nan")), out=tmp_path / "two", engine=ranksearch.Local(0))


def test_the_users_model_is_not_changed(trained, tmp_path):
    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    ranksearch.search(
        trained, out=tmp_path / "mine", search=ranksearch.Search(trials=2), finetune=ranksearch.Recipe(1), finalists=ranksearch.Finalists(1, count=1), engine=ranksearch.Local(0),
    )  # fmt: skip
    after = trained.model.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_dense_model_is_another_study(trained, tmp_path):
    def go(task):
        return ranksearch.search(
            task, out=tmp_path / "mine", search=ranksearch.Search(trials=1), finetune=ranksearch.Recipe(1), finalists=ranksearch.Finalists(1, count=1), engine=ranksearch.Local(0),
        )  # fmt: skip

    go(trained)
    torch.manual_seed(9)
    with pytest.raises(
        StudyError, match=r"started from another dense model \(.* here\); choose another --out or name, or --fresh"
    ):
        go(replace(trained, model=nets.small()))


def test_a_test_score_that_is_no_number_is_told_before_the_search(trained, tmp_path):
    asked = iter(range(100))

    def score(outputs, targets):
        return float("nan") if next(asked) == 2 else 0.5  # the check, then the dense net on validation, then on test

    with pytest.raises(ModelError, match="The dense net's score must be finite, but score returned nan on test; fix the score"):
        ranksearch.search(replace(trained, score=score), out=tmp_path / "mine", search=Search(trials=1), engine=Local(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "name"), [("(_x)", "x-"), ("#_1", "1"), ("~.cfg", "cfg"), ("größe 1", "größe-1"), ("日本", "search")]
)
def test_any_folder_gives_a_name(trained, tmp_path, folder, name):
    record = ranksearch.search(
        trained, out=tmp_path / folder, search=Search(trials=1, min_score=np.float32(0.25)),
        finetune=Recipe(0), finalists=Finalists(0, count=1), space=Space(layers="fc2", data_aware=np.bool_(False)), engine=Local(0),
    )  # fmt: skip
    assert record.facts.name == name
    assert record.facts.limits.min_score == 0.25
