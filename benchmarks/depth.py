"""The field's figures of a finished study of depth: the share within 1.25 times the true depth, absolute relative error, D1.

    python benchmarks/depth.py runs/pydnet --write    # after `ranksearch study pydnet`; the table of docs/thesis.md

Beside the dense net and the models of the front stands a guess that looks at no picture: for each pixel, the mean of the
logarithms of the true disparities that the training pictures have there, and in pixels where none has one, of all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from pages import PAGE, row, said, table, write_section
from torch import Tensor

from ranksearch.compress.saved import load_model
from ranksearch.data import batches
from ranksearch.data.depth import StereoPairs
from ranksearch.data.disparity import abs_rel, d1, delta_1_25
from ranksearch.report import text
from ranksearch.results.attributes import read_study
from ranksearch.results.messages import Difference
from ranksearch.results.scores import DELTA
from ranksearch.study import folder
from ranksearch.study.dense import load_weights
from ranksearch.task.task import load_task, predict

HEAD = ("", "parameters", "latency", "faster", "delta < 1.25, test", "from dense, points", "abs rel", "D1")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the study's folder")
    parser.add_argument("--write", action="store_true", help="put the table into docs/thesis.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    spec = folder.read_spec(given.run)
    record, task = read_study(folder.open_study(spec.name, folder.storage_url(given.run, None))), load_task(spec)
    facts, dense = record.facts, record.facts.dense
    if not load_weights(task.model, given.run / folder.DENSE_FILE):
        raise SystemExit(f"{given.run} must hold a dense net, but does not; run the study first.")
    lines = [said(f"Run on {facts.machine}; torch {facts.versions['torch']}; latency in ONNX Runtime, one thread, batch 1.\n")]
    lines += [said(f"Data: {facts.data}.\n"), *table(HEAD)]
    test = task.data.test
    lines.append(row("the training pictures' mean", "", "", "", *figures(guess(task.data.train, test), test)))
    outputs, _ = predict(task.model, test)
    lines.append(row("dense", f"{dense.params:,}", text.milliseconds(dense.latency_ms), "", *figures(outputs, test)))
    for trial in record.front:
        if trial.finalist:
            outputs, _ = predict(load_model(task.model, given.run / "models" / str(trial.number)), test)
            assert dense.latency_ms is not None
            assert trial.finalist.latency_ms is not None
            lines.append(row(
                f"trial {trial.number}", f"{trial.params:,}", text.milliseconds(trial.finalist.latency_ms),
                text.ratio(dense.latency_ms / trial.finalist.latency_ms),
                *figures(outputs, test, trial.finalist.difference_test),
            ))  # fmt: skip
    lines += ["", said(f"`{facts.command}`")]
    if given.write:
        command = "python benchmarks/depth.py runs/pydnet --write"
        write_section("pydnet", command, "\n".join(lines), page=PAGE.with_name("thesis.md"))


def figures(outputs: tuple[Tensor, ...], split: object, difference: Difference | None = None) -> list[str]:
    """The figures of a model on a split as text."""
    assert isinstance(split, StereoPairs)
    ((_, targets),) = batches(split, len(split))
    off = text.difference(difference.value, DELTA) if difference else ""
    off += f" {text.interval(difference.low, difference.high, DELTA)}" if difference else ""
    share, wrong = (text.percent(score(outputs, targets)) for score in (delta_1_25, d1))
    return [share, off, f"{abs_rel(outputs, targets):.3f}", wrong]


def guess(train: object, test: object) -> tuple[Tensor, ...]:
    """For each picture of the test split the same map, of the training split's true disparities."""
    assert isinstance(train, StereoPairs)
    assert isinstance(test, StereoPairs)
    logs = torch.cat([train.disparity, train.disparity.flip(3)]).log()  # mirrored too, as the nets see them
    means = logs.nanmean(0, keepdim=True)
    return (means.where(~means.isnan(), logs.nanmean()).exp().expand(len(test), 2, *means.shape[2:]),)


if __name__ == "__main__":
    main()
