"""Make the tables in docs/ that come from the code: `python benchmarks/keys.py --write`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

from pages import write_section

from ranksearch.cli import make_parser
from ranksearch.settings import default_of, fields
from ranksearch.spec import Recipe, StudySpec
from ranksearch.study.options import Ray, option_of

COMMAND = "python benchmarks/keys.py --write"
DOCS = Path(__file__).parents[1] / "docs"


def keys_text() -> str:
    """Every key of a study file by section, for docs/reference/study-file.md."""
    hints = typing.get_type_hints(StudySpec)
    sections = [name for name in fields(StudySpec) if dataclasses.is_dataclass(hints[name])]
    top = {name: entry for name, entry in fields(StudySpec).items() if name not in sections}
    texts = [f"## Outside of the sections\n\n{_settings_table(top, head='key')}"]
    texts += [_section_text(name, hints[name], fields(StudySpec)[name]) for name in sections]
    training = "How to train, for each of the sections `dense`, `narrow`, `finetune` and `finalists`:"
    return "\n\n".join([*texts, f"## Training\n\n{training}\n\n{_settings_table(fields(Recipe), head='key')}"])


def _section_text(name: str, kind: type[Any], entry: Field[Any]) -> str:
    inherited = fields(Recipe) if issubclass(kind, Recipe) else {}
    own = {f"{name}.{key}": entry for key, entry in fields(kind).items() if key not in inherited}
    training = " It also has the keys of [training](#training)." if inherited else ""
    texts = [f"## Section `{name}`", f"{_sentence(entry)}{training}", *([_settings_table(own, head="key")] if own else [])]
    return "\n\n".join(texts)


def _sentence(entry: Field[Any]) -> str:
    text = str(entry.metadata["help"])
    required = " Required." if default_of(entry) is MISSING else ""
    return f"{text[0].upper()}{text[1:]}.{required}"


def engine_text() -> str:
    """The options of the Ray engine, for docs/cluster.md."""
    return _settings_table({option_of(name): entry for name, entry in fields(Ray).items()}, head="option")


def _settings_table(settings: Mapping[str, Field[Any]], *, head: str) -> str:
    rows = (f"| `{name}` | {_default_text(entry)} | {entry.metadata['help']} |" for name, entry in settings.items())
    return "\n".join([f"| {head} | default | meaning |", "|---|---|---|", *rows])


def _default_text(entry: Field[Any]) -> str:
    default = default_of(entry)
    if default is MISSING:
        return "required"
    if default is None:
        return "none"
    return "empty" if default == "" else json.dumps(default)


def commands_text() -> str:
    """Every command with its arguments, for docs/reference/command-line.md."""
    # argparse has no public list of a parser's arguments.
    commands = next(action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    texts = ("\n".join(_command_lines(name, parser)) for name, parser in commands.choices.items())
    return "\n\n".join(text.rstrip() for text in texts)


def _command_lines(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## ranksearch {name}\n"
    yield f"{parser.description}\n"
    for group in parser._mutually_exclusive_groups:
        yield f"One of {', '.join(f'`{action.option_strings[0]}`' for action in group._group_actions)} must be given.\n"
    arguments = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    if arguments:
        yield "| argument | meaning |"
        yield "|---|---|"
    for action in arguments:
        assert action.help, f"ranksearch {name}: {action.dest} needs a help text"
        yield f"| `{_argument(action)}` | {action.help.replace('%%', '%')} |"


def _argument(action: argparse.Action) -> str:
    """An argument as it is typed: `--out DIR`, `--engine local, ray`."""
    values = ", ".join(action.choices) if action.choices else action.metavar if action.nargs != 0 else ""
    return " ".join([*action.option_strings[:1], str(values).replace("|", " or ")]).strip()


def front_keys() -> str:
    """The keys of front.json with their meanings, for docs/reference/file-formats.md."""
    schema = json.loads((DOCS / "reference" / "front.schema.json").read_text(encoding="utf-8"))
    tables = [("The file", schema), *((f"`{name}`", part) for name, part in schema["$defs"].items() if "properties" in part)]
    return "\n\n".join(f"{title}: {part['description']}\n\n{_keys_table(part)}" for title, part in tables)


def _keys_table(schema: Mapping[str, Any]) -> str:
    rows = (f"| `{key}` | {entry['description']} |" for key, entry in schema["properties"].items())
    return "\n".join(["| key | meaning |", "|---|---|", *rows])


TABLES = {
    "keys": ("reference/study-file.md", keys_text),
    "commands": ("reference/command-line.md", commands_text),
    "front": ("reference/file-formats.md", front_keys),
    "engines": ("cluster.md", engine_text),
}
"""By section: the page in docs/, and the function that makes it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/, instead of printing them")
    arguments = parser.parse_args()
    for name, (page, table) in TABLES.items():
        if arguments.write:
            write_section(name, COMMAND, table(), page=DOCS / page)
        else:
            print(table(), end="\n\n")


if __name__ == "__main__":
    main()
