"""`Batched`, the base class of splits that make a whole batch at once, on the model's device."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset


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
    def batch(self, chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """The inputs and targets, on `device`, with the indices `chosen` (batch,), a tensor on the CPU."""

    @abc.abstractmethod
    def only(self, chosen: Tensor) -> Self:
        """The part of the split with the indices `chosen` (count,)."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.batch(torch.tensor([range(len(self))[index]]), torch.device("cpu"))
        return inputs[0], targets[0]
