"""Tables of the benchmarks: print each line at once, and write the table into its section of a page in docs/."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def machine(*packages: str) -> str:
    """Print and return a line with machine, versions of packages, and date."""
    return said(f"{about(*packages)}; {datetime.now(UTC):%Y-%m-%d}.\n")


def about(*packages: str) -> str:
    """Architecture, cores and versions of packages, as text."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def table(head: Sequence[str]) -> list[str]:
    """Print and return the first two lines of a Markdown table."""
    return [row(*head), said("|" + " --- |" * len(head))]


def row(*cells: object) -> str:
    """Print and return one line of a Markdown table."""
    return said("| " + " | ".join(map(str, cells)) + " |")


def said(line: str) -> str:
    """Print a line and return it."""
    print(line, flush=True)
    return line


def write_section(name: str, command: str, text: str, *, page: Path = PAGE) -> None:
    """Replace the text between the marks of section `name` in a page. The rest of the page stays."""
    whole = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: made by `{command}` -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"<!-- {name}:.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(whole):
        raise SystemExit(f"{page} must hold the marks of {name!r}: {begin} and {end}.")
    page.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", whole), encoding="utf-8")
