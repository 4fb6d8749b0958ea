"""`Batched`, the base class of splits that make a whole batch at once, on the model's device."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ranksearch.support.nesting import map_tensors


class Batched(Dataset[Any], abc.ABC):
    """A split that makes a whole batch at once on a device, which is faster than input by input.

    Random augmentation must use torch's default generator on the CPU, which training seeds. Then a seed gives the same batches
    on every device, unless the model itself draws random numbers (dropout).
    """

    at_once: ClassVar[int | None] = None
    """The largest batch size, for large inputs; None for no limit."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def batch(self, chosen: Tensor, device: torch.device) -> tuple[Any, Any]:
        """The inputs and targets, on `device`, with the indices `chosen` (batch,), a tensor on the CPU; nested in any way."""

    @abc.abstractmethod
    def only(self, chosen: Tensor) -> Self:
        """The part of the split with the indices `chosen` (count,)."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        batch = self.batch(torch.tensor([range(len(self))[index]]), torch.device("cpu"))
        inputs, targets = (map_tensors(lambda tensor: tensor[0] if tensor.dim() else tensor, part) for part in batch)
        return inputs, targets
