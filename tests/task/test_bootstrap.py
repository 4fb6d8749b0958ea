"""The bootstrap of scores: it agrees with the binomial formula, pairs the models, and follows its seed."""

import math

import pytest
import torch

from ranksearch.support.nesting import PerInput
from ranksearch.task.bootstrap import MAX_RESAMPLES, MIN_RESAMPLES, difference, standard_error
from ranksearch.task.task import accuracy

INPUTS = 2000


def outputs(wrong, targets):
    """Outputs of a classifier that errs on these inputs only."""
    classes = torch.where(wrong, (targets + 1) % 10, targets)
    return torch.nn.functional.one_hot(classes, 10).float()


@pytest.fixture
def targets():
    return torch.arange(INPUTS) % 10


def test_the_standard_error_of_an_accuracy_is_that_of_the_binomial_distribution(targets):
    wrong = torch.arange(INPUTS) < 100
    expected = math.sqrt(0.05 * 0.95 / INPUTS)
    assert standard_error(accuracy, outputs(wrong, targets), targets, seed=0) == pytest.approx(expected, rel=0.1)


def test_inputs_that_both_models_fail_on_make_the_difference_no_less_certain(targets):
    few, many = torch.arange(INPUTS) < 20, torch.arange(INPUTS) % 4 == 0
    alone = difference(accuracy, outputs(few, targets), outputs(few & False, targets), targets, seed=0)
    both = difference(accuracy, outputs(many | few, targets), outputs(many & ~few, targets), targets, seed=0)
    assert (both.low, both.high) == pytest.approx((alone.low, alone.high))
    assert both.standard_error == pytest.approx(alone.standard_error)
    assert alone.value == pytest.approx(-0.01)
    assert alone.low < -0.01 < alone.high < 0


def test_a_model_equal_to_the_dense_one_does_not_differ(targets):
    same = outputs(torch.arange(INPUTS) < 100, targets)
    found = difference(accuracy, same, same, targets, seed=0)
    assert (found.value, found.low, found.high, found.standard_error) == (0, 0, 0, 0)


def test_the_seed_decides(targets):
    model, dense = outputs(torch.arange(INPUTS) < 100, targets), outputs(torch.arange(INPUTS) < 50, targets)
    first, again, other = (difference(accuracy, model, dense, targets, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_the_interval_covers_the_difference_of_all_inputs_as_often_as_it_says():
    """One large set plays all inputs; splits of 200 are drawn from it."""
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(50_000) % 10
    model = outputs(torch.rand(50_000, generator=generator) < 0.10, every)
    dense = outputs(torch.rand(50_000, generator=generator) < 0.08, every)
    true = accuracy(model, every) - accuracy(dense, every)
    covered = 0
    for seed in range(100):
        drawn = torch.randint(50_000, (200,), generator=generator)
        found = difference(accuracy, model[drawn], dense[drawn], every[drawn], seed=seed)
        covered += found.low <= true <= found.high
    assert 88 <= covered <= 100


def test_outputs_and_targets_may_be_nested(targets):
    model = {"class": outputs(torch.arange(INPUTS) < 100, targets), "box": (torch.zeros(INPUTS, 4),)}
    dense = {"class": outputs(torch.arange(INPUTS) < 50, targets), "box": (torch.zeros(INPUTS, 4),)}

    def score(outputs, targets):
        return accuracy(outputs["class"], targets["class"]) - float(outputs["box"][0].abs().sum())

    nested = difference(score, model, dense, {"class": targets}, seed=0)
    assert nested == difference(accuracy, model["class"], dense["class"], targets, seed=0)


def test_lists_with_an_entry_for_each_input_are_resampled_too(targets):
    wrong = torch.arange(INPUTS) < 100
    model = PerInput({"class": row} for row in outputs(wrong, targets))

    def score(outputs, targets):
        return accuracy(torch.stack([entry["class"] for entry in outputs]), targets)

    listed = standard_error(score, model, targets, seed=0)
    assert listed == pytest.approx(standard_error(accuracy, outputs(wrong, targets), targets, seed=0), rel=0.15)


def test_outputs_without_a_value_for_each_input_have_no_interval(targets):
    outputs_and_anchors = (outputs(targets > 7, targets), torch.zeros(20, 4))
    assert standard_error(lambda outputs, targets: accuracy(outputs[0], targets), outputs_and_anchors, targets, seed=0) is None


def test_a_score_of_lists_is_asked_less_often(targets):
    """Such as the mean precision of boxes, which may take a second."""
    calls = []
    standard_error(
        lambda outputs, targets: float(len(calls.append(0) or calls)), PerInput([torch.zeros(1)] * INPUTS), targets, seed=0
    )
    assert len(calls) == MIN_RESAMPLES


def test_a_score_that_fails_on_some_resamples_is_judged_by_the_others(targets):
    calls = []

    def fussy(outputs, targets):
        calls.append(len(calls))
        if len(calls) % 10 == 0:
            raise ValueError("Only one class is present.")
        return accuracy(outputs, targets) if len(calls) % 7 else math.nan

    assert standard_error(fussy, outputs(targets > 7, targets), targets, seed=0) > 0
    assert len(calls) == MAX_RESAMPLES


def test_a_score_that_fails_on_most_resamples_has_no_interval(targets):
    def failing(outputs, chosen):
        if torch.equal(chosen, targets):
            return 0.5
        raise ValueError("Only one class is present.")

    same = outputs(targets > 7, targets)
    assert standard_error(failing, same, targets, seed=0) is None
    assert difference(failing, same, same, targets, seed=0) is None
