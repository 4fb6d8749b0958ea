"""Laws of the losses and scores of disparities, on made-up pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ranksearch.data import disparity
from ranksearch.models import pydnet

WIDTH, SHIFT = 64, 5


def shifted_pair(shift=SHIFT, *, height=32, width=WIDTH):
    """Pictures (1, 3, height, width): in the right one everything is `shift` pixels farther left."""
    scene = torch.rand(1, 3, height, width + shift)
    return scene[..., :width], scene[..., shift:]


def constant(value, like, channels=1):
    return torch.full((len(like), channels, *like.shape[2:]), value)


def pyramid(finest, levels=6):
    """A pyramid of maps whose finest is given."""
    return tuple(torch.nn.functional.avg_pool2d(finest, 2**level) for level in range(levels))


def test_the_right_disparity_gives_the_other_picture():
    left, right = shifted_pair()
    share = constant(SHIFT / WIDTH, left)
    # The first columns of the left picture are not in the right one, and the last of the right not in the left.
    torch.testing.assert_close(disparity.warped(right, share)[..., SHIFT:], left[..., SHIFT:])
    torch.testing.assert_close(disparity.warped(left, -share)[..., :-SHIFT], right[..., :-SHIFT])
    torch.testing.assert_close(disparity.warped(right, 0 * share), right)


def test_between_two_pixels_a_picture_is_interpolated():
    left, _ = shifted_pair()
    half = disparity.warped(left, constant(0.5 / WIDTH, left))
    torch.testing.assert_close(half[..., 1:], (left[..., 1:] + left[..., :-1]) / 2)


def test_the_photometric_error_is_zero_for_the_true_disparity_and_larger_for_any_other():
    left, right = shifted_pair()

    def error(shift):
        inside = slice(2 * SHIFT, -2 * SHIFT)
        return float(
            disparity.photometric_error(disparity.warped(right, constant(shift / WIDTH, left))[..., inside], left[..., inside])
        )

    assert error(SHIFT) < 1e-5
    assert min(error(shift) for shift in (0, SHIFT - 1, SHIFT + 1, SHIFT - 0.5)) > 0.05
    assert float(disparity.photometric_error(left, left)) == pytest.approx(0, abs=1e-6)


def test_the_photometric_error_is_that_of_its_definition():
    one, two = torch.rand(2, 1, 1, 4, 5).double()
    dissimilar = []
    for row in range(2):
        for column in range(3):
            x, y = (each[0, 0, row : row + 3, column : column + 3] for each in (one, two))
            covariance = ((x - x.mean()) * (y - y.mean())).mean()
            ssim = (2 * x.mean() * y.mean() + 1e-4) * (2 * covariance + 9e-4)
            ssim /= (x.mean() ** 2 + y.mean() ** 2 + 1e-4) * (x.var(correction=0) + y.var(correction=0) + 9e-4)
            dissimilar.append(float(((1 - ssim) / 2).clamp(0, 1)))
    expected = 0.85 * np.mean(dissimilar) + 0.15 * float((one - two).abs().mean())
    assert float(disparity.photometric_error(one, two)) == pytest.approx(expected)


def test_a_constant_map_is_smooth_and_edges_of_the_picture_excuse_edges_of_the_map():
    flat, edge = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    assert disparity.roughness(constant(0.2, flat), torch.rand(1, 3, 8, 8)) == 0
    step = edge[:, :1] * 0.1
    assert float(disparity.roughness(step, flat)) == pytest.approx(0.1 / 7)
    assert float(disparity.roughness(step, edge)) == pytest.approx(0.1 / 7 * math.exp(-1))
    assert disparity.roughness(step.mT, flat) == disparity.roughness(step, flat)


def test_maps_that_say_the_same_are_consistent():
    ones = torch.ones(1, 1, 4, WIDTH)
    assert disparity.inconsistency(0.1 * ones, 0.1 * ones) == 0
    assert float(disparity.inconsistency(0.1 * ones, 0.15 * ones)) == pytest.approx(0.1)
    # A slanted wall: right(y) = a + b y, and left(x) = right(x - left(x)).
    places, a, b = (torch.arange(WIDTH) + 0.5) / WIDTH, 0.05, 0.1
    right, left = (each.expand(1, 1, 4, WIDTH) for each in (a + b * places, (a + b * places) / (1 + b)))
    inside = slice(WIDTH // 4, -WIDTH // 4)
    torch.testing.assert_close(disparity.warped(right, left)[..., inside], left[..., inside])
    torch.testing.assert_close(disparity.warped(left, -right)[..., inside], right[..., inside])


def test_the_self_supervised_loss_is_least_at_the_true_disparity():
    left, right = shifted_pair(8)
    targets = {"left": left, "right": right}

    def loss(shift):
        return float(disparity.self_supervised(pyramid(constant(shift / WIDTH, left, 2)), targets))

    assert loss(8) == min(map(loss, (0, 4, 6, 8, 10, 12)))
    guess = constant(5 / WIDTH, left, 2).requires_grad_()
    disparity.self_supervised(pyramid(guess), targets).backward()
    assert guess.grad.isfinite().all()


def test_the_supervised_loss_is_the_error_of_the_logarithms_of_known_pixels():
    truth = 0.01 + 0.1 * torch.rand(2, 1, 8, 16)
    truth[:, :, :3] = torch.nan
    targets = {"disparity": truth}
    known = truth.nan_to_num(0.05).repeat(1, 2, 1, 1)
    assert float(disparity.supervised([known], targets)) == pytest.approx(0, abs=1e-6)
    assert float(disparity.supervised([2 * known, known], targets)) == pytest.approx(math.log(2) / 2)
    known[:, 1] = 0.3
    assert float(disparity.supervised([known], targets)) == pytest.approx(0, abs=1e-6), "the truth is of the left picture"
    assert disparity.supervised([known], {"disparity": truth * torch.nan}) == 0


def test_a_net_learns_from_both_losses():
    left, right = shifted_pair(8, height=64)
    targets = {"left": left, "right": right, "disparity": constant(0.125, left)}
    for loss in (disparity.supervised, disparity.self_supervised):
        torch.manual_seed(0)
        net = pydnet()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        losses = []
        for _ in range(8):
            losses.append(loss(net(left), targets))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.9 * losses[0]


def scored():
    """Predictions and targets of three pictures, of which one has no known pixel."""
    generator = torch.Generator().manual_seed(0)
    truth = 0.01 + 0.09 * torch.rand(3, 1, 6, 8, generator=generator)
    unknown = torch.rand(truth.shape, generator=generator) < torch.tensor([0.2, 0.7, 2.0])[:, None, None, None]
    predicted = truth * torch.exp(0.3 * torch.randn(truth.shape, generator=generator))
    targets = {"disparity": truth.masked_fill(unknown, torch.nan), "width": torch.tensor([1242.0, 600.0, 600.0])}
    return (predicted.repeat(1, 2, 1, 1), torch.rand(3, 2, 3, 4)), targets


def by_definition(outputs, targets, value):
    """A mean over the pixels of each picture, then over pictures, of `value(predicted, true, width)`."""
    means = []
    for predicted, truth, width in zip(outputs[0][:, 0], targets["disparity"][:, 0], targets["width"], strict=True):
        pairs = zip(predicted.flatten().tolist(), truth.flatten().tolist(), strict=True)
        if values := [value(ours, true, float(width)) for ours, true in pairs if not math.isnan(true)]:
            means.append(sum(values) / len(values))
    return sum(means) / len(means)


@pytest.mark.parametrize(
    ("score", "value"),
    [
        (disparity.delta_1_25, lambda ours, true, width: max(ours / true, true / ours) < 1.25),
        (disparity.abs_rel, lambda ours, true, width: abs(1 / ours - 1 / true) * true),
        (disparity.d1, lambda ours, true, width: abs(ours - true) * width > 3 and abs(ours - true) > 0.05 * true),
    ],
)
def test_scores_are_those_of_their_definitions(score, value):
    outputs, targets = scored()
    assert score(outputs, targets) == pytest.approx(by_definition(outputs, targets, value))
    assert 0 < score(outputs, targets) < 1


def test_scores_of_no_known_pixel_and_of_nan_are_nan():
    (maps, *rest), targets = scored()
    assert math.isnan(disparity.delta_1_25((maps[2:],), {name: each[2:] for name, each in targets.items()}))
    assert math.isnan(disparity.delta_1_25((maps * torch.nan, *rest), targets))


def test_only_the_finest_left_map_counts_and_is_scaled_to_the_truth():
    truth = torch.full((1, 1, 8, 16), 0.05)
    maps = torch.stack([torch.full((1, 4, 8), 0.05), torch.full((1, 4, 8), 0.2)], 1)
    assert disparity.delta_1_25((maps, 9 * maps[..., ::2, ::2]), {"disparity": truth}) == 1
    assert disparity.delta_1_25((maps.flip(1),), {"disparity": truth}) == 0


def test_pictures_of_a_sample():
    truth = torch.tensor([[[0.004, 0.12], [torch.nan, 0.02]]])
    target = disparity.show("target", {"disparity": truth})
    assert target.tolist()[0] == [[68, 1, 84], [253, 231, 37]]
    assert target[1, 0].tolist() == [0, 0, 0]
    assert disparity.show("input", torch.rand(3, 4, 6)).shape == (4, 6, 3)
    output = disparity.show("output", (torch.full((2, 2, 3), 0.12), torch.zeros(2, 1, 1)))
    assert output.shape == (4, 6, 3)
    assert (output == target[0, 1]).all()
