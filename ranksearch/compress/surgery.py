"""`factorize_(model, plan)` replaces layers of a model by their factorizations, in place."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ranksearch.compress.axes import as_maps, usual_order
from ranksearch.compress.decomposed import from_tensorly
from ranksearch.compress.inventory import plain_or_why
from ranksearch.compress.plain import Plain, is_computed, weights_behind
from ranksearch.compress.stand_ins import attributes_of, replace_
from ranksearch.compress.watch import names_of_parameters
from ranksearch.errors import ModelError, PlanError, first_line, nearest
from ranksearch.methods import Method, Shape, method_of
from ranksearch.methods.groups import shape_of_group, split, stack
from ranksearch.methods.layer import CONVOLUTIONS, MAX_DIMS, Conv, as_kernel, groups_of
from ranksearch.plan import Factorization, Plan
from ranksearch.support.copies import deep_copy

if TYPE_CHECKING:
    from tensorly.cp_tensor import CPTensor
    from tensorly.tucker_tensor import TuckerTensor

M = TypeVar("M", bound=nn.Module)

PERMANENT = "made_permanent"
"""The attribute of a replacement whose layer computed in each pass what the replacement keeps."""


def factorize_(
    model: M,
    plan: Plan | Mapping[str, Factorization | CPTensor | TuckerTensor],
    *,
    factors: Mapping[str, Sequence[Tensor]] | None = None,
    bias_corrections: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> M:
    """Replace, in place, each layer that `plan` names by plain torch modules that compute its factorization.

    All or nothing: all new modules are built before the first is put in. A replacement keeps the layer's device, dtype,
    `requires_grad` and mode; the rest of the model is not touched.

    Args:
        model: any module; layers are named as in `model.named_modules()`.
        plan: by layer, the factorization, or TensorLy's decomposition of the kernel as `from_tensorly` takes it. A layer not
            named stays dense.
        factors: by layer, factors already computed; the other layers are decomposed here.
        bias_corrections: by layer, a term (out,) to add to its bias.
        seed: of CP's random starts.

    Returns:
        `model` itself.

    Raises:
        PlanError: a layer does not exist, shares its weight or cannot be factorized as the plan says, a rank is above its
            bound, a weight holds NaN or infinity, or a bias correction does not fit. The model is then unchanged.
    """
    modules, ready = dict(model.named_modules()), dict(factors or {})
    values: dict[str, Any] = dict(plan)
    for name, value in values.items():
        if not isinstance(value, Factorization) and isinstance(layer := modules.get(name), (*CONVOLUTIONS, nn.Linear)):
            values[name], ready[name] = from_tensorly(name, layer, value)
    wanted = Plan.of(values)
    names = names_of_parameters(model)
    replacements = {}
    for name, value in wanted:
        if name not in modules or not name:
            raise PlanError(f"A plan must name layers of the model, but {name!r} is none.{nearest(name, _layers(model))}")
        module = modules[name]
        owners = [other for other, owned in model.named_modules(remove_duplicate=False) if owned is module]
        if len(owners) > 1:
            raise PlanError(f"A layer must have one name, but {name!r} is also {', '.join(o for o in owners if o != name)}.")
        plain = plain_layer(name, module, value)
        kernel, groups = kernel_of(name, plain.layer, value), groups_of(plain.layer)
        shape = shape_of_group(tuple(kernel.shape), groups)
        tied = [other for weight in weights_behind(module) for other in names[id(weight)] if not other.startswith(f"{name}.")]
        if tied:
            raise PlanError(f"A layer must not share its weight, but that of {name!r} is also {', '.join(tied)}; leave it out.")
        method = method_of(value)
        layer_factors = ready.get(name)
        if layer_factors is None and not torch.isfinite(kernel).all():
            raise PlanError(f"Weights must be finite, but layer {name!r} holds NaN or infinity; load or train it again.")
        if layer_factors is None:
            layer_factors = _decomposed(kernel, groups, method, value.ranks, seed)
        _check_shapes(name, value, shape, groups, layer_factors)
        replacement = method.build(plain.layer, shape, value.ranks, layer_factors, plain.padding)
        if bias_corrections and name in bias_corrections:
            _correct_bias(name, plain.layer, replacement, bias_corrections[name])
        replacement = replacement if value.order is None else _reordered(replacement, shape[1:], value.order)
        vars(replacement).update(attributes_of(module) | ({PERMANENT: True} if is_computed(module) else {}))
        replacements[name] = replacement
    for name, module in replacements.items():
        replace_(model, name, module)
    return model


def _decomposed(kernel: Tensor, groups: int, method: Method, ranks: tuple[int, ...], seed: int) -> tuple[Tensor, ...]:
    """The factors of a kernel, stacked over the groups."""
    kernels = [one for (one,) in split([kernel], groups)]
    return stack([method.factors(one, method.prepare(one, [ranks], seed), ranks, seed) for one in kernels])


def _reordered(replacement: nn.Sequential, size: Shape, order: Sequence[int]) -> nn.Sequential:
    """Prepend a step that brings the axes of a flattened map (channels, *size) from this order into the usual one."""
    # Imported here, since it would take seconds in every worker.
    from torchvision.ops import Permute

    steps: OrderedDict[str, nn.Module] = OrderedDict()
    steps["map"] = nn.Unflatten(1, [size[axis] for axis in order])
    steps["order"] = Permute(list(usual_order(order)))
    steps["row"] = nn.Flatten()
    return nn.Sequential(steps | OrderedDict(replacement.named_children())).train(replacement.training)


def _correct_bias(layer: str, dense: nn.Module, replacement: nn.Module, bias_correction: Tensor) -> None:
    if not isinstance(dense.bias, Tensor) or dense.bias.shape != bias_correction.shape:
        has = f"a bias of shape {tuple(dense.bias.shape)}" if isinstance(dense.bias, Tensor) else "no bias"
        raise PlanError(
            f"Layer {layer!r}: a bias correction of shape {tuple(bias_correction.shape)} needs a bias of that shape, but the "
            f"layer has {has}."
        )
    # Only the last part of a factorization has a bias.
    bias = next(parameter for name, parameter in replacement.named_parameters() if name.endswith(".bias"))
    with torch.no_grad():
        bias.add_(bias_correction.to(bias))


def skeleton_(model: M, plan: Plan) -> M:
    """Factorize `model` in place with factors of zeros. Saved or new weights are then put into it."""
    modules = dict(model.named_modules())
    factors = {}
    for name, value in plan:
        if name in modules:
            layer = plain_layer(name, modules[name], value).layer
            shape = shape_of_group(tuple(kernel_of(name, layer, value).shape), groups_of(layer))
            factors[name] = [torch.zeros(s) for s in method_of(value).factor_shapes(shape, value.ranks, groups_of(layer))]
    return factorize_(model, plan, factors=factors)


def plain_layer(name: str, module: nn.Module, value: Factorization) -> Plain:
    """The plain layer that `value` decomposes, with the weight that `module` hands to torch now.

    Raises:
        PlanError: the layer cannot be factorized, or pads its input in another way than `value` says.
    """
    plain = plain_or_why(module, value.padding)
    if isinstance(plain, str):
        raise PlanError(f"A plan may only name layers that can be factorized, but names {name!r}: {plain}.")
    if value.padding is None and plain.varies:
        raise PlanError(
            f"A plan must name the padding of a layer that pads by the size of its input, but has none for {name!r}; write "
            "padding=((before, after), ...), one pair for each axis."
        )
    axes = len(getattr(plain.layer, "kernel_size", ())) if plain.varies else 0
    if value.padding is not None and len(value.padding) != axes:
        needs = f"needs padding of {axes} axes" if axes else "does not pad by the size of its input and needs no padding"
        raise PlanError(f"Layer {name!r} {needs}, but the plan has padding={value.padding}; it was made for another model.")
    return plain


def kernel_of(name: str, module: Conv | nn.Linear, value: Factorization) -> Tensor:
    """The kernel (out, in, *kernel) of a plain layer that `value` decomposes, in float32 or float64, stacked over the groups.

    Raises:
        PlanError: the layer cannot be factorized by `value`.
    """
    weight = as_kernel(module, module.weight.detach())
    weight = weight if weight.dtype == torch.float64 else weight.float()
    if value.kernel is not None:
        fits = len(value.kernel) <= MAX_DIMS and weight[0].numel() % math.prod(value.kernel) == 0
        if not isinstance(module, nn.Linear) or not fits:
            raise PlanError(
                f"Layer {name!r} of shape {tuple(weight.shape)} is not a fully connected layer after a map of size "
                f"{value.kernel}; the plan was made for another model or input size."
            )
        channels = weight[0].numel() // math.prod(value.kernel)
        weight = as_maps(weight, (channels, *value.kernel), value.order)
    groups = groups_of(module)
    method, shape = method_of(value), shape_of_group(tuple(weight.shape), groups)
    if not method.applies(shape, linear=isinstance(module, nn.Linear)):
        hint = "; name the map its input is flattened from, as in CP(16, kernel=(6, 6))" if len(shape) == 2 else ""
        where = f" in each of {groups} groups" if groups > 1 else ""
        raise PlanError(f"Layer {name!r} of shape {shape}{where} cannot be stored as {value.title}{hint}.")
    for field, rank, bound in zip(value.rank_names(), value.ranks, method.bounds(shape), strict=True):
        if rank > bound:
            raise PlanError(f"Layer {name!r}: {field} of {value.title} must be at most {bound}, but got {rank}.")
    return weight


def _check_shapes(name: str, value: Factorization, shape: Shape, groups: int, factors: Sequence[Tensor]) -> None:
    wanted = method_of(value).factor_shapes(shape, value.ranks, groups)
    got = tuple(tuple(factor.shape) for factor in factors)
    if got != wanted:
        raise PlanError(f"Layer {name!r}: the factors of {value} must have shapes {wanted}, but have {got}.")


def _layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if name and isinstance(module, (*CONVOLUTIONS, nn.Linear))]


def copied(model: M) -> M:
    """A copy of a model. Every trial starts from one.

    Raises:
        ModelError: the model cannot be copied, for example since it holds an open file.
    """
    try:
        return deep_copy(model)
    except Exception as error:
        raise ModelError(
            f"It must be possible to copy the model, but copy.deepcopy raised {type(error).__name__}: {first_line(error)}; "
            "keep open files and the like outside the model."
        ) from error
