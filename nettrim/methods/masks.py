"""Which weights stay: masks with exact counts by construction. True means kept."""

from __future__ import annotations

import torch
from torch import Tensor

from nettrim.errors import ProblemError


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


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Return the mask of the `count` largest scores, exactly; of equal ones the earlier stay.

    Raises
    ------
    ProblemError
        `count` is negative or above the number of scores.
    """
    if not 0 <= count <= scores.numel():
        raise ProblemError(f"count={count} is out of range: there are {scores.numel()} weights.")
    order = torch.argsort(scores.flatten(), descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:count]] = True
    return mask.reshape(scores.shape)
