"""Check the published CCNN weights (Poggi and Mattoccia 2016): compare their maps with the published ones, measure their AUC.

    python benchmarks/ccnn_reference.py WEIGHTS.npz data/stereo

`WEIGHTS.npz` holds the TensorFlow variables (height, width, in, out). `data/stereo/ccnn_reference/disparity` holds disparity
maps and `.../confidence` the confidence maps that the published program computed from them. `data/stereo/kitti2015` holds
stereo pairs with ground truth; the AUC is measured on the disparity maps that ranksearch computes from them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ranksearch.data import confidence, stereo
from ranksearch.data.stereo import MARGIN, Maps
from ranksearch.models import ccnn
from ranksearch.task import training
from ranksearch.task.task import Task

NAMES = {
    "conv1": "conv1", "conv2": "conv2", "conv3": "conv3", "conv4": "conv4", "fc1": "fully_connected_1",
    "fc2": "fully_connected_2", "fc3": "prediction",
}  # fmt: skip


def published(path: Path) -> nn.Module:
    """The published network. Its input is disparities in pixels."""
    found, state = np.load(path), {}
    for ours, theirs in NAMES.items():
        state[f"{ours}.weight"] = torch.from_numpy(found[f"{theirs}/weights"]).permute(3, 2, 0, 1)
        state[f"{ours}.bias"] = torch.from_numpy(found[f"{theirs}/biases"])
    net = ccnn()
    net.load_state_dict(state)
    return net.eval()


def read(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path)).astype(np.float32))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("root", type=Path)
    options = parser.parse_args()
    net = published(options.weights)
    for path in sorted((options.root / "ccnn_reference" / "disparity").glob("*.png")):
        found = net(F.pad(read(path)[None, None], [MARGIN] * 4)).sigmoid()[0, 0]
        expected = read(options.root / "ccnn_reference" / "confidence" / path.name) / 65535
        print(f"{path.name}: largest difference of confidence {float((found - expected).abs().max()):.1e}")
    for test in ((1, 20), (21, 40)):
        data = stereo(root=str(options.root), test_scenes=test, scaled=False)
        assert isinstance(data.test, Maps)
        score = training.score(net, Task(net, data, score=confidence.one_minus_auc), data.test, device=torch.device("cpu"))
        print(f"kitti2015 {test[0]} to {test[1]}: AUC {1 - score:.4f}, optimum {data.test.optimum():.4f}", flush=True)


if __name__ == "__main__":
    main()
