"""A pruned network as an ONNX file: dense, with its zeros, and held against the model before it is there."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nettrim.errors import MissingExtraError, ProblemError, RunError, UnsupportedError
from nettrim.network.edit import evaluating, first_line, frozen_copy
from nettrim.pipeline.files import write_atomically
from nettrim.pipeline.outputs import plain_state

#: relative; what two correct runtimes may differ by in single precision
ONNX_TOLERANCE = 1e-4

_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
# a protobuf message, which an ONNX file is, holds no more
_LIMIT = 2**31


def export_onnx(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...], path: str | Path) -> float:
    """Write a model as ONNX, dense with its zeros, checked in ONNX Runtime before the file is there.

    The model is exported in evaluation mode, on the CPU, with its weights inside the file. The inputs' first dimension
    stays free where the model's operations allow it and the example has more than one row; all others are fixed.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    example_inputs : Tensor or tuple of Tensor
        The arguments of one call, on which both are compared.
    path : path
        A file there is replaced whole, or left as it is.

    Returns
    -------
    float
        The largest difference of an output entry between PyTorch and ONNX Runtime, relative to the largest entry of
        that output; at most 1e-4.

    Raises
    ------
    MissingExtraError
        onnx, onnxscript or onnxruntime is not installed.
    ProblemError
        An example input is no tensor, or the outputs are empty.
    UnsupportedError
        The model cannot run on the example, cannot be exported, returns something else than tensors, or holds 2 GiB.
    RunError
        ONNX Runtime does not run the file or answers otherwise than the model; or the file cannot be written.
    """
    runtime = _runtime()
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    for tensor in inputs:
        if not isinstance(tensor, Tensor):
            raise ProblemError(f"example_inputs holds a {type(tensor).__name__}: give the tensors of one call.")
    twin = frozen_copy(model).cpu()
    inputs = tuple(tensor.detach().cpu() for tensor in inputs)
    if sum(tensor.nbytes for tensor in plain_state(twin).values()) >= _LIMIT:
        raise UnsupportedError("the model holds 2 GiB or more, which no single ONNX file can: use write_packed.")
    content, expected = _content(twin, inputs)
    try:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        named = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), inputs, strict=True)}
        answers = [torch.from_numpy(np.asarray(answer)) for answer in session.run(None, named)]
    except Exception as error:  # ONNX Runtime raises classes of its own that it does not export
        raise RunError(f"ONNX Runtime does not run the exported model ({first_line(error)}).") from error
    difference = _difference(expected, answers)
    if not difference <= ONNX_TOLERANCE:
        raise RunError(
            f"ONNX Runtime differs from the model by {difference:.3g} of its largest output, above {ONNX_TOLERANCE:g}: "
            "export it in float32, and without operations that draw random numbers."
        )
    write_atomically(Path(path), content)
    return difference


def _runtime() -> Any:
    for name in _LIBRARIES:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise MissingExtraError(f"ONNX files need {name}: pip install 'nettrim[onnx]'.") from error
    return module


def _content(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[bytes, list[Tensor]]:
    """Return the file's content, and the model's own outputs."""
    free: tuple[Any, ...] = tuple({0: torch.export.Dim.AUTO} if tensor.dim() else {} for tensor in inputs)
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        # the exporter counts what goes into *inputs as one argument
        named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        free = (*free[:named], free[named:])
    # it reports every optional library that torch could have used
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), evaluating(model), warnings.catch_warnings():
            outputs = model(*inputs)
            # torch's own exporter calls deprecated parts of torch
            warnings.simplefilter("ignore")
            program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=free, verbose=False)
            content: bytes = program.model_proto.SerializeToString() if program is not None else b""
    except Exception as error:  # a user's own code, and every part of the exporter: said in one line
        # the exporter's own errors are pages on its stages; their cause is what happened
        reason = error.__cause__ or error
        raise UnsupportedError(
            f"{type(model).__name__} cannot be exported to ONNX ({type(reason).__name__}: {first_line(reason)})."
        ) from error
    finally:
        logger.setLevel(level)
    leaves = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise UnsupportedError(
            f"{type(model).__name__} returns something else than tensors: wrap it so that it returns one, or a tuple."
        )
    if not any(leaf.numel() for leaf in leaves):
        raise ProblemError("example_inputs give no outputs to compare: give at least one row.")
    return content, leaves


def _difference(expected: list[Tensor], answers: list[Tensor]) -> float:
    """Return the largest of all outputs; infinite where shapes differ, NaN where a value is."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in answers]:
        return math.inf
    worst = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(expected, answers, strict=True):
        if ours.numel():
            size = ours.double().abs().max()
            off = (ours.double() - theirs.double()).abs().max()
            # maximum, unlike max, hands NaN on
            worst = torch.maximum(worst, off / size if size > 0 else off)
    return float(worst)
