"""Users' own methods keep the contract, are searched and reported, and reach other processes."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import make_dataclass

import pytest
import torch

import ranksearch
from ranksearch.cli import main
from ranksearch.compress.inventory import inventory
from ranksearch.compress.profile import profile
from ranksearch.compress.surgery import factorize_
from ranksearch.engines import processes
from ranksearch.errors import PlanError, SpecError
from ranksearch.methods import METHODS, Method, Part, register_method
from ranksearch.methods.groups import stack
from ranksearch.methods.parts import assemble, built, built_factors, composed
from ranksearch.plan import KINDS, SVD, TT, Factorization, Plan
from ranksearch.results.attributes import read_trials
from ranksearch.results.messages import Job, Outcome
from ranksearch.spec import Finalists, Recipe, Search, Space
from ranksearch.strategy.prior import vbmf_plans
from ranksearch.strategy.space import make_space
from ranksearch.study.options import Local
from tests import ROOT, nets
from tests.conftest import essence, refuse, small_spec, stored
from tests.geometries import given_geometry
from tests.methods.test_factorization import check_costs, check_identity, check_reconstruction

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


@pytest.fixture
def forgotten():
    """Unregister after the test all methods that it registered."""
    before = dict(KINDS), dict(METHODS)
    yield
    for registry, entries in zip((KINDS, METHODS), before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def made_up(forgotten):
    module = importlib.import_module("tests.made_up")
    register_method(module.Tucker1Method())
    return module


def forget(monkeypatch):
    """Leave this process like one that has not imported the method's module."""
    METHODS.pop(KINDS.pop("tucker1", None), None)
    monkeypatch.delitem(sys.modules, "tests.made_up", raising=False)


# --- use ---


@pytest.mark.parametrize("geometry", ["conv2d", "conv2d asymmetric stride", "conv2d same even", "linear behind a map"])
def test_it_keeps_the_contract(made_up, geometry):
    model, inputs, layer = given_geometry(geometry)
    for check in (check_identity, check_costs, check_reconstruction):
        check(model, inputs, layer, METHODS[made_up.Tucker1])


@pytest.mark.slow
def test_a_small_search_with_it_ends_in_a_report(bare, made_up, trained, tmp_path, monkeypatch):
    found = {}
    for workers in (0, 1):
        found[workers] = ranksearch.search(
            trained, out=tmp_path / str(workers), space=Space(methods=("tucker1", "svd")), search=Search(trials=2),
            finetune=Recipe(1), finalists=Finalists(1, count=1), engine=Local(workers),
        )  # fmt: skip
    assert essence(found[0].trials) == essence(found[1].trials)
    assert {trial.outcome for trial in found[0].trials} <= {Outcome.DONE, Outcome.OVER_BUDGET}
    assert made_up.Tucker1 in {type(value) for trial in found[1].trials for _, value in trial.plan}
    forget(monkeypatch)  # the report imports the module that the study names
    assert main(["report", str(tmp_path / "1")]) == 0
    assert "Tucker-1" in (tmp_path / "1" / "report.html").read_text()


def test_it_leads_plans_at_vbmf_ranks_after_the_built_in_methods(made_up):
    layers = inventory(nets.small(), torch.ones(1, 1, 8, 8))
    estimates = {layer.name: (4, 6) for layer in layers.layers}
    plans = dict(vbmf_plans(make_space(layers, ["tucker1", "svd", "tt", "cp"]), estimates))
    assert list(plans) == ["vbmf cp x1", "vbmf tt x1", "vbmf tucker1 x1"]
    assert plans["vbmf tucker1 x1"]["conv2"] == made_up.Tucker1(4)
    assert plans["vbmf tt x1"]["conv2"] == TT(4, 6, 6)
    assert list(dict(vbmf_plans(make_space(layers, ["svd"]), estimates))) == ["vbmf svd x1"]


@pytest.mark.slow
def test_a_study_file_names_the_module_that_registers(bare, forgotten, tmp_path, monkeypatch):
    forget(monkeypatch)
    text = nets.SMALL + '\n[space]\nmethods = ["tucker1"]\nlayers = ["conv*"]\nplugins = ["tests.made_up"]\n'
    (tmp_path / "small.toml").write_text(text)
    few = ("--trials", "1", "--set", "dense.epochs=1", "--set", "finalists.count=1")
    assert main(["study", str(tmp_path / "small.toml"), "--out", str(tmp_path / "out"), "--workers", "0", *few]) == 0
    assert {value.method for trial in read_trials(stored(tmp_path / "out")) for _, value in trial.plan} == {"tucker1"}


SCRIPT = """
import torch
import ranksearch
from tests import nets
from ranksearch.spec import Finalists, Recipe, Search, Space
from ranksearch.study import study
from ranksearch.study.options import Local
from ranksearch.task.task import Task
torch.set_num_threads(1)
study.write_report = study.time_finalists = lambda *args: None
record = ranksearch.search(
    Task(nets.small(), nets.few_digits()), out={out!r}, space=Space(methods="tucker1", layers="conv2"), search=Search(trials=1),
    finetune=Recipe(1), finalists=Finalists(1, count=1), engine=Local(1),
)
print({{str(value) for trial in record.trials for _, value in trial.plan}})
"""


@pytest.mark.slow
def test_workers_know_a_method_that_a_script_defines(tmp_path, capsys):
    """A script's classes cannot be imported, so they travel by value. This process refuses the unknown method."""
    script = (ROOT / "tests" / "made_up.py").read_text() + SCRIPT.format(out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Tucker-1" in done.stdout
    told = refuse(capsys, "report", tmp_path / "out")
    assert "space.methods must name known methods, but got 'tucker1'. Did you mean 'tucker2'? The study in" in told


class Named:
    """An evaluation whose result names the class of the value in the job's plan."""

    def __call__(self, job):
        raise PlanError(str(type(job.plan["conv"])))
        yield


@pytest.mark.slow
def test_a_plan_reaches_a_worker_with_a_class_that_cannot_be_imported(forgotten):
    jobs = iter([Job(0, Plan.of({"conv": odd().kind(1)}), 0)])
    with processes.engine(1) as engine, pytest.raises(PlanError, match="Odd"):
        engine.run(jobs, Named(), on_message=lambda job, message: None, should_stop=lambda: False)


# --- names ---


def test_a_plan_of_an_unknown_method_is_refused(forgotten):
    text = '{"format": "ranksearch-plan/1", "layers": {"conv": {"method": "odd", "rank": 3}}}'
    with pytest.raises(PlanError, match=r"^Layer 'conv' must name a known method, but got 'odd'\."):
        Plan.from_json(text)
    register_method(odd())
    assert Plan.from_json(text).to_json() == Plan.from_json(Plan.from_json(text).to_json()).to_json()
    assert str(Plan.from_json(text)) == "conv odd 3"


def test_a_study_of_an_unknown_method_is_refused(forgotten):
    with pytest.raises(
        SpecError, match=r"^space.methods must name known methods, but got 'odd'\. Valid: cp, cp4, spatial, svd, tt, tuck"
    ):
        small_spec("space.methods=['odd']")
    register_method(odd())
    assert small_spec("space.methods=['odd']").space.methods == ("odd",)


def test_where_a_method_is_defined_makes_no_other_study(made_up):
    assert small_spec("space.plugins=['tests.made_up']").identity() == small_spec().identity()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "space.plugins must be importable, but 'plugged' is not: No module named 'plugged'; check the spelling"),
        (
            "1 / 0",
            "space.plugins must be importable, but 'plugged' raised ZeroDivisionError: division by zero; fix the module.",
        ),
        (
            "import ranksearch; ranksearch.register_method(3)",
            "space.plugins must be importable, but 'plugged' cannot be used: register_method takes an instance of a subclass of",
        ),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused(tmp_path, monkeypatch, source, message):
    monkeypatch.syspath_prepend(tmp_path)
    if source:
        (tmp_path / "plugged.py").write_text(source)
    with pytest.raises(SpecError, match=f"^{re.escape(message)}"):
        small_spec("space.plugins=['plugged']")


@pytest.mark.parametrize("name", ["", ".x", "a b", "a:b"])
def test_what_names_no_module_is_refused(name):
    message = f"small.toml: space.plugins must be names of modules such as 'my_pkg.methods', but got {[name]!r}."
    with pytest.raises(SpecError, match=f"^{re.escape(message)}$"):
        small_spec(f"space.plugins={[name]!r}")


# --- registration ---


def odd(*, vbmf=("larger",), ranks=("rank",), **names):
    """A method with made-up ranks and names, which may be invalid."""
    names = {"method": "odd", "title": "odd", "__module__": __name__} | names
    kind = make_dataclass("Odd", [(rank, int) for rank in ranks], bases=(Factorization,), namespace=names, frozen=True)
    empty = {name: lambda self, *args: None for name in Method.__abstractmethods__}
    return type("OddMethod", (Method,), empty | {"kind": kind, "vbmf": vbmf})()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: SVD(3), "register_method takes an instance of a subclass of ranksearch.methods.Method, but got SVD("),
        (lambda: type(METHODS[SVD]), "register_method takes an instance of a subclass of ranksearch.methods.Method, but got <class"),
        (lambda: odd(method="svd"), "A method's name must be unique, but both tests.methods.test_registry and ranksearch.plan use 'svd'; rename one."),
        (lambda: odd(method="dense"), "A method's name must be unique, but both tests.methods.test_registry and ranksearch.plan use 'dense'"),
        (lambda: odd(method="a.b"), "Odd must have a title, and a method name of lower-case letters, digits and _, but has title='odd' and method='a.b'."),
        (lambda: odd(title=None), "Odd must have a title, and a method name"),
        (lambda: odd(ranks=()), "Odd must have a field for each rank, none of them called method, kernel, order, padding, but has none."),
        (lambda: odd(ranks=("method",)), "Odd must have a field for each rank, none of them called method, kernel, order, padding, but has method."),
        (lambda: odd(vbmf=("in", "out")), "OddMethod.vbmf must name one of in, out, larger for each of the ranks rank, but is ('in', 'out')."),
        (lambda: odd(vbmf=("inn",)), "OddMethod.vbmf must name one of in, out, larger for each of the ranks rank, but is ('inn',)."),
        (lambda: with_kind(3), "OddMethod.kind must be a frozen dataclass that derives from Factorization, but is 3."),
        (lambda: with_kind(type("Bare", (SVD,), {"method": "bare"})), "OddMethod.kind must be a frozen dataclass that derives from Factorization, but is <class"),
    ],
)  # fmt: skip
def test_what_is_no_method_is_refused(forgotten, method, message):
    before = dict(KINDS), dict(METHODS)
    with pytest.raises(PlanError, match=f"^{re.escape(message)}"):
        register_method(method())
    assert (dict(KINDS), dict(METHODS)) == before


def with_kind(kind):
    method = odd()
    type(method).kind = kind
    return method


def test_a_method_whose_function_takes_other_arguments_is_refused(forgotten):
    method = odd()
    type(method).prepare = lambda self, kernel, ranks, seed: {}
    with pytest.raises(
        PlanError, match=r"prepare must take \(kernel, ranks, seed, rows\), as Method.prepare does, but is prepare\(k"
    ):
        register_method(method)


def test_a_method_that_says_a_wrong_error_is_refused(made_up, monkeypatch):
    right = made_up.Tucker1Method.errors
    monkeypatch.setattr(made_up.Tucker1Method, "errors", lambda self, *given: [0.1 * error for error in right(self, *given)])
    model = nets.small()
    found = inventory(model, torch.zeros(1, 1, 8, 8))
    with pytest.raises(
        PlanError,
        match=r"Tucker1Method.errors must give relative errors, .* but at the ranks \(1,\) of a kernel of shape .* it gives",
    ):
        profile(model, found, {"conv2": [METHODS[made_up.Tucker1]]})


@pytest.mark.parametrize(("into", "rank", "kernels"), [(4, 2, 3), (4, 4, 2), (1, 1, 2), (1, 1, 9), (3, 1, 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_depthwise_parts_may_have_several_kernels_a_channel(into, rank, kernels, groups):
    conv = torch.nn.Conv2d(groups * into, groups * 6, 3, padding=1, groups=groups).double()
    weight = (6, into, 3, 3)
    parts = (
        Part("reduce", into, rank),
        Part("basis", rank, rank * kernels, (0, 1), depthwise=True),
        Part("mix", rank * kernels, 6),
    )
    torch.manual_seed(0)
    factors = [[torch.randn(part.shape(weight)).double() for part in parts] for _ in range(groups)]
    kernel = torch.cat([composed(parts, each, weight) for each in factors])
    stacked = stack([built_factors(parts, each) for each in factors])
    small = assemble(conv, weight, built(parts), stacked)
    with torch.no_grad():
        conv.weight.copy_(kernel)
        inputs = torch.randn(2, groups * into, 5, 5).double()
        torch.testing.assert_close(small(inputs), conv(inputs))


def test_a_depthwise_part_keeps_or_multiplies_its_channels():
    with pytest.raises(
        ValueError, match=r"A depthwise part must have a multiple of its input channels as outputs, but 'x' has 4 and 6"
    ):
        Part("x", 4, 6, (0, 1), depthwise=True)


def test_a_method_that_is_defined_again_replaces_its_former_self(forgotten):
    """As when a notebook's cell runs again."""
    first, second = odd(), odd()
    for method in (first, first, second):
        register_method(method)
    assert KINDS["odd"] is second.kind
    assert METHODS[second.kind] is second
    assert first.kind not in METHODS


def test_a_layer_can_be_made_a_part_at_a_time(made_up, trained):
    """The public names suffice to use a method by hand."""
    model = factorize_(nets.small(), {"conv2": made_up.Tucker1(3)})
    assert [name for name, _ in model.conv2.named_children()] == ["reduce", "core"]
    assert Part("core", 3, 16, (0, 1)).shape((16, 8, 3, 3)) == (16, 3, 3, 3)
