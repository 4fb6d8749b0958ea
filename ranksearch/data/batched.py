"""The contract of a split that is cut into batches as a whole, on the device that wants them."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Batched(Dataset[Any], abc.ABC):
    """A split that knows how to make a whole batch: quicker than one input after the other, and where the model is.

    What a batch draws at random it draws from torch's default generator on the CPU, which training seeds: so the same
    seed gives the same batches on every device, of a model that draws none itself (dropout).
    """

    at_once: ClassVar[int | None] = None
    """How many inputs a batch holds at most, where they are large; None for as many as are asked for."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def batch(self, chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """The inputs and targets with the numbers `chosen` (batch,), a tensor on the CPU; on `device`."""

    @abc.abstractmethod
    def only(self, chosen: Tensor) -> Self:
        """The split of those inputs alone."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.batch(torch.tensor([range(len(self))[index]]), torch.device("cpu"))
        return inputs[0], targets[0]
