"""A record is read as Optuna reads it, only sooner."""

import math

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from ranksearch import folder
from ranksearch.objectives import Objectives

SPACE = {
    "method": CategoricalDistribution(["dense", "cp"]),
    "level": FloatDistribution(0.0, 1.0),
    "rank": IntDistribution(1, 8),
}


def test_all_trials_are_those_that_optuna_reads(tmp_path):
    url = folder.storage_url(tmp_path, None)
    for name in ("one", "other"):
        fill(folder.create_study(name, url, Objectives()))
    for name in ("one", "other"):
        theirs = optuna.load_study(study_name=name, storage=RDBStorage(url)).trials
        assert folder.open_study(name, url).trials == theirs
        assert [trial.number for trial in theirs] == list(range(6))
    waiting = folder.open_study("one", url).get_trials(states=(TrialState.WAITING,))
    assert [trial.number for trial in waiting] == [5]


def fill(study):
    """A trial in every state that a study of ours has, one of them with a value that is no number of a database."""
    for values, state in (
        ((0.5, 1.0), TrialState.COMPLETE),
        ((math.inf, -math.inf), TrialState.COMPLETE),
        (None, TrialState.PRUNED),
        (None, TrialState.FAIL),
        (None, None),
    ):
        trial = study.ask(SPACE)
        trial.set_user_attr("about", {"curve": [[0, 0.25]], "score": None})
        trial.set_constraint("worth", 0.1)
        if state is not None:
            study.tell(trial, values, state=state)
    study.enqueue_trial({"method": "cp", "level": 0.5, "rank": 3}, user_attrs={"place": 6})
