"""L-OBS: layer-wise Optimal Brain Surgeon, one-shot, as its authors released it.

Dong, Chen, Pan, "Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain Surgeon", NIPS 2017.

With ``H = (1/P) Σ x xᵀ + damping·I`` over the inputs (a constant 1 appended for the bias), every weight of the layer is
ranked once by ``L_q = w_q² / (2 [H⁻¹]_qq)``. The weights are removed in that order; each removal adds
``−w_q/[H⁻¹]_qq · H⁻¹ e_q`` with the *present* ``w_q`` and the *never downdated* ``H⁻¹``. For one neuron with removal
order ``Q`` that is one triangular solve: ``λ = tril([H⁻¹]_QQ)⁻¹ w_Q``, then ``w ← w − [H⁻¹]_{·Q} λ`` and ``w_Q = 0``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.core.linalg import damped_inverse, gram
from nettrim.errors import ProblemError
from nettrim.methods.base import LayerResult, LayerTask, with_bias_column


@dataclass(frozen=True)
class LObs:
    """One-shot L-OBS.

    Parameters
    ----------
    damping : float
        Added to the diagonal of ``H``, absolute, in squared units of the inputs. 1e-6 is the released value.
    bias : {"kept", "pooled"}
        "kept": biases are compensated and never removed, so that the count of weights is exact. "pooled": they compete
        with the weights for the same number of removals, as in the released code.
    """

    damping: float = 1e-6
    bias: str = "kept"
    name: str = "l-obs"
    amounts: tuple[str, ...] = ("sparsity", "kept")

    def __post_init__(self) -> None:
        """Refuse unknown settings."""
        if self.bias not in ("kept", "pooled"):
            raise ProblemError(f"LObs's bias={self.bias!r} is unknown: use kept or pooled.")
        if not self.damping >= 0:
            raise ProblemError(f"LObs's damping={self.damping} is out of range: it is ≥ 0.")

    def prune_layer(self, task: LayerTask) -> LayerResult:
        """Rank once, sweep once."""
        began = time.monotonic()
        inputs, dense = task.inputs, task.weight
        if task.bias is not None:
            inputs, dense = with_bias_column(inputs), torch.cat([dense, task.bias[:, None]], dim=1)
        hessian = gram(inputs) / inputs.shape[0]
        damped = hessian + self.damping * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        inverse, extra = damped_inverse(damped)
        remove = task.weight.numel() - task.kept
        score = 0.5 * dense.square() / inverse.diagonal()
        if task.bias is not None and self.bias == "kept":
            score[:, -1] = torch.inf
        order = torch.argsort(score.flatten(), stable=True)[:remove]
        weight = _sweep(dense.clone(), inverse, order)
        bias = None
        if task.bias is not None:
            weight, bias = weight[:, :-1], weight[:, -1]
        change = torch.cat([weight, bias[:, None]], dim=1) - dense if bias is not None else weight - dense
        # E = (1/P)‖Ẑ − Z‖² on these inputs, without the damping
        facts = {"damping": self.damping + extra, "E": float(((change @ hessian) * change).sum())}
        return LayerResult(weight, bias, time.monotonic() - began, facts=facts)


def _sweep(weight: Tensor, inverse: Tensor, order: Tensor) -> Tensor:
    """Remove the flat indices `order`, first to last, neuron by neuron; the neurons do not touch each other."""
    neuron, column = order // weight.shape[1], order % weight.shape[1]
    for m in range(weight.shape[0]):
        removed = column[neuron == m]
        if not removed.numel():
            continue
        block = inverse[removed][:, removed]
        step = torch.linalg.solve_triangular(block.tril(), weight[m, removed][:, None], upper=False)[:, 0]
        weight[m] -= inverse[:, removed] @ step
        weight[m, removed] = 0.0
    return weight
