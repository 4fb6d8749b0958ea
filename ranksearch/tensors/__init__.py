"""Tensor mathematics: functions from tensors to tensors, without modules."""
