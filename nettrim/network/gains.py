"""How one step of a network passes errors of its inputs on.

A dense and a pruned network are run side by side, and at every step ``b`` bounds how far they differ, in the Frobenius
norm over all samples. Each rule here is a theorem: where it hangs on no data it holds for every pair of inputs; where
it reads values ("measured …") it holds for those of one chunk of samples. As ``‖e‖² = Σ ‖e_chunk‖²``, the largest gain
of all chunks holds for all samples (Minkowski).

Integers and truth values carry no error: they are the same in both networks, or nothing is known.
Layers with weights are not handled here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nettrim.errors import ProblemError
from nettrim.network.gains_call import Arguments, Call, is_real, same
from nettrim.network.gains_rules import find_rule
from nettrim.network.program import Step, leaves


@dataclass(frozen=True)
class Flow:
    """How a step passes on errors ``b_i`` of what it reads.

    Attributes
    ----------
    kind : str
        "sum": ``b = Σ g_i b_i``; "stack": ``b = √(Σ (g_i b_i)²)``.
    gains : tuple of float
        One per reference of the step, in the order of `Step.refs`; infinity where nothing is known. A gain of 0 holds
        whatever the error, and an error of 0 whatever the gain: ``0 · ∞`` is 0 here.
    method : str
        What proves them, in short.
    """

    kind: str
    gains: tuple[float, ...]
    method: str


def flow(step: Step, dense: Arguments, pruned: Arguments, value: Any) -> Flow:
    """Return how a step passes errors on, for one chunk of samples.

    What other weights change on the dense inputs is not counted: with ``f^`` the step with the pruned weights, the
    bound is on ``‖f^(x^) − f^(x)‖_F``.

    Parameters
    ----------
    step : Step
    dense, pruned : (args, kwargs)
        What it is called with in the two networks, tensors in the place of their names.
    value
        What it gives in the dense one.
    """
    names, rule = find_rule(step)
    call = Call(step, names, dense, pruned, value)
    count = len(call.refs)
    if any(not is_real(x) and not same(x, y) for x, y in call.refs):
        return Flow("sum", (math.inf,) * count, "integers differ")
    results = [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]
    if not any(result.is_floating_point() for result in results):
        agree = not any(result.is_complex() for result in results) and call.results_same()
        return Flow("sum", (0.0 if agree else math.inf,) * count, "equal" if agree else "integers differ")
    if all(x is y or not is_real(x) for x, y in call.refs):
        return Flow("sum", (0.0,) * count, "equal inputs")
    found = rule(call) if rule is not None and call.widens(results[0].dtype) else None
    if found is None:
        return Flow("sum", (math.inf,) * count, "unknown")
    gains = [math.inf if is_real(x) else 0.0 for x, _ in call.refs]
    for name, gain in found.gains.items():
        given = call.find(name)
        for at in given.refs if given is not None else ():
            gains[at] = math.inf if math.isnan(gain) else gain
    return Flow(found.kind, tuple(gains), found.method)


def combine(first: Flow, second: Flow) -> Flow:
    """Return what holds for two chunks of samples together: the larger gains.

    Raises
    ------
    ProblemError
        They are not of the same step.
    """
    if len(first.gains) != len(second.gains):
        raise ProblemError(
            f"second has {len(second.gains)} gains and first {len(first.gains)}; give two flows of the same step"
        )
    gains = tuple(max(pair) for pair in zip(first.gains, second.gains, strict=True))
    # √(Σ b²) ≤ Σ b, so the sum holds for both
    kind = first.kind if first.kind == second.kind else "sum"
    return Flow(
        kind, gains, first.method if max(first.gains, default=0.0) >= max(second.gains, default=0.0) else second.method
    )
