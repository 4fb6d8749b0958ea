"""Exports a model as plan and weights, as ONNX or by torch.export, and compares the reloaded model before keeping it."""

from __future__ import annotations

import inspect
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ranksearch.compress.flat import Flat, PlainOutputs
from ranksearch.compress.saved import largest, load_model, write_model
from ranksearch.compress.weights import weights_of
from ranksearch.errors import StudyError, first_line
from ranksearch.plan import Plan
from ranksearch.support.batch import arguments_of, concatenate, first_inputs, named_arguments, run_model
from ranksearch.support.files import write_whole
from ranksearch.support.nesting import has_lists_per_input, is_plain, map_tensors, named_tensors, tensors_in

if TYPE_CHECKING:
    from onnx import ModelProto

MAX_RELATIVE_DIFFERENCE = 1e-4
"""Accepted difference of outputs, relative to the largest output (or to 1): rounding of another runtime stays below it."""


def export_model(
    model: nn.Module,
    dense: nn.Module,
    plan: Plan,
    inputs: Any,
    target: str | Path,
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
    target = Path(target)
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
        write_model(Path(scratch_folder), plan, weights)
        loaded = load_model(dense, scratch_folder)
        difference = _compare(model if original is None else original, run_model(loaded, inputs), inputs)
    write_model(target, plan, weights)
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

    difference = _compare(model if original is None else original, run(inputs), inputs)
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
            model if plain else PlainOutputs(model), args, kwargs, dynamic_shapes=map_tensors(_free_batch, dict(bound))
        )
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    difference = _compare(model if original is None else original, run_model(loaded, inputs), inputs)
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


def _compare(model: nn.Module, outputs: Any, inputs: Any) -> float:
    """The largest difference of a model's outputs on real inputs from these `outputs`.

    Raises:
        StudyError: the difference is more than rounding.
    """
    with torch.no_grad():
        expected, got = tensors_in(run_model(model, inputs)), [tensor.detach() for tensor in tensors_in(outputs)]
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in got]:
        raise StudyError("The exported model's outputs must have the shapes of the trial's, but differ; nothing was written.")
    difference = max((largest(one.double() - two.double()) for one, two in zip(expected, got, strict=True)), default=0.0)
    bound = MAX_RELATIVE_DIFFERENCE * max(1.0, *map(largest, expected))
    if not difference <= bound:
        raise StudyError(
            f"The exported model's outputs must equal the trial's, but differ by {difference:.2g}; nothing was written."
        )
    return difference
