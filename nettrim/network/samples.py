"""All samples of a run as one batch: checked, moved, cut and handed to a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from nettrim.errors import NetTrimError, ProblemError
from nettrim.network.batches import Batch, Batches, require_finite
from nettrim.network.edit import evaluating, first_line
from nettrim.network.observe import output_of

BLOCK = 256  # samples in one pass without gradients
_TOKENS = (torch.int32, torch.int64)  # what an embedding takes


def joined(inputs: Tensor | Batch | Batches) -> Batch:
    """Return all samples as one checked batch.

    Parameters
    ----------
    inputs : Tensor (P, ...), Batch or Batches
        Floating and finite, or token ids; batches are joined in memory.

    Raises
    ------
    ProblemError
        They are neither, or there is no row.
    """
    if isinstance(inputs, Batches):
        return inputs.select(torch.arange(inputs.rows))  # checked when they were read
    if isinstance(inputs, Tensor):
        if inputs.dtype not in _TOKENS:
            check_inputs(inputs)
        inputs = Batch((inputs,))
    for tensor in (*inputs.inputs, *inputs.kwargs.values()):
        if tensor.dim() == 0 or len(tensor) == 0:
            raise ProblemError(f"inputs have shape {tuple(tensor.shape)}; pass at least one row")
        require_finite(tensor, "an input")
    return inputs


def check_inputs(inputs: Tensor) -> None:
    """Refuse inputs that are not floating and finite, of shape (P, ...) with at least one row.

    Raises
    ------
    ProblemError
        They are not.
    """
    if inputs.dim() < 2 or len(inputs) == 0 or not inputs.is_floating_point():
        raise ProblemError(
            f"inputs are {inputs.dtype} of shape {tuple(inputs.shape)}; "
            "pass at least one floating row, of shape (P, ...)"
        )
    require_finite(inputs, "the tensor of inputs")


def moved(batch: Batch, like: Tensor) -> Batch:
    """Return a batch on the device of a tensor and, where floating, in its dtype; without labels."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.detach().to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)

    return Batch(
        tuple(move(tensor) for tensor in batch.inputs), {key: move(tensor) for key, tensor in batch.kwargs.items()}
    )


def taken(batch: Batch, rows: Tensor | slice) -> Batch:
    """Return some samples of a batch, without labels: a view of a slice, else a copy."""

    def take(tensor: Tensor) -> Tensor:
        return tensor[rows if isinstance(rows, slice) else rows.to(tensor.device)]

    return Batch(
        tuple(take(tensor) for tensor in batch.inputs), {key: take(tensor) for key, tensor in batch.kwargs.items()}
    )


def pieces(batches: Batch | Iterable[Batch], rows: int) -> Iterator[Batch]:
    """Iterate over all samples in order, in batches of at most so many rows."""
    if isinstance(batches, Batches):
        yield from batches.chunks(rows)
        return
    for batch in [batches] if isinstance(batches, Batch) else batches:
        for start in range(0, len(batch), rows):
            yield taken(batch, slice(start, start + rows))


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Return the one tensor that a model gives, in the mode that it is in.

    Raises
    ------
    UnsupportedError
        There is none, or several.
    """
    return output_of(model(*batch.inputs, **batch.kwargs), model)


def forward_checked(model: nn.Module, batch: Batch) -> Tensor:
    """Return what `forward` does, on a copy of the batch; what the model itself raises comes back in one sentence.

    Raises
    ------
    ProblemError
        The model fails.
    """
    # copied, because a first layer that works in place would otherwise change the data
    own = Batch(
        tuple(tensor.clone() for tensor in batch.inputs), {key: tensor.clone() for key, tensor in batch.kwargs.items()}
    )
    try:
        return forward(model, own)
    except NetTrimError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (*batch.inputs, *batch.kwargs.values()))
        raise ProblemError(
            f"model ({type(model).__name__}) fails on inputs of shape {shapes} "
            f"({first_line(error)}); pass inputs that the model can be called on"
        ) from error


def dense_outputs(teacher: nn.Module, model: nn.Module, samples: Batch) -> Tensor:
    """Return the teacher's outputs (P, ...), in the dtype and on the device of the model.

    Both run in evaluation mode and are left as they were.

    Raises
    ------
    ProblemError
        Either fails on the samples, their outputs differ in shape, or those of the teacher are NaN or infinite.
    """
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    own = next((parameter for parameter in teacher.parameters() if parameter.is_floating_point()), like)
    with evaluating(teacher), torch.no_grad():
        wanted = torch.cat(
            [forward_checked(teacher, moved(batch, own)).detach().to(like) for batch in pieces(samples, BLOCK)]
        )
    require_finite(wanted, "what the teacher returns")
    with evaluating(model), torch.no_grad():
        found = forward_checked(model, taken(samples, slice(0, 1)))
    if len(wanted) != len(samples) or found.shape != wanted[:1].shape:
        raise ProblemError(
            f"the teacher maps {len(samples)} rows to outputs of shape {tuple(wanted.shape)} and the model one row to "
            f"{tuple(found.shape)}; pass networks that both map (P, ...) to (P, C)"
        )
    return wanted
