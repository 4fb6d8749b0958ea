"""What `mkdocs build` does beyond the pages' Markdown."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import griffe

RELATIVE_LINK = re.compile(r"(?<=\]\()(?:\.\./)+[^)#\s]+")
HIDDEN_CODE = re.compile(r"<!-- python\n.*?-->\n?", re.DOTALL)


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Point links that leave docs/ at the repository, and remove hidden code, which only the tests run."""
    docs = Path(config.docs_dir)

    def in_repository(match: re.Match[str]) -> str:
        target = (docs / page.file.src_uri).parent.joinpath(match[0]).resolve()
        if target.is_relative_to(docs):
            return match[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"{config.repo_url.rstrip('/')}/{kind}/main/{target.relative_to(docs.parent)}"

    return RELATIVE_LINK.sub(in_repository, HIDDEN_CODE.sub("", markdown))


class RuntimeDocstrings(griffe.Extension):
    """Take docstrings that the package completes when it is imported, such as the help of settings, from there."""

    def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
        if any(str(decorator.value) == "documented" for decorator in cls.decorators):
            _take(cls)

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        if func.path == "ranksearch.api.search":
            _take(func)


def _take(thing: griffe.Class | griffe.Function) -> None:
    text = inspect.getdoc(griffe.dynamic_import(thing.path))
    assert text, thing.path
    thing.docstring = griffe.Docstring(text, parent=thing)
