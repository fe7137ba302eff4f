"""How far the pruned network can be from the dense one, layer by layer: every bound that is known, side by side.

``e_l = ‖Ŷ_l − Y_l‖_F`` is the error at the output of layer ``l`` of the pruned network on its own activations, over the
samples at hand; ``b_l`` bounds it. ReLU, eval-mode dropout and flatten are 1-Lipschitz, and a bias cancels in
differences.

===============  ==============================================  =======================================
name             recursion                                       source; where it holds
===============  ==============================================  =======================================
paper            ``b_l = p_l + ‖W_l‖₁ b_{l−1}``                  Net-Trim, Theorem 1 rescaled; parallel
paper            ``b_l = max(ε_l‖Y_l‖, √γ ‖W_l‖₁ b_{l−1})``      Net-Trim, Theorem 2 rescaled; cascade
cascade product  as before with ``‖W_l‖₂``                       cascade
cascade          ``b_l = p_l``                                   a posteriori; cascade
l-obs            ``b_l = ‖Ẑ_l − Z_l‖ + ‖Ŵ_l‖_F b_{l−1}``         L-OBS, Theorem 3.2; any
l-obs spectral   as before with ``‖Ŵ_l‖₂``                       the same proof; any
operator         ``b_l = ε̂_l + ‖Ŵ_l‖₂ b_{l−1}``                  any
telescoped       ``b_L = Σ_l ‖h_l − h_{l−1}‖``                   any; at the output
===============  ==============================================  =======================================

``p_l`` is what the layer's solution promises on the inputs it was solved for; ``ε̂_l`` and ``Ẑ_l − Z_l`` are
measured on clean inputs; ``h_l`` is the output with the first ``l`` layers pruned. Norms leave the bias out.
The theorems are stated for link-normalised networks, ``‖W_l‖₁ = 1``; dividing ``paper`` by ``Π_{j ≤ l} ‖W_j‖₁``
gives them back. ``‖·‖₂`` is the largest singular value of an exact decomposition in float64, raised by 1e-9 for
its rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_ROUNDING = 1 + 1e-12  # sums of squares in float64, in another order each time


@dataclass(frozen=True)
class Link:
    """What the bounds need to know of one layer of a chain.

    Attributes
    ----------
    pruned : bool
        A layer that was left dense adds no error of its own.
    clean : bool
        Whether it was solved on the dense network's inputs.
    promised : float or None
        ``p_l``; None where the method promises nothing.
    asked, floor : float or None
        ``ε_l ‖Y_l‖`` where that is one side of the cascade's rule, 0 under the paper's rule, None where no radius was
        asked for; and the smallest radius that is set.
    gamma, kappa, violation : float
        ``γ``, the risk factor, and the relative violation of the solution.
    halfspace : bool
        Whether a ceiling stood beside the ball.
    excess : float
        How much the ceiling was exceeded, as a Frobenius norm.
    clean_error, clean_change : float
        ``ε̂_l`` and ``‖Ẑ_l − Z_l‖_F``, on clean inputs.
    dense_l1, dense_l2, pruned_l1, pruned_l2, pruned_fro : float
        Norms: entrywise ``ℓ1``, largest singular value, Frobenius.
    """

    pruned: bool
    clean: bool
    promised: float | None
    asked: float | None
    floor: float
    gamma: float
    kappa: float
    violation: float
    halfspace: bool
    excess: float
    clean_error: float
    clean_change: float
    dense_l1: float
    dense_l2: float
    pruned_l1: float
    pruned_l2: float
    pruned_fro: float


def layer_bounds(links: list[Link], schedule: str) -> list[dict[str, float]]:
    """Return for every layer the bounds on ``e_l`` that hold, by name; one that fails at a layer fails after it."""
    rules: dict[str, Callable[[Link, float], float | None]] = {
        "operator": _operator,
        "l-obs": _l_obs,
        "l-obs spectral": _l_obs_spectral,
    }
    if schedule == "parallel":
        rules["paper"] = _paper_parallel
    else:
        rules |= {"paper": _paper_cascade, "cascade product": _cascade_product, "cascade": _a_posteriori}
    found: list[dict[str, float]] = [{} for _ in links]
    for name, rule in rules.items():
        before: float | None = 0.0
        for link, bounds in zip(links, found, strict=True):
            before = None if before is None else rule(link, before)
            if before is not None:
                bounds[name] = before * _ROUNDING
    return found


def _operator(link: Link, before: float) -> float:
    return link.clean_error + link.pruned_l2 * before


def _l_obs(link: Link, before: float) -> float:
    return link.clean_change + link.pruned_fro * before


def _l_obs_spectral(link: Link, before: float) -> float:
    return link.clean_change + link.pruned_l2 * before


def _paper_parallel(link: Link, before: float) -> float | None:
    if not link.pruned:
        return link.dense_l1 * before
    if link.promised is None:
        return None
    # the theorem's ‖Ŵ‖₁ ≤ ‖W‖₁ holds at an optimum; a rough solution may miss it
    return link.promised + max(link.dense_l1, link.pruned_l1) * before


def _paper_cascade(link: Link, before: float) -> float | None:
    return _cascade(link, before, link.dense_l1)


def _cascade_product(link: Link, before: float) -> float | None:
    return _cascade(link, before, link.dense_l2)


def _cascade(link: Link, before: float, norm: float) -> float | None:
    """``e_l² ≤ r_l² + ‖(V_l)₊‖²`` with ``d_l, ‖(V_l)₊‖ ≤ ‖W_l‖ e_{l−1}``: the dense residual on Ω and excess off it."""
    if not link.pruned:
        return norm * before
    if link.promised is None or (link.asked is None and not link.clean):
        return None
    if link.clean and before == 0.0:
        return link.promised
    assert link.asked is not None
    if link.halfspace:
        # beside the ball's part stands the ceiling's; both are at most ‖W_l‖ e_{l−1}, in quadrature together
        factor = max(link.kappa * math.sqrt(link.gamma), 1.0)
        within = math.hypot(max(link.kappa * link.asked, link.floor), factor * norm * before)
        return (1 + link.violation) * within + link.excess
    return (1 + link.violation) * max(link.floor, link.kappa * max(link.asked, math.sqrt(link.gamma) * norm * before))


def _a_posteriori(link: Link, before: float) -> float | None:
    return link.promised if link.pruned else link.dense_l2 * before


def telescoped(outputs: list[Tensor]) -> float:
    """Return ``Σ_l ‖h_l − h_{l−1}‖_F`` for the outputs with 0, 1, … layers pruned."""
    return _ROUNDING * sum(float((b - a).norm()) for a, b in pairwise(outputs))


def spectral_norm(weight: Tensor) -> float:
    """Return an upper bound on ``‖W‖₂``: the largest singular value in float64, raised by 1e-9 for the rounding."""
    return float(torch.linalg.matrix_norm(weight.double(), ord=2)) * (1 + 1e-9)
