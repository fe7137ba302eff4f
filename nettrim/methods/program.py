"""One layer's convex program, set up from what a record stores: `verify` solves nothing, but checks the same thing.

In parallel the radius of layer ``l`` is ``ε_l ‖Y_l‖_F``. In cascade the inputs come through the pruned prefix,
where the dense weights themselves are off by ``d_l``; the radius is ``max(ε_l ‖Y_l‖_F, √γ d_l)`` ("relative"),
or ``√γ d_l`` after the first pruned layer ("paper"). Where a number of weights was asked for, it is the distance of the
weight that was found.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nettrim.core.certificate import Certificate, measure_fit
from nettrim.core.problem import FORMS, LayerProblem
from nettrim.errors import ProblemError
from nettrim.methods.base import with_bias_column


def derive(
    facts: dict[str, Any],
    clean: bool,
    inputs: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    found: Tensor | None = None,
) -> dict[str, Any]:
    """Return what follows from the data: the radius by the schedule's rule, and what it was made from.

    Parameters
    ----------
    facts : dict
        As a record stores them; "epsilon" or "lam" among them, or a count.
    clean : bool
        Whether the inputs are the dense network's own.
    inputs : Tensor (P, N)
    targets : Tensor (P, M)
    weight, bias : Tensor (M, N), Tensor (M,) or None
        Dense.
    found : Tensor (M, N or N + 1), optional
        The weight that was found, joined with its bias, where a count was asked for.

    Returns
    -------
    dict
        "target_norm" ``‖Y‖``; "ceiling_norm" ``‖V₊‖`` off the active set; "radius", "lam"; and with a radius "drift"
        ``d``, how far the dense weights are from these targets, "asked" ``ε‖Y‖`` (0 where the papers' rule does not
        ask) and "floor", below which no radius is set.
    """
    dense = inputs @ weight.T if bias is None else inputs @ weight.T + bias
    size = float(targets.norm())
    ceiling_norm = 0.0
    if facts["ceiling"] != "none":
        ceiling_norm = float(dense.clamp(min=0)[targets <= 0].norm())
    known = {"target_norm": size, "ceiling_norm": ceiling_norm, "lam": facts.get("lam"), "radius": None}
    if known["lam"] is not None:
        return known
    # the distance does not depend on the radius, which is not known yet
    problem = layer_problem(facts | {"radius": 1.0, "lam": None}, inputs, targets, weight, bias)
    drift = measure_fit(problem, join_bias(weight, bias, facts["bias"])).distance
    # where nothing was asked and nothing drifted, or all targets are zero, a radius of 0 would ask for the impossible
    floor = 1e-6 * (size or float(dense.norm()) or 1.0)
    if "epsilon" not in facts:
        assert found is not None
        reached = measure_fit(problem, found.double()).distance
        return known | {"drift": drift, "floor": floor, "radius": max(reached, floor)}
    asked = facts["epsilon"] * size if clean or facts["cascade"] == "relative" else 0.0
    radius = facts["kappa"] * (asked if clean else max(asked, math.sqrt(facts["gamma"]) * drift))
    return known | {"drift": drift, "asked": asked, "floor": floor, "radius": max(radius, floor)}


def promise(facts: dict[str, Any], certificate: Certificate, targets: Tensor) -> float:
    """Return what ``‖σ(X Ûᵀ) − Y‖_F`` cannot exceed, on the inputs that the layer was solved for.

    The radius, or the distance where that is missed, and for ``halfspace`` what the ceiling lets pass: all of ``V₊``,
    and the excess over it at every inactive entry. Raised by 1e-12 for the rounding of sums.
    """
    reached = max(certificate.distance, facts["radius"] or 0.0)
    passed: float = facts["ceiling_norm"] + certificate.excess * math.sqrt(int((targets <= 0).sum()))
    return math.hypot(reached, passed) * (1 + 1e-12)


def layer_problem(
    facts: dict[str, Any], inputs: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None
) -> LayerProblem:
    """Set up one layer's program from what a record stores, so that `verify` solves nothing but checks the same thing.

    Parameters
    ----------
    facts : dict
        "form", "bias", "ceiling", and one of "radius" and "lam" not None.
    inputs : Tensor (P, N)
    targets : Tensor (P, M)
    weight, bias : Tensor (M, N), Tensor (M,) or None
        Dense.
    """
    form, kind = facts["form"], facts["bias"]
    if form not in FORMS:
        raise ProblemError(f"form={form!r} is unknown: use one of {', '.join(FORMS)}.")
    dense = inputs @ weight.T if bias is None else inputs @ weight.T + bias
    ceiling = None
    if facts["ceiling"] != "none":
        ceiling = dense.clamp(min=0) if facts["ceiling"] == "clipped" else dense
    active = None if form == "linear" else targets > 0
    penalty = None
    if kind == "frozen":
        assert bias is not None
        # Z = X Uᵀ + b: the anchor moves by −b, on the active set and off it
        targets = targets - bias
        if form != "linear":
            ceiling = (inputs.new_zeros(()) if ceiling is None else ceiling) - bias.expand_as(targets)
    elif kind in ("free", "penalised"):
        inputs = with_bias_column(inputs)
        if kind == "free":
            penalty = inputs.new_ones(inputs.shape[1], dtype=torch.float64)
            penalty[-1] = 0.0
    return LayerProblem(inputs, targets, form, facts["radius"], facts["lam"], ceiling, penalty, active)


def join_bias(weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """Return ``U``: the weight, with the bias as its last column where the program fits one."""
    return torch.cat([weight, bias[:, None]], dim=1) if bias is not None and kind in ("free", "penalised") else weight


def split_bias(u: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor | None]:
    """Undo `join_bias`; a frozen bias comes back as it was."""
    return (u[:, :-1], u[:, -1]) if kind in ("free", "penalised") else (u, bias)
