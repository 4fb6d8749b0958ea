"""Pictures with true disparities, from made-up pairs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ranksearch.data import batches, check_splits, depth, disparity, example
from ranksearch.data.scenes import find_scenes
from ranksearch.errors import DataError
from ranksearch.models import pydnet
from ranksearch.support.batch import select_inputs
from ranksearch.support.seeds import seeded
from ranksearch.task.bootstrap import difference
from ranksearch.task.checks import check_outputs
from ranksearch.task.task import Task, predict
from tests.pictures import SHIFTS, write_scenes

CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path):
    write_scenes(tmp_path)
    return tmp_path


def made(root, **options):
    spans = {"train_scenes": [1, 1], "validation_scenes": [2, 2], "test_scenes": [3, 3]}
    return depth(**({"root": str(root), "size": [64, 64], "zoom": 0} | spans | options))


def test_splits_hold_pictures_and_the_share_of_the_width(root):
    data = made(root, size=[24, 40])
    check_splits(data)
    ((pictures, targets),) = batches(data.train, 8)
    assert pictures.shape == (1, 3, 24, 40)
    assert targets["disparity"].shape == (1, 1, 24, 40)
    (inputs, targets), scene = data.validation[0], find_scenes(root / "kitti2015")[1]
    assert targets["width"] == 41
    assert inputs.min() >= 0
    assert 0.9 < inputs.max() <= 1
    truth = scene.disparities()
    columns = (np.arange(40) + 0.5) * 41 / 40
    np.testing.assert_allclose(targets["disparity"][0].numpy(), truth[:, columns.astype(int)] / 41, rtol=1e-6)
    assert targets["disparity"][0, 20, 20] == pytest.approx(SHIFTS[1] / 41)
    assert data.about == (
        "pictures of 24 x 40 pixels with true disparities, 1 of kitti2015 for training, 1 of kitti2015 / 1 of kitti2015 for "
        "validation / test"
    )


def batch_of(split, seed, times=1):
    with seeded(seed):
        return split.batch(torch.zeros(times, dtype=torch.long), CPU)


def test_training_inputs_are_mirrored_with_their_truth(root):
    plain, _ = batch_of(made(root, flip=False, jitter=0).train, 0)
    split = made(root, jitter=0).train
    pictures, targets = batch_of(split, 0, times=40)
    truth = made(root, flip=False).train.disparity
    mirrored = [not torch.equal(picture, plain[0]) for picture in pictures]
    assert 5 < sum(mirrored) < 35
    for flipped, picture, found in zip(mirrored, pictures, targets["disparity"], strict=True):
        torch.testing.assert_close(picture, plain[0].flip(2) if flipped else plain[0])
        torch.testing.assert_close(found, truth[0].flip(2) if flipped else truth[0], equal_nan=True)


def test_a_mirrored_pair_is_still_one_of_a_left_and_a_right_camera(root):
    """The picture of the right camera, mirrored, is that of a left one. Its true disparities are not known."""
    _, plain = batch_of(made(root, self_supervised=True, flip=False, jitter=0).train, 0)
    pictures, targets = batch_of(made(root, self_supervised=True, jitter=0).train, 0, times=40)
    assert torch.equal(pictures, targets["left"])
    mirrored = targets["disparity"].isnan().flatten(1).all(1)
    assert 5 < mirrored.sum() < 35
    for flipped, left, right in zip(mirrored, targets["left"], targets["right"], strict=True):
        assert torch.equal(left, plain["right"][0].flip(2) if flipped else plain["left"][0])
        assert torch.equal(right, plain["left"][0].flip(2) if flipped else plain["right"][0])


def test_both_pictures_of_a_pair_are_jittered_alike_and_pairs_differently(root):
    split = made(root, self_supervised=True, flip=False, jitter=0.2).train
    _, targets = batch_of(split, 0, times=2)
    _, plain = batch_of(made(root, self_supervised=True, flip=False, jitter=0).train, 0, times=2)
    assert not torch.equal(targets["left"][0], targets["left"][1])
    for pair in range(2):
        for channel in range(3):
            # The same curve, a power times a factor, maps both plain pictures onto the jittered ones.
            before, after = (
                torch.cat([each[name][pair, channel].flatten() for name in ("left", "right")]) for each in (plain, targets)
            )
            inside = (before > 0.1) & (after < 1)
            logs = torch.stack([before[inside].log(), torch.ones(int(inside.sum()))], 1).double()
            power, factor = torch.linalg.lstsq(logs, after[inside].log().double()[:, None]).solution.flatten().tolist()
            assert 0.8 <= power <= 1.2
            assert 0.8 <= np.exp(factor) <= 1.2
            torch.testing.assert_close(
                logs @ torch.tensor([power, factor]).double(), after[inside].log().double(), atol=1e-4, rtol=0
            )
    assert torch.equal(batch_of(split, 3)[0], batch_of(split, 3)[0])
    assert not torch.equal(batch_of(split, 3)[0], batch_of(split, 4)[0])


def test_an_enlarged_input_is_what_a_longer_lens_sees(root):
    """Everything is farther apart by the factor by which its disparity grew, around the middle row and any column."""
    down, across = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    places = torch.stack([3 * down, 3 * across, down]).byte()[None]
    truth = torch.full((1, 1, 64, 64), 0.1)
    truth[..., :32] = torch.nan
    split = replace(made(root, flip=False, jitter=0, zoom=0.5).train, left=places, right=places, disparity=truth)
    pictures, targets = batch_of(split, 0, times=20)
    factors = [float(found[~found.isnan()].mean() / 0.1) for found in targets["disparity"]]
    assert min(factors) >= 1
    assert 1.4 < max(factors) <= 1.5
    for picture, found, factor in zip(pictures, targets["disparity"], factors, strict=True):
        rows, columns = 85 * picture[0].mean(1), 85 * picture[1].mean(0)
        for steps in (rows.diff(), columns.diff()):
            torch.testing.assert_close(steps[8:-8], torch.full((47,), 1 / factor), atol=1e-3, rtol=0)
        assert float(rows.mean()) == pytest.approx(31.5, abs=0.1)
        assert columns.min() >= -1e-3
        assert columns.max() <= 63.001
        # The truth is taken from the nearest pixel, so it begins where the picture says that it does.
        torch.testing.assert_close(found[0, 0].isnan(), columns < 31.5)


def test_validation_and_test_are_left_as_they_are(root):
    data = made(root)
    for split in (data.validation, data.test):
        assert torch.equal(batch_of(split, 0)[0], batch_of(split, 1)[0])


@pytest.mark.parametrize("self_supervised", [False, True])
def test_the_task_fits_together_and_the_bootstrap_is_over_pictures(tmp_path, self_supervised):
    write_scenes(tmp_path, shifts=(3, 7, 5, 4, 6, 2))
    data = made(tmp_path, test_scenes=[3, 6], self_supervised=self_supervised)
    torch.manual_seed(0)
    loss = disparity.self_supervised if self_supervised else disparity.supervised
    task = check_outputs(Task(pydnet(), data, loss, disparity.delta_1_25))
    assert not task.loss_in_training
    assert task.score_name == "delta < 1.25"
    outputs, targets = predict(task.model, data.test)
    assert [len(maps) for maps in outputs] == [4] * 6
    # The score of a split is the mean of those of its pictures, so any resample of pictures has a score.
    single = [task.score(select_inputs(outputs, one), select_inputs(targets, one)) for one in torch.arange(4)[:, None]]
    assert task.score(outputs, targets) == pytest.approx(sum(single) / 4)
    better = (torch.nn.functional.interpolate(targets["disparity"].nan_to_num(0.1), (32, 32)).repeat(1, 2, 1, 1), *outputs[1:])
    found = difference(task.score, better, outputs, targets, seed=0)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(task.score(better, targets) - task.score(outputs, targets))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": [64]}, r"size must be the height and the width of the inputs, but got \[64\]"),
        ({"size": [0, 64]}, r"size must be the height and the width of the inputs, but got \[0, 64\]"),
        ({"zoom": -0.5}, r"zoom must be at least 0, but got -0\.5"),
        ({"jitter": 1.0}, r"jitter must be at least 0 and below 1, but got 1\.0"),
        ({"test_scenes": [3, 4]}, r"test_scenes must be the first and the last of 3 scenes, counted from 1, but got \[3, 4\]"),
        ({"test_scenes": [1, 1]}, "No scene may be in two splits, but 000000 is in train and test; change test_scenes"),
        ({"train": "kitti2012"}, r"Stereo pairs with ground truth must lie in .*kitti2012, but there are none; unpack"),
    ],
)
def test_depth_data_that_is_refused(root, options, message):
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


def test_gray_pictures_have_three_equal_channels(root):
    picture = example(made(root).test)[0]
    assert torch.equal(picture[0], picture[1])
    assert torch.equal(picture[0], picture[2])
