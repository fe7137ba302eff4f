"""One chain of evidence over several runs, each of which started from the network that the one before it gave.

Every run's ledger speaks of its own start. For networks ``y₀, y₁, ..., y_k`` on the same samples the triangle
inequality joins them: ``‖y_k − y₀‖ ≤ Σ_j ‖y_j − y_{j−1}‖``, so the sum of the runs' bounds bounds the whole. What
is measured from end to end is measured directly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from nettrim.network.batches import Batches
from nettrim.network.program import run
from nettrim.pipeline.account import Account, Standing
from nettrim.pipeline.files import digest_tensors
from nettrim.pipeline.records import Chain, Ledger, Stage
from nettrim.pipeline.result import PruneResult


def digest_of(model: nn.Module, stored: Mapping[str, Tensor] | None) -> str:
    """Return the digest of a network's weights: as they are stored, where the module runs steps instead."""
    return digest_tensors(dict(model.state_dict() if stored is None else stored))


def stage(ledger: Ledger, before: str, after: str, account: Account) -> Stage:
    """Return what a chain keeps of one run.

    Parameters
    ----------
    ledger : Ledger
    before, after : str
        Digests of the network that it started from and of the one that it gave.
    account : Account
        Of the run.
    """
    finish = None if ledger.finish is None else str(ledger.finish["kind"])
    # of all layers, because runs prune different ones; one without a record is as it was
    numel = ledger.costs["dense"]["weights"]
    kept = numel - ledger.numel + ledger.kept
    return Stage(
        ledger.method, finish, ledger.bound, ledger.measured, ledger.output_norm, kept, numel,
        before, after, account.batches.digest(),
    )  # fmt: skip


def chained(previous: PruneResult) -> tuple[Account, list[Stage]]:
    """Return the network that the first run started from, and all runs up to that result."""
    if previous.ledger.chain is not None and previous.first is not None:
        return previous.first, list(previous.ledger.chain.stages)
    assert previous.account is not None
    after = digest_of(previous.model, previous.stored)
    return previous.account, [stage(previous.ledger, previous.settings["model"], after, previous.account)]


def link(first: Account, stages: Sequence[Stage], account: Account, standing: Standing) -> Chain:
    """Join runs to one chain, and measure it from end to end.

    Parameters
    ----------
    first : Account
        Of the network that the first run started from.
    stages : sequence of Stage
        All runs, in their order.
    account, standing : Account, Standing
        Of the last run, and the network that it gave.
    """
    broken = [k for k in range(1, len(stages)) if stages[k].before != stages[k - 1].after]
    other = [s for s in stages if s.data != stages[-1].data]
    why = None
    if broken:
        why = f"run {broken[0] + 1} did not start from the network that run {broken[0]} gave."
    elif other:
        why = "the runs were not all measured on the same calibration samples."
    error, norm, accuracy = _apart(first, account, standing, account.batches)
    figures = {} if accuracy is None else {"calibration": accuracy}
    held = None
    if account.held is not None:
        held_error, held_norm, accuracy = _apart(first, account, standing, account.held)
        held = held_error / held_norm if held_norm > 0 else 0.0
        figures |= {} if accuracy is None else {"held-out": accuracy}
    bound = None if why else sum(s.bound for s in stages)
    return Chain(tuple(stages), bound, why, error, norm, held, figures)


def _apart(
    first: Account, account: Account, standing: Standing, batches: Batches
) -> tuple[float, float, dict[str, float] | None]:
    """Return the norm of the difference of two networks' outputs, that of the first's, and both accuracies."""
    error = norm = 0.0
    right, labels = [0, 0], 0
    for batch in batches.chunks(min(first.at_a_time, account.at_a_time)):
        before = run(first.graph.program, first.dense, batch)
        after = run(account.graph.program, standing.state, batch)
        error += float((after - before).square().sum())
        norm += float(before.square().sum())
        if (
            batch.labels is not None
            and batch.labels.shape == before.shape[:-1]
            and not batch.labels.is_floating_point()
        ):
            hits = [int((out.argmax(-1) == batch.labels.to(out.device)).sum()) for out in (before, after)]
            right = [right[0] + hits[0], right[1] + hits[1]]
            labels += batch.labels.numel()
    accuracy = {"dense": right[0] / labels, "pruned": right[1] / labels} if labels else None
    return math.sqrt(error), math.sqrt(norm), accuracy
