"""`merge_(model, plan, names)` multiplies the factors of layers back into one dense layer each, in place."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from ranksearch.compress.stand_ins import attributes_of, replace_
from ranksearch.compress.surgery import PERMANENT, kernel_of
from ranksearch.errors import PlanError, nearest
from ranksearch.methods import Part, Shape, method_of
from ranksearch.methods.groups import shape_of_group, shape_of_stack, split, stack
from ranksearch.methods.layer import CONVOLUTIONS, PLAIN, TRANSPOSED, Conv, as_kernel, as_weight, groups_of
from ranksearch.methods.parts import META_DEVICE, built, composed
from ranksearch.plan import Factorization, Plan

SETTINGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
"""The settings of a convolution, to which a transposed one adds `output_padding`. A factorized layer has them as attributes;
likewise `in_features` and `out_features`."""


def merge_(model: nn.Module, plan: Plan, names: Collection[str]) -> Plan:
    """Replace, in place, these factorized layers by dense layers with the kernels that their factors stand for.

    All or nothing, as `factorize_`. The model's outputs stay the same up to rounding. A merged layer has as many parameters as
    that of the dense model.

    Args:
        model: a model that was factorized by `plan`, and may have been trained since.
        plan: the plan of `model`.
        names: the layers to merge.

    Returns:
        The plan of the layers that are still factorized, with which `load_model` loads the model again.

    Raises:
        PlanError: the plan does not name a layer, or a layer is not factorized as the plan says. The model is then unchanged.
    """
    values, modules = dict(plan), dict(model.named_modules())
    for name in names:
        if name not in values:
            raise PlanError(f"Only layers that the plan factorizes can be merged, but {name!r} is none.{nearest(name, values)}")
        if name not in modules:
            raise PlanError(f"A plan must name layers of the model, but {name!r} is none.{nearest(name, modules)}")
    dense = {name: merged(name, modules[name], values[name]) for name in names}
    for name, module in dense.items():
        replace_(model, name, module)
    return Plan.of({name: value for name, value in plan if name not in dense}, plan.width, plan.narrowing)


def merged(name: str, module: nn.Module, value: Factorization) -> nn.Module:
    """The dense layer that computes the same as `module`, the layer `name` factorized by `value`.

    Raises:
        PlanError: `module` is not factorized by `value`.
    """
    if not can_merge(module):
        raise PlanError(
            f"Only layers that were plain can be merged, but {name!r} computed its weight or its padding in each pass, as the "
            "layer of the dense model still does; leave it factorized."
        )
    dense, layers = parts_in(name, module, value)
    groups, parts, shape = _parts(name, dense, value)
    kernels = [as_kernel(layer, layer.weight.detach().double()) for layer in layers]
    factors = [kernel.reshape(shape_of_stack(part.shape(shape), groups)) for kernel, part in zip(kernels, parts, strict=True)]
    first, bias = layers[0].weight, layers[-1].bias
    dense = dense.to(first.dtype).to_empty(device=first.device).train(module.training)
    with torch.no_grad():
        dense.weight.copy_(as_weight(dense, _kernel(parts, split(factors, groups), shape, value)))
        if bias is not None and dense.bias is not None:
            dense.bias.copy_(bias)
            dense.bias.requires_grad_(bias.requires_grad)
    dense.weight.requires_grad_(first.requires_grad)
    vars(dense).update(attributes_of(module))
    return dense


def can_merge(module: nn.Module) -> bool:
    """Whether the dense model's class of this factorized layer takes its merged weight as it is."""
    return PERMANENT not in vars(module)


def parts_in(name: str, module: nn.Module, value: Factorization) -> tuple[nn.Linear | Conv, list[nn.Linear | Conv]]:
    """For `module`, the layer `name` factorized by `value`: the dense layer on the device "meta", and the parts.

    Raises:
        PlanError: `module` is not factorized by `value`.
    """
    layers = [child for child in module.children() if isinstance(child, (*CONVOLUTIONS, nn.Linear))]
    about = attributes_of(module)
    if not layers or not ({"kernel_size", "in_features"} & set(about)):
        raise _other(name, module, value)
    dense = _empty(about, bias=layers[-1].bias is not None)
    groups, parts, shape = _parts(name, dense, value)
    if [layer.weight.numel() for layer in layers] != [groups * math.prod(part.shape(shape)) for part in parts]:
        raise _other(name, module, value)
    return dense, layers


def _parts(name: str, dense: nn.Linear | Conv, value: Factorization) -> tuple[int, tuple[Part, ...], Shape]:
    """The groups of a dense layer, the parts that are built of each, and the shape of each group's kernel."""
    groups = groups_of(dense)
    shape = shape_of_group(tuple(kernel_of(name, dense, value).shape), groups)
    return groups, built(method_of(value).parts(shape, value.ranks)), shape


def _other(name: str, module: nn.Module, value: Factorization) -> PlanError:
    return PlanError(
        f"Layer {name!r} must consist of the parts of {value}, but is another {type(module).__name__}; give the plan that the "
        "model was factorized by."
    )


def _empty(about: dict[str, object], *, bias: bool) -> nn.Linear | Conv:
    """The dense layer on the device "meta"."""
    if "in_features" in about:
        return nn.Linear(about["in_features"], about["out_features"], bias=bias, device=META_DEVICE)  # type: ignore[arg-type]
    kinds, settings = (TRANSPOSED, (*SETTINGS, "output_padding")) if about["transposed"] else (PLAIN, SETTINGS)
    kind = kinds[len(about["kernel_size"]) - 1]  # type: ignore[arg-type]
    return kind(**{name: about[name] for name in settings}, bias=bias, device=META_DEVICE)  # type: ignore[arg-type]


def _kernel(parts: Sequence[Part], groups: Sequence[Sequence[Tensor]], shape: Shape, value: Factorization) -> Tensor:
    """The kernel that the factors of all groups stand for, stacked; its axes are in the order of the layer's inputs."""
    (kernel,) = stack([(composed(parts, factors, shape),) for factors in groups])
    return kernel if value.order is None else kernel.permute(0, *(1 + axis for axis in value.order))
