"""The closed-form steps that first-order solvers are made of, each with its formula and source."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_threshold(a: Tensor, t: Tensor | float) -> Tensor:
    """``argmin_u t·|u| + ½(u − a)²  =  sign(a)·max(|a| − t, 0)``, entrywise.

    [Boyd et al., Distributed Optimization by ADMM, 2011, §4.4.3]
    """
    limit = torch.as_tensor(t, dtype=a.dtype, device=a.device)
    return a - a.clamp(min=-limit, max=limit)


def ball_step(residual: Tensor, radius: Tensor | float, per_neuron: bool = False) -> Tensor:
    """``A − argmin_W {½‖W − A‖² : dist_F(W, K) ≤ r}  =  (1 − min(1, r/‖R‖))·R``,  ``R = A − P_K(A)``.

    The nearest point of the ball around a convex set ``K`` lies on the segment from ``A`` to its projection on
    ``K``. With `per_neuron` each column has a ball of its own. Net-Trim's published step is the case where ``K``
    is one point. [Beck, First-Order Methods in Optimization, 2017, §6.6]
    """
    norm = torch.linalg.vector_norm(residual, dim=0 if per_neuron else None)
    shrink: Tensor = (1 - radius / norm.clamp(min=torch.finfo(residual.dtype).tiny)).clamp(min=0)
    return residual * shrink


def quadratic_step(residual: Tensor, lam: float, rho: Tensor | float) -> Tensor:
    """``A − argmin_W (λ/2) dist²(W, K) + (ρ/2)‖W − A‖²  =  λ/(λ + ρ)·R``,  ``R = A − P_K(A)``.

    [Beck, First-Order Methods in Optimization, 2017, §6.6]
    """
    return residual * (lam / (lam + rho))
