"""How far a layer is from the dense network's outputs, and the nearest that a mask allows."""

from __future__ import annotations

import torch
from torch import Tensor

from nettrim.core.support import refit_linear
from nettrim.errors import ProblemError
from nettrim.methods.base import LayerTask, with_bias_column


def check_task(task: LayerTask, needs: str = "moments") -> None:
    """Refuse arrays that do not fit together or are not finite: NaN must be ranked nowhere.

    Parameters
    ----------
    task : LayerTask
        Its rows are looked at where there are any, its moments where they are given.
    needs : {"moments", "weight"}
        "moments": there must be a row, or moments of one. "weight": there need be none.

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
    if needs != "weight" and not (samples if task.moments is None else task.moments.count):
        raise ProblemError(f"layer {task.name!r} has no sample: give it at least one.")
    for name, tensor, shape in wanted:
        if tensor.shape != shape:
            raise ProblemError(f"layer {task.name!r}: {name} has shape {tuple(tensor.shape)}: it must be {shape}.")
        if not bool(tensor.isfinite().all()):
            raise ProblemError(f"layer {task.name!r}: {name} holds NaN or infinity: there is nothing to rank by.")
    if task.moments is None:
        return
    found = tuple(task.moments.cross.shape)
    if found != (columns + 1, neurons):
        raise ProblemError(
            f"layer {task.name!r}: moments are of {found[0] - 1} inputs and {found[1]} outputs: its weight has "
            f"{columns} and {neurons}."
        )
    if not task.moments.finite:
        raise ProblemError(
            f"layer {task.name!r}: moments hold NaN or infinity: check the rows for these and for values above 1e150."
        )


def mean_error(task: LayerTask, weight: Tensor, bias: Tensor | None, rows: int = 8192) -> float:
    """Return ``E = (1/P) ‖X Uᵀ + b − Z‖²_F``, ``Z (P, M)`` the dense network's outputs before any ReLU.

    Measured on all of the task's rows, without damping or rescaling: over blocks of `rows` samples, or from the moments
    where they are given. Then on clean inputs it is the mean square of what the change of the weight does to the
    outputs; otherwise a difference, with the accuracy that `nettrim.core.moments.Moments.error` states.
    """
    if task.moments is not None:
        if not task.clean:
            return task.moments.error(weight, bias)
        before, after = (weight.new_zeros(len(weight)) if b is None else b for b in (task.bias, bias))
        return task.moments.output_power(weight - task.weight, after - before)
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


def shortfall_moment(task: LayerTask, ones: bool = False) -> Tensor:
    """Return ``(1/P) Sᵀ X (M, N)`` for the `shortfall` ``S``; with `ones` ``(1/P) Sᵀ [X, 1] (M, N + 1)``.

    From the moments where they are given; there it is exactly zero on clean inputs, where a difference of two sums
    would leave their rounding for an inverse to enlarge.
    """
    if task.moments is None:
        inputs = with_bias_column(task.inputs) if ones else task.inputs
        return shortfall(task).T @ inputs / len(inputs)
    size = task.weight.shape[1] + ones
    if task.clean:
        return task.weight.new_zeros(len(task.weight), size)
    return task.moments.shortfall(task.weight, task.bias)[:, :size] / task.moments.count


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
    statistics, biased = task.statistics(), task.bias is not None
    moment, cross = statistics.second_moment(ones=biased), statistics.cross_moment(ones=biased)
    columns = task.weight.shape[1]
    live = moment.diagonal()[:columns] > 0
    support = mask & live
    if biased:
        support = torch.cat([support, support.new_ones(len(support), 1)], dim=1)
    fitted = refit_linear(moment, cross, support)
    weight = task.weight.where(mask & ~live, fitted[:, :columns])
    return weight, fitted[:, columns] if biased else None
