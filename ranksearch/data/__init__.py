"""Data sets that a study can name, as `data = "ranksearch.data:digits"`."""

from ranksearch.data.digits import digits
from ranksearch.data.splits import Splits, batches, check_splits, example, sample, sample_inputs, size

__all__ = ["Splits", "batches", "check_splits", "digits", "example", "sample", "sample_inputs", "size"]
