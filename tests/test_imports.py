"""Imports go one way, and the command line starts without heavy packages."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from tests import ROOT

PACKAGE = ROOT / "ranksearch"

# A part may import from the parts above it, and a package also from itself.
PARTS = [
    "errors",
    "support",
    "plan",
    "results",
    "settings",
    "spec",
    "references",
    "study_file",
    "console",
    "report",
    "tensors",
    "methods",
    "compress",
    "latency",
    "data",
    "models",
    "task",
    "strategy",
    "engines",
    "study",
    "api",
    "cli",
]
LIGHT_FILES = {"__init__.py", "cli.py", "report/__init__.py"}


def imports(path):
    """For every import from ranksearch in a file: (module, whether the import is inside a function)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom | ast.Import)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ranksearch":
            base = node.module.removeprefix("ranksearch").lstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                yield name if _is_module(name) else base, node in inner


def _is_module(name):
    path = PACKAGE.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def files():
    return sorted(path for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_from_its_own_part_and_those_above(path):
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    for name, inside in imports(path):
        part = name.split(".")[0]
        if str(relative) in LIGHT_FILES:
            continue
        assert not inside, f"{relative} imports {name} inside a function"
        assert part == own or PARTS.index(part) < PARTS.index(own), f"{relative} imports {name}"


def test_every_file_belongs_to_a_part():
    found = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__"} == set(PARTS)


def test_no_imports_run_in_a_circle():
    def module(path):
        return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")

    graph = {module(path): {name for name, _ in imports(path)} for path in files() if path.parent != PACKAGE}
    assert {"compress.surgery", "methods.base", "study.study"} <= set(graph)
    # A package's __init__ imports its files, so a file that imports from its package's __init__ makes a circle.
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("from ranksearch.cli import main; main(['--help'])", {"torch", "optuna", "ray", "sklearn", "rich"}),
        ("from ranksearch.cli import main; main(['studies'])", {"torch", "optuna", "ray", "sklearn"}),
        ("import ranksearch", {"torch", "optuna", "ray", "rich"}),
        (
            "import ranksearch.report.charts, ranksearch.report.markdown, ranksearch.report.page, ranksearch.console",
            {"torch", "ray", "sklearn"},
        ),
        pytest.param("import ranksearch.study.study", {"altair", "ray", "sklearn", "torchvision"}, marks=pytest.mark.slow),
        pytest.param(
            "import ranksearch, torch; ranksearch.inventory(torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.ones(1, 8))",
            {"torch._dynamo", "optuna", "ray"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_light_imports_load_no_heavy_packages(statement, absent):
    code = f"""
import sys
try:
    {statement}
except SystemExit:
    pass
print(*sorted({absent!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_an_unknown_name_of_the_package():
    import ranksearch

    with pytest.raises(AttributeError, match="module 'ranksearch' has no attribute 'serach'"):
        _ = ranksearch.serach


def test_the_public_names_are_shown_and_are_there():
    import ranksearch

    assert {"search", "factorize_", "StudyRecord", "export_model", "Plan"} <= set(dir(ranksearch)) == set(ranksearch.__all__)
    assert all(getattr(ranksearch, name) is not None for name in ranksearch.__all__)
