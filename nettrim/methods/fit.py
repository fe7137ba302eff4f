"""How far a layer is from the dense network's outputs, and the nearest that a mask allows."""

from __future__ import annotations

import torch
from torch import Tensor

from nettrim.core.linalg import second_moment
from nettrim.core.support import refit_linear
from nettrim.errors import ProblemError
from nettrim.methods.base import LayerTask, with_bias_column


def check_task(task: LayerTask) -> None:
    """Refuse arrays that do not fit together or are not finite: NaN must be ranked nowhere.

    Raises
    ------
    ProblemError
        The text names the layer and the array.
    """
    neurons, columns = task.weight.shape
    samples = task.inputs.shape[0]
    wanted: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("weight", task.weight, (neurons, columns)),
        ("inputs", task.inputs, (samples, columns)),
        ("outputs", task.outputs, (samples, neurons)),
    ]
    if task.bias is not None:
        wanted.append(("bias", task.bias, (neurons,)))
    if not samples:
        raise ProblemError(f"layer {task.name!r} has no sample: give it at least one.")
    for name, tensor, shape in wanted:
        if tensor.shape != shape:
            raise ProblemError(f"layer {task.name!r}: {name} has shape {tuple(tensor.shape)}: it must be {shape}.")
        if not bool(tensor.isfinite().all()):
            raise ProblemError(f"layer {task.name!r}: {name} holds NaN or infinity: there is nothing to rank by.")


def mean_error(task: LayerTask, weight: Tensor, bias: Tensor | None, rows: int = 8192) -> float:
    """Return ``E = (1/P) ‖X Uᵀ + b − Z‖²_F``, ``Z (P, M)`` the dense network's outputs before any ReLU.

    Measured on the task's own inputs, without damping or rescaling, over blocks of `rows` samples.
    """
    total = 0.0
    for start in range(0, task.inputs.shape[0], rows):
        outputs = task.inputs[start : start + rows] @ weight.T
        if bias is not None:
            outputs = outputs + bias
        total += float((outputs - task.outputs[start : start + rows]).square().sum())
    return total / task.inputs.shape[0]


def shortfall(task: LayerTask) -> Tensor:
    """Return ``Z − (X Ŵᵀ + b) (P, M)``: what the dense weights lack on these inputs; rounding where they are clean."""
    outputs = task.inputs @ task.weight.T
    return task.outputs - (outputs if task.bias is None else outputs + task.bias)


def refit(task: LayerTask, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the weight and the bias on a mask that bring ``E`` to its minimum, neuron by neuron.

    A kept weight on a dead input, one that is zero in every sample, changes no output and stays as it is.

    Parameters
    ----------
    task : LayerTask
    mask : bool Tensor (M, N)
        True = kept. A bias is always fitted.

    Returns
    -------
    weight : Tensor (M, N)
        Exactly zero off the mask; on it only where the best value is zero, as for two equal inputs that cancel.
    bias : Tensor (M,) or None

    Raises
    ------
    ProblemError
        The inputs' Gram matrix is not finite, or not positive semi-definite.
    """
    inputs = task.inputs if task.bias is None else with_bias_column(task.inputs)
    moment = second_moment(inputs)
    cross = inputs.T @ task.outputs / inputs.shape[0]
    columns = task.weight.shape[1]
    live = moment.diagonal()[:columns] > 0
    support = mask & live
    if task.bias is not None:
        support = torch.cat([support, support.new_ones(len(support), 1)], dim=1)
    fitted = refit_linear(moment, cross, support)
    weight = task.weight.where(mask & ~live, fitted[:, :columns])
    return weight, None if task.bias is None else fitted[:, columns]
