"""Pictures of maps, for the functions that a study names as `task.show`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

VIRIDIS = (
    (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137), (53, 183, 121), (109, 205, 89),
    (180, 222, 44), (253, 231, 37),
)  # fmt: skip
"""Ten colours (red, green, blue) of matplotlib's colour map viridis, evenly spaced."""


def coloured(shares: Tensor) -> NDArray[np.uint8]:
    """A picture (height, width, 3) of values in 0..1 (height, width), from dark violet to yellow; NaN is black."""
    values = shares.double().numpy()
    known = ~np.isnan(values)
    places, stops = np.where(known, values, 0).clip(0, 1), np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(places, stops, channel) for channel in np.array(VIRIDIS).T]
    return np.where(known[..., None], np.stack(channels, 2).round(), 0).astype(np.uint8)


def in_gray(shares: Tensor) -> NDArray[np.uint8]:
    """A picture (height, width, 3) of values in 0..1 (height, width), from black to white."""
    values = (255 * shares.double().clamp(0, 1)).round().byte().numpy()
    return np.repeat(values[..., None], 3, 2)
