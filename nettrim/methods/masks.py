"""Which weights stay: masks with exact counts by construction. True means kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.errors import ProblemError


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: of every `of` neighbouring weights of a row, exactly `keep` stay.

    Raises
    ------
    ProblemError
        Not ``1 ≤ keep < of``.
    """

    keep: int
    of: int

    def __post_init__(self) -> None:
        """Refuse a pattern that keeps nothing or everything."""
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (self.keep, self.of))
        if not (whole and 1 <= self.keep < self.of):
            raise ProblemError(f"pattern {self.keep}:{self.of} is out of range: it keeps 1 ≤ keep < of, such as 2:4.")

    def __str__(self) -> str:
        """Return it as it is written: ``2:4``."""
        return f"{self.keep}:{self.of}"

    def count(self, numel: int) -> int:
        """Return how many of `numel` weights stay."""
        return numel // self.of * self.keep


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


def keep_pattern(scores: Tensor, pattern: Pattern) -> Tensor:
    """Return the mask ``(M, N)`` of the `keep` largest scores among every `of` neighbours; of equal ones the earlier.

    Raises
    ------
    ProblemError
        The rows do not divide into groups.
    """
    rows, columns = scores.shape
    if columns % pattern.of:
        raise ProblemError(f"pattern {pattern} does not divide rows of {columns} weights: leave that layer out.")
    groups = scores.reshape(-1, pattern.of)
    order = torch.argsort(groups, dim=1, descending=True, stable=True)[:, : pattern.keep]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)
    return mask.reshape(rows, columns)
