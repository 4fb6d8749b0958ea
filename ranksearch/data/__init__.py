"""Data sets for studies, named as `data = "ranksearch.data:digits"`."""

from ranksearch.data.batched import Batched
from ranksearch.data.checks import check_splits
from ranksearch.data.cifar10 import cifar10
from ranksearch.data.depth import depth
from ranksearch.data.digits import digits
from ranksearch.data.image_folder import image_folder
from ranksearch.data.splits import Splits, at_once, batches, example, part, sample, sample_inputs, size
from ranksearch.data.stereo import stereo

__all__ = [
    "Batched", "Splits", "at_once", "batches", "check_splits", "cifar10", "depth", "digits", "example", "image_folder", "part",
    "sample", "sample_inputs", "size", "stereo",
]  # fmt: skip
