"""Pictures in one folder per class, decoded once and cached in one file next to the folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ranksearch.errors import DataError
from ranksearch.support.files import write_whole

DECODER_VERSION = 2
"""The version of the decoder. Raise it when decoding changes, so that older caches are not used."""
MAX_NAMED_FILES = 3
"""How many unreadable files an error message names after the first."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Decoded pictures (count, channels, size, size) as uint8, sorted by class; `labels` number the `classes`."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    left_out: tuple[Path, ...]
    """Ignored files: their names do not have the ending of a picture."""


def read_pictures(folder: Path, *, size: int, mode: str = "RGB") -> Pictures:
    """Read the pictures under `folder/<class>/`, scaled so that the shorter side is `size`, and cropped to the central square.

    They are cached in `<folder>-<size>-<mode>.safetensors`, which is written anew if the files' names, sizes or times change.

    Args:
        folder: a folder in torchvision's ImageFolder layout.
        size: side of the square in pixels.
        mode: "RGB", or "L" for gray.

    Raises:
        DataError: there are no class folders, a class has no pictures, or a file cannot be read as a picture.
    """
    classes = class_names(folder)
    pictures, left_out = _listed(folder, classes)
    files = [(path.relative_to(folder), stat) for path, stat in _existing(path for path, _ in pictures)]
    listing = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in files)
    digest = hashlib.sha256(f"{DECODER_VERSION}\n{listing}".encode()).hexdigest()
    cache = folder.with_name(f"{folder.name}-{size}-{mode}.safetensors")
    pixels = _cached(cache, digest)
    if pixels is None:
        pixels = _all_decoded([path for path, _ in pictures], size, mode)
        # If the folder is read-only, go on: the pictures are then decoded in each run.
        with suppress(OSError):
            write_whole(cache, safetensors.torch.save({"pixels": pixels}, {"files": digest}))
    return Pictures(pixels, torch.tensor([label for _, label in pictures]), classes, tuple(left_out))


def class_names(folder: Path) -> tuple[str, ...]:
    """The sorted names of the class folders in a folder, without hidden folders and folders of operating systems.

    Raises:
        DataError: the folder does not exist, has no class folders, or holds a broken link.
    """
    if not folder.is_dir():
        raise DataError(f"Pictures must lie in {folder}/<class>/, but there is no folder {folder}{_beside(folder)}.")
    entries = sorted(path for path in folder.iterdir() if not _is_clutter(path.name))
    if broken := next((path for path in entries if not path.exists()), None):
        raise DataError(f"{broken} must be a folder of pictures, but is a broken link; repair or delete it.")
    names = [path.name for path in entries if path.is_dir()]
    if not names:
        raise DataError(f"Pictures must lie in {folder}/<class>/, but {folder} holds no folders; make one for each class.")
    return tuple(names)


def _listed(folder: Path, classes: Sequence[str]) -> tuple[list[tuple[Path, int]], list[Path]]:
    """The pictures of a folder with their class numbers, and the files that are not pictures."""
    # Imported here: it takes seconds, which workers of studies with other data should not spend.
    from torchvision.datasets.folder import make_dataset

    endings = {ending for ending, form in Image.registered_extensions().items() if form in Image.OPEN}
    left_out: list[Path] = []

    def is_picture(name: str) -> bool:
        path = Path(name)
        if any(_is_clutter(part) for part in path.relative_to(folder).parts):
            return False
        if path.suffix.lower() not in endings:
            left_out.append(path.relative_to(folder.parent))
            return False
        return True

    numbers = {name: number for number, name in enumerate(classes)}
    samples = make_dataset(str(folder), numbers, is_valid_file=is_picture, allow_empty=True)
    if empty := sorted(set(classes) - {classes[label] for _, label in samples}):
        other_files = next((f", only files like {path}" for path in left_out if path.parts[1] == empty[0]), "")
        raise DataError(
            f"Each class must hold pictures, but {folder / empty[0]} holds none{other_files}; add some, or delete the folder."
        )
    return [(Path(name), label) for name, label in samples], left_out


def _beside(folder: Path) -> str:
    """For an error message: the folders next to a missing one, or where a relative path was looked for."""
    if not folder.parent.is_dir():
        return "" if folder.is_absolute() else f" in {Path.cwd()}"
    names = sorted(path.name for path in folder.parent.iterdir() if path.is_dir() and not _is_clutter(path.name))
    return f", only {', '.join(names)}" if names else ""


def _is_clutter(name: str) -> bool:
    """Whether the name is of a hidden file or one that macOS, Windows, Jupyter or a Synology server leaves behind."""
    return name.startswith(".") or name in {"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir"}


def _existing(paths: Iterable[Path]) -> Iterator[tuple[Path, os.stat_result]]:
    for path in paths:
        try:
            yield path, path.stat()
        except OSError as error:
            raise DataError(f"{path} must be a picture, but is a broken link ({error.strerror}); delete it.") from None


def _all_decoded(paths: Sequence[Path], size: int, mode: str) -> Tensor:
    """All pictures (count, channels, size, size); one error reports all files that cannot be read."""
    decoded, errors = list[Tensor](), dict[Path, Exception]()
    for path in paths:
        try:
            decoded.append(_decoded(path, size, mode))
        except Exception as error:  # Pillow raises many types of exceptions on damaged files
            errors[path] = error
    if errors:
        first, *rest = errors
        more = f"; neither can {', '.join(map(str, rest[:MAX_NAMED_FILES]))}" if rest else ""
        more += f" and {len(rest) - MAX_NAMED_FILES:,} more" if len(rest) > MAX_NAMED_FILES else ""
        remedy = "remove them" if rest else "remove it"
        raise DataError(f"{first} must be a picture, but cannot be read: {errors[first]}{more}; {remedy} from the folder.")
    return torch.stack(decoded)


def _cached(path: Path, digest: str) -> Tensor | None:
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("pixels") if file.metadata() == {"files": digest} else None
    except (FileNotFoundError, SafetensorError):
        return None


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    """A 16-bit picture scaled to 8 bits; Pillow's own conversion would clip its values. Other pictures are unchanged."""
    if picture.mode[0] not in "IF":
        return picture
    values = np.array(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() >= 1 << 16:
        raise ValueError(f"its pixels, of mode {picture.mode}, have neither 8 nor 16 bits")
    return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))


def _decoded(path: Path, size: int, mode: str) -> Tensor:
    with Image.open(path) as opened:
        picture = _in_eight_bits(ImageOps.exif_transpose(opened)).convert(mode)
    if picture.size != (size, size):
        scale = size / min(picture.size)
        wide, high = (max(size, round(side * scale)) for side in picture.size)
        left, top = (wide - size) // 2, (high - size) // 2
        picture = picture.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.atleast_3d(np.array(picture))).permute(2, 0, 1).contiguous()
