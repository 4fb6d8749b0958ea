"""Exports a model as plan and weights, as ONNX or by torch.export, and compares the reloaded model before keeping it."""

from __future__ import annotations

import inspect
import io
import logging
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ranksearch.compress.flat import Flat, Plain
from ranksearch.compress.narrowing import narrow_
from ranksearch.compress.surgery import copied, factorize_, skeleton_
from ranksearch.compress.weights import load_, state_of, weights_of
from ranksearch.errors import ModelError, PlanError, StudyError, first_line, last_line
from ranksearch.plan import Plan
from ranksearch.support.batch import arguments_of, concatenate, first_inputs, named_arguments, run_model
from ranksearch.support.copies import deep_copy
from ranksearch.support.files import write_whole
from ranksearch.support.nesting import has_lists_per_input, is_plain, map_tensors, named_tensors, tensors_in
from ranksearch.support.seeds import seeded

if TYPE_CHECKING:
    from onnx import ModelProto

M = TypeVar("M", bound=nn.Module)

PLAN, WEIGHTS = "plan.json", "weights.safetensors"
MAX_RELATIVE_DIFFERENCE = 1e-4
"""Accepted difference of outputs, relative to the largest output (or to 1): rounding of another runtime stays below it."""


def save_model(folder: Path, plan: Plan, weights: bytes) -> None:
    """Write `plan.json` and `weights.safetensors` (the factorized model's state dict) into a folder."""
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
    model = deep_copy(dense)
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
        torch.allclose(one, other, rtol=1e-3, atol=1e-5 * max(1.0, _largest(one)), equal_nan=True)
        for one, other in zip(first, second, strict=True)
    )


def _largest(values: Tensor) -> float:
    return float(values.nan_to_num(posinf=0, neginf=0).abs().max()) if values.numel() else 0.0


def export_model(
    model: nn.Module,
    dense: nn.Module,
    plan: Plan,
    inputs: Any,
    target: Path,
    *,
    form: str = "plan",
    opset: int | None = None,
    original: nn.Module | None = None,
) -> float:
    """Write a compressed model, reload it, and compare the two on real inputs.

    Args:
        model: the compressed model, in eval mode, on the CPU.
        dense: for the form `plan`, the dense model; its weights do not matter.
        plan: the plan of `model`.
        inputs: a batch of real inputs.
        target: the file to write, or the folder for the form `plan`.
        form: `plan` (plan.json and weights.safetensors), `onnx`, or `pt2` (torch.export).
        opset: for the form `onnx`, the ONNX opset version; None for torch's default.
        original: the model before `merge_`, whose outputs the reloaded model must give, too; None if nothing was merged.

    Returns:
        The largest absolute difference of the outputs.

    Raises:
        StudyError: the difference is more than rounding, or the model cannot be written in this form. Nothing is kept then.
    """
    match form:
        case "plan":
            return export_plan(model, dense, plan, inputs, target, original=original)
        case "onnx":
            return export_onnx(model, inputs, target, opset, original=original)
        case _:
            return export_pt2(model, inputs, target, original=original)


def export_plan(
    model: nn.Module, dense: nn.Module, plan: Plan, inputs: Any, target: Path, *, original: nn.Module | None = None
) -> float:
    """Write plan and weights into the folder `target`; returns the largest output difference after reloading."""
    weights = weights_of(model)
    with tempfile.TemporaryDirectory() as scratch_folder:
        save_model(Path(scratch_folder), plan, weights)
        difference = _compare(model if original is None else original, load_model(dense, scratch_folder), inputs)
    save_model(target, plan, weights)
    return difference


def export_onnx(
    model: nn.Module, inputs: Any, target: Path, opset: int | None = None, *, original: nn.Module | None = None
) -> float:
    """Write an ONNX file with a free batch size; returns the largest output difference in onnxruntime.

    Its inputs and outputs are the tensors of the model's, by their names: `image`, `boxes.0`; a single one is called `input` or
    `output`.
    """
    import onnxruntime  # imported here, since workers never need it

    data = _onnx(model, inputs, opset).SerializeToString()

    def run(batch: Any) -> list[Tensor]:
        with _exporting("onnx"):
            session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
            arrays = {name: tensor.numpy() for name, tensor in _onnx_inputs(model, batch).items()}
            feed = {entry.name: arrays[entry.name] for entry in session.get_inputs()}  # it may lack unused inputs
            return [torch.from_numpy(array) for array in session.run(None, feed)]

    difference = _compare(model if original is None else original, run, inputs)
    write_whole(target, data)
    return difference


def _onnx_inputs(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    arguments = named_arguments(model, inputs)
    return {path: tensor for name, value in arguments.items() for path, tensor in named_tensors(value, name).items()}


def _onnx(model: nn.Module, inputs: Any, opset: int | None) -> ModelProto:
    """Convert a model to ONNX with this opset, without paths and source lines of this machine."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not 1 <= opset <= newest:
        raise StudyError(f"--opset must be between 1 and {newest}, the newest that the installed onnx knows, but got {opset}.")
    _check_batched(inputs, "onnx")
    two = first_inputs(inputs, 2)
    names = _onnx_inputs(model, two)
    with _exporting("onnx"), quiet_exporter():
        with torch.no_grad():
            outputs = run_model(model, two)
        # A model of one tensor keeps the names of its weights.
        single = isinstance(two, Tensor) and isinstance(outputs, Tensor)
        tensors = two if single else tuple(names.values())
        program = torch.onnx.export(
            model if single else Flat(model, two), (tensors,), dynamo=True,
            dynamic_shapes=(map_tensors(_free_batch, tensors),), verbose=False, input_names=list(names),
            output_names=list(named_tensors(outputs, "output")), opset_version=opset,
        )  # fmt: skip
    assert program is not None
    proto = program.model_proto
    # If the exporter cannot convert a model to the opset, it only warns and keeps the opset that it wrote first.
    written = next(opset_id.version for opset_id in proto.opset_import if not opset_id.domain)
    if opset not in (None, written):
        raise StudyError(
            f"--opset must be one that the installed exporter can write, but it could not convert this model from {written} to "
            f"{opset}; choose {written} to {newest}."
        )
    _strip(proto)
    return proto


def _strip(message: Any) -> None:
    """Remove stack traces, source lines and class names from an ONNX message and all messages in it."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type:
            for inner in value if isinstance(value, Sequence) else [value]:
                _strip(inner)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the exporter, which warns of its own internals and logs tracebacks of attempts that it then replaces."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def export_pt2(model: nn.Module, inputs: Any, target: Path, *, original: nn.Module | None = None) -> float:
    """Write a torch.export archive with a free batch size; returns the largest output difference after reloading.

    It is called as the model. Its outputs are nested likewise, with plain dicts in the place of their subclasses.
    """
    _check_batched(inputs, "pt2")
    # Zeros, since the archive contains the example inputs, which are private. Two, since a batch size of one would become a
    # constant.
    two = map_tensors(torch.zeros_like, first_inputs(concatenate([inputs, inputs]), 2))
    with _exporting("pt2"):
        args, kwargs = arguments_of(model, two)
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        with torch.no_grad():
            plain = is_plain(run_model(model, two))
        program = torch.export.export(
            model if plain else Plain(model), args, kwargs, dynamic_shapes=map_tensors(_free_batch, dict(bound))
        )
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    difference = _compare(model if original is None else original, torch.export.load(buffer).module(), inputs)
    write_whole(target, buffer.getvalue())
    return difference


@contextmanager
def _exporting(form: str) -> Iterator[None]:
    """Raise a `StudyError` if exporting fails: torch.export raises errors of many types on a user's forward."""
    try:
        yield
    except Exception as error:
        raise StudyError(
            f"torch must be able to write the model as {form}, but raised {type(error).__name__}: {first_line(error)}; export "
            "it by --format plan."
        ) from error


def _check_batched(inputs: Any, form: str) -> None:
    if has_lists_per_input(inputs):
        raise StudyError(
            f"A model must take tensors with a batch dimension to be written as {form}, but takes lists with an entry for each "
            "input; export it by --format plan."
        )


def _free_batch(tensor: Tensor) -> dict[int, Any] | None:
    return {0: torch.export.Dim("batch")} if tensor.dim() else None


def _compare(model: nn.Module, other: Callable[..., Any], inputs: Any) -> float:
    """The largest difference of two models' outputs on real inputs.

    Raises:
        StudyError: the difference is more than rounding.
    """
    with torch.no_grad():
        expected, got = (tensors_in(run_model(net, inputs)) for net in (model, other))
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in got]:
        raise StudyError("The exported model's outputs must have the shapes of the trial's, but differ; nothing was written.")
    difference = max((_largest(one.double() - two.double()) for one, two in zip(expected, got, strict=True)), default=0.0)
    bound = MAX_RELATIVE_DIFFERENCE * max(1.0, *map(_largest, expected))
    if not difference <= bound:
        raise StudyError(
            f"The exported model's outputs must equal the trial's, but differ by {difference:.2g}; nothing was written."
        )
    return difference
