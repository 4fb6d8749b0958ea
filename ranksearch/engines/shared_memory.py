"""All local workers share one copy of data, model and factors.

The driver writes the memory of tensors and arrays once, to a file without a name: in memory on Linux, in the folder for
temporary files elsewhere. Every worker maps that file copy-on-write, so what a worker writes stays private to it. The file
disappears with the last process that holds it, however the processes end. Memory that already maps a file (`np.memmap`,
`torch.from_file`, and tensors made from them) is not copied: workers map the same file.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import re
import stat
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import UntypedStorage
from torch.storage import TypedStorage

from ranksearch.engines.pickling import ModulePickler, picklable
from ranksearch.errors import DataError, StudyError

ALIGNMENT_BYTES = 64
"""Alignment in bytes, that of torch's own allocations: some kernels round differently with another one."""
MIN_MAPPED_BYTES = 1 << 20
"""Bytes. Smaller pieces of mapped files are copied, not mapped again, since there may be thousands."""
MAPPING = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) ...(.) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)")
"""The first line of a mapping in /proc/self/smaps: start, end, p(rivate) or s(hared), offset, device, inode, path."""


@dataclass(frozen=True)
class Packed:
    """A value in a file: first the memory of its tensors and arrays, then, from byte `start` on, a pickle that refers to it."""

    file: IO[bytes]
    start: int

    def close(self) -> None:
        """Close the file. Workers that have unpacked the value keep it."""
        self.file.close()


@dataclass(frozen=True)
class _File:
    path: str
    device: int
    inode: int

    def check(self, stats: os.stat_result) -> None:
        """Raises a DataError unless `stats` is of this file."""
        if (stats.st_dev, stats.st_ino) != (self.device, self.inode) or not stat.S_ISREG(stats.st_mode):
            raise DataError(f"{self.path} must not change while a study runs, but was replaced by another file")


@dataclass(frozen=True)
class _Mapping:
    """Memory of this process, from address `start` to `end`, that maps the file from `offset` on."""

    start: int
    end: int
    offset: int
    file: _File


@dataclass(frozen=True)
class _Span:
    """Where the memory of one tensor or array lies: in `file`, or in the packed file if `file` is None."""

    file: _File | None
    offset: int
    length: int


def pack(value: Any) -> Packed:
    """Write a value so that workers can share its memory.

    Raises:
        ModelError: something in it cannot be pickled.
        StudyError: there is no room for the copy.
    """
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    with picklable():
        _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    memories = [buffer.raw() for buffer in buffers]
    file = _anonymous_file()
    try:
        spans = _write(memories, file)
        start = file.tell()
        pickle.dump((spans, stream.getbuffer().tobytes()), file)
        file.flush()
    except OSError as error:
        file.close()
        size = sum(memory.nbytes for memory in memories) / 1e6
        raise StudyError(
            f"A second copy of data, model and factors ({size:,.0f} MB) must fit into memory for the workers, but does not "
            f"({error}); free some memory, or run the trials in this process with --workers 0."
        ) from None
    return Packed(file, start)


def unpack(file: int, start: int) -> Any:
    """The value that was packed into the file with this descriptor. Its memory is mapped copy-on-write.

    Raises:
        DataError: a mapped data file was replaced since.
    """
    packed_memory = memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_COPY))
    spans, stream = pickle.loads(packed_memory[start:])
    return pickle.loads(stream, buffers=[_mapped(packed_memory, span) for span in spans])


def check_portable(value: Any) -> None:
    """Check, without keeping a copy, that a value can be sent to the workers.

    Raises:
        ModelError: something in it cannot be pickled.
    """
    with picklable():
        _Pickler(_NullStream(), protocol=5, buffer_callback=lambda buffer: None).dump(value)


class _NullStream(io.RawIOBase):
    def write(self, data: Any) -> int:
        return len(data)


class _Pickler(ModulePickler):
    """Passes the memory of CPU tensors and of arrays to `buffer_callback`. Plain pickle would copy it into the stream."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, TypedStorage):
            return _typed, (value._untyped_storage, value.dtype)
        if isinstance(value, UntypedStorage) and value.device.type == "cpu":
            memory = torch.empty(0, dtype=torch.uint8).set_(value).numpy()
            return _untyped, (pickle.PickleBuffer(memory.data),)
        if type(value) is np.memmap:
            return _memmap, (value.view(np.ndarray),)
        if type(value) is np.ndarray and (root := _root(value)) is not None:
            return _strided, (root, _address(value) - _address(root), value.dtype, value.shape, value.strides)
        return super().reducer_override(value)


def _root(array: NDArray[Any]) -> NDArray[Any] | None:
    """The flat memory behind a strided view: that of a transposed array, or of the mapped file that contains the array.

    None if the array is contiguous or holds objects, which pickle handles itself, or is a part of some other array.
    """
    if array.flags.forc or array.dtype.hasobject:
        return None
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    if not root.flags.forc or not (isinstance(root, np.memmap) or root.nbytes == array.nbytes):
        return None
    return root.view(np.ndarray).ravel(order="K")


def _typed(storage: UntypedStorage, dtype: torch.dtype) -> TypedStorage:
    return TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _untyped(memory: memoryview) -> UntypedStorage:
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage() if len(memory) else UntypedStorage(0)


def _memmap(array: NDArray[Any]) -> NDArray[Any]:
    return array.view(np.memmap)


def _strided(
    root: NDArray[Any], offset: int, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...]
) -> NDArray[Any]:
    return np.ndarray(shape, dtype, root, offset, strides)


def _address(memory: Any) -> int:
    return int(np.asarray(memory).__array_interface__["data"][0])


def _anonymous_file() -> IO[bytes]:
    # Not in /dev/shm, which is limited to 64 MB in a Docker container: memfd has no limit of its own.
    return os.fdopen(os.memfd_create("ranksearch"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()


def _write(memories: Sequence[memoryview], file: IO[bytes]) -> list[_Span]:
    mappings = _mappings() if any(memory.nbytes >= MIN_MAPPED_BYTES for memory in memories) else []
    spans = []
    for memory in memories:
        span = _in_a_file(memory, mappings)
        if span is None:
            file.seek(-file.tell() % ALIGNMENT_BYTES, os.SEEK_CUR)
            span = _Span(None, file.tell(), memory.nbytes)
            file.write(memory)
        spans.append(span)
    return spans


def _in_a_file(memory: memoryview, mappings: Sequence[_Mapping]) -> _Span | None:
    if memory.nbytes < MIN_MAPPED_BYTES:
        return None
    start = _address(memory)
    mapping = next((each for each in mappings if each.start <= start < each.end), None)
    if mapping is None or start + memory.nbytes > mapping.end:
        return None
    try:
        mapping.file.check(Path(mapping.file.path).stat())
    except (OSError, DataError):  # the file was deleted or replaced, so workers could not map it
        return None
    return _Span(mapping.file, start - mapping.start + mapping.offset, memory.nbytes)


def _mappings() -> list[_Mapping]:
    """The file mappings of this process, without private mappings that were written to and so differ from their file."""
    mappings: list[_Mapping] = []
    private = False
    with suppress(FileNotFoundError):  # only Linux has smaps; elsewhere mapped files are copied like other memory
        for line in Path("/proc/self/smaps").read_bytes().splitlines():
            if match := MAPPING.fullmatch(line):
                start, end, kind, offset, major, minor, inode, path = match.groups()
                file = _File(os.fsdecode(path), os.makedev(int(major, 16), int(minor, 16)), int(inode))
                mappings.append(_Mapping(int(start, 16), int(end, 16), int(offset, 16), file))
                private = kind == b"p"
            elif private and line.startswith((b"Anonymous:", b"Swap:")) and int(line.split()[1]):
                mappings.pop()
                private = False
    return mappings


def _mapped(packed_memory: memoryview, span: _Span) -> memoryview:
    if span.file is None:
        return packed_memory[span.offset : span.offset + span.length]
    with Path(span.file.path).open("rb") as file:
        span.file.check(os.fstat(file.fileno()))
        before = span.offset % mmap.ALLOCATIONGRANULARITY
        mapping = mmap.mmap(file.fileno(), before + span.length, access=mmap.ACCESS_COPY, offset=span.offset - before)
    return memoryview(mapping)[before:]
