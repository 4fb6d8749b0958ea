"""Folders of pictures, one a class: decoded once, then read from one file beside them."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ranksearch.errors import DataError, first_line
from ranksearch.files import write_whole

DECODER = 2
"""Counts changes in how a picture is decoded, so that what was kept before is decoded again."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Decoded pictures (count, channels, size, size) as uint8, sorted by class; `labels` number the `classes`."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]


def read_pictures(folder: Path, *, size: int, mode: str = "RGB") -> Pictures:
    """The pictures under `folder/<class>/`, scaled so that the shorter side is `size` and cut to the square in the middle.

    They are kept as `<folder>-<size>-<mode>.safetensors`, which is made again when the files' names, sizes or times change.

    Args:
        folder: torchvision's ImageFolder layout.
        size: pixels of a side.
        mode: RGB, or L for gray.

    Raises:
        DataError: no folder of classes with pictures, or a file that is no picture.
    """
    # Here, since it takes seconds to import, in every worker.
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise DataError(f"Pictures must lie in {folder}/<class>/, but {first_line(error)}") from None
    paths = [Path(path) for path, _ in found.samples]
    kept = [(path.relative_to(folder), path.stat()) for path in paths]
    listing = "\n".join(f"{name} {about.st_size} {about.st_mtime_ns}" for name, about in kept)
    digest = hashlib.sha256(f"{DECODER}\n{listing}".encode()).hexdigest()
    cache = folder.with_name(f"{folder.name}-{size}-{mode}.safetensors")
    pixels = _cached(cache, digest)
    if pixels is None:
        pixels = torch.stack([_decoded(path, size, mode) for path in paths])
        # A folder that cannot be written to is no reason to stop: its pictures are then decoded in each run.
        with suppress(OSError):
            write_whole(cache, safetensors.torch.save({"pixels": pixels}, {"files": digest}))
    return Pictures(pixels, torch.tensor(found.targets), tuple(found.classes))


def _cached(path: Path, digest: str) -> Tensor | None:
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("pixels") if file.metadata() == {"files": digest} else None
    except (FileNotFoundError, SafetensorError):
        return None


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    """Pillow itself clips what is darker or brighter than 8 bits can say."""
    if picture.mode[0] not in "IF":
        return picture
    values = np.array(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() >= 1 << 16:
        raise ValueError(f"its pixels, of mode {picture.mode}, are neither of 8 nor of 16 bits")
    return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))


def _decoded(path: Path, size: int, mode: str) -> Tensor:
    try:
        with Image.open(path) as opened:
            picture = _in_eight_bits(ImageOps.exif_transpose(opened)).convert(mode)
    except Exception as error:  # Pillow raises of many types on damaged files
        raise DataError(f"{path} must be a picture, but cannot be read: {error}; take it out of the folder.") from None
    if picture.size != (size, size):
        scale = size / min(picture.size)
        wide, high = (max(size, round(side * scale)) for side in picture.size)
        left, top = (wide - size) // 2, (high - size) // 2
        picture = picture.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.atleast_3d(np.array(picture))).permute(2, 0, 1).contiguous()
