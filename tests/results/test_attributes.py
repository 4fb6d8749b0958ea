"""What is stored of the controls is read again."""

from __future__ import annotations

import optuna
import pytest

from ranksearch.results.attributes import (
    read_controls,
    read_shares,
    read_study,
    write_control,
    write_facts,
    write_failed_control,
    write_shares,
)
from ranksearch.results.messages import Outcome
from tests.report_study import study_facts, study_record, with_controls

RECORD = with_controls(study_record(), (20.0, 0.9), (5.0, 0.95))


@pytest.fixture
def study():
    study = optuna.create_study(directions=["maximize", "maximize"])
    write_facts(study, study_facts())
    return study


def test_controls_are_read_as_they_were_written(study):
    assert read_controls(study) == ({}, {})
    assert read_shares(study) == ([], "")
    write_shares(study, [0.05, 0.2, 0.5])
    for control in RECORD.controls:
        write_control(study, control)
    write_failed_control(study, 3, Outcome.DIVERGED)
    assert read_shares(study) == ([0.05, 0.2, 0.5], "")
    assert read_controls(study) == ({1: RECORD.controls[0], 2: RECORD.controls[1]}, {3: Outcome.DIVERGED})
    record = read_study(study)
    assert [control.number for control in record.controls] == [1, 2]
    assert record.notes == [
        "Control 3 failed, diverged: the loss or the score became NaN or infinite; a lower dense.learning_rate helps."
    ]


def test_the_latency_of_a_control_is_the_measured_one(study):
    (control, _) = RECORD.controls
    write_control(study, control)
    (stored,) = read_study(study).controls
    assert stored.costs["latency"] == control.latency_ms == control.timings[0].ms


def test_a_study_says_why_it_has_no_controls(study):
    write_shares(study, [], "the net cannot be narrowed.")
    assert read_study(study).notes == ["There are no controls: the net cannot be narrowed."]
    assert read_study(study).controls == ()
