"""Write a compressed model as ONNX, run it in ONNX Runtime without torch's help, and time it beside the dense one.

After a study the command line does the first part: ranksearch export runs/lenet --knee --format onnx

python examples/deploy_onnx.py            half a minute
python examples/deploy_onnx.py --quick    seconds, to see that it runs
"""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import ranksearch
from ranksearch import CP, SVD, Plan, Tucker2
from ranksearch.data import digits
from ranksearch.models import lenet


def session_of(path: Path) -> onnxruntime.InferenceSession:
    """The file in ONNX Runtime, on one thread: times on several are at the mercy of what else the machine does."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def milliseconds(sessions: list[onnxruntime.InferenceSession], images: np.ndarray, rounds: int) -> list[float]:
    """The least time of one pass of each: taken in turn, since other work on the machine only ever adds time."""
    least = [float("inf")] * len(sessions)
    for _ in range(rounds):
        for number, session in enumerate(sessions):
            start = time.perf_counter()
            for _ in range(20):
                session.run(None, {"input": images})
            least[number] = min(least[number], (time.perf_counter() - start) / 20 * 1e3)
    return least


def main(out: str | Path = "runs/deploy", *, quick: bool = False):
    """Export and time; returns the models, the paths of their files and their milliseconds, the dense one first."""
    torch.manual_seed(0)
    Path(out).mkdir(parents=True, exist_ok=True)
    dense = lenet(channels=1).eval()  # times do not depend on the weights; take your own trained net
    plan = Plan.of(
        {"conv2": Tucker2(8, 8), "conv3": Tucker2(8, 16), "conv4": Tucker2(16, 16), "fc1": CP(32, kernel=(6, 6)), "fc2": SVD(8)}
    )
    small = ranksearch.factorize_(copy.deepcopy(dense), plan)
    images = digits().validation.tensors[0]

    paths = [Path(out) / "dense.onnx", Path(out) / "small.onnx"]
    for model, each, path in ((dense, Plan(), paths[0]), (small, plan, paths[1])):
        # Writes the file with a free batch size, loads it again and compares the outputs on real inputs.
        difference = ranksearch.export_model(model, dense, each, images[:64], path, form="onnx")
        print(f"{path}: {path.stat().st_size:,} bytes; outputs differ by at most {difference:.1e} from torch's")

    sessions = [session_of(path) for path in paths]
    for batch in (1, 64):
        times = milliseconds(sessions, images[:batch].numpy(), rounds=2 if quick else 10)
        print(f"batch {batch}: dense {times[0]:.3f} ms, compressed {times[1]:.3f} ms, {times[0] / times[1]:.1f}x faster")
    return (dense, small), paths, times


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
