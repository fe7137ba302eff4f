"""How far the pruned network can be from the dense one, step by step: every bound that is known, side by side.

``e_v = ‖v̂ − v‖_F`` is the error at step ``v`` of the pruned network on its own activations, over the samples at hand;
``b_v`` bounds it. Between layers errors pass by the gains of `nettrim.network.gains`: branches add up, concatenation
stacks, a ReLU passes on what it gets. At a layer that reads ``u`` and hands on ``l``, behind its ReLU:

===============  ==============================================  =======================================
name             recursion                                       source; where it holds
===============  ==============================================  =======================================
paper            ``b_l = p_l + ‖W_l‖₁ b_u``                      Net-Trim, Theorem 1 rescaled; parallel
paper            ``b_l = max(ε_l‖Y_l‖, √γ ‖W_l‖₁ b_u)``          Net-Trim, Theorem 2 rescaled; cascade
cascade product  as before with ``‖W_l‖₂``                       cascade
cascade          ``b_l = p_l``                                   a posteriori; cascade
l-obs            ``b_l = ‖Ẑ_l − Z_l‖ + ‖Ŵ_l‖_F b_u``             L-OBS, Theorem 3.2; any
l-obs spectral   as before with ``‖Ŵ_l‖₂``                       the same proof; any
operator         ``b_l = ε̂_l + ‖Ŵ_l‖₂ b_u``                      any
telescoped       ``b_L = Σ_l ‖h_l − h_{l−1}‖``                   any; at the output
===============  ==============================================  =======================================

``p_l`` is what the layer's solution promises on the inputs it was solved for; ``ε̂_l`` and ``Ẑ_l − Z_l`` are
measured on clean inputs; ``h_l`` is the output with the first ``l`` layers pruned. Norms leave the bias out, and of a
convolution they are those of the operator: ``‖·‖₂`` as `nettrim.network.norms` bounds it, ``‖K‖₁`` because every tap is
a shift, and ``‖K‖_F`` times the root of the windows that cover a pixel.
The theorems are stated for link-normalised networks, ``‖W_l‖₁ = 1``; dividing ``paper`` by ``Π_{j ≤ l} ‖W_j‖₁``
gives them back. Where a program was made of a sample of the rows, ``p_l`` says nothing about the others: in parallel
the measured ``ε̂_l`` of all rows takes its place, in cascade the bounds that rest on it are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nettrim.network.gains import Flow
from nettrim.network.program import Program
from nettrim.pipeline.measure import Passage

_ROUNDING = 1 + 1e-12  # sums of squares in float64, in another order each time


@dataclass(frozen=True)
class Link:
    """What the bounds need to know of one layer.

    Attributes
    ----------
    step, output : int
        Where it is called, and where it hands on what it gives.
    promised_at : int
        The step that its promise is about: `output`, or the sum that it was fitted to.
    pruned : bool
        A layer that was left dense adds no error of its own.
    clean : bool
        Whether it was solved on the dense network's inputs.
    promised : float or None
        ``p_l``; None where the method promises nothing.
    whole : bool
        Whether the promise is about all rows, not a sample of them.
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
        Norms: entrywise ``ℓ1``, of the operator, Frobenius.
    """

    step: int
    output: int
    promised_at: int
    pruned: bool
    clean: bool
    promised: float | None
    whole: bool
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


Rule = Callable[[Link, float], tuple[float, float]]


def compose(
    program: Program, passages: Sequence[Passage], links: Sequence[Link], schedule: str
) -> dict[str, list[float]]:
    """Return for every rule its bound on ``e_v`` at every step; infinite where it does not hold."""
    rules: dict[str, Rule] = {"operator": _operator, "l-obs": _l_obs, "l-obs spectral": _l_obs_spectral}
    if schedule == "parallel":
        rules["paper"] = _paper_parallel
    else:
        rules |= {"paper": _paper_cascade, "cascade product": _cascade_product, "cascade": _a_posteriori}
    at = {link.step: link for link in links}
    return {name: _composed(program, passages, at, rule) for name, rule in rules.items()}


def _composed(program: Program, passages: Sequence[Passage], at: Mapping[int, Link], rule: Rule) -> list[float]:
    bounds: list[float] = []
    behind: dict[int, float] = {}
    for index, (step, passage) in enumerate(zip(program.steps, passages, strict=True)):
        incoming = [bounds[ref.step] for ref in step.refs]
        if math.isinf(passage.error):
            bound = math.inf
        elif index in at:
            link = at[index]
            bound, after = rule(link, incoming[0])
            if link.promised_at != link.output:
                # fitted to what is missing at a sum: only there a bound that rests on the promise holds
                behind[link.promised_at] = after if math.isinf(bound) else math.inf
            elif link.output == index:
                bound = after
            else:
                behind[link.output] = after
        else:
            bound = passed(passage.flow, incoming) + math.sqrt(passage.own)
        bounds.append(min(bound, behind.get(index, math.inf)) * _ROUNDING)
    return bounds


def passed(flow: Flow | None, incoming: Sequence[float]) -> float:
    """Return what a step makes of the errors of what it reads; nothing where none comes in."""
    if not any(incoming):
        return 0.0
    if flow is None:
        # the networks never differed here, on any sample
        return 0.0
    # no error stays none and a gain of 0 lets none pass, whatever the other is
    terms = [g * b if g and b else 0.0 for g, b in zip(flow.gains, incoming, strict=True)]
    return math.hypot(*terms) if flow.kind == "stack" else sum(terms)


def _operator(link: Link, before: float) -> tuple[float, float]:
    passes = _times(link.pruned_l2, before)
    return link.clean_change + passes, link.clean_error + passes


def _l_obs(link: Link, before: float) -> tuple[float, float]:
    return _both(link.clean_change + _times(link.pruned_fro, before))


def _l_obs_spectral(link: Link, before: float) -> tuple[float, float]:
    return _both(link.clean_change + _times(link.pruned_l2, before))


def _paper_parallel(link: Link, before: float) -> tuple[float, float]:
    if not link.pruned:
        return link.clean_change + _times(link.dense_l1, before), link.clean_error + _times(link.dense_l1, before)
    if link.promised is None:
        return math.inf, math.inf
    own = link.promised if link.whole else link.clean_error
    # the theorem's ‖Ŵ‖₁ ≤ ‖W‖₁ holds at an optimum; a rough solution may miss it
    return math.inf, own + _times(max(link.dense_l1, link.pruned_l1), before)


def _paper_cascade(link: Link, before: float) -> tuple[float, float]:
    return _cascade(link, before, link.dense_l1)


def _cascade_product(link: Link, before: float) -> tuple[float, float]:
    return _cascade(link, before, link.dense_l2)


def _cascade(link: Link, before: float, norm: float) -> tuple[float, float]:
    """``e_l² ≤ r_l² + ‖(V_l)₊‖²`` with ``d_l, ‖(V_l)₊‖ ≤ ‖W_l‖ b_u``: the dense residual on Ω and excess off it."""
    if not link.pruned:
        return link.clean_change + _times(norm, before), link.clean_error + _times(norm, before)
    if link.promised is None or not link.whole or (link.asked is None and not link.clean):
        return math.inf, math.inf
    if link.promised_at != link.output:
        return math.inf, math.inf  # its radius follows the trunk's drift too
    if link.clean and before == 0.0:
        return math.inf, link.promised
    assert link.asked is not None
    if link.halfspace:
        # beside the ball's part stands the ceiling's; both are at most ‖W_l‖ b_u, in quadrature together
        factor = max(link.kappa * math.sqrt(link.gamma), 1.0)
        within = math.hypot(max(link.kappa * link.asked, link.floor), factor * _times(norm, before))
        return math.inf, (1 + link.violation) * within + link.excess
    drift = math.sqrt(link.gamma) * _times(norm, before)
    return math.inf, (1 + link.violation) * max(link.floor, link.kappa * max(link.asked, drift))


def _a_posteriori(link: Link, before: float) -> tuple[float, float]:
    if not link.pruned:
        return link.clean_change + _times(link.dense_l2, before), link.clean_error + _times(link.dense_l2, before)
    return (math.inf, link.promised) if link.promised is not None and link.whole else (math.inf, math.inf)


def _both(value: float) -> tuple[float, float]:
    return value, value


def _times(norm: float, before: float) -> float:
    # no error stays none, and a norm of 0 lets none pass, whatever the other is
    return norm * before if norm and before else 0.0


def telescoped(ladder: Sequence[float]) -> float:
    """Return ``Σ_l ‖h_l − h_{l−1}‖_F`` from the squares of its terms."""
    return _ROUNDING * sum(math.sqrt(term) for term in ladder)
