"""Stereo confidence on made-up pairs: disparity maps by matching, patches and whole maps, AUC."""

from __future__ import annotations

import math
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ranksearch.data import batches, check_splits, confidence, example, stereo
from ranksearch.data.census import census, disparity_map
from ranksearch.data.scenes import Scene, find_scenes
from ranksearch.errors import DataError
from ranksearch.models import ccnn
from ranksearch.task import training
from ranksearch.task.checks import check_outputs
from ranksearch.task.task import Task, predict
from tests.pictures import SHIFTS, pair, write_scenes

CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path):
    write_scenes(tmp_path)
    return tmp_path


def made(root, **options):
    spans = {"train_scenes": [1, 1], "validation_scenes": [2, 2], "test_scenes": [3, 3]}
    return stereo(**({"root": str(root), "disparities": 16, "patches": 100} | spans | options))


def test_the_census_is_that_of_its_definition():
    image, _ = pair(1, height=6, width=7)
    padded = np.pad(image, 2, mode="edge")
    for row in range(6):
        for column in range(7):
            window = padded[row : row + 5, column : column + 5].flatten().tolist()
            bits = [value < image[row, column] for place, value in enumerate(window) if place != 12]
            assert census(image)[row, column] == int("".join(str(int(bit)) for bit in bits), 2)


def test_the_disparity_is_the_cheapest_one():
    left, right = pair(4, height=9, width=14)
    ones, others = census(left), census(right)
    expected = np.zeros(left.shape, np.uint8)
    for row in range(9):
        for column in range(14):
            costs = [
                sum(
                    int(ones[y, x] ^ others[y, x - d]).bit_count() if x >= d else 24
                    for y in range(max(0, row - 2), min(9, row + 3))
                    for x in range(max(0, column - 2), min(14, column + 3))
                )
                for d in range(8)
            ]
            expected[row, column] = costs.index(min(costs))
    np.testing.assert_array_equal(disparity_map(left, right, disparities=8), expected)


def test_a_moved_image_is_matched():
    for shift in (0, 3, 11):
        found = disparity_map(*pair(shift), disparities=16)
        assert (found[:, shift + 2 :] == shift).mean() > 0.99
    assert disparity_map(*pair(3), disparities=400).max() < 40


def test_splits_hold_patches_and_maps(root):
    data = made(root)
    check_splits(data)
    check_outputs(Task(ccnn(), data, confidence.cross_entropy, confidence.one_minus_auc))
    assert example(data.train).shape == (1, 1, 9, 9)
    ((maps, targets),) = batches(data.test, 256)
    # The true disparity is known from column 10 on. The inputs have a margin for the patches of the outermost pixels.
    assert targets.shape == (1, 1, 24, 32)
    assert maps.shape == (1, 1, 32, 40)
    assert (targets[0, 0, 12:, 5:] == 1).all()
    assert (targets[0, 0, :12] == 0).float().mean() > 0.99
    assert "100 pixels of 1 maps of kitti2015 for training, 1 of kitti2015 / 1 of kitti2015" in data.about
    assert f"the best possible score is {1 - data.validation.optimum():.4f} / {1 - data.test.optimum():.4f}" in data.about


def test_patches_are_cut_from_their_maps(root):
    data = made(root, scaled=False, patches=10**6)
    ((maps, targets),) = batches(data.train.maps, 1)
    patches, right = data.train.batch(torch.arange(len(data.train)), CPU)
    assert len(patches) == int((~targets.isnan()).sum())
    triples = list(zip(patches, right, data.train.places.tolist(), strict=True))
    for patch, label, (number, row, column) in triples[::7]:
        assert torch.equal(patch[0], maps[number, 0, row : row + 9, column : column + 9])
        assert label.item() == targets[number, 0, row, column]
    scaled, _ = made(root, patches=10**6).train.batch(torch.arange(len(data.train)), CPU)
    torch.testing.assert_close(scaled, patches / 15)


def test_maps_of_several_sizes_stand_in_one_split(root):
    write_scenes(root, shifts=(*SHIFTS, 4), folder="four")
    data = made(root, train="four", train_scenes=[1, 1], validation_scenes=[2, 4])
    sizes = [(inputs.shape, targets.shape) for inputs, targets in batches(data.validation, 8)]
    assert sizes == [((1, 1, 32, 41), (1, 1, 24, 33))] * 3
    assert torch.isnan(data.validation[0][1]).sum() == 2 * 24
    outputs, targets = predict(ccnn(), data.validation, device=CPU)
    assert outputs.shape == targets.shape == (3, 1, 24, 33)
    assert 0 < confidence.one_minus_auc(outputs, targets) < 1


def test_pixels_are_drawn_the_same_in_every_run_and_maps_matched_once(root, monkeypatch):
    first = made(root)
    monkeypatch.setattr(sys.modules["ranksearch.data.stereo"], "disparity_map", None)
    second = made(root)
    assert torch.equal(first.train.places, second.train.places)
    assert torch.equal(first.test.disparities, second.test.disparities)
    assert len(pickle.dumps(first.train)) < 20_000


def test_ccnn_learns_which_pixels_to_trust(tmp_path):
    """Disparities are correct and smooth in the lower half, and noise in the upper half: the net must trust smooth ones."""
    write_scenes(tmp_path, shifts=(3, 5, 4))
    for scene in find_scenes(tmp_path / "kitti2015"):
        right = scene.images()[1].copy()
        right[:12] = np.random.default_rng(9).integers(0, 256, right[:12].shape)
        Image.fromarray(right).save(scene.right)
    data = made(tmp_path, patches=10**6)
    torch.manual_seed(0)
    task = Task(ccnn(), data, confidence.cross_entropy, confidence.one_minus_auc)
    for _ in training.fit(task.model, task, training.Recipe(4, batch_size=32), seed=0, device=CPU):
        pass
    auc = 1 - training.score(task.model, task, data.test, device=CPU)
    assert data.test.optimum() - 0.01 < auc < data.test.optimum() + 0.1


def by_definition(values, right):
    """The AUC by its definition: at 20 steps, the error of the most confident pixels."""
    errors = []
    for step in range(20):
        least = sorted(values)[min(len(values) - 1, math.ceil(len(values) * step / 20))]
        kept = [not good for value, good in zip(values, right, strict=True) if value >= least]
        errors.append(sum(kept) / len(kept))
    return sum((one + two) / 40 for one, two in zip(errors, [*errors[1:], 0.0], strict=True))


@pytest.mark.parametrize("count", [1, 7, 20, 333])
@pytest.mark.parametrize("levels", [2, 10**6])
def test_auc_is_that_of_its_definition(count, levels):
    generator = torch.Generator().manual_seed(count)
    values = torch.randint(levels, (count,), generator=generator).float()
    right = torch.randint(2, (count,), generator=generator).float()
    assert confidence.auc(values, right) == pytest.approx(by_definition(values.tolist(), right.tolist()))


@pytest.mark.parametrize("error", [0.0, 0.1, 0.4, 1.0])
def test_a_confidence_that_knows_the_truth_reaches_the_optimum(error):
    right = (torch.arange(100_000) >= 100_000 * error).float()
    assert confidence.auc(right + torch.rand(100_000) / 2, right) == pytest.approx(confidence.optimal_auc(error), abs=0.026)
    if 0 < error < 1:
        assert confidence.auc(torch.rand(100_000), right) > confidence.optimal_auc(error) + 0.02


def test_pixels_nobody_knows_play_no_part():
    outputs = torch.tensor([[3.0, -1.0, 9.0], [0.5, 2.0, -4.0]])
    targets = torch.tensor([[1.0, 0.0, torch.nan], [torch.nan, 1.0, 0.0]])
    known = confidence.one_minus_auc(outputs[:, [0, 1]], targets[:, [0, 1]])
    assert 1 - confidence.one_minus_auc(outputs, targets) == pytest.approx(
        (confidence.auc(outputs[0, :2], targets[0, :2]) + confidence.auc(outputs[1, 1:], targets[1, 1:])) / 2
    )
    assert known != confidence.one_minus_auc(outputs, targets)
    valid = torch.tensor([3.0, -1.0, 2.0, -4.0])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(valid, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(confidence.cross_entropy(outputs, targets), expected)
    assert math.isnan(confidence.one_minus_auc(outputs[:1], targets[:1] * torch.nan))


@pytest.mark.parametrize("folders", [("image_2", "image_3", "disp_noc_0"), ("image_0", "image_1", "disp_noc")])
def test_kittis_layouts(tmp_path, folders):
    for folder, pixels in zip(folders, (*pair(3), np.full((24, 40), 768, np.uint16)), strict=True):
        for number in (1, 0):
            for frame in ("10", "11")[: 1 if folder.startswith("disp") else 2]:
                path = tmp_path / "training" / folder / f"{number:06}_{frame}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    scenes = find_scenes(tmp_path)
    assert [scene.name for scene in scenes] == ["000000", "000001"]
    assert (scenes[0].disparities() == 3).all()
    assert (scenes[0].disparities(4) == 3).all(), "units are for truth of 8 bits"


def test_middleburys_layouts(tmp_path):
    left, right = pair(3)
    colour = np.repeat(left[:, :, None], 3, 2)
    truth = np.full((24, 40), 3.5, "<f4")
    truth[0, 0] = np.inf
    (tmp_path / "manifest.csv").write_text("dataset,scene,gt_div\nall,Teddy,4\n")
    for scene, names in {"Piano": ("im0", "im1"), "Art": ("view1", "view5"), "Teddy": ("im2", "im6")}.items():
        (tmp_path / "all" / scene).mkdir(parents=True)
        for name, pixels in zip(names, (colour, right), strict=True):
            Image.fromarray(pixels).save(tmp_path / "all" / scene / f"{name}.png")
    (tmp_path / "all" / "Piano" / "disp0.pfm").write_bytes(b"Pf\n40 24\n-1.0\n" + truth[::-1].tobytes())
    for scene, name in (("Art", "disp1"), ("Teddy", "disp2")):
        Image.fromarray(np.full((24, 40), 12, np.uint8)).save(tmp_path / "all" / scene / f"{name}.png")
    art, piano, teddy = find_scenes(tmp_path / "all")
    assert (art.name, piano.name, teddy.name) == ("Art", "Piano", "Teddy")
    np.testing.assert_array_equal(art.images()[0], left)
    assert np.isnan(piano.disparities()[0, 0])
    assert (piano.disparities().flatten()[1:] == 3.5).all()
    assert (teddy.disparities() == 3).all()
    assert (art.disparities(3) == 4).all()
    assert (teddy.disparities(2) == 3).all(), "what a file tells is what it is"
    with pytest.raises(
        DataError,
        match=r"The unit of the true disparities must be known, but 8-bit .*disp1\.png does not state it; give units = 1, 2 or 3",
    ):
        art.disparities()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "kitti2012"}, r"Stereo pairs with ground truth must lie in .*kitti2012, but there are none; unpack"),
        ({"test_scenes": [3, 4]}, r"test_scenes must be the first and the last of 3 scenes, counted from 1, but got \[3, 4\]"),
        ({"train_scenes": [2]}, r"train_scenes must be the first and the last of 3 scenes, counted from 1, but got \[2\]"),
        ({"disparities": 256}, r"disparities must lie in 1\.\.255, but got 256"),
        ({"patches": 0}, "patches must be at least 1, but got 0"),
        ({"train_scenes": [1, 2]}, "No scene may be in two splits, but 000001 is in train and validation; change validation_scenes"),
        ({"test_scenes": [1, 1]}, "No scene may be in two splits, but 000000 is in train and test; change test_scenes"),
    ],
)  # fmt: skip
def test_stereo_data_that_is_refused(root, options, message):
    with pytest.raises(DataError, match=message):
        made(root, **options)


def test_scenes_that_do_not_fit_together(root):
    scene = find_scenes(root / "kitti2015")[0]
    Image.fromarray(np.zeros((24, 40), np.uint16)).save(scene.truth)
    with pytest.raises(
        DataError, match=r"Ground truth must have known pixels, but .*disp_gt\.png has none; leave the scene out"
    ):
        made(root)
    Image.fromarray(np.ones((24, 39), np.uint16)).save(scene.truth)
    with pytest.raises(DataError, match=r" must have the size of its image, \(24, 40\), but has \(24, 39\)"):
        made(root)
    Image.fromarray(np.zeros((24, 30), np.uint8)).save(scene.right)
    with pytest.raises(DataError, match=r"The two images of a pair must have the same size, but those in .* do not"):
        made(root)
    scene.truth.with_suffix(".pfm").write_bytes(b"PF\n")
    with pytest.raises(DataError, match=r"disp_gt\.pfm must be a gray portable float map, but does not start like one"):
        Scene("", scene.left, scene.right, scene.truth.with_suffix(".pfm")).disparities()
