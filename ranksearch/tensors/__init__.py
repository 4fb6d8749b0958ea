"""Tensor mathematics: tensors in, tensors out, no modules."""
