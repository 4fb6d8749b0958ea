"""At the end of a study whose task can draw: pictures of a few test inputs, their targets and the models' outputs."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from ranksearch.compress.saved import load_model
from ranksearch.console import View
from ranksearch.errors import RankSearchError
from ranksearch.report.pictures import DENSE, PICTURES, picture_name
from ranksearch.results.trials import TrialRecord
from ranksearch.support.files import write_whole, writing
from ranksearch.task.showing import Picture, drawn_inputs, drawn_outputs, shown_inputs
from ranksearch.task.task import Task

MAX_SIDE = 512
"""Larger pictures are scaled down to so many pixels along their longer side, so that the report stays small."""
QUALITY = 85
"""Of WebP, out of 100."""


def draw_pictures(task: Task, trials: Sequence[tuple[TrialRecord, Path]], out: Path, view: View) -> None:
    """Draw some test inputs, their targets, and the outputs of the dense model and all finalists, into the study's folder.

    The report chooses from them. If something cannot be drawn, the view is told why, and the study goes on.

    Args:
        task: the dense model and its data.
        trials: the finalists and the folders of their models.
        out: the study's folder.
        view: is told why there are no pictures.
    """
    if task.show is None:
        return
    try:
        drawn = dict(_drawn(task, trials))
        with writing(f"The folder {out / PICTURES}"):
            for path in (out / PICTURES).glob("*.webp"):
                if path.name not in drawn:
                    path.unlink()
            for name, picture in drawn.items():
                write_whole(out / PICTURES / name, _encoded(picture))
    except RankSearchError as error:
        view.note(f"no pictures in the report: {error}")


def _drawn(task: Task, trials: Sequence[tuple[TrialRecord, Path]]) -> Iterator[tuple[str, Picture]]:
    """Every picture with the name of its file."""
    chosen, dense = shown_inputs(task), task.model.cpu()
    for index, kind, picture in drawn_inputs(task, chosen):
        yield picture_name(index, kind), picture
    for index, picture in drawn_outputs(task, dense, chosen):
        yield picture_name(index, DENSE), picture
    for trial, folder in trials:
        for index, picture in drawn_outputs(task, load_model(dense, folder), chosen):
            yield picture_name(index, str(trial.number)), picture


def _encoded(picture: Picture) -> bytes:
    image, buffer = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    image.save(buffer, "webp", quality=QUALITY)
    return buffer.getvalue()
