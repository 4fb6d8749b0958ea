"""Pages of the documentation: their blocks of code, commands, links and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

DOCS = ROOT / "docs"
BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<kind>\w+)(?: title=\"(?P<title>[^\"]+)\")?[^\n]*\n(?P<code>.*?)^(?P=indent)```$"
    r"|^<!-- python\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, the file that it is to be saved as, and its text.

    Code in a comment `<!-- python ... -->`, which readers do not see, is a block of Python without a file.
    """

    kind: str
    title: str | None
    code: str
    line: int


def pages(*patterns: str) -> list[Path]:
    """The pages that match the patterns, relative to the repository."""
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [_block(match, text.count("\n", 0, match.start()) + 2) for match in BLOCK.finditer(text)]


def _block(match: re.Match[str], line: int) -> Block:
    if match["hidden"] is not None:
        return Block("python", None, match["hidden"], line)
    indent = len(match["indent"])
    code = "".join(text[indent:] for text in match["code"].splitlines(keepends=True))
    return Block(match["kind"], match["title"], code, line)


def commands(code: str) -> Iterator[list[str]]:
    """The commands `ranksearch ...` in a block of a console, as lists of words."""
    for line in code.splitlines():
        if prompt := re.match(r"\S*\$ ", line):
            words = shlex.split(line[prompt.end() :], comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                command, words = words[:end], words[end + 1 :]
                if command[:1] == ["ranksearch"]:
                    yield command[1:]


def links(page: Path) -> list[str]:
    """The relative links of a page."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"`[^`\n]*`", "", text)
    return [link for link in LINK.findall(text) if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in HEADING.findall(text)}
