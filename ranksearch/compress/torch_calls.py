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
            amounts = pad.amounts[: 2 * self.dims]  # a forward may name the other dimensions, too, with zeros
            for axis, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
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
        """Whether the other call has the same settings, paddings, weight and bias."""
        return other is not None and self.is_like(other) and self.computes_as(other)

    def computes_as(self, other: TorchCall) -> bool:
        """Whether the other call has the same weight, bias and settings, the paddings aside."""
        settings = [{name: value for name, value in each.settings.items() if name != "padding"} for each in (self, other)]
        return settings[0] == settings[1] and _equal(self.weight, other.weight) and _equal(self.bias, other.bias)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors, or none, have equal values; NaN equals itself."""
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


class _Followed(TorchFunctionMode):
    """Follows a tensor through paddings to torch's convolutions and products.

    Torch counts the changes of a tensor in place as its version. A tensor that was changed is followed no longer.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        # By id; the tensors are kept alive, since an id is only unique while its tensor lives.
        self._padded: dict[int, tuple[Tensor, int, tuple[_Pad, ...]]] = {id(start): (start, start._version, ())}
        self._calls: list[tuple[Tensor, int, TorchCall]] = []

    def call_behind(self, outputs: Any) -> TorchCall | None:
        """The call whose result these outputs are, unchanged; None if there is none, or if a followed tensor was changed."""
        if any(tensor._version != version for tensor, version, _ in self._padded.values()):
            return None
        return next((call for result, version, call in self._calls if result is outputs and result._version == version), None)

    def _pads_of(self, tensor: Any) -> tuple[_Pad, ...] | None:
        """The paddings of a followed tensor; None if it is another one, or was changed."""
        found = self._padded.get(id(tensor))
        return found[2] if found is not None and tensor._version == found[1] else None

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        arguments = dict(kwargs or {})
        result = func(*args, **arguments)
        if func is F.pad:
            inputs, pad = _pad(*args, **arguments)
            if (pads := self._pads_of(inputs)) is not None:
                self._padded[id(result)] = (result, result._version, (*pads, pad))
        elif func in FUNCTIONS:
            bound = _bound_transposed if "conv_transpose" in func.__name__ else _bound
            inputs, call = bound(func, *args, **arguments)
            if (pads := self._pads_of(inputs)) is not None:
                self._calls.append((result, result._version, replace(call, pads=pads)))
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
    return followed.call_behind(outputs)
