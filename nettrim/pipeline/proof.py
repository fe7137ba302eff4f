"""What a pruned layer's multipliers prove about its weight, on the rows that its convex program was made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nettrim.core.refine import evidence_of
from nettrim.core.solution import FEASIBLE, Status, judge
from nettrim.methods.program import derive, join_bias, layer_problem, promise

_TINY = 1e-300


@dataclass(frozen=True)
class Proof:
    """A certificate in float64, and the promise that follows; of a grouped convolution, of all groups together.

    Attributes
    ----------
    rows : int
    objective : float
    lower_bound, gap : float or None
        None where the weight is not feasible: they prove nothing there.
    violation : float
    promised : float
        What ``‖σ(X Ûᵀ) − Y‖`` cannot exceed on these rows.
    excess : float
        How much a ceiling is exceeded, as a Frobenius norm.
    facts : dict
        What the layer's solution says of itself, with what follows from the data.
    """

    rows: int
    objective: float
    lower_bound: float | None
    gap: float | None
    violation: float
    promised: float
    excess: float
    facts: dict[str, Any]


def prove(
    facts: dict[str, Any],
    clean: bool,
    relu: bool,
    inputs: Tensor,
    outputs: Tensor,
    dense: tuple[Tensor, Tensor | None],
    found: tuple[Tensor, Tensor | None],
    multipliers: Tensor,
) -> Proof:
    """Compute the certificate of one layer.

    Parameters
    ----------
    facts : dict
        As the method gave them; under "blocks" for each group.
    clean, relu : bool
    inputs : Tensor (P, G · N)
    outputs : Tensor (P, M)
        Of the dense network, before the ReLU.
    dense, found : (Tensor (M, N), Tensor (M,) or None)
        Weight as a matrix, and bias.
    multipliers : Tensor (P, M)
    """
    blocks = facts.get("blocks")
    if blocks is None:
        return _prove(facts, clean, relu, inputs, outputs, dense, found, multipliers)
    groups = len(blocks)
    wide, tall = inputs.shape[1] // groups, outputs.shape[1] // groups
    proofs = []
    for g, own in enumerate(blocks):
        columns, rows = slice(g * wide, (g + 1) * wide), slice(g * tall, (g + 1) * tall)
        before, after = ((w[rows], None if b is None else b[rows]) for w, b in (dense, found))
        proofs.append(
            _prove(own, clean, relu, inputs[:, columns], outputs[:, rows], before, after, multipliers[:, rows])
        )
    return _joined(proofs, facts)


def _prove(
    facts: dict[str, Any],
    clean: bool,
    relu: bool,
    inputs: Tensor,
    outputs: Tensor,
    dense: tuple[Tensor, Tensor | None],
    found: tuple[Tensor, Tensor | None],
    multipliers: Tensor,
) -> Proof:
    targets = outputs.clamp(min=0) if relu else outputs
    weight, bias = dense[0].double(), None if dense[1] is None else dense[1].double()
    # what follows from the data is derived again, not read
    solved = join_bias(found[0], found[1], facts["bias"]).double()
    facts = facts | derive(facts, clean, inputs, targets, weight, bias, solved)
    problem = layer_problem(facts, inputs, targets, weight, bias)
    evidence = evidence_of(problem, solved, multipliers.double())
    certificate = evidence.certificate
    ended = Status[facts["status"]]
    otherwise = Status.MAX_ITER if ended is Status.SOLVED else ended
    facts = facts | {"status": judge(certificate, facts["tol"], otherwise).name}
    if ended is Status.REFINED:
        facts = facts | {"nearest": evidence.nearest}
    # the bound of a problem whose weight is not feasible proves nothing, and may be as large as you like
    proven = certificate.violation <= FEASIBLE
    return Proof(
        rows=len(inputs),
        objective=certificate.objective,
        lower_bound=certificate.lower_bound if proven else None,
        gap=certificate.gap if proven else None,
        violation=certificate.violation,
        promised=promise(facts, certificate, targets),
        excess=certificate.excess * math.sqrt(int((targets <= 0).sum())),
        facts=facts,
    )


def _joined(proofs: list[Proof], facts: dict[str, Any]) -> Proof:
    """Add up what is proven of the groups: objectives and bounds add, errors in quadrature."""
    first = proofs[0].facts
    objective = math.fsum(proof.objective for proof in proofs)
    below = [proof.lower_bound for proof in proofs]
    lower = None if any(bound is None for bound in below) else math.fsum(bound for bound in below if bound is not None)
    statuses = [Status[proof.facts["status"]] for proof in proofs]
    ended = next((status for status in statuses if not status.accepted), statuses[0])
    whole: dict[str, Any] = {
        key: first[key] for key in ("form", "gamma", "kappa", "cascade", "tol", "bias", "ceiling") if key in first
    }
    for key in ("asked", "floor", "drift", "radius", "target_norm"):
        parts = [proof.facts.get(key) for proof in proofs]
        if None not in parts:
            whole[key] = math.hypot(*(float(part) for part in parts if part is not None))
    return Proof(
        rows=proofs[0].rows,
        objective=objective,
        lower_bound=lower,
        gap=None if lower is None else (objective - lower) / max(objective, _TINY),
        violation=max(proof.violation for proof in proofs),
        promised=math.hypot(*(proof.promised for proof in proofs)) * (1 + 1e-12),
        excess=math.hypot(*(proof.excess for proof in proofs)),
        facts=facts | whole | {"status": ended.name, "blocks": [proof.facts for proof in proofs]},
    )
