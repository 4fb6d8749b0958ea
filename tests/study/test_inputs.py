"""A study resumes only with the data and the dense weights that it was begun with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.utils.data import Dataset, TensorDataset

from ranksearch import Splits
from ranksearch.console import Silent
from ranksearch.data.images import Images
from ranksearch.errors import ModelError, StudyError
from ranksearch.study import folder
from ranksearch.study.folder import input_difference
from ranksearch.study.inputs import inputs_of
from ranksearch.study.options import Local, Options
from ranksearch.study.study import run_study
from tests import nested, nets
from tests.conftest import essence, least_spec, snapshot, stored

pytestmark = pytest.mark.usefixtures("bare")

FIX = "; choose another --out or name, or --fresh to start over."


def images(count=40, *, scale=1.0, shift=0, **changes):
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.randint(256, (count, 1, 8, 8), generator=generator) * scale).to(torch.uint8)
    return Images(pixels, torch.arange(count) % 4, torch.zeros(1), torch.ones(1), flip=bool(shift), shift=shift, **changes)


def splits(**changes):
    return replace(Splits(images(shift=2), images(24), images(20), 4, "noise"), **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"train": images(41, shift=2)}, "other data (the number of inputs in split 'train' is 40 there and 41 here)"),
        ({"test": images(19)}, "other data (the number of inputs in split 'test' is 20 there and 19 here)"),
        ({"validation": images(24, scale=0.5)}, "other data (the root mean square of some inputs in split 'validation' is 0.565975 there and 0.282122 here)"),
        (
            {"test": replace(images(20), labels=torch.zeros(20))},
            "other data (the root mean square of some targets in split 'test' is 1.87083 there and 0 here)",
        ),
        # Of augmented data only the number of inputs is compared.
        ({"train": images(shift=3)}, ""),
        # A small difference, as when another release decodes pictures.
        ({"validation": replace(images(24), std=torch.tensor([1.0001]))}, ""),
    ],
)  # fmt: skip
def test_other_data_is_recognised(changes, words):
    found = input_difference(inputs_of(splits(), None), inputs_of(splits(**changes), None))
    assert found.startswith(words)
    assert bool(found) is bool(words)


def test_nested_inputs_and_targets_are_compared():
    def data(scale):
        return nested.splits(lambda image, vector, label: ({"image": image, "vector": vector * scale}, {"label": label}))

    found = input_difference(inputs_of(data(1.0), None), inputs_of(data(2.0), None))
    assert found.startswith("other data (the root mean square of some inputs in split 'train' is")
    assert not input_difference(inputs_of(data(1.0), None), inputs_of(data(1.0), None))


def test_a_figure_that_only_one_side_has_is_no_difference():
    assert not input_difference(inputs_of(splits(), "abc"), inputs_of(splits(), None))
    assert not input_difference(inputs_of(splits(), None), inputs_of(splits(), "abc"))
    assert input_difference(inputs_of(splits(), "a" * 64), inputs_of(splits(), "b" * 64)) == (
        "another dense model (the SHA-256 of its weights is aaaaaaaa... there and bbbbbbbb... here)"
    )


class Drawn(Dataset):
    """Inputs from a generator that follows no seed; some targets are NaN."""

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return torch.from_numpy(np.random.default_rng().random(3)), torch.tensor([float("nan"), 1.0])


def test_data_of_any_kind_is_the_same_as_itself():
    unknown = TensorDataset(torch.zeros(30, 3), torch.full((30, 2), float("nan")))
    whole = TensorDataset(torch.arange(30).reshape(10, 3), torch.arange(10))
    data = Splits(Drawn(), unknown, whole, None, "odd")
    state = torch.get_rng_state()
    assert input_difference(inputs_of(data, None), inputs_of(data, None)) == ""
    assert torch.equal(torch.get_rng_state(), state)
    assert inputs_of(data, None)["train"] == {"count": 30}


@pytest.mark.parametrize("elsewhere", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_study_does_not_go_on_with_other_data(tmp_path, monkeypatch, elsewhere):
    out, options = tmp_path / "small", Options(Local(0))
    if elsewhere:
        options = replace(options, storage=f"sqlite:///{tmp_path / 'shared.db'}")
    run_study(least_spec(), out, options)
    before, few = snapshot(out), nets.few_digits
    monkeypatch.setattr(nets, "few_digits", lambda: few(210))
    words = r"The storage's study 'small' was started from other data \(the number of inputs in split 'train' is 200 there and 210 here\)"
    with pytest.raises(StudyError, match=words + FIX):
        run_study(least_spec("search.trials=2"), out, options)
    assert {path: held for path, held in snapshot(out).items() if "study.db" not in path.name} == {
        path: held for path, held in before.items() if "study.db" not in path.name
    }
    assert run_study(least_spec("search.trials=2"), out, replace(options, fresh=True)).trials


@pytest.fixture
def weights(finished, tmp_path):
    """A function that makes the spec of a study with given weights, and the file of the weights."""
    path = tmp_path / "mine.safetensors"
    path.write_bytes((finished[0] / "dense.safetensors").read_bytes())

    def spec(*changes, path=path):
        return least_spec("dense.epochs=0", f"dense.weights='{path}'", *changes)

    return spec, path


def test_a_study_does_not_go_on_with_other_weights(weights, tmp_path):
    spec, path = weights
    out, state = tmp_path / "small", safetensors.torch.load_file(path)
    run_study(spec("search.trials=1"), out, Options(Local(0)))
    state["fc2.bias"][0] += 1
    safetensors.torch.save_file(state, path)
    words = (
        r"The storage's study 'small' was started from another dense model \(the SHA-256 of its weights is \w{8}... there and "
    )
    with pytest.raises(StudyError, match=words + r"\w{8}... here\)" + FIX):
        run_study(spec("search.trials=2"), out, Options(Local(0)))
    assert len(stored(out).trials) == 1


@pytest.mark.slow
def test_weights_may_move_and_change_their_format_and_go_once_the_folder_has_them(weights, tmp_path):
    spec, path = weights
    out, notes = tmp_path / "small", []
    before = run_study(spec("search.trials=1"), out, Options(Local(0)))
    moved = tmp_path / "moved.pt"
    torch.save(safetensors.torch.load_file(path), moved)
    path.unlink()
    view = Silent()
    view.note = notes.append
    assert essence(run_study(spec("search.trials=1"), out, Options(Local(0)), view=view).trials) == essence(before.trials)
    assert notes == [f"dense.weights {path} no longer exists; using the dense net in the study's folder"]
    run_study(spec("search.trials=1", path=moved), out, Options(Local(0)))
    with pytest.raises(StudyError, match=r"is another study \(dense.weights is '.*moved.pt' there and 'nowhere.pt' here\)"):
        run_study(spec("search.trials=1", path="nowhere.pt"), out, Options(Local(0)))
    with pytest.raises(StudyError, match=r"is another study \(dense.weights is '.*moved.pt' there and '' here\)"):
        run_study(least_spec("dense.epochs=0"), out, Options(Local(0)))
    with pytest.raises(ModelError, match=r"dense.weights must be a state dict of the model, but .* does not exist"):
        run_study(spec("search.trials=1"), out, Options(Local(0), fresh=True))


def test_a_dense_net_that_was_put_into_the_folder_is_not_the_studys(finished, tmp_path):
    out, spec = tmp_path / "small", least_spec()
    run_study(spec, out, Options(Local(0)))
    safetensors.torch.save_file(nets.small().state_dict(), out / folder.DENSE_FILE)
    with pytest.raises(
        StudyError, match="The study 'small' in this storage was started from another dense model; choose another name"
    ):
        run_study(spec, out, Options(Local(0)))
