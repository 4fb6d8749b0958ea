"""The plain torch layer that computes the same as a layer with a forward of its own, or with a computed weight.

What a layer hands to torch decides, not its class. If it only pads its input with zeros, gives it to torch's convolution or
product and returns the result, a plain layer with the weight of that call computes the same. So weight standardisation, weight
and spectral normalisation, pruning and the padding of TensorFlow are made permanent in a layer that is decomposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ranksearch.compress.torch_calls import BASES, FUNCTIONS, TorchCall, base_of, call_of
from ranksearch.methods.layer import CONVOLUTIONS, TRANSPOSED, Conv, Padding
from ranksearch.methods.parts import META_DEVICE
from ranksearch.support.copies import deep_copy

FORWARDS = ("forward", "_conv_forward", "_output_padding")
"""The methods that compute a Conv or Linear layer."""
COMPUTING_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Torch's hooks that compute a weight before each call."""


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
    if not all(each is not None and each.computes_as(call) for each in calls):
        return None
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
    call = call_of(deep_copy(module).eval(), shape)
    return None if call is None or not call.by_zeros else call.zeros


def _steady_call(module: nn.Module) -> TorchCall | None:
    """What a module hands to torch in eval mode.

    None if that depends on the values of the input, or if in training more than the values of the weights differ.
    """
    try:
        twin = deep_copy(module)
    except Exception:  # a module's own code for copies may raise anything
        return None
    for shape in _shapes(module):
        first, second = (call_of(twin.eval(), shape, seed) for seed in (0, 1))
        if first and first.equals(second) and first.is_like(call_of(twin.train(), shape)):
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


def _calls_of_other_sizes(module: Conv) -> list[TorchCall | None]:
    """What a convolution hands to torch for inputs of the sizes over which a padding by size repeats itself."""
    twin, small = deep_copy(module).eval(), _small(module)
    sizes = range(small + 1, small + 1 + max(module.stride))
    return [call_of(twin, (1, module.in_channels, *(size,) * len(module.kernel_size))) for size in sizes]


def _convolution(call: TorchCall, padding: Any, mode: str) -> Conv:
    """An empty convolution with the settings of a call."""
    kind, groups = CONVOLUTIONS[FUNCTIONS.index(call.function)], call.settings["groups"]
    first, second, *kernel = call.weight.shape
    into, out = (first, second * groups) if kind in TRANSPOSED else (second * groups, first)
    settings = {name: value for name, value in call.settings.items() if name != "padding"}
    return kind(into, out, tuple(kernel), padding=padding, padding_mode=mode, device=META_DEVICE, **settings)  # type: ignore[arg-type]


def _with_weights(layer: Conv | nn.Linear, call: TorchCall, module: nn.Module) -> Conv | nn.Linear:
    """The layer with weight and bias of the call, as trainable as the parameters of the module, and in its mode."""
    trainable = any(parameter.requires_grad for parameter in weights_behind(module))
    bias = module._parameters.get("bias")
    layer.weight = nn.Parameter(call.weight, requires_grad=trainable)
    layer.register_parameter(
        "bias",
        None if call.bias is None else nn.Parameter(call.bias, requires_grad=trainable if bias is None else bias.requires_grad),
    )
    return layer.train(module.training)
