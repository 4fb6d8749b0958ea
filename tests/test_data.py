"""Data sets of pictures: what is read is what was written, and chance follows the seed."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from ranksearch.data import Images, batches, check_splits, cifar10, sample, size
from ranksearch.errors import DataError

CPU = torch.device("cpu")
CLASSES = [f"class{number}" for number in range(10)]


def images(count=6, *, augment=False, side=8):
    pixels = torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Images(pixels, torch.arange(count), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), augment=augment)


def write_pictures(root, *, each=20, side=32):
    for part in ("train", "test"):
        for number, name in enumerate(CLASSES):
            folder = root / "cifar10" / part / name
            folder.mkdir(parents=True)
            for place in range(each):
                Image.new("RGB", (side, side), (25 * number, place, 7)).save(folder / f"{place:04}.png")


def test_images_are_normalised_by_channel():
    found = images()
    inputs, targets = found.batch(torch.tensor([4, 1]), CPU)
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    assert torch.allclose(inputs[0] * std + mean, found.pixels[4] / 255, atol=1e-6)
    assert targets.tolist() == [4, 1]
    assert torch.equal(found[4][0], inputs[0])


def test_images_are_drawn_as_other_splits_are():
    assert [len(targets) for _, targets in batches(images(), 4)] == [4, 2]
    chosen = sample(images(), 3, seed=1)
    assert size(chosen) == 3
    assert isinstance(chosen, Images)


def test_an_augmented_image_is_itself_moved_and_flipped():
    found = images(1, augment=True)
    plain = images(1).batch(torch.tensor([0]), CPU)[0][0]
    black = images(1)._mean  # where the image was moved away from
    for seed in range(40):
        torch.manual_seed(seed)
        moved = found.batch(torch.tensor([0]), CPU)[0][0]
        padded = torch.nn.functional.pad(found.pixels[0], (4,) * 4)
        crops = [padded[:, down : down + 8, right : right + 8] for down in range(9) for right in range(9)]
        candidates = torch.stack([*crops, *(crop.flip(2) for crop in crops)]) / 255
        expected = (candidates - torch.tensor(black)[:, None, None]) / torch.tensor(found._std)[:, None, None]
        assert (expected - moved).abs().flatten(1).amax(1).min() < 1e-5
        torch.manual_seed(seed)
        assert torch.equal(moved, found.batch(torch.tensor([0]), CPU)[0][0])
    assert torch.equal(plain, images(1).batch(torch.tensor([0]), CPU)[0][0])


def test_augmentation_takes_every_way_and_each_image_its_own():
    found = images(1, augment=True)
    torch.manual_seed(0)
    seen = {tuple(batch.flatten().tolist()) for batch in found.batch(torch.zeros(3000, dtype=torch.long), CPU)[0]}
    assert len(seen) == 2 * 9 * 9


def test_cifar10_reads_a_folder_of_pictures(tmp_path):
    write_pictures(tmp_path)
    found = cifar10(root=str(tmp_path), augment=False)
    check_splits(found)
    assert [size(part) for part in (found.train, found.validation, found.test)] == [180, 20, 200]
    assert torch.bincount(found.validation.labels).tolist() == [2] * 10
    assert torch.equal(found.test.pixels[:, 0, 0, 0], 25 * found.test.labels)
    kept = {(int(p[0, 0, 0]), int(p[1, 0, 0])) for part in (found.train, found.validation) for p in part.pixels}
    assert len(kept) == 200
    assert "CIFAR-10, 180 / 20 / 200 images" in found.about


def test_cifar10_takes_fewer_training_images_of_every_class(tmp_path):
    write_pictures(tmp_path)
    found = cifar10(root=str(tmp_path), train=50)
    assert torch.bincount(found.train.labels).tolist() == [5] * 10
    assert torch.equal(found.validation.pixels, cifar10(root=str(tmp_path)).validation.pixels)
    with pytest.raises(DataError, match=r"cifar10 has 180 training images in ten classes, but train=181; choose in between\."):
        cifar10(root=str(tmp_path), train=181)


def test_cifar10_says_where_it_looked(tmp_path):
    with pytest.raises(
        DataError,
        match=r"CIFAR-10 must be in .*, but neither .*cifar-10-batches-py nor .*cifar10/train is there; put it there, or let torchvision fetch it with task\.data_args\.download=true\.",
    ):
        cifar10(root=str(tmp_path))


def test_cifar10_refuses_pictures_of_another_size(tmp_path):
    write_pictures(tmp_path, each=2, side=31)
    with pytest.raises(DataError, match=r"CIFAR-10's pictures must have 32x32 pixels, but .*0000\.png has 31x31\."):
        cifar10(root=str(tmp_path))
