"""PyD-Net has the paper's levels and size, and a study can decompose all of its layers."""

from __future__ import annotations

import pytest
import torch

from ranksearch.compress.inventory import count_params, inventory
from ranksearch.errors import ModelError
from ranksearch.models import pydnet


def test_the_size_is_the_papers():
    """The paper says 1.9 million; the sum over the layers that it lists is this one, which its authors' code has too."""
    encoder = sum(
        9 * (a * b + b * b) + 2 * b for a, b in zip((3, 16, 32, 64, 96, 128), (16, 32, 64, 96, 128, 192), strict=True)
    )
    features = [16 + 8, 32 + 8, 64 + 8, 96 + 8, 128 + 8, 192]
    decoders = sum(9 * (into * 96 + 96 * 64 + 64 * 32 + 32 * 8) + 96 + 64 + 32 + 8 for into in features)
    upsampling = 5 * (4 * 8 * 8 + 8)
    assert count_params(pydnet()) == encoder + decoders + upsampling == 1_971_624


def test_the_pyramid_of_disparities():
    net = pydnet().eval()
    pictures = torch.rand(2, 3, 64, 128)
    with torch.no_grad():
        maps = net(pictures)
    assert [tuple(each.shape) for each in maps] == [(2, 2, 64 >> level, 128 >> level) for level in range(1, 7)]
    assert all(each.min() > 0 and each.max() < 0.3 for each in maps)


def test_each_level_hears_of_the_coarser_ones():
    """The finest map depends on every layer."""
    net = pydnet()
    net(torch.rand(1, 3, 64, 64))[0].sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in net.parameters())


def test_every_layer_can_be_decomposed():
    found = inventory(pydnet(), torch.rand(1, 3, 64, 64))
    assert len(found.layers) == 12 + 6 * 4 + 5
    assert not found.skipped
    assert all(layer.name.split(".")[0].rstrip("123456") in ("encoder", "decoder", "up") for layer in found.layers)


def test_sides_that_the_levels_do_not_divide():
    with pytest.raises(ModelError, match="the sides of a picture must be multiples of 64, but it is 96 x 320"):
        inventory(pydnet(), torch.rand(1, 3, 96, 320))
