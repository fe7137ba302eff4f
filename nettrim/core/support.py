"""The best weight on a support that is given: least squares for any layer, neuron by neuron, from its Gram matrix.

For neuron ``m`` with support ``S`` and targets ``y_m``: ``min_u ‖X_S u − y_m‖²``, so ``(XᵀX)_SS u = (XᵀY)_Sm``. This
is group OBS: removing all other weights at once and compensating with those that stay.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nettrim.errors import ProblemError

_ENTRIES = 2**24  # float64 entries of the blocks (B, S, S) that are factorised at a time: 128 MiB


def kept_count(numel: int, sparsity: float) -> int:
    """Return how many of `numel` weights a sparsity keeps: ``numel − ⌊numel · sparsity⌋``.

    Raises
    ------
    ProblemError
        `sparsity`, the fraction of zeros, is not in [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ProblemError(f"sparsity={sparsity:g} is out of range: it is the fraction of zeros, in [0, 1).")
    # the smallest excess of a product such as 100 · 0.29 over its integer would cost one weight
    return numel - int(numel * sparsity + 1e-9)


def refit_linear(gram: Tensor, cross: Tensor, mask: Tensor) -> Tensor:
    """Return the weight on a support that fits linear targets best.

    Parameters
    ----------
    gram : Tensor (N, N)
        ``XᵀX``, or any multiple of it.
    cross : Tensor (N, M)
        ``XᵀY``, the same multiple.
    mask : bool Tensor (M, N)
        True = kept. Every neuron has a support of its own.

    Returns
    -------
    Tensor (M, N)
        In the dtype of `gram`; exactly zero off the support. Where inputs on a support are collinear, the blocks are
        damped as by `nettrim.core.linalg.damped_inverse`.

    Raises
    ------
    ProblemError
        Shapes do not match, or a block is not positive semi-definite.
    """
    neurons, columns = mask.shape
    if gram.shape != (columns, columns) or cross.shape != (columns, neurons):
        raise ProblemError(
            f"gram {tuple(gram.shape)}, cross {tuple(cross.shape)} and mask {tuple(mask.shape)} do not match: "
            "they must be (N, N), (N, M) and (M, N)."
        )
    weight = gram.new_zeros(neurons, columns)
    for rows, support, valid in support_batches(mask):
        blocks = gather_blocks(gram, support, valid)
        right = cross.T[rows].gather(1, support).where(valid, 0.0)
        solved = solve_blocks(blocks, right[..., None])[..., 0].where(valid, 0.0)
        # padding points at column 0 with the value 0, so added rather than written
        weight[rows] = weight[rows].scatter_add(1, support, solved)
    return weight


def support_batches(mask: Tensor, entries: int = _ENTRIES) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield neurons of similar support size together, the larger supports first.

    Yields
    ------
    rows : Tensor (B,)
        Neurons.
    support : Tensor (B, S)
        The columns of each, ascending, padded by 0.
    valid : bool Tensor (B, S)
        False where padded.
    """
    sizes = mask.sum(1)
    order = torch.argsort(sizes, descending=True, stable=True)
    order = order[sizes[order] > 0]
    start = 0
    while start < len(order):
        widest = int(sizes[order[start]])
        rows = order[start : start + max(1, entries // widest**2)]
        # those of half the size and less would mostly be padding
        rows = rows[sizes[rows] > widest // 2]
        positions = torch.argsort(mask[rows].to(torch.int8), dim=1, descending=True, stable=True)[:, :widest]
        valid = torch.arange(widest, device=mask.device) < sizes[rows][:, None]
        yield rows, positions.where(valid, 0), valid
        start += len(rows)


def gather_blocks(gram: Tensor, support: Tensor, valid: Tensor) -> Tensor:
    """Return the blocks ``(B, S, S)`` of a matrix on each support, with the identity where padded."""
    both = valid[:, :, None] & valid[:, None, :]
    blocks = gram[support[:, :, None], support[:, None, :]].where(both, 0.0)
    blocks.diagonal(dim1=1, dim2=2).add_((~valid).to(gram.dtype))
    return blocks


def solve_blocks(blocks: Tensor, right: Tensor) -> Tensor:
    """Solve symmetric positive semi-definite systems ``(B, S, S)``, damping those alone that have no factor.

    Raises
    ------
    ProblemError
        A block has no Cholesky factor even with 1e-2 of its mean diagonal added.
    """
    factor, failed = torch.linalg.cholesky_ex(blocks)
    for relative in (1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2):
        again = torch.nonzero(failed)[:, 0]
        if not len(again):
            break
        damped = blocks[again]
        diagonal = damped.diagonal(dim1=1, dim2=2)
        diagonal += relative * diagonal.mean(1, keepdim=True)
        factor[again], failed[again] = torch.linalg.cholesky_ex(damped)
    if bool(failed.any()):
        raise ProblemError("a block of a Gram matrix has no Cholesky factor: check the inputs for NaN.")
    solution: Tensor = torch.cholesky_solve(right, factor)
    return solution
