"""Studies that minimise or limit the latency, and the latencies in every study's report."""

import json

import pytest

from ranksearch.errors import ModelError, SpecError, StudyError
from ranksearch.results.costs import costs_of
from ranksearch.study import timing
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from tests.conftest import essence, small_spec, stored, time_once, tiny_spec

CLOCK = "latency.runtime='tests.latency.clocks:counting'"
TIMED = ("search.minimize=['latency']", CLOCK, "space.rank_multiple=1", "dense.epochs=2")
HERE = Options(engine=Local(0))


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    out = tmp_path_factory.mktemp("timed")
    with pytest.MonkeyPatch.context() as patch:
        time_once(patch)
        return out, run_study(small_spec(*TIMED), out, HERE)


@pytest.mark.slow
class TestStudy:
    def test_the_front_is_of_measured_latencies(self, timed):
        _, record = timed
        assert [cost.name for cost in costs_of(record.facts.dense)] == ["params", "macs", "latency"]
        assert record.facts.dense.costs["latency"] == record.facts.dense.latency_ms
        for trial in record.front:
            assert trial.costs["latency"] == trial.finalist.latency_ms < record.facts.dense.latency_ms
            assert trial.finalist.predicted_ms == pytest.approx(trial.finalist.latency_ms, rel=0.05)
            assert not trial.finalist.mispredicted

    def test_every_trial_has_a_predicted_latency(self, timed):
        _, record = timed
        assert all(trial.costs["latency"] > 0 for trial in record.trials)

    def test_it_is_timed_in_three_runtimes_and_at_several_batches(self, timed):
        out, record = timed
        ways = {(timing.runtime, timing.batch) for timing in record.facts.dense.timings}
        assert ways == {
            ("tests.latency.clocks:counting", 1), ("onnxruntime", 1), ("onnxruntime", 64), ("torch", 1), ("torch", 64),
        }  # fmt: skip
        assert all(len(trial.finalist.timings) == len(ways) for trial in record.front)
        content = json.loads((out / "front.json").read_text())
        assert content["dense"]["latency_ms"] == record.facts.dense.latency_ms
        assert all(row["latency_ms"] > 0 for row in content["front"])

    def test_the_report_shows_them(self, timed):
        out, _ = timed
        page = (out / "report.html").read_text()
        assert "ONNX Runtime, batch 64" in page
        assert 'id="chart-layers"' in page
        assert "## Latency" in (out / "report.md").read_text()

    def test_resumed_equals_uninterrupted(self, timed, unreported, tmp_path):
        _, whole = timed
        run_study(small_spec(*TIMED, "search.trials=4"), tmp_path, HERE)
        assert essence(run_study(small_spec(*TIMED), tmp_path, HERE).trials) == essence(whole.trials)

    def test_the_table_is_measured_once(self, timed, unreported, monkeypatch):
        out, _ = timed
        monkeypatch.setattr(timing, "latency_table", lambda *args, **kwargs: pytest.fail("measured again"))
        run_study(small_spec(*TIMED), out, HERE)

    def test_plans_over_the_limit_are_not_trained(self, timed, bare, tmp_path):
        _, record = timed
        bound = sorted(trial.costs["latency"] for trial in record.trials)[len(record.trials) // 2]
        spec = small_spec(CLOCK, "space.rank_multiple=1", "dense.epochs=2", f"search.max_latency_ms={bound}", "search.trials=4")
        limited = run_study(spec, tmp_path, HERE)
        assert all(trial.costs["latency"] <= bound for trial in limited.trials if trial.trained)
        assert stored(tmp_path)


@pytest.mark.slow
def test_a_front_of_latencies_is_not_of_another_runtimes(unreported, tmp_path, monkeypatch):
    spec = tiny_spec(*TIMED, "dense.epochs=1", "search.trials=2")

    def fails(*args):
        raise StudyError("the phone is gone")

    with monkeypatch.context() as patch:
        patch.setattr(timing, "_time_in", fails)
        with pytest.raises(StudyError, match="the phone is gone"):
            run_study(spec, tmp_path, HERE)
    record = run_study(spec, tmp_path, HERE)
    assert record.front
    assert record.facts.dense.timings[0].runtime == "tests.latency.clocks:counting"


@pytest.mark.slow
def test_no_way_to_store_a_layer_is_slower_than_dense(unreported, tmp_path):
    spec = tiny_spec(CLOCK, "space.smaller_in=['latency']", "space.rank_multiple=1", "search.trials=3")
    record = run_study(spec, tmp_path, HERE)
    dense = {layer.name: layer.costs["latency"] for layer in record.facts.layers}
    for trial in record.trials:
        if trial.finalist:
            assert all(ms < dense[name] for name, ms in trial.finalist.layers_ms.items())


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        (
            CLOCK.replace("counting", "broken"),
            StudyError,
            "must return milliseconds, a finite number above 0, but returned nan",
        ),
        (CLOCK.replace("counting", "coun"), SpecError, "latency.runtime: module 'tests.latency.clocks' has no 'coun'"),
        (
            "search.max_latency_ms=1e-9",
            SpecError,
            "search.max_latency_ms must be at least .*, that of the smallest plan in the",
        ),
        ("task.model='tests.nets:entropic'", ModelError, "latency.runtime onnxruntime must take the model, but"),
    ],
)
def test_bad_input_is_refused_before_training(override, error, words, tmp_path):
    clock = () if "entropic" in override else (CLOCK,)
    with pytest.raises(error, match=words):
        run_study(tiny_spec(*clock, "search.minimize=['latency']", "space.rank_multiple=1", override), tmp_path / "out", HERE)
    assert not (tmp_path / "out").exists()


def test_ranks_are_multiples_of_four_where_the_latency_counts():
    assert small_spec().space.rank_multiple == 1
    assert small_spec("search.minimize=['latency']").space.rank_multiple == 4
    assert small_spec("search.max_latency_ms=3").space.rank_multiple == 4
    assert small_spec("search.max_latency_ms=3", "space.rank_multiple=8").space.rank_multiple == 8


def test_where_a_study_is_timed_makes_another_study_only_if_the_search_needs_it():
    assert small_spec("latency.threads=2").identity() == small_spec().identity()
    assert small_spec(*TIMED, "latency.threads=2").identity() != small_spec(*TIMED).identity()
