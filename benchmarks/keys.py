"""Make the tables of settings in docs/ from the settings' fields: `python benchmarks/keys.py --write`."""

from __future__ import annotations

import argparse

from pages import PAGE, write_section

from ranksearch.spec import keys_tables
from ranksearch.study.options import engine_table

COMMAND = "python benchmarks/keys.py --write"
TABLES = {"keys": ("studies.md", keys_tables), "engines": ("cluster.md", engine_table)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/, instead of printing them")
    arguments = parser.parse_args()
    for name, (page, table) in TABLES.items():
        if arguments.write:
            write_section(name, COMMAND, table(), page=PAGE.parent / page)
        else:
            print(table(), end="\n\n")


if __name__ == "__main__":
    main()
