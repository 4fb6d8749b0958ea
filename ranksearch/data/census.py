"""Disparity maps by matching census transforms (Zabih and Woodfill 1994): simple, fast, and often wrong."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RADIUS = 2
"""The radius, in pixels, of the census window and of the box that costs are summed over; both are 5x5."""


def disparity_map(left: NDArray[np.uint8], right: NDArray[np.uint8], *, disparities: int) -> NDArray[np.uint8]:
    """The disparity with the lowest cost, of 0 .. `disparities` - 1, for each pixel of the left gray image (height, width).

    The cost is the Hamming distance of the 5x5 census, summed over 5x5 pixels; of equal costs the smallest disparity wins.
    A match outside the right image has the highest cost.
    """
    height, width = left.shape
    left_bits, right_bits = census(left), census(right)
    lowest = np.full((height, width), np.iinfo(np.uint16).max, np.uint16)
    chosen = np.zeros((height, width), np.uint8)
    # One disparity at a time, so that the arrays fit into a core's cache.
    cost = np.empty((height, width), np.uint8)
    max_cost = (2 * RADIUS + 1) ** 2 - 1
    for disparity in range(min(disparities, width)):
        cost[:, :disparity] = max_cost
        np.bitwise_count(left_bits[:, disparity:] ^ right_bits[:, : width - disparity], out=cost[:, disparity:])
        summed = _box(cost)
        better = summed < lowest
        np.copyto(lowest, summed, where=better)
        chosen[better] = disparity
    return chosen


def census(image: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """For each pixel (height, width), 24 bits: which of its 5x5 neighbours are darker. Edge pixels are repeated outwards."""
    height, width = image.shape
    padded = np.pad(image, RADIUS, mode="edge")
    bits = np.zeros((height, width), np.uint32)
    for down in range(2 * RADIUS + 1):
        for right in range(2 * RADIUS + 1):
            if (down, right) != (RADIUS, RADIUS):
                bits <<= 1
                bits |= padded[down : down + height, right : right + width] < image
    return bits


def _box(cost: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Sums over 5x5 pixels, over fewer at the border."""
    height, width = cost.shape
    padded = np.pad(cost.astype(np.uint16), RADIUS)
    rows = sum((padded[step : step + height] for step in range(1, 2 * RADIUS + 1)), padded[:height])
    return sum((rows[:, step : step + width] for step in range(1, 2 * RADIUS + 1)), rows[:, :width])
