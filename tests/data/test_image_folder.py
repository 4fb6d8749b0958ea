"""Folders of a user's pictures: which folder becomes which split, which files are ignored, and which folders are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ranksearch.data import check_splits, image_folder, size
from ranksearch.data.folders import read_pictures
from ranksearch.data.images import moments
from ranksearch.errors import DataError
from tests.pictures import write_pictures


def test_image_folder_takes_anyones_pictures(tmp_path):
    for name, each in (("train", 20), ("test", 3)):
        write_pictures(tmp_path / name, each=each, side=20, classes=["cat", "dog"])
    data = image_folder(root=str(tmp_path), size=16, shift=2)
    check_splits(data)
    assert (data.classes, size(data.train), size(data.validation), size(data.test)) == (2, 36, 4, 6)
    assert (data.train.flip, data.train.shift, data.test.flip) == (True, 2, False)
    assert data.train[0][0].shape == (3, 16, 16)
    assert "pictures of" in data.about
    gray = image_folder(root=str(tmp_path), size=16, gray=True, mean=[0.5], std=[0.25], validation=10, train=8, flip=False)
    assert (size(gray.train), size(gray.validation)) == (8, 10)
    pixels = gray.train.pixels[0].float() / 255
    torch.testing.assert_close(gray.train[0][0], (pixels - 0.5) / 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [0.5]}, r"mean and std must both be given, 3 numbers each, or neither, but got \[0\.5\] and None"),
        ({"mean": [0.5], "std": [1.0]}, r"mean and std must both be given, 3 numbers each, or neither, but got \[0\.5\] and \[1\.0\]"),
        ({"mean": [0.5] * 3, "std": [1.0, 0.0, 1.0]}, r"std must be above 0, but got \[1\.0, 0\.0, 1\.0\]"),
        ({"size": 0}, "size must be at least 1, but got 0"),
        ({}, "train and test in .* must hold the same classes, but 'dog' is only in train and 'cow' is only in test; rename or delete the"),
    ],
)  # fmt: skip
def test_image_folders_that_are_refused(tmp_path, options, message):
    write_pictures(tmp_path / "train", each=1, classes=["cat", "dog"])
    write_pictures(tmp_path / "test", each=1, classes=["cat", "cow"])
    with pytest.raises(DataError, match=message):
        image_folder(root=str(tmp_path), **options)


@pytest.fixture
def pets(tmp_path):
    """A folder with pictures of cats and dogs: 20 of each to train, 3 to test."""
    for name, each in (("train", 20), ("test", 3)):
        write_pictures(tmp_path / name, each=each, side=20, classes=["cat", "dog"])
    return tmp_path


def sizes(data):
    return size(data.train), size(data.validation), size(data.test)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev"])
def test_a_folder_for_validation_validates(pets, name):
    write_pictures(pets / name, each=5, side=20, classes=["cat", "dog"])
    mine = {"validation_folder": name} if name == "dev" else {}
    data = image_folder(root=str(pets), size=16, **mine)
    check_splits(data)
    assert sizes(data) == (40, 10, 6)
    assert data.about == (
        f"pictures of {pets} at 16x16, those in {name} for validation, 40 / 10 / 6 images for training / validation / test"
    )
    assert torch.equal(data.validation.pixels, read_pictures(pets / name, size=16).pixels)
    assert not data.validation.flip
    torch.testing.assert_close(data.validation.mean, moments(data.train.pixels)[0])
    assert sizes(image_folder(root=str(pets), size=16, train=8, **mine)) == (8, 10, 6)
    held_out = image_folder(root=str(pets), size=16, validation=10, validation_folder="train")
    assert sizes(held_out) == (30, 10, 6)
    assert "for validation, " not in held_out.about


def test_folders_for_validation_that_do_not_fit(pets):
    write_pictures(pets / "val", each=5, side=20, classes=["cat", "dog"])

    def refused(message, **options):
        with pytest.raises(DataError, match=message):
            image_folder(root=str(pets), size=16, **options)

    refused(
        r"validation = 10 would hold out pictures of train, but .* has a validation folder, val; leave out validation, or give "
        r"validation_folder = 'train' to ignore that folder",
        validation=10,
    )
    refused(
        r"test folder must not be the training or validation folder too, but test_folder = 'val' is; name another",
        test_folder="val",
        validation_folder="val",
    )
    refused(r"training or validation folder too, but test_folder = 'train/' is", test_folder="train/")
    refused(
        r"Pictures must lie in .*/dev/<class>/, but there is no folder .*/dev, only test, train, val", validation_folder="dev"
    )
    (pets / "val" / "dog").rename(pets / "val" / "wolf")
    refused(r"train and val in .* must hold the same classes, but 'dog' is only in train and 'wolf' is only in val")
    (pets / "valid").mkdir()
    refused(r".* must have only one validation folder, but has val and valid; name one of them with validation_folder")


def test_without_test_but_with_val(pets):
    (pets / "test").rename(pets / "val")
    with pytest.raises(
        DataError,
        match=r"Test pictures must lie in .*/test, but there is no such folder; to test on val and hold out pictures of train for "
        r"validation, give test_folder = 'val'",
    ):
        image_folder(root=str(pets), size=16)
    assert sizes(image_folder(root=str(pets), size=16, test_folder="val")) == (36, 4, 6)


def test_folders_that_are_not_there(pets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=rf"Pictures must lie in pics/train/<class>/, but there is no folder pics/train in {tmp_path}"
    ):
        image_folder(root="pics")
    with pytest.raises(DataError, match=r"but there is no folder .*/tests, only test, train\."):
        image_folder(root=str(pets), test_folder="tests")
    for part in ("train", "test"):
        (tmp_path / "zoo" / part).mkdir(parents=True)
        (pets / part).rename(tmp_path / "zoo" / part / "animals")
    with pytest.raises(DataError, match=r"There must be two classes or more, but zoo/train holds one folder, 'animals'"):
        image_folder(root="zoo")


def test_files_that_systems_leave_are_passed_over(pets):
    before = image_folder(root=str(pets), size=16)
    for name in (".DS_Store", "train/.DS_Store", "train/cat/._0.jpg", "train/cat/Thumbs.db", "train/dog/desktop.ini",
                 "__MACOSX/train/cat/._0.jpg", "train/__MACOSX/._0.jpg", "train/.ipynb_checkpoints/0.jpg",
                 "train/cat/.ipynb_checkpoints/0-checkpoint.jpg", "train/cat/@eaDir/0.jpg/SYNOFILE_THUMB_M.jpg"):  # fmt: skip
        (pets / name).parent.mkdir(parents=True, exist_ok=True)
        (pets / name).write_bytes(b"\0\5\x16\7")
    after = image_folder(root=str(pets), size=16)
    assert after.about == before.about
    assert torch.equal(after.train.pixels, before.train.pixels)


def test_all_that_pillow_reads_is_read_and_the_rest_is_told(pets):
    picture = Image.fromarray(np.zeros((20, 20, 3), np.uint8))
    for name in ("a.gif", "b.PNG", "c.jfif", "d.webp", "more/e.jpg"):
        (pets / "train" / "cat" / "more").mkdir(exist_ok=True)
        picture.save(pets / "train" / "cat" / name, {"c.jfif": "JPEG"}.get(name))
    (pets / "train" / "dog" / "labels.txt").write_text("dogs")
    data = image_folder(root=str(pets), size=16)
    assert size(data.train) + size(data.validation) == 45
    assert data.about.startswith(
        f"pictures of {pets} at 16x16 (ignored: 1 file that is not a picture, for example train/dog/labels.txt), "
    )
    (pets / "test" / "dog" / "0.heic").touch()
    about = image_folder(root=str(pets), size=16).about
    assert "(ignored: 2 files that are not pictures, for example train/dog/labels.txt), " in about


def test_a_class_without_pictures(pets):
    for part in ("train", "test"):
        (pets / part / "emu").mkdir()
    with pytest.raises(DataError, match=r"Each class must hold pictures, but .*/train/emu holds none; add some, or delete the"):
        image_folder(root=str(pets), size=16)
    (pets / "train" / "cat" / "notes.txt").touch()
    (pets / "train" / "emu" / "0.heic").touch()
    with pytest.raises(DataError, match=r"emu holds none, only files like train/emu/0\.heic; add some"):
        image_folder(root=str(pets), size=16)


def test_broken_links(pets):
    (pets / "train" / "cat" / "x.jpg").symlink_to(pets / "gone.jpg")
    with pytest.raises(
        DataError, match=r"cat/x\.jpg must be a picture, but is a broken link \(No such file or directory\); delete"
    ):
        image_folder(root=str(pets), size=16)
    (pets / "train" / "cat").rename(pets / "cat")
    (pets / "train" / "cat").symlink_to(pets / "gone")
    with pytest.raises(DataError, match=r"train/cat must be a folder of pictures, but is a broken link; repair or delete it"):
        image_folder(root=str(pets), size=16)


def test_all_files_that_cannot_be_read_are_told_at_once(pets):
    for number in range(6):
        (pets / "train" / "cat" / f"{number}.jpg").write_text("<!DOCTYPE html>")
    with pytest.raises(
        DataError,
        match=r"cat/0\.jpg must be a picture, but cannot be read: .*; neither can .*1\.jpg, .*2\.jpg, .*3\.jpg and 2 more; remove "
        r"them from the folder",
    ):
        image_folder(root=str(pets), size=16)
