"""Folders of pictures and of stereo pairs, made of noise."""

from __future__ import annotations

import numpy as np
from PIL import Image

CLASSES = [f"class{number}" for number in range(10)]


def write_pictures(folder, *, each, side=32, classes=CLASSES):
    draw = np.random.default_rng(len(folder.name))
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
            pixels[: side // 2] = 25 * label
            Image.fromarray(pixels).save(folder / name / f"{number:04}.jpg")


SHIFTS = (3, 7, 5)


def pair(shift, *, height=24, width=40, seed=0):
    """A stereo pair: the right image is the left one moved by `shift` pixels, with noise at the free edge."""
    draw = np.random.default_rng(seed)
    left = draw.integers(0, 256, (height, width), dtype=np.uint8)
    right = draw.integers(0, 256, (height, width), dtype=np.uint8)
    right[:, : width - shift] = left[:, shift:]
    return left, right


def write_scenes(root, *, shifts=SHIFTS, folder="kitti2015"):
    """Write scenes. Their true disparity is the shift, 9 pixels more in the upper half, and unknown in the first columns."""
    for number, shift in enumerate(shifts):
        scene = root / folder / f"{number:06}"
        scene.mkdir(parents=True)
        left, right = pair(shift, width=40 + number, seed=number)
        truth = np.full(left.shape, shift * 256, np.uint16)
        truth[: len(truth) // 2] += 9 * 256
        truth[:, :10] = 0
        for name, pixels in (("left", left), ("right", right), ("disp_gt", truth)):
            Image.fromarray(pixels).save(scene / f"{name}.png")
