"""The report of a study: an HTML page, Markdown, CSV, JSON and PNG, made from record and pictures alone, without torch."""

from __future__ import annotations

from pathlib import Path

from ranksearch.results.record import StudyRecord
from ranksearch.support.files import write_whole, writing

__all__ = ["write_report"]


def write_report(record: StudyRecord, folder: Path) -> Path:
    """Write the study's report into `folder` and return the path of its page, `report.html`.

    The page also shows the pictures that the study drew into `folder`, if any.

    Also writes `report.md`, `front.csv`, `front.json`, `trials.csv`, `front.png`, `front-COST.png` for each further cost, and
    `controls.csv` if there are controls.
    Each file is replaced in one step. The study may be at any stage, even before its first trial. Equal records give equal
    bytes, as do equal pictures.

    Raises:
        StudyError: a file cannot be written.
    """
    # Imported here: the drawing libraries take a quarter of a second, which would delay the start of a study.
    from ranksearch.report import charts, json_and_csv, markdown, page, pictures, summary

    # The page comes last, so that every file it links to exists before it.
    contents: dict[str, str | bytes] = {
        "front.json": json_and_csv.front_json(record),
        "front.csv": json_and_csv.front_csv(record),
        "trials.csv": json_and_csv.trials_csv(record),
        **({"controls.csv": json_and_csv.controls_csv(record)} if record.controls else {}),
        **{name: charts.picture(record, cost) for name, cost in summary.pictures(record).items()},
        "report.md": markdown.markdown(record),
        "report.html": page.html(record, folder, pictures.rows(record, folder)),
    }
    for name, content in contents.items():
        with writing(f"The report's {folder / name}", "fix this and run `ranksearch report`"):
            write_whole(folder / name, content)
    return folder / "report.html"
