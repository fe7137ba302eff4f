"""Wanda: pruning by weights and activations, without any update of what stays.

Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024.

The score of a weight is ``|W_ij| · ‖X_j‖₂``, the norm of input ``j`` over all samples. Weights compete with those of
the same output neuron: every row loses the same share.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from nettrim.errors import ProblemError
from nettrim.methods.base import LayerResult, LayerTask
from nettrim.methods.fit import check_task, refit
from nettrim.methods.masks import keep_largest, keep_pattern, keep_rows


@dataclass(frozen=True)
class Wanda:
    """Wanda to an exact count, or to N:M.

    Parameters
    ----------
    group : {"row", "layer"}
        Which weights compete: those of one output neuron, as in the paper, or all of the layer. A count that the rows
        do not divide leaves some rows one weight more, those whose next score is largest. N:M has groups of its own.
    refit : bool
        Fit the weights that stay, and the bias, to the dense network's outputs by least squares. The paper changes
        nothing that stays.
    """

    group: str = "row"
    refit: bool = False
    name: str = "wanda"
    amounts: tuple[str, ...] = ("sparsity", "kept", "pattern")

    def __post_init__(self) -> None:
        """Refuse unknown settings."""
        if self.group not in ("row", "layer"):
            raise ProblemError(f"Wanda's group={self.group!r} is unknown: use row or layer.")

    def needs(self) -> str:
        """Return "moments"."""
        return "moments"

    def prune_layer(self, task: LayerTask) -> LayerResult:
        """Keep the weights of largest score; of equal ones the earlier.

        Raises
        ------
        ProblemError
            The inputs' norms are not finite, or the pattern does not divide the rows.
        """
        began = time.monotonic()
        check_task(task)
        mask = self._mask(task)
        weight, bias = refit(task, mask) if self.refit else (task.weight.where(mask, 0.0), task.bias)
        return LayerResult(weight, bias, time.monotonic() - began)

    def _mask(self, task: LayerTask) -> Tensor:
        norms = task.inputs.norm(dim=0) if task.moments is None else task.moments.norms
        if not bool(norms.isfinite().all()):
            raise ProblemError(f"the norms of layer {task.name!r}'s inputs are not finite: check them for NaN.")
        scores = task.weight.abs() * norms
        if task.pattern:
            return keep_pattern(scores, task.pattern)
        return keep_rows(scores, task.kept) if self.group == "row" else keep_largest(scores, task.kept)
