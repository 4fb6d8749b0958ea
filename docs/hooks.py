"""What `mkdocs build` does beyond the pages' Markdown."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import griffe

from ranksearch.settings import default_of, fields

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


class Settings(griffe.Extension):
    """Take from the imported package what settings get there: docstrings with their help, and defaults without their rules."""

    def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
        if _holds_settings(cls):
            _complete(cls)

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        if func.path == "ranksearch.api.search":
            _complete(func)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if isinstance(attr.parent, griffe.Class) and _holds_settings(attr.parent) and "property" not in attr.labels:
            default = default_of(fields(griffe.dynamic_import(attr.parent.path))[attr.name])
            attr.value = None if default is MISSING else repr(default)


def _holds_settings(cls: griffe.Class) -> bool:
    return any(str(decorator.value) == "documented" for decorator in cls.decorators)


def _complete(thing: griffe.Class | griffe.Function) -> None:
    text = inspect.getdoc(griffe.dynamic_import(thing.path))
    assert text, thing.path
    thing.docstring = griffe.Docstring(text, parent=thing)
