"""Losses and scores of disparities predicted from one picture, and their pictures.

Outputs are a pyramid: maps (batch, 2, height, width), the finest first, of the disparities of a left and a right picture as
shares of the width. Targets are those of `ranksearch.data:depth`.

Two losses: `supervised` learns the left disparities from the true ones where these are known. `self_supervised` learns both
from pairs of pictures alone (Godard, Mac Aodha and Brostow, CVPR 2017), which takes many pairs.

Scores compare the finest left map, scaled to the size of the truth, with the known true disparities of each picture, and are
means over pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ranksearch.data.colours import coloured

MIN_DISPARITY = 1e-4
"""The smallest disparity whose logarithm counts, as a share of the width: a tenth of a pixel of KITTI's."""
SCALES = 4
"""How many maps of the pyramid the self-supervised loss compares, the finest ones; the others are too small for a window."""
SSIM_SHARE, C1, C2 = 0.85, 0.01**2, 0.03**2
"""The share of the structural similarity in the photometric error, and its constants."""
SMOOTHNESS_WEIGHT = 0.1
"""The weight of the smoothness at the finest map; it halves with each coarser one."""
DELTA = 1.25
"""Disparities are right if none of the two is more than so many times the other."""
MAX_PIXELS_OFF, MAX_SHARE_OFF = 3.0, 0.05
"""A disparity is wrong for D1 if its error is larger than both: in pixels, and as a share of the true disparity."""
FAR, NEAR = 0.004, 0.12
"""The disparities that are drawn darkest and brightest: 5 and 150 pixels of KITTI's 1242."""


def supervised(outputs: Sequence[Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """The mean absolute difference of the logarithms of predicted and true disparities, averaged over the pyramid.

    Logarithms, since what counts is how many times a distance is off. Each map is scaled to the size of the truth.
    """
    truth = targets["disparity"]
    known = ~truth.isnan()
    logs = truth[known].clamp_min(MIN_DISPARITY).log()
    errors = [
        (_scaled(maps[:, :1], truth)[known].clamp_min(MIN_DISPARITY).log() - logs).abs().sum() / max(len(logs), 1)
        for maps in outputs
    ]
    return torch.stack(errors).mean()


def self_supervised(outputs: Sequence[Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """The loss of Godard et al. 2017, summed over the finest maps: photometric error, smoothness, left-right consistency."""
    losses = []
    for number, maps in enumerate(outputs[:SCALES]):
        left, right = (F.interpolate(targets[name], maps.shape[2:], mode="area") for name in ("left", "right"))
        of_left, of_right = maps[:, :1], maps[:, 1:2]
        losses += [
            photometric_error(warped(right, of_left), left) + photometric_error(warped(left, -of_right), right),
            SMOOTHNESS_WEIGHT / 2**number * (roughness(of_left, left) + roughness(of_right, right)),
            inconsistency(of_left, of_right),
        ]
    return torch.stack(losses).sum()


def warped(picture: Tensor, disparity: Tensor) -> Tensor:
    """A picture (batch, channels, height, width) as the other camera sees it: each pixel is taken from `disparity` to its left.

    `disparity` is (batch, 1, height, width), as a share of the width; a negative one takes from the right. Between pixels it is
    interpolated linearly; beyond the edge the outermost pixels are repeated.
    """
    height, width = disparity.shape[2:]
    down, across = ((2 * torch.arange(count, device=picture.device) + 1) / count - 1 for count in (height, width))
    # In the coordinates of grid_sample, which run from -1 to 1.
    columns = across - 2 * disparity[:, 0]
    grid = torch.stack([columns, down[:, None].expand_as(columns)], 3)
    return F.grid_sample(picture, grid.to(picture.dtype), padding_mode="border", align_corners=False)


def photometric_error(picture: Tensor, other: Tensor) -> Tensor:
    """How different two pictures (batch, channels, height, width) look: 0.85 of (1 - SSIM) / 2, of windows of 3x3, and 0.15 of
    the mean absolute difference."""
    dissimilar = ((1 - _similarity(picture, other)) / 2).clamp(0, 1).mean()
    return SSIM_SHARE * dissimilar + (1 - SSIM_SHARE) * (picture - other).abs().mean()


def _similarity(picture: Tensor, other: Tensor) -> Tensor:
    """The structural similarity of each window of 3x3 pixels (Wang et al. 2004)."""
    mean, other_mean = (F.avg_pool2d(each, 3, 1) for each in (picture, other))
    variance = F.avg_pool2d(picture**2, 3, 1) - mean**2
    other_variance = F.avg_pool2d(other**2, 3, 1) - other_mean**2
    covariance = F.avg_pool2d(picture * other, 3, 1) - mean * other_mean
    alike = (2 * mean * other_mean + C1) * (2 * covariance + C2)
    return alike / ((mean**2 + other_mean**2 + C1) * (variance + other_variance + C2))


def roughness(disparity: Tensor, picture: Tensor) -> Tensor:
    """The mean absolute gradient of a disparity map, less where the picture has edges; 0 for a constant map."""
    total = disparity.new_zeros(())
    for axis in (2, 3):
        edges = picture.diff(dim=axis).abs().mean(1, keepdim=True)
        total = total + (disparity.diff(dim=axis).abs() * torch.exp(-edges)).mean()
    return total


def inconsistency(of_left: Tensor, of_right: Tensor) -> Tensor:
    """How far the disparities of the two pictures are from saying the same: each map against the other one, warped by it."""
    left_off = (of_left - warped(of_right, of_left)).abs().mean()
    return left_off + (of_right - warped(of_left, -of_right)).abs().mean()


def delta_1_25(outputs: Sequence[Tensor], targets: Mapping[str, Tensor]) -> float:
    """The share of known pixels whose disparity, and so depth, is less than 1.25 times the true one, and that less than 1.25
    times the predicted one.

    A mean over pictures. NaN if a prediction is NaN.
    """
    predicted, truth = _compared(outputs, targets)
    ratio = predicted / truth
    return _mean_over_pictures((torch.maximum(ratio, 1 / ratio) < DELTA).double(), predicted, truth)


def abs_rel(outputs: Sequence[Tensor], targets: Mapping[str, Tensor]) -> float:
    """The absolute error of the depth over the true depth, as a mean over pictures; lower is better.

    The depth is proportional to 1 / disparity, so no focal length is needed.
    """
    predicted, truth = _compared(outputs, targets)
    return _mean_over_pictures((truth / predicted - 1).abs().double(), predicted, truth)


def d1(outputs: Sequence[Tensor], targets: Mapping[str, Tensor]) -> float:
    """KITTI's D1: the share of known pixels whose disparity is off by more than 3 pixels and 5 %; lower is better.

    Pixels are those of the pictures as they were before they were scaled. A mean over pictures.
    """
    predicted, truth = _compared(outputs, targets)
    off = (predicted - truth).abs()
    wrong = (off * targets["width"][:, None, None, None] > MAX_PIXELS_OFF) & (off > MAX_SHARE_OFF * truth)
    return _mean_over_pictures(wrong.double(), predicted, truth)


def show(kind: str, value: Any) -> NDArray[np.uint8]:
    """An input, a target or an output of one picture as a picture (height, width, 3).

    Disparities are coloured on a logarithmic scale from far, dark violet, to near, yellow; those not known are black.
    """
    if kind == "input":
        picture: NDArray[np.uint8] = (255 * value).round().byte().permute(1, 2, 0).numpy()
        return picture
    if kind == "target":
        disparity = value["disparity"][0]
    else:
        (disparity,) = F.interpolate(value[0][None, :1], scale_factor=2, mode="bilinear")[0]
    return coloured((disparity.clamp_min(MIN_DISPARITY) / FAR).log() / math.log(NEAR / FAR))


def _compared(outputs: Sequence[Tensor], targets: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Predicted and true disparities (pictures, 1, height, width)."""
    truth = targets["disparity"]
    return _scaled(outputs[0][:, :1], truth), truth


def _scaled(maps: Tensor, truth: Tensor) -> Tensor:
    return F.interpolate(maps, truth.shape[2:], mode="bilinear", align_corners=False)


def _mean_over_pictures(values: Tensor, predicted: Tensor, truth: Tensor) -> float:
    """The mean of the values of known pixels, over pictures that have any."""
    known = ~truth.isnan()
    if predicted[known].isnan().any():
        return math.nan
    counts = known.flatten(1).sum(1)
    sums = values.where(known, 0).flatten(1).sum(1)
    means = sums[counts > 0] / counts[counts > 0]
    return float(means.mean()) if len(means) else math.nan
