"""Study files: every key is checked, and every message is one sentence with the rule, the value and the fix."""

import re
from dataclasses import MISSING, is_dataclass, replace
from typing import get_type_hints

import numpy as np
import pytest

from ranksearch.errors import SpecError
from ranksearch.references import resolve
from ranksearch.results.limits import UNLIMITED, Limits
from ranksearch.settings import default_of, fields
from ranksearch.spec import Finalists, Recipe, Search, Space, StudySpec
from ranksearch.study.options import Local, Options, Ray
from ranksearch.study_file import builtin_studies, check_spec, load_spec, parse_spec  # fmt: skip
from tests.nets import SMALL


def parse(text=SMALL, *overrides):
    return parse_spec(text, source="study.toml", overrides=overrides)


def test_what_is_resolved_gives_the_same_study():
    spec = parse(SMALL, "space.skip=['conv1']", "search.minutes=2", "task.model_args.classes=10")
    assert parse_spec(spec.to_toml(), source="again") == spec


@pytest.mark.parametrize("name", builtin_studies())
def test_builtin_studies_are_valid_and_named_as_their_file(name):
    spec = load_spec(name)
    assert spec.name == name
    assert spec.about


def test_overrides_take_toml_values_and_bare_words():
    assert parse(SMALL, "space.data_aware=true").space.data_aware is True
    assert parse(SMALL, "space.data_aware=false").space.data_aware is False
    spec = parse(SMALL, "search.trials=11", "finetune.learning_rate=0.5", "search.sampler=nsga2", "space.methods=['cp']")
    assert (spec.search.trials, spec.finetune.learning_rate, spec.search.sampler) == (11, 0.5, "nsga2")
    assert spec.space.methods == ("cp",)


def test_the_budget_is_not_part_of_a_studys_identity():
    assert parse(SMALL, "search.trials=99", "search.minutes=1").identity() == parse().identity()
    assert parse(SMALL, "controls=4").identity() == parse().identity()
    assert parse(SMALL, "finetune.epochs=9").identity() != parse().identity()
    assert parse(SMALL, "search.minimize=['macs']").identity() != parse().identity()


def test_limits_say_what_is_looked_for_and_make_no_other_study():
    spec = parse(SMALL, "search.min_score=0.9", "search.min_ratio=4", "search.max_params=9000", "search.max_macs=80000")
    assert spec.search.limits == Limits(min_score=0.9, min_ratio=4.0, max_costs={"params": 9000, "macs": 80000})
    assert str(spec.search.limits) == "min_score 0.9, min_ratio 4, max_params 9,000, max_macs 80,000"
    assert parse().search.limits == UNLIMITED
    assert not parse().search.limits
    assert spec.identity() == parse().identity()
    assert Limits.of(spec.to_dict()["search"]) == spec.search.limits


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("serach.trials=3", "study.toml: serach is not a key of a study. Did you mean 'search'?"),
        ("search.trails=3", "study.toml: search.trails is not a key of a study. Did you mean 'trials'?"),
        ("search.trials=0", "study.toml: search.trials must be at least 1, but got 0."),
        ("search.trials='many'", "study.toml: search.trials must be a whole number, but got 'many'."),
        ("search.minutes=0", "study.toml: search.minutes must be a finite number above 0, but got 0."),
        (
            "search.sampler=tpee",
            "study.toml: search.sampler must be one of rank, tpe, nsga2, gp, random, but got 'tpee'. Did you mean 'tpe'?",
        ),
        ("search.min_score=nan", "study.toml: search.min_score must be a finite number, but got nan."),
        ("search.min_score=high", "study.toml: search.min_score must be a number, but got 'high'."),
        ("search.min_ratio=0", "study.toml: search.min_ratio must be a finite number above 0, but got 0."),
        ("search.min_ratio=inf", "study.toml: search.min_ratio must be a finite number above 0, but got inf."),
        ("search.max_params=0", "study.toml: search.max_params must be at least 1, but got 0."),
        ("search.max_macs=1e6", "study.toml: search.max_macs must be a whole number, but got 1000000.0."),
        ("space.methods=['tucker']", "space.methods must name known methods, but got 'tucker'. Did you mean 'tucker2'?"),
        ("space.methods=[]", "study.toml: space.methods must be at least one method, but got []."),
        (
            "latency.runtime='tensorrt'",
            "study.toml: latency.runtime must be auto, onnxruntime, torch, or 'package.module:name', but got 'tensorrt'.",
        ),
        ("latency.threads=0", "study.toml: latency.threads must be at least 1, but got 0."),
        ("search.max_latency_ms=0", "study.toml: search.max_latency_ms must be a finite number above 0, but got 0."),
        ("space.rank_multiple=0", "study.toml: space.rank_multiple must be at least 1, but got 0."),
        ("space.rank_multiple=1.5", "study.toml: space.rank_multiple must be a whole number, but got 1.5."),
        ("space.smaller_in=[]", "study.toml: space.smaller_in must be at least one of params, macs, latency, but got []."),
        ("space.smaller_in='macs'", "study.toml: space.smaller_in must be a list of strings, but got 'macs'."),
        (
            "space.smaller_in=['flops']",
            "space.smaller_in must name known costs, but got 'flops'. Valid: latency, macs, params.",
        ),
        ("space.smaller_in=['macs', 'macs']", "space.smaller_in must name each cost once, but got ['macs', 'macs']."),
        ("search.minimize=[]", "study.toml: search.minimize must be at least one of params, macs, latency, but got []."),
        (
            "search.minimize=['seconds']",
            "search.minimize must name known costs, but got 'seconds'. Valid: latency, macs, params.",
        ),
        ("space.data_aware=1", "study.toml: space.data_aware must be true or false, but got 1."),
        ("space.skip='conv1'", "study.toml: space.skip must be a list of strings, but got 'conv1'."),
        ("finetune.learning_rate=-1", "study.toml: finetune.learning_rate must be a finite number above 0, but got -1."),
        (
            "finetune.precision=bfloat",
            "study.toml: finetune.precision must be one of float32, bfloat16, but got 'bfloat'. Did you mean 'bfloat16'?",
        ),
        (
            "space.start=new",
            "study.toml: space.start must be one of decomposed, scratch, but got 'new'. Valid: decomposed, scratch.",
        ),
        (
            "finalists.schedule=layer",
            "study.toml: finalists.schedule must be one of one-shot, layerwise, but got 'layer'. Did you mean 'layerwise'?",
        ),
        ("task.model=lenet", "study.toml: task.model must be 'package.module:name', but got 'lenet'."),
        ("task.model_args=3", "study.toml: task.model_args must be a table, but got 3."),
        ("dense=3", "study.toml: dense must be a section, but got 3."),
        ("controls=-1", "study.toml: controls must be at least 0, but got -1."),
        ("controls=1.5", "study.toml: controls must be a whole number, but got 1.5."),
        ("controls=true", "study.toml: controls must be a whole number, but got True."),
        ("name='a/b'", "study.toml: name must be letters, digits, '.', '_' or '-', but got 'a/b'."),
        ("seed", "An override must read section.key=value, but got 'seed'."),
        ("name.x=3", "An override must read section.key=value, but 'name' in 'name.x=3' is not a section."),
    ],
)
def test_bad_values(override, message):
    with pytest.raises(SpecError, match=f"^{re.escape(message)}$"):
        parse(SMALL, override)


def test_controls_must_be_trained():
    untrained = ("dense.epochs=0", "finalists.epochs=0")
    assert parse(SMALL, *untrained).controls == 0
    with pytest.raises(
        SpecError,
        match=r"^controls must be 0 where dense.epochs and finalists.epochs are 0, which train nothing, but got 4\.$",
    ):
        parse(SMALL, *untrained, "controls=4")


def test_a_missing_key():
    with pytest.raises(SpecError, match=r"^study.toml: task.model must be set, but is missing.$"):
        parse('name = "x"')


def test_not_toml():
    with pytest.raises(SpecError, match=r"^A study file must be TOML, but study.toml is not: .*line 1"):
        parse("name = lenet = 3")


def test_unknown_study():
    with pytest.raises(
        SpecError, match=r"^A study is a built-in name or a .toml file, but 'lennet' is neither. Did you mean 'lenet'\?"
    ):
        load_spec("lennet")


def test_unreadable_files(tmp_path):
    with pytest.raises(
        SpecError, match=r"^The study file .*none.toml cannot be read: No such file or directory; check the path."
    ):
        load_spec(str(tmp_path / "none.toml"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="cannot be read: it is not UTF-8 text"):
        load_spec(str(tmp_path / "bytes.toml"))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_package.nets:make", "task.model must be importable, but 'no_such_package.nets:make' is not: No module named"),
        ("tests.nets:smal", "task.model: module 'tests.nets' has no 'smal'. Did you mean 'small'?"),
        ("tests.nets:NUMBER", "task.model must name a callable, but 'tests.nets:NUMBER' is of type int."),
    ],
)
def test_bad_references(reference, message):
    with pytest.raises(SpecError, match=f"^{re.escape(message)}"):
        resolve(reference, key="task.model")


def all_settings(cls):
    """(class, field) for every setting of a class and of its sections."""
    for name, kind in get_type_hints(cls).items():
        yield cls, fields(cls)[name]
        if is_dataclass(kind):
            yield from all_settings(kind)


SETTINGS = {
    f"{cls.__name__}.{entry.name}": (cls, entry)
    for whole in (StudySpec, Options, Local, Ray)
    for cls, entry in all_settings(whole)
}
each_setting = pytest.mark.parametrize(("cls", "entry"), SETTINGS.values(), ids=SETTINGS)


@each_setting
def test_a_setting_has_a_phrase_of_help_and_its_docstring_repeats_it(cls, entry):
    text = entry.metadata["help"]
    assert text
    assert "|" not in text
    assert text[-1] not in ".;:"
    assert f"    {entry.name}: {text.replace('`', '')}." in cls.__doc__


@each_setting
def test_a_default_keeps_its_rule(cls, entry):
    default = default_of(entry)
    assert default is MISSING or default is None or entry.metadata["holds"](default)


def test_values_from_python_are_checked_as_a_file_is():
    spec = parse()
    assert check_spec(spec) == spec
    given = replace(spec, space=Space(methods="svd", skip=["conv1"]), seed=np.int64(3), search=Search(minutes=np.float32(2)))
    wanted = parse(SMALL, "space.methods=['svd']", "space.skip=['conv1']", "seed=3", "search.minutes=2")
    assert check_spec(given).space == replace(wanted.space, data_aware=True)
    assert (check_spec(given).seed, check_spec(given).search.minutes) == (3, 2.0)
    assert {type(check_spec(given).seed), type(check_spec(given).search.minutes)} == {int, float}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": Search(trials=0)}, "search.trials must be at least 1, but got 0."),
        ({"search": Search(trials=None)}, "search.trials must be a whole number, but got None."),
        ({"search": Search(trials=True)}, "search.trials must be a whole number, but got True."),
        ({"search": Search(sampler="tpee")}, "search.sampler must be one of rank, tpe, nsga2, gp, random, but got 'tpee'. Did you mean 'tpe'?"),
        ({"search": Search(first=[3])}, "search.first must be a list of strings, but got [3]."),
        ({"space": Space(methods="tucker")}, "space.methods must name known methods, but got 'tucker'. Did you mean 'tucker2'?"),
        ({"space": "svd"}, "space must be a ranksearch.Space, but got 'svd'."),
        ({"finetune": Finalists(1)}, f"finetune must be a ranksearch.Recipe, but got {Finalists(1)!r}."),
        ({"finalists": Recipe(1)}, f"finalists must be a ranksearch.Finalists, but got {Recipe(1)!r}."),
        ({"finalists": Finalists(0, schedule="layerwise")}, "finalists.epochs must be at least 1 where finalists.schedule is layerwise, but got 0."),
        ({"seed": "one"}, "seed must be a whole number, but got 'one'."),
        ({"seed": -1}, "seed must be between 0 and 2147483647, but got -1."),
    ],
)  # fmt: skip
def test_bad_values_from_python(changes, message):
    with pytest.raises(SpecError, match=f"^{re.escape(message)}$"):
        check_spec(replace(parse(), **changes))
