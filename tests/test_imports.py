"""Imports run one way, and the light doors stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ranksearch"

# Each floor may import from itself where its files are a package, and from the floors above it.
FLOORS = [
    ["errors"],
    ["files"],
    ["plan", "pareto", "limits"],
    ["objectives"],
    ["spec"],
    ["record"],
    ["attributes"],
    ["report", "console"],
    ["tensors", "confidence", "seeds"],
    ["macs", "stand_ins", "axes"],
    ["layers"],
    ["factorization", "metric"],
    ["surgery", "profile"],
    ["scratch"],
    ["data", "models"],
    ["tasks", "checkpoint", "inputs", "weights"],
    ["training"],
    ["export"],
    ["dense"],
    ["strategy"],
    ["engines"],
    ["storage"],
    ["database"],
    ["folder"],
    ["options"],
    ["facts"],
    ["run"],
    ["probing", "finishing"],
    ["study"],
    ["api"],
    ["cli"],
]
DOORS = {"__init__.py", "cli.py", "report/__init__.py"}


def imports(path):
    """(imported ranksearch module, whether inside a function) for every import of our own in a file."""
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
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            yield from ((name, node in inner) for name in names)


def files():
    return sorted(path for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_from_floors_above(path):
    height = {name: level for level, names in enumerate(FLOORS) for name in names}
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    for name, inside in imports(path):
        if str(relative) in DOORS:
            continue
        assert not inside, f"{relative} imports {name} inside a function"
        assert name == own or height[name] < height[own], f"{relative} imports {name}"


def test_every_module_stands_on_a_floor():
    known = {name for names in FLOORS for name in names}
    found = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__"} == known


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
        ("import ranksearch.study", {"altair", "ray", "sklearn", "torchvision"}),
        (
            "import ranksearch, torch; ranksearch.inventory(torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.ones(1, 8))",
            {"torch._dynamo", "optuna", "ray"},
        ),
    ],
)
def test_light_doors(statement, absent):
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
