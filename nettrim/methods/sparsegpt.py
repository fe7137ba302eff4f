"""SparseGPT: Optimal Brain Surgeon with one sequence of inverses for all neurons.

Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023.

Columns are visited left to right. Whatever is removed in column ``j`` is compensated by the columns to its right alone,
so that all neurons share the inverses of ``H_jj…, j = 0, 1, …``, the remaining blocks ``H[j:, j:]``. Their first rows
are those of the upper Cholesky factor ``R`` of ``H⁻¹ = RᵀR``: ``[H[j:, j:]⁻¹]_1· = R_jj R_j,j:``. Which weights go is
chosen a block of columns at a time, by the cost ``w² / R_jj²`` of a removal with the weights as compensated so far.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.core.linalg import damped_inverse
from nettrim.core.problem import check_count, check_number
from nettrim.errors import ProblemError
from nettrim.methods.base import LayerResult, LayerTask
from nettrim.methods.fit import check_task, mean_error, shortfall_moment
from nettrim.methods.masks import check_division, keep_largest, keep_pattern, share_out


@dataclass(frozen=True)
class SparseGpt:
    """SparseGPT to an exact count, or to N:M. Biases are neither pruned nor changed.

    Every block keeps weights in proportion to its columns, dead ones included, as in the paper. Weights on dead inputs
    (zero in every sample) go first and are not counted against the block: where a block has fewer live weights than its
    share, the other blocks keep what it leaves. Only a count above all live weights of the layer keeps any on dead
    inputs, and those stay as they are.

    Parameters
    ----------
    block_size : int
        Columns among which weights compete; 128 in the paper. With N:M, where the groups are N:M's own, it only says
        how much is updated at a time.
    relative_damping : float
        Added to the diagonal of ``H = XᵀX / P``, as a fraction of its mean, ≥ 0; 0.01 in the released code (which puts
        ones for dead inputs into that mean, so that it depends on the inputs' unit). Zero leaves a singular ``H`` to
        `nettrim.core.linalg.damped_inverse`.
    targets : {"own", "dense"}
        What the layer is fitted to where its inputs come through pruned layers. "own": what its dense weights make of
        these inputs, as in the released code. "dense": the dense network's outputs; the sweep then starts from the
        damped least-squares weight toward them. The two agree on the dense network's own inputs.
    """

    block_size: int = 128
    relative_damping: float = 0.01
    targets: str = "own"
    name: str = "sparsegpt"
    amounts: tuple[str, ...] = ("sparsity", "kept", "pattern")

    def __post_init__(self) -> None:
        """Refuse unknown settings."""
        check_count("SparseGpt's block_size", self.block_size)
        damping = check_number("SparseGpt's relative_damping", self.relative_damping)
        if not 0 <= damping < float("inf"):
            raise ProblemError(f"SparseGpt's relative_damping={damping} is out of range: it is finite and ≥ 0.")
        if self.targets not in ("own", "dense"):
            raise ProblemError(f"SparseGpt's targets={self.targets!r} is unknown: use own or dense.")

    def needs(self) -> str:
        """Return "moments"."""
        return "moments"

    def prune_layer(self, task: LayerTask) -> LayerResult:
        """Sweep once over the columns.

        Raises
        ------
        ProblemError
            ``H`` is not finite or has no Cholesky factor; or the pattern does not divide the rows.
        """
        began = time.monotonic()
        check_task(task)
        if task.pattern:
            check_division(task.weight.shape[1], task.pattern)
        hessian = task.statistics().second_moment()
        live = hessian.diagonal() > 0
        mean = float(hessian.diagonal().mean())
        damping = self.relative_damping * mean
        # a dead input is tied to no other: any value above zero leaves the rest as it is, and this one has their unit
        hessian.diagonal().add_(torch.full_like(hessian.diagonal(), damping).where(live, mean or 1.0))
        inverse, extra = damped_inverse(hessian)
        factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if int(failed):
            raise ProblemError(
                f"the inverse Hessian of layer {task.name!r} has no Cholesky factor: give a larger relative_damping."
            )
        weight = task.weight.clone()
        if self.targets == "dense":
            weight += shortfall_moment(task) @ inverse
        weight = self._sweep(weight, factor, live, task)
        facts = {
            "damping": damping + extra,
            "targets": self.targets,
            "E": mean_error(task, weight, task.bias),
        }
        return LayerResult(weight, task.bias, time.monotonic() - began, facts=facts)

    def _sweep(self, weight: Tensor, factor: Tensor, live: Tensor, task: LayerTask) -> Tensor:
        """Return the pruned weight ``(M, N)``; `weight` is overwritten."""
        columns, pattern, width = weight.shape[1], task.pattern, int(self.block_size)
        if pattern:
            width = max(width // pattern.of, 1) * pattern.of
        blocks = [(start, min(start + width, columns)) for start in range(0, columns, width)]
        counts = [] if pattern else _shares(task.kept, blocks, live, len(weight))
        for number, (start, stop) in enumerate(blocks):
            block, local, alive = weight[:, start:stop], factor[start:stop, start:stop], live[start:stop]
            keep = torch.ones_like(block, dtype=torch.bool)
            if not pattern:
                keep = keep_largest(_costs(block, local, alive), counts[number])
            error = torch.zeros_like(block)
            for j in range(stop - start):
                if pattern and j % pattern.of == 0:
                    group = slice(j, j + pattern.of)
                    keep[:, group] = keep_pattern(_costs(block, local, alive)[:, group], pattern)
                error[:, j] = block[:, j].masked_fill(keep[:, j], 0.0) / local[j, j]
                block[:, j:] -= error[:, j, None] * local[j, j:]
            # what was removed is zero up to rounding
            block.masked_fill_(~keep, 0.0)
            weight[:, stop:] -= error @ factor[start:stop, stop:]
        return weight


def _costs(weight: Tensor, factor: Tensor, live: Tensor) -> Tensor:
    """Return ``|w| / R_jj``, the root of what each removal costs; dead inputs go before all others."""
    return (weight / factor.diagonal()).abs().where(live, -1.0)


def _shares(kept: int, blocks: list[tuple[int, int]], live: Tensor, rows: int) -> list[int]:
    """Return how many weights each block keeps; they add up to `kept`."""
    alive = [rows * int(live[start:stop].sum()) for start, stop in blocks]
    dead = [rows * (stop - start) - count for (start, stop), count in zip(blocks, alive, strict=True)]
    useful = min(kept, sum(alive))
    first = share_out(useful, [stop - start for start, stop in blocks], alive)
    return [a + b for a, b in zip(first, share_out(kept - useful, dead, dead), strict=True)]
