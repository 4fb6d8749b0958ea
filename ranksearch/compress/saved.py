"""Saved models: a folder with `plan.json` and `weights.safetensors`, which `load_model` loads onto the dense model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ranksearch.compress.merging import can_merge, parts_in
from ranksearch.compress.narrowing import narrow_
from ranksearch.compress.surgery import copied, factorize_, skeleton_
from ranksearch.compress.weights import load_, state_of, weights_of
from ranksearch.errors import ModelError, PlanError, StudyError, last_line, nearest
from ranksearch.plan import Factorization, Plan
from ranksearch.support.batch import run_model
from ranksearch.support.files import write_whole, writing
from ranksearch.support.nesting import tensors_in
from ranksearch.support.seeds import seeded

M = TypeVar("M", bound=nn.Module)

PLAN, WEIGHTS = "plan.json", "weights.safetensors"


def save_model(model: nn.Module, plan: Plan | Mapping[str, Factorization], folder: str | Path) -> None:
    """Save a factorized model, for `load_model`: `plan.json` and `weights.safetensors` (its state dict) in a folder.

    Args:
        model: a model that `factorize_` made; it may have been trained since.
        plan: the plan that it was factorized by.
        folder: the folder, which is made if it does not exist; a model that it holds is replaced.

    Raises:
        PlanError: a layer is not factorized as the plan says, or the plan is of a narrower net and lacks its narrowing.
        StudyError: the folder cannot be written.
    """
    plan, folder = plan if isinstance(plan, Plan) else Plan.of(plan), Path(folder)
    if plan.width != 1 and plan.narrowing is None:
        raise PlanError(f"A plan of width {plan.width:g} must hold its narrowing to be saved, but does not; set it.")
    modules = dict(model.named_modules())
    for name, value in plan:
        if name not in modules:
            raise PlanError(f"A plan must name layers of the model, but {name!r} is none.{nearest(name, modules)}")
        if can_merge(modules[name]):  # the parts of other layers follow from what the dense layer computes
            parts_in(name, modules[name], value)
    with writing(f"The model in {folder}", "choose another folder"):
        write_model(folder, plan, weights_of(model))


def write_model(folder: Path, plan: Plan, weights: bytes) -> None:
    """Write `plan.json` and `weights.safetensors` into a folder, without checks."""
    write_whole(folder / WEIGHTS, weights)
    write_whole(folder / PLAN, plan.to_json())


def read_plan(folder: Path) -> Plan:
    """The plan of the model in a folder."""
    return Plan.from_json((folder / PLAN).read_text(encoding="utf-8"))


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model with undamaged files."""
    try:
        read_plan(folder)
        with safe_open(folder / WEIGHTS, "pt") as weights:
            weights.keys()
    except (OSError, UnicodeDecodeError, PlanError, SafetensorError):
        return False
    return True


def load_model(dense: M, folder: str | Path) -> M:
    """Load the compressed model in a folder, built on a copy of the dense model, whose weights do not matter.

    Raises:
        StudyError: the folder holds no model, a damaged one, or one made from another dense model.
        PlanError: the plan does not fit `dense`.
    """
    folder = Path(folder)
    if any(parameter.is_meta for parameter in dense.parameters()):
        raise StudyError("The dense model must not be on the device meta, but is; build it on the CPU.")
    try:
        plan = read_plan(folder)
        state = state_of((folder / WEIGHTS).read_bytes())
    except OSError:
        raise StudyError(f"A model's folder must hold {PLAN} and {WEIGHTS}, but {folder} does not.") from None
    except SafetensorError as error:
        raise StudyError(f"The weights in {folder} are damaged ({error}); run the study again.") from None
    if plan.width != 1 and plan.narrowing is None:
        raise PlanError(f"A plan of width {plan.width:g} must hold its narrowing, but that in {folder} does not; save both.")
    model = copied(dense)
    model = skeleton_(model if plan.narrowing is None else narrow_(model, plan.narrowing), plan)
    try:
        load_(model, state)
    except Exception as error:  # a module's own loading code may raise anything
        raise StudyError(f"The weights in {folder} must fit the given dense model, but do not: {last_line(error)}") from None
    return model.eval()


def check_reloading(model: nn.Module, fresh: nn.Module, plan: Plan, inputs: Any) -> None:
    """Check that a compressed model survives saving: save, load and compare one factorized copy.

    Args:
        model: the dense model, on the CPU; not changed.
        fresh: the dense model as constructed, before its first pass; it is changed.
        plan: the plan of the copy.
        inputs: a batch of at least two inputs, which training mode may need.

    Raises:
        ModelError: the copy cannot be saved or loaded, or its outputs change.
    """
    with seeded(0), torch.no_grad():
        twin = _as_if_trained(factorize_(copied(model), plan), inputs)
        with _reload_step("saved"):
            weights = weights_of(twin)
        with _reload_step("loaded"):
            back = load_(skeleton_(fresh, plan), state_of(weights))
        with _reload_step("run after loading"):
            first, again, loaded = (_outputs(net, inputs) for net in (twin, twin, back))
    # Outputs that differ in every pass cannot be compared.
    if _alike(first, again) and not _alike(first, loaded):
        raise ModelError(_not_reloaded("gave other outputs afterwards"))


@contextmanager
def _reload_step(step: str) -> Iterator[None]:
    """Raise a `ModelError` if this step fails: the model's code may raise anything, and safetensors refuses some tensors."""
    try:
        yield
    except Exception as error:
        raise ModelError(_not_reloaded(f"cannot be {step}: {type(error).__name__}: {last_line(error)}")) from error


def _not_reloaded(failure: str) -> str:
    return (
        f"A compressed model must be the same after saving and loading, but a factorized copy {failure}; keep in state_dict() "
        "all that a forward needs and training changes, and create buffers in __init__."
    )


def _as_if_trained(model: M, inputs: Any) -> M:
    """Change, in place, everything that training would change."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(1 + 0.1 * random.random())
    run_model(model.train(), inputs)
    return model


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with seeded(0):
        return [tensor.double().clone() for tensor in tensors_in(run_model(model.eval(), inputs))]


def _alike(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return [tensor.shape for tensor in first] == [tensor.shape for tensor in second] and all(
        torch.allclose(one, other, rtol=1e-3, atol=1e-5 * max(1.0, largest(one)), equal_nan=True)
        for one, other in zip(first, second, strict=True)
    )


def largest(values: Tensor) -> float:
    """The largest absolute value that is finite; 0 if there are no values."""
    return float(values.nan_to_num(posinf=0, neginf=0).abs().max()) if values.numel() else 0.0
