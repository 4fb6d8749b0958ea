"""The report of a study: one HTML page, Markdown, CSV, JSON, a picture; from its record alone, without torch."""

from __future__ import annotations

from pathlib import Path

from ranksearch.results.record import StudyRecord
from ranksearch.support.files import write_whole, writing

__all__ = ["write_report"]


def write_report(record: StudyRecord, folder: Path) -> Path:
    """Write the study's report into `folder` and return the path of its page, `report.html`.

    Beside the page stand `report.md`, `front.csv`, `front.json`, `trials.csv` and `front.png`, or one more picture where there
    are two costs, each replaced as a whole. A study at any stage has a report: before its first trial, before its finalists,
    after its end. Equal records give equal bytes.

    Raises:
        StudyError: a file of it cannot be written.
    """
    # Loaded here: what draws takes a quarter of a second, which is not for the start of a study.
    from ranksearch.report import charts, markdown, page, summary, tables

    # The page comes last: once it is there, so is all that it links to.
    contents: dict[str, str | bytes] = {
        "front.json": tables.front_json(record),
        "front.csv": tables.front_csv(record),
        "trials.csv": tables.trials_csv(record),
        **{name: charts.picture(record, cost) for name, cost in summary.pictures(record).items()},
        "report.md": markdown.markdown(record),
        "report.html": page.html(record),
    }
    for name, content in contents.items():
        with writing(f"The report's {folder / name}", "mend that, and `ranksearch report` makes it from the record"):
            write_whole(folder / name, content)
    return folder / "report.html"
