"""Memory shared by local workers: values arrive unchanged, a write is seen by its worker only, mapped files are not copied."""

from __future__ import annotations

import io
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import Dataset, TensorDataset

from ranksearch.engines import processes, shared_memory
from ranksearch.engines.pickling import pickled
from ranksearch.engines.shared_memory import check_portable, pack, unpack
from ranksearch.errors import DataError, ModelError, StudyError
from ranksearch.plan import Plan
from ranksearch.results.messages import CurvePoint, Job, Outcome, Result

linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="mapped files are found in Linux's /proc alone")
ROWS = 3 << 20
"""Rows of a mapped file, one byte each: large enough to be mapped again instead of copied."""


class Mine(Dataset):
    """A user's data set with tensors and arrays in any attributes."""

    def __init__(self, **parts):
        self.parts = [parts]

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.parts[0]


def sent(value):
    """The value as a worker gets it."""
    packed = pack(value)
    try:
        return unpack(packed.file.fileno(), packed.start)
    finally:
        packed.close()


def copied(value):
    """The number of bytes that are copied for the workers."""
    packed = pack(value)
    packed.close()
    return packed.start


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.stride(), one.requires_grad) == (
            other.dtype, other.shape, other.stride(), other.requires_grad,
        )  # fmt: skip
        assert torch.equal(one, other)
    else:
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.array_equal(one, other)


def tensors():
    whole = torch.arange(120).reshape(2, 3, 4, 5)
    yield from (whole, whole.permute(0, 3, 1, 2), whole[:, 1:, ::2], whole[1], whole.to(memory_format=torch.channels_last))
    yield from (torch.zeros(0), torch.zeros(3, 0), torch.tensor(7.0), torch.ones(1).expand(4, 3), torch.tensor([True, False]))
    yield from (whole.to(kind) for kind in (torch.uint8, torch.bfloat16, torch.float64, torch.complex64))
    yield from (nn.Parameter(torch.randn(3)), torch.randn(3, requires_grad=True), whole.to_sparse())


def arrays():
    whole = np.arange(120).reshape(2, 3, 4, 5)
    yield from (whole, whole.transpose(0, 3, 1, 2), whole[:, 1:, ::2], whole[::-1], np.asfortranarray(whole), whole[..., 0])
    yield from (
        np.zeros(0),
        np.zeros((3, 0)),
        np.array(7.0),
        np.broadcast_to(np.ones(1), (4, 3)),
        np.array(["a", None], object),
    )
    yield from (np.zeros(3, [("x", "u1"), ("y", ">f4")]), np.arange(3).astype(">i8"), np.ma.masked_array([1, 2], [True, False]))


@pytest.mark.parametrize("without", [None, "memfd_create"])
def test_a_worker_gets_what_was_sent(without, monkeypatch):
    """Tensors and arrays of every kind in a user's data set, with and without the features of Linux."""
    if without:
        monkeypatch.delattr(os, without)
        monkeypatch.setattr(shared_memory, "_mappings", list)
    given = [*tensors(), *arrays()]
    for one, other in zip(given, sent(Mine(given=given)).parts[0]["given"], strict=True):
        if getattr(one, "is_sparse", False):
            one, other = one.to_dense(), other.to_dense()
        same(one, other)


def test_memory_is_aligned_as_torch_aligns_it():
    given = [torch.zeros(count, dtype=torch.uint8) for count in (1, 3, 65, 1000)]
    assert [each.data_ptr() % 64 for each in sent(given)] == [0] * 4


def test_tensors_that_share_memory_share_it_in_the_worker():
    whole = torch.zeros(1 << 20)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    halves = [whole[: 1 << 19], whole[1 << 19 :]]
    assert copied(halves) < 1.1 * 4 * (1 << 20)
    first, second = sent(halves)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    there = sent(net)
    assert there[1].weight is there[0].weight
    same(there[0].bias, net[0].bias)


def test_an_array_that_is_seen_transposed_is_shared():
    array = np.zeros((64, 32, 32, 3), np.float32)
    there = sent(array.transpose(0, 3, 1, 2))
    assert there.strides == array.transpose(0, 3, 1, 2).strides
    assert not there.flags.owndata


def mapped(path, mode):
    if not path.exists():
        path.write_bytes(bytes(100) + (bytes(range(251)) * (ROWS // 251 + 1))[:ROWS])
    return np.memmap(path, np.uint8, mode, offset=100, shape=(ROWS // 3, 3))


MAPPED = {
    "whole": lambda array: array,
    "rows": lambda array: array[5:-5],
    "in steps": lambda array: array[::2, 1:],
    "backwards": lambda array: array[::-1],
    "transposed": lambda array: array.T,
    "as an array": np.asarray,
    "rows as an array": lambda array: np.asarray(array[7:]),
    "a tensor": lambda array: torch.from_numpy(array),
    "a tensor of rows": lambda array: torch.from_numpy(array[9:]),
    "a tensor in steps": lambda array: torch.from_numpy(array)[::2].T,
}


@linux
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
@pytest.mark.parametrize("view", MAPPED)
def test_a_mapped_file_is_not_copied(tmp_path, view, mode):
    value = MAPPED[view](mapped(tmp_path / "data", mode))
    assert copied(Mine(value=value)) < 10_000
    same(sent(Mine(value=value)).parts[0]["value"], value)


@linux
@pytest.mark.parametrize("whose", [True, False])
def test_a_file_that_torch_maps_is_not_copied(tmp_path, whose):
    mapped(tmp_path / "data", "r")
    value = torch.from_file(str(tmp_path / "data"), shared=whose, size=ROWS, dtype=torch.uint8)
    assert copied(value) < 10_000
    same(sent(value), value)


def test_what_was_written_to_a_private_mapping_is_sent(tmp_path):
    array = mapped(tmp_path / "data", "c")
    array[ROWS // 6] = 255
    same(sent(array), array)
    assert mapped(tmp_path / "data", "r")[ROWS // 6].max() < 255


def test_a_mapped_file_that_is_deleted_or_replaced_is_sent(tmp_path):
    array = mapped(tmp_path / "data", "r")
    before = np.array(array)
    (tmp_path / "other").write_bytes(bytes(100 + ROWS))
    (tmp_path / "other").replace(tmp_path / "data")
    assert np.array_equal(sent(array), before)
    (tmp_path / "data").unlink()
    assert np.array_equal(sent(array), before)


@linux
def test_a_mapped_file_that_is_replaced_before_a_worker_starts(tmp_path):
    packed = pack(mapped(tmp_path / "data", "r"))
    (tmp_path / "other").write_bytes(bytes(100 + ROWS))
    (tmp_path / "other").replace(tmp_path / "data")
    with pytest.raises(DataError, match=r"data must not change while a study runs, but was replaced by another file"):
        unpack(packed.file.fileno(), packed.start)
    packed.close()


@pytest.mark.parametrize("mode", ["r+", "c", None])
def test_a_write_reaches_nobody_else(tmp_path, mode):
    array = mapped(tmp_path / "data", mode) if mode else np.ones((ROWS // 3, 3), np.uint8)
    before, packed = np.array(array), pack([array, torch.from_numpy(array)])
    for _ in range(2):
        for each in unpack(packed.file.fileno(), packed.start):
            assert np.array_equal(each, before)
            each[:] = 9
    assert np.array_equal(array, before)
    packed.close()


def test_no_room_for_the_copy(monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_memory, "_anonymous_file", Full)
    words = (
        r"A second copy of data, model and factors \(8 MB\) must fit into memory for the workers, but does not \(\[Errno 28\] No space left "
        r"on device\); free some memory, or run the trials in this process with --workers 0"
    )
    with pytest.raises(StudyError, match=words):
        pack(torch.zeros(2_000_000))


def test_what_cannot_be_pickled():
    words = r"Model, data, loss and score must be picklable to reach the workers, but are not \(cannot pickle"
    for refused in (pack, check_portable):
        with pytest.raises(ModelError, match=words):
            refused([torch.zeros(3), (number for number in range(3))])
    check_portable([torch.zeros(3)])


class Writes:
    """Adds one to its data, waits until the other worker did so too, and reports memory, smallest and largest value."""

    def __init__(self, data, folder):
        self.data, self.folder = data, folder

    def __call__(self, job):
        images = self.data.tensors[0]
        yield CurvePoint(0, float(images.sum()))
        yield CurvePoint(1, float(_anonymous()))
        images[0] += 1
        (self.folder / f"{job.key}").touch()
        while len(list(self.folder.iterdir())) < 2:
            time.sleep(0.01)
        yield CurvePoint(2, float(images[0].min()))
        yield CurvePoint(3, float(images[0].max()))
        yield Result(Outcome.DONE)


def _anonymous():
    """Private memory of this process that belongs to no file, in megabytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Anonymous:")).split()[1]) / 1000


@pytest.mark.slow
@linux
def test_two_workers_share_one_copy_and_no_writes(tmp_path):
    megabytes, used = 64, {}
    for count in (1, megabytes):
        data = TensorDataset(torch.full((count, 1_000_000), 5, dtype=torch.uint8))
        folder = tmp_path / str(count)
        folder.mkdir()
        told = {}
        with processes.engine(2) as engine:
            engine.run(
                (Job(key, Plan(), seed=key) for key in range(2)), Writes(data, folder),
                on_message=lambda job, m, told=told: told.setdefault(job.key, []).append(m), should_stop=lambda: False,
            )  # fmt: skip
        for messages in told.values():
            total, used[count], least, most = (message.score for message in messages[:4])
            assert total == 5 * 1_000_000 * count
            assert (least, most) == (6, 6), "its own write, and not the other's"
        assert (data.tensors[0] == 5).all()
    assert used[megabytes] - used[1] < megabytes / 4


def test_parametrised_modules_reach_workers_on_other_machines():
    layer = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    twin = pickle.loads(pickled(layer))
    assert torch.equal(twin.weight, layer.weight)
