"""The documentation holds to the code: tables, links, blocks of code, commands, quoted messages and schemas of files."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
import tomllib
from dataclasses import replace

import jsonschema
import pytest
import tomli_w

from ranksearch.cli import _all_overrides, main, make_parser
from ranksearch.errors import PlanError
from ranksearch.methods import METHODS
from ranksearch.plan import CP, FORMAT, KINDS, Kept, Narrowing, Plan, Tucker2
from ranksearch.report.json_and_csv import front_json
from ranksearch.results.limits import Limits
from ranksearch.spec import Recipe, StudySpec
from ranksearch.study.options import Local
from ranksearch.study.study import run_study
from ranksearch.study_file import load_spec, parse_spec
from tests import ROOT, nets
from tests.conftest import time_once
from tests.pages import DOCS, anchors, blocks, commands, links, name_of, pages
from tests.report_study import study_record, with_controls

ALL = pages("*.md", "docs/**/*.md", "examples/**/*.md")
TAUGHT = pages("README.md", "docs/tutorial/*.md", "docs/how-to/*.md", "docs/explanation/*.md")
"""Pages whose Python runs, whose study files load and whose commands parse."""
RUN = pages("docs/tutorial/*.md")
"""Pages whose commands run, too."""

every_page = pytest.mark.parametrize("page", ALL, ids=name_of)
taught = pytest.mark.parametrize("page", TAUGHT, ids=name_of)


@pytest.mark.parametrize("section", ["keys", "commands", "front", "engines"])
def test_tables_are_those_of_the_code(section, monkeypatch):
    """`python benchmarks/keys.py --write` updates them."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    keys = importlib.import_module("keys")
    assert section in keys.TABLES
    page, table = keys.TABLES[section]
    written = re.search(rf"<!-- {section}: .*? -->\n(.*)\n<!-- end of {section} -->", (DOCS / page).read_text(), re.DOTALL)
    assert written
    assert written[1] == table()


@every_page
def test_links_lead_somewhere(page):
    for link in links(page):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{name_of(page)} links to {link}"
        assert not anchor or anchor in anchors(path), f"{name_of(page)} links to {link}"


@taught
def test_study_files_load(page):
    for block in blocks(page):
        if block.kind == "toml":
            source, table = f"{name_of(page)}, line {block.line}", tomllib.loads(block.code)
            if "name" not in table:  # some sections of a study file
                rest = tomllib.loads(nets.SMALL)
                table = {
                    key: {**rest.get(key, {}), **value} if isinstance(value, dict) else value for key, value in table.items()
                }
                table = rest | table
            assert parse_spec(tomli_w.dumps(table), source=source)


def parsed(words):
    """The options of a command; None for `--help` and `--version`, which print and end."""
    try:
        return make_parser().parse_args(words)
    except SystemExit as end:
        if end.code:
            pytest.fail(f"ranksearch {' '.join(words)} does not parse")
        return None


@taught
def test_commands_parse(page):
    for block in blocks(page):
        for words in commands(block.code) if block.kind == "console" else ():
            options = parsed(words)
            if hasattr(options, "overrides"):
                assert parse_spec(nets.SMALL, source=" ".join(words), overrides=_all_overrides(options))


def cut_short(spec: StudySpec) -> StudySpec:
    """The study with two trials at most, one finalist and an epoch of each training; without limits, and without CP, which takes longest."""

    def short(recipe: Recipe) -> Recipe:
        return replace(recipe, epochs=min(recipe.epochs, 1))

    return replace(
        spec, controls=0, dense=short(spec.dense), narrow=short(spec.narrow), finetune=short(spec.finetune),
        finalists=replace(short(spec.finalists), count=1),
        search=replace(spec.search, trials=min(spec.search.trials, 2), **dict.fromkeys(Limits.names())),
        space=replace(spec.space, widths=(1.0,), methods=tuple(name for name in spec.space.methods if name != "cp")),
    )  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Every study is cut short and runs in this process, whatever it says."""

    def run(spec, out, options, **rest):
        return run_study(cut_short(spec), out, replace(options, engine=Local(0)), **rest)

    monkeypatch.setattr("ranksearch.study.study.run_study", run)
    monkeypatch.setattr("ranksearch.api.run_study", run)
    time_once(monkeypatch)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder of its own, from which modules are imported; they and the methods that a page registers are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    methods, kinds = dict(METHODS), dict(KINDS)
    yield tmp_path
    for registry, those_before in ((METHODS, methods), (KINDS, kinds)):
        registry.clear()
        registry.update(those_before)
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.slow
@taught
def test_a_page_runs_from_its_beginning_to_its_end(page, quick, alone, capsys):
    """In order: files are saved, Python is executed in one namespace, and the commands of a tutorial are run."""
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.title:
            (alone / block.title).write_text(block.code)
            if block.kind == "toml":
                assert load_spec(block.title)
        elif block.kind == "python":
            # The lines of the page, so that a traceback names them.
            code = compile("\n" * (block.line - 1) + block.code, name_of(page), "exec")
            exec(code, names)
        elif block.kind == "console" and page in RUN:
            for words in commands(block.code):
                if words != ["--version"]:
                    assert main(words) == 0, f"ranksearch {' '.join(words)}: {capsys.readouterr().err}"


def message_patterns() -> list[re.Pattern[str]]:
    """A pattern for each text in the package that is long enough to be a message; any text may stand for its values."""
    texts = set()
    for path in (ROOT / "ranksearch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*" for part in node.values]
                texts.add((sum(len(part) for part in parts if part != ".*"), "".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add((len(node.value), re.escape(node.value)))
    return [re.compile(text) for length, text in sorted(texts) if length >= 25]


def test_quoted_messages_are_those_of_the_code():
    page = DOCS / "troubleshooting.md"
    quoted = re.findall(r"^(?:> |\| )`([^`\n]+)`", page.read_text(), re.MULTILINE)
    assert len(quoted) > 20
    patterns = message_patterns()
    assert [line for line in quoted if not any(pattern.fullmatch(line) for pattern in patterns)] == []


def schema(name: str) -> jsonschema.Draft202012Validator:
    content = json.loads((DOCS / "reference" / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(content)
    return jsonschema.Draft202012Validator(content)


def test_the_files_of_a_finished_study_keep_their_schemas(finished):
    folder, _ = finished
    front = json.loads((folder / "front.json").read_text())
    schema("front").validate(front)
    assert front["front"]
    plans = list(folder.glob("models/*/plan.json"))
    assert plans
    for path in plans:
        schema("plan").validate(json.loads(path.read_text()))


def test_the_schema_of_a_front_names_every_key():
    front = json.loads(front_json(with_controls(study_record(), (40.0, 0.9))))
    validator = schema("front")
    validator.validate(front)
    keys = {name: set(part["properties"]) for name, part in validator.schema["$defs"].items() if "properties" in part}
    assert set(front) == set(validator.schema["properties"])
    assert set(front["dense"]) == keys["dense"]
    assert [set(row) for row in front["front"]] == [keys["model"]] * len(front["front"])
    assert [set(row) for row in front["controls"]] == [keys["control"]]
    assert set(front["dense"]["timings"][0]) == keys["timing"]


NARROWING = Narrowing((Kept(8, (0, 3)),), {"conv1.weight": {0: 0}}, {"conv1": {"out_channels": 2, "shape": (1, 2)}})
PLANS = [
    Plan(),
    Plan.of({kind.method: kind(*range(1, 1 + len(kind.rank_names()))) for kind in KINDS.values()}),
    Plan.of({"fc1": CP(3, kernel=(6, 6), order=(1, 2, 0)), "conv": Tucker2(2, 3, padding=((0, 1), (1, 1)))}),
    Plan.of({"conv1": CP(2)}, 0.25, NARROWING),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_schema_of_a_plan_takes_every_plan(plan):
    schema("plan").validate(json.loads(plan.to_json()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layers": {}}, 'A plan needs "format": '),
        ({"format": "ranksearch-plan/0", "layers": {}}, 'A plan needs "format": '),
        ({"format": FORMAT, "layers": []}, 'A plan needs "format": '),
        ({"format": FORMAT, "layers": {}, "width": 0}, "A plan's width must be above 0"),
        ({"format": FORMAT, "layers": {}, "width": 2}, "A plan's width must be above 0"),
        ({"format": FORMAT, "layers": {"conv": {"rank": 3}}}, "Layer 'conv' must name a known method"),
        ({"format": FORMAT, "layers": {"conv": {"method": "cp"}}}, "method 'cp' takes rank, but got none"),
        ({"format": FORMAT, "layers": {"conv": {"method": "cp", "rank": 0}}}, "A rank must be a whole number"),
        ({"format": FORMAT, "layers": {"conv": {"method": "cp", "rank": 1.5}}}, "A rank must be a whole number"),
        ({"format": FORMAT, "layers": {"conv": {"method": "tucker2", "rank": 3}}}, "method 'tucker2' takes rank_in, rank_out"),
        ({"format": FORMAT, "layers": {"conv": {"method": "cp", "rank": 3, "kernel": [0]}}}, "A kernel must be whole numbers"),
        ({"format": FORMAT, "layers": {"conv": {"method": "cp", "rank": 3, "order": [0, 1]}}}, "An order must list each axis"),
        ({"format": FORMAT, "layers": {"conv": {"method": "cp", "rank": 3, "padding": [1]}}}, "A padding must be pairs"),
        ({"format": FORMAT, "layers": {}, "narrowing": {"kept": []}}, 'A narrowing needs "kept"'),
        (
            {
                "format": FORMAT,
                "layers": {},
                "narrowing": {"kept": [{"size": 3, "indices": []}], "tensors": {}, "attributes": {}},
            },
            "Kept channels must be ascending",
        ),
        (
            {"format": FORMAT, "layers": {}, "narrowing": {"kept": [], "tensors": {"a": {"x": 0}}, "attributes": {}}},
            "A narrowing must give each dimension",
        ),
    ],
    ids=str,
)
def test_what_the_schema_of_a_plan_refuses_the_reader_refuses(content, message):
    assert not schema("plan").is_valid(content)
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(content)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/-]+\.md", navigation.partition("nav:")[2]))
    assert listed == {str(page.relative_to(DOCS)) for page in pages("docs/**/*.md")}
