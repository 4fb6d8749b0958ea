"""What a layer hands to torch: the call of torch's convolution or product in its forward, and the paddings before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ranksearch.methods.layer import CONVOLUTIONS, Conv, Padding
from ranksearch.support.seeds import seeded

BASES = (*CONVOLUTIONS, nn.Linear)
FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear)
"""Torch's functions that compute `BASES`, in the same order."""


def base_of(module: nn.Module) -> type[Conv | nn.Linear]:
    """Torch's class of a Conv or Linear."""
    return next(base for base in BASES if isinstance(module, base))


@dataclass(frozen=True)
class _Pad:
    """A call of torch's `pad`."""

    amounts: tuple[int, ...]
    mode: str
    value: float | None

    def only_zeros(self, dims: int) -> bool:
        """Whether it only puts zeros around the last dimensions, so many as `dims`."""
        around, others = self.amounts[: 2 * dims], self.amounts[2 * dims :]
        return self.mode == "constant" and not self.value and min(around, default=0) >= 0 and not any(others)


@dataclass(frozen=True)
class TorchCall:
    """A call of one of `FUNCTIONS`, on an input that was padded like this before."""

    function: Any
    pads: tuple[_Pad, ...]
    weight: Tensor
    bias: Tensor | None
    settings: Mapping[str, Any]

    @property
    def dims(self) -> int:
        return self.weight.dim() - 2

    @property
    def by_zeros(self) -> bool:
        """Whether the input was only padded with zeros, along its positions."""
        return all(pad.only_zeros(self.dims) for pad in self.pads)

    @property
    def zeros(self) -> Padding:
        """All zeros around the input, (before, after) for each axis."""
        totals = [[before, after] for before, after in self._own_zeros()]
        for pad in self.pads:
            for axis, (before, after) in enumerate(zip(pad.amounts[::2], pad.amounts[1::2], strict=True)):
                totals[-1 - axis][0] += before
                totals[-1 - axis][1] += after
        return tuple((before, after) for before, after in totals)

    def _own_zeros(self) -> Iterator[tuple[int, int]]:
        padding = self.settings["padding"]
        for axis, (size, apart) in enumerate(zip(self.weight.shape[2:], self.settings["dilation"], strict=True)):
            around = apart * (size - 1) if padding == "same" else 0
            yield (around // 2, around - around // 2) if isinstance(padding, str) else (padding[axis], padding[axis])

    def pads_as(self, module: Conv) -> bool:
        """Whether the input was padded as torch's own convolution with the attributes of `module` pads it."""
        if module.padding_mode == "zeros":
            return not self.pads and self.settings["padding"] == module.padding
        wanted = _Pad(tuple(module._reversed_padding_repeated_twice), module.padding_mode, None)
        return self.pads == (wanted,) and self.settings["padding"] in ((0,) * self.dims, "valid")

    def is_like(self, other: TorchCall | None) -> bool:
        """Whether the other call has the same settings and paddings, and a weight of the same shape."""
        return (
            other is not None
            and self.function is other.function
            and (self.pads, dict(self.settings), self.weight.shape) == (other.pads, dict(other.settings), other.weight.shape)
            and (self.bias is None) == (other.bias is None)
        )

    def equals(self, other: TorchCall | None) -> bool:
        """Whether the other call has the same weight and bias, too."""
        if other is None or not self.is_like(other) or not torch.equal(self.weight, other.weight):
            return False
        return self.bias is None or other.bias is None or torch.equal(self.bias, other.bias)


class _Followed(TorchFunctionMode):
    """Follows a tensor through paddings to torch's convolutions and products."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        # By id; the tensors are kept alive, since an id is only unique while its tensor lives.
        self._padded: dict[int, tuple[Tensor, tuple[_Pad, ...]]] = {id(start): (start, ())}
        self.calls: list[tuple[Tensor, TorchCall]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        arguments = dict(kwargs or {})
        result = func(*args, **arguments)
        if func is F.pad:
            inputs, pad = _pad(*args, **arguments)
            if id(inputs) in self._padded:
                self._padded[id(result)] = (result, (*self._padded[id(inputs)][1], pad))
        elif func in FUNCTIONS:
            bound = _bound_transposed if "conv_transpose" in func.__name__ else _bound
            inputs, call = bound(func, *args, **arguments)
            if id(inputs) in self._padded:
                self.calls.append((result, replace(call, pads=self._padded[id(inputs)][1])))
        return result


def _pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> tuple[Tensor, _Pad]:
    return input, _Pad(tuple(pad), mode, value)


def _bound(
    func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1, output_padding: Any = None,
) -> tuple[Tensor, TorchCall]:  # fmt: skip
    dims = weight.dim() - 2
    given = {} if func is F.linear else {"stride": stride, "padding": padding, "dilation": dilation}
    given |= {} if output_padding is None else {"output_padding": output_padding}
    settings: dict[str, Any] = {
        name: value if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else (value,) * dims
        for name, value in given.items()
    }
    kept = None if bias is None else bias.detach().clone()
    return input, TorchCall(func, (), weight.detach().clone(), kept, settings | ({"groups": groups} if given else {}))


def _bound_transposed(
    func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> tuple[Tensor, TorchCall]:  # fmt: skip
    return _bound(func, input, weight, bias, stride, padding, dilation, groups, output_padding)


def call_of(module: nn.Module, shape: Sequence[int], seed: int = 0) -> TorchCall | None:
    """What a module hands to torch for a random input of this shape; None if it fails, or changes the result."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    inputs = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(like)
    followed = _Followed(inputs)
    try:
        with seeded(seed), torch.no_grad(), followed:
            outputs = module(inputs)
    except Exception:  # a forward may raise anything
        return None
    return next((call for result, call in followed.calls if result is outputs), None)
