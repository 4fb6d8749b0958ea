"""The plain torch layer that computes the same as a layer with a forward of its own, or with a computed weight.

What a layer hands to torch decides, not its class. If it only pads its input with zeros, gives it to torch's convolution or
product and returns the result, a plain layer with the weight of that call computes the same. So weight standardisation, weight
and spectral normalisation, pruning and the padding of TensorFlow are made permanent in a layer that is decomposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from ranksearch.methods.layer import CONVOLUTIONS, TRANSPOSED, Conv, Padding
from ranksearch.methods.parts import META_DEVICE
from ranksearch.support.copies import deep_copy
from ranksearch.support.seeds import seeded

FORWARDS = ("forward", "_conv_forward", "_output_padding")
"""The methods that compute a Conv or Linear layer."""
COMPUTING_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Torch's hooks that compute a weight before each call."""
BASES = (*CONVOLUTIONS, nn.Linear)
FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear)
"""Torch's functions that compute `BASES`, in the same order."""


@dataclass(frozen=True)
class Plain:
    """A plain torch layer, and the zeros around its input if it cannot pad by itself: (before, after) for each axis.

    `around` holds all zeros around the input, if the module that it stands for pads in another way than its attributes say;
    `varies` says whether they depend on the size of the input.
    """

    layer: Conv | nn.Linear
    padding: Padding | None = None
    around: Padding | None = None
    varies: bool = False


def is_parametrised(module: nn.Module) -> bool:
    """Whether a Conv or Linear computes its weight from other tensors, as weight or spectral normalisation and pruning do."""
    # Ask `is_parametrized` first: reading the weight computes it, which can change the tensors that it is computed from.
    return parametrize.is_parametrized(module) or not isinstance(module.weight, nn.Parameter)


def runs_as_torch(module: nn.Module) -> bool:
    """Whether a Conv or Linear has torch's own forward. A subclass may standardise its weights or pad its inputs."""
    base = base_of(module)
    return all(getattr(type(module), name, None) is getattr(base, name, None) for name in FORWARDS)


def base_of(module: nn.Module) -> type[Conv | nn.Linear]:
    """Torch's class of a Conv or Linear."""
    return next(base for base in BASES if isinstance(module, base))


def is_computed(module: nn.Module) -> bool:
    """Whether what a Conv or Linear hands to torch may differ from its weight and its settings."""
    return is_parametrised(module) or not runs_as_torch(module)


def holds_other_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks other than those by which torch computes a weight."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return not all(isinstance(hook, COMPUTING_HOOKS) for hook in hooks)


def weights_behind(module: nn.Module) -> list[nn.Parameter]:
    """The parameters from which a layer's weight is computed: all of the layer but its bias."""
    return [parameter for name, parameter in module.named_parameters() if name != "bias"]


def plain_of(module: nn.Module, padding: Padding | None = None) -> Plain | None:
    """The plain layer that computes the same as a Conv or Linear; None if the module does more than a plain layer can.

    A copy of the module runs on random inputs, in eval mode, and once in training mode. The weight is that of eval mode.

    Args:
        module: not changed; itself the result if it is plain.
        padding: the zeros around an input, where the module pads by the input's size; None for those of a small input.
    """
    assert isinstance(module, (*CONVOLUTIONS, nn.Linear))
    if not is_computed(module):
        return Plain(module)
    call = _steady_call(module)
    if call is None:
        return None
    if not isinstance(module, CONVOLUTIONS):
        out, into = call.weight.shape
        return Plain(_with_weights(nn.Linear(into, out, device=META_DEVICE), call, module))
    calls = [call] if runs_as_torch(module) else [call, *_calls_of_other_sizes(module)]
    if isinstance(module, TRANSPOSED):
        # Zeros around its input are not its padding, which crops the output.
        steady = not call.pads and all(map(call.is_like, calls))
        return Plain(_with_weights(_convolution(call, call.settings["padding"], "zeros"), call, module)) if steady else None
    if all(each is not None and each.pads_as(module) for each in calls):
        return Plain(_with_weights(_convolution(call, module.padding, module.padding_mode), call, module))
    if not all(each is not None and each.by_zeros for each in calls):
        return None
    around = padding or call.zeros
    itself = all(before == after for before, after in around)
    layer = _with_weights(_convolution(call, tuple(before for before, _ in around) if itself else 0, "zeros"), call, module)
    return Plain(layer, None if itself else around, around, len({each and each.zeros for each in calls}) > 1)


def padding_at(module: nn.Module, shape: Sequence[int]) -> Padding | None:
    """The zeros around an input of this shape; None if the module fails on it, or does not only pad it with zeros."""
    call = _call(deep_copy(module).eval(), shape)
    return None if call is None or not call.by_zeros else call.zeros


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
class _Call:
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

    def is_like(self, other: _Call | None) -> bool:
        """Whether the other call has the same settings and paddings, and a weight of the same shape."""
        return (
            other is not None
            and self.function is other.function
            and (self.pads, dict(self.settings), self.weight.shape) == (other.pads, dict(other.settings), other.weight.shape)
            and (self.bias is None) == (other.bias is None)
        )

    def equals(self, other: _Call | None) -> bool:
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
        self.calls: list[tuple[Tensor, _Call]] = []

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
) -> tuple[Tensor, _Call]:  # fmt: skip
    dims = weight.dim() - 2
    given = {} if func is F.linear else {"stride": stride, "padding": padding, "dilation": dilation}
    given |= {} if output_padding is None else {"output_padding": output_padding}
    settings: dict[str, Any] = {
        name: value if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else (value,) * dims
        for name, value in given.items()
    }
    kept = None if bias is None else bias.detach().clone()
    return input, _Call(func, (), weight.detach().clone(), kept, settings | ({"groups": groups} if given else {}))


def _bound_transposed(
    func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> tuple[Tensor, _Call]:  # fmt: skip
    return _bound(func, input, weight, bias, stride, padding, dilation, groups, output_padding)


def _call(module: nn.Module, shape: Sequence[int], seed: int = 0) -> _Call | None:
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


def _steady_call(module: nn.Module) -> _Call | None:
    """What a module hands to torch in eval mode.

    None if that depends on the values of the input, or if in training more than the values of the weights differ.
    """
    try:
        twin = deep_copy(module)
    except Exception:  # a module's own code for copies may raise anything
        return None
    for shape in _shapes(module):
        first, second = (_call(twin.eval(), shape, seed) for seed in (0, 1))
        if first and first.equals(second) and first.is_like(_call(twin.train(), shape)):
            return first if FUNCTIONS.index(first.function) == BASES.index(base_of(module)) else None
    return None


def _shapes(module: Conv | nn.Linear | nn.Module) -> list[tuple[int, ...]]:
    """Shapes of small inputs to try."""
    if isinstance(module, CONVOLUTIONS):
        return [(2, module.in_channels, *(_small(module),) * len(module.kernel_size))]
    assert isinstance(module, nn.Linear)
    return [(3, module.in_features), (2, 3, module.in_features)]


def _small(module: Conv) -> int:
    reach = [apart * (size - 1) + 1 for size, apart in zip(module.kernel_size, module.dilation, strict=True)]
    return 2 * max(*reach, *module.stride)


def _calls_of_other_sizes(module: Conv) -> list[_Call | None]:
    """What a convolution hands to torch for inputs of the sizes over which a padding by size repeats itself."""
    twin, small = deep_copy(module).eval(), _small(module)
    sizes = range(small + 1, small + 1 + max(module.stride))
    return [_call(twin, (1, module.in_channels, *(size,) * len(module.kernel_size))) for size in sizes]


def _convolution(call: _Call, padding: Any, mode: str) -> Conv:
    """An empty convolution with the settings of a call."""
    kind, groups = BASES[FUNCTIONS.index(call.function)], call.settings["groups"]
    first, second, *kernel = call.weight.shape
    into, out = (first, second * groups) if kind in TRANSPOSED else (second * groups, first)
    settings = {name: value for name, value in call.settings.items() if name != "padding"}
    return kind(into, out, tuple(kernel), padding=padding, padding_mode=mode, device=META_DEVICE, **settings)  # type: ignore


def _with_weights(layer: Conv | nn.Linear, call: _Call, module: nn.Module) -> Conv | nn.Linear:
    """The layer with weight and bias of the call, as trainable as the parameters of the module, and in its mode."""
    trainable = any(parameter.requires_grad for parameter in weights_behind(module))
    bias = module._parameters.get("bias")
    layer.weight = nn.Parameter(call.weight, requires_grad=trainable)
    layer.register_parameter(
        "bias",
        None if call.bias is None else nn.Parameter(call.bias, requires_grad=trainable if bias is None else bias.requires_grad),
    )
    return layer.train(module.training)
