"""Images in memory: augmentation and normalisation of a batch, reading CIFAR-10, and seeds."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ranksearch.data import batches, check_splits, cifar10, sample, size
from ranksearch.data.folders import read_pictures
from ranksearch.data.images import Images, moments, split_images
from ranksearch.errors import DataError
from ranksearch.models import lenet
from ranksearch.task import training
from ranksearch.task.task import Task
from tests.pictures import CLASSES, write_pictures

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder in the layout of the JPEG copy of CIFAR-10, with 8 training and 2 test pictures of each class."""
    root = tmp_path_factory.mktemp("data")
    write_pictures(root / "cifar10" / "train", each=8)
    write_pictures(root / "cifar10" / "test", each=2)
    return root


def images(count=6, *, side=5, **options):
    pixels = torch.randint(1, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Images(pixels, torch.arange(count), torch.zeros(3), torch.ones(3) / 255, **options)


def test_cifar10_from_a_folder_of_pictures(root):
    data = cifar10(root=str(root), validation=20, train=40)
    assert data.about == "CIFAR-10 (JPEG copy), 40 / 20 / 20 images for training / validation / test"
    assert data.classes == 10
    check_splits(data)
    for split, each in ((data.train, 4), (data.validation, 2), (data.test, 2)):
        assert torch.bincount(split.labels).tolist() == [each] * 10
    inputs, targets = next(batches(data.test, 20))
    assert inputs.shape == (20, 3, 32, 32)
    assert inputs.dtype is torch.float32
    means = inputs[:, :, :16].mean((1, 2, 3))
    assert torch.corrcoef(torch.stack([means, targets.float()]))[0, 1] > 0.99, "labels follow the folders"


def test_cifar10_is_the_same_in_every_run_and_decoded_once(root, monkeypatch):
    first = cifar10(root=str(root), validation=20)
    monkeypatch.setattr(Image, "open", None)
    second = cifar10(root=str(root), validation=20)
    for one, two in ((first.train, second.train), (first.validation, second.validation), (first.test, second.test)):
        assert torch.equal(one.pixels, two.pixels)
    used = torch.cat([first.train.pixels, first.validation.pixels]).flatten(1)
    assert len(used.unique(dim=0)) == 80


def test_pictures_are_decoded_again_when_they_change(tmp_path):
    write_pictures(tmp_path / "train", each=1, classes=["a", "b"])
    before = read_pictures(tmp_path / "train", size=8)
    assert before.pixels.shape == (2, 3, 8, 8)
    Image.new("RGB", (32, 64)).save(tmp_path / "train" / "b" / "0000.jpg")
    after = read_pictures(tmp_path / "train", size=8)
    assert torch.equal(before.pixels[0], after.pixels[0])
    assert not after.pixels[1].any()
    (tmp_path / "train-8-RGB.safetensors").write_bytes(b"half")
    assert torch.equal(read_pictures(tmp_path / "train", size=8).pixels, after.pixels)
    assert read_pictures(tmp_path / "train", size=8, mode="L").pixels.shape == (2, 1, 8, 8)


def test_pictures_of_a_constant_size_are_decoded_again_when_they_change(tmp_path):
    for name, gray in (("a", 10), ("b", 200)):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("L", (8, 8), gray).save(tmp_path / "train" / name / "0.bmp")
    before = read_pictures(tmp_path / "train", size=8)
    one, other = (tmp_path / "train" / name / "0.bmp" for name in "ab")
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    assert torch.equal(read_pictures(tmp_path / "train", size=8).pixels, before.pixels.flip(0))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_pictures_of_sixteen_bits_are_scaled(tmp_path, suffix):
    (tmp_path / "train" / "a").mkdir(parents=True)
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "train" / "a" / f"0.{suffix}")
    (pixels,) = read_pictures(tmp_path / "train", size=8, mode="L").pixels
    assert torch.equal(pixels[0], torch.from_numpy((ramp >> 8).astype(np.uint8)))


def test_pictures_stand_as_their_camera_was_held(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    half = np.zeros((8, 8), np.uint8)
    half[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(half).save(tmp_path / "train" / "a" / "0.png", exif=exif)
    (pixels,) = read_pictures(tmp_path / "train", size=8, mode="L").pixels
    assert torch.equal(pixels[0], torch.from_numpy(half[::-1].copy()))


def test_pictures_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "train" / "a" / "0.tiff"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(path)
    with pytest.raises(
        DataError, match=r"0\.tiff must be a picture, but cannot be read: its pixels, of mode F, have neither 8 nor"
    ):
        read_pictures(tmp_path / "train", size=8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(
        DataError, match=r"0\.tiff must be a picture, but cannot be read: Image size .*; remove it from the folder"
    ):
        read_pictures(tmp_path / "train", size=8)


def test_cifar10_from_torchvisions_pickles(tmp_path, monkeypatch):
    """The test writes the files of torchvision's archive with its own images, so their checksums differ."""
    torchvision = pytest.importorskip("torchvision")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [name for name, _ in (*torchvision.datasets.CIFAR10.train_list, *torchvision.datasets.CIFAR10.test_list)]
    for number, name in enumerate(names):
        batch = {"data": np.full((20, 3072), number, np.uint8), "labels": [*range(10)] * 2}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}))
    with pytest.raises(
        DataError, match=r"CIFAR-10 must be readable in .*, but: Dataset not found or corrupted.* Unpack https://"
    ):
        cifar10(root=str(tmp_path))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = cifar10(root=str(tmp_path), validation=10)
    assert data.about == "CIFAR-10, 90 / 10 / 20 images for training / validation / test"
    assert (data.test.pixels == 5).all()
    assert data.train.pixels.shape == (90, 3, 32, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 5}, r"validation must lie in 10\.\.70 for 80 training images, so that both parts can hold an image of each class, but got 5"),
        ({"validation": 20, "train": 61}, r"train must lie in 10\.\.50, or be 60 for all images that are not held out, but got 61"),
        ({"validation": 20, "train": 59}, r"train must lie in 10\.\.50, or be 60 for all images that are not held out, but got 59"),
        ({"validation": 20, "shift": 33}, r"shift must lie in 0\.\.32, the size of the images, but got 33"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(root, options, message):
    with pytest.raises(DataError, match=message):
        cifar10(root=str(root), **options)


def test_images_that_are_not_there(tmp_path):
    with pytest.raises(
        DataError,
        match=r"CIFAR-10 must lie in .*, but it holds neither cifar-10-batches-py nor cifar10/train; add `--set task\.data_args\.download=true`, or unpack https://",
    ):
        cifar10(root=str(tmp_path))
    with pytest.raises(
        DataError, match=r"Pictures must lie in (.*)/<class>/, but \1 holds no folders; make one for each class"
    ):
        read_pictures(tmp_path, size=8)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_text("no picture")
    with pytest.raises(DataError, match=r"1\.png must be a picture, but cannot be read: .*; remove it from the folder"):
        read_pictures(tmp_path, size=8)


def test_without_augmentation_a_batch_is_the_normalised_images():
    split = images()
    inputs, targets = split.batch(torch.tensor([4, 1]), CPU)
    torch.testing.assert_close(inputs, split.pixels[[4, 1]].float(), rtol=1e-5, atol=1e-3)
    assert targets.tolist() == [4, 1]
    one, label = split[-1]
    torch.testing.assert_close(one, split.pixels[5].float(), rtol=1e-5, atol=1e-3)
    assert label == 5
    with pytest.raises(IndexError, match="range object index out of range"):
        split[6]


def test_augmentation_mirrors_and_moves_and_nothing_else():
    """Each image of a batch is the original or its mirror image, shifted by one of 5 x 5 shifts, and black at the free edge."""
    split = images(400, flip=True, shift=2)
    torch.manual_seed(0)
    found, _ = split.batch(torch.arange(400), CPU)
    padded = torch.nn.functional.pad(split.pixels.float(), [2] * 4)
    seen = set()
    for number, image in enumerate(found.round()):
        ways = {
            (mirrored, down, right)
            for mirrored in (False, True)
            for down in range(5)
            for right in range(5)
            if torch.equal(
                image,
                (padded[number].flip(2) if mirrored else padded[number])[:, down : down + 5, right : right + 5],
            )
        }
        assert len(ways) == 1
        seen |= ways
    assert len(seen) == 50
    only = images(50, flip=True)
    found, _ = only.batch(torch.arange(50), CPU)
    same = (found.round() == only.pixels.float()).flatten(1).all(1)
    assert 10 < same.sum() < 40


def test_moments_are_those_of_torch():
    pixels = images(40).pixels
    mean, std = moments(pixels)
    torch.testing.assert_close(mean, (pixels / 255).mean((0, 2, 3)))
    torch.testing.assert_close(std, (pixels / 255).std((0, 2, 3), correction=0))
    assert moments(torch.zeros(2, 1, 3, 3, dtype=torch.uint8))[1] > 0


def test_a_sample_is_of_the_same_kind_and_small_to_send():
    split = images(1000, flip=True, shift=1)
    few = sample(split, 10, seed=0)
    assert (size(few), few.flip, few.shift, few.pixels.dtype) == (10, True, 1, torch.uint8)
    assert len(pickle.dumps(split)) < 1.3 * split.pixels.numel()
    items = DataLoader(images(4), batch_size=4)
    torch.testing.assert_close(next(iter(items))[0], images(4).batch(torch.arange(4), CPU)[0])


def test_training_on_augmented_images_follows_its_seed_alone(root):
    data = cifar10(root=str(root), validation=20, train=40)

    def weights(seed):
        torch.manual_seed(0)
        task = Task(lenet(), data)
        for epoch in training.fit(task.model, task, training.Recipe(2, batch_size=16), seed=seed, device=CPU):
            torch.manual_seed(epoch)  # the global generator must not matter
        return torch.cat([p.detach().flatten() for p in task.model.parameters()])

    first = weights(1)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


@pytest.mark.parametrize(
    ("counts", "validation", "message"),
    [
        (
            [20, 20, 3],
            4,
            "validation must include an image of each class, but 4 of 43 include none of class 2; raise validation",
        ),
        ([20, 20, 1], 12, "Each class must have at least two images to be split, but class 2 has one; add some, or remove the"),
    ],
)
def test_classes_that_are_too_small_to_be_parted(counts, validation, message):
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    pixels = torch.randint(0, 256, (len(labels), 3, 4, 4), dtype=torch.uint8)
    with pytest.raises(DataError, match=message):
        split_images(
            (pixels, pixels), (labels, labels), classes=3, about="", train=None, validation=validation, flip=False, shift=0
        )
