"""Tables of benchmarks: printed as they grow, and kept in the pages of docs, a section for each script."""

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
    """Versions, cores and date, as a line of the page."""
    return said(f"{about(*packages)}; {datetime.now(UTC):%Y-%m-%d}.\n")


def about(*packages: str) -> str:
    """Versions and cores."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def table(head: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [row(*head), said("|" + " --- |" * len(head))]


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return said("| " + " | ".join(map(str, cells)) + " |")


def said(line: str) -> str:
    """The line, printed."""
    print(line, flush=True)
    return line


def write_section(name: str, command: str, text: str, *, page: Path = PAGE) -> None:
    """Replace what stands between the marks of `name` in docs/benchmarks.md, or another page; the words around it stay."""
    whole = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: made by `{command}` -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"<!-- {name}:.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(whole):
        raise SystemExit(f"{page} must hold the marks of {name!r}: {begin} and {end}.")
    page.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", whole), encoding="utf-8")
