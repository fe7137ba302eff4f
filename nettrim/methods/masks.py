"""Which weights stay: masks with exact counts by construction. True means kept."""

from __future__ import annotations

from collections.abc import Sequence
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
    check_division(columns, pattern)
    groups = scores.reshape(-1, pattern.of)
    order = torch.argsort(groups, dim=1, descending=True, stable=True)[:, : pattern.keep]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)
    return mask.reshape(rows, columns)


def check_division(columns: int, pattern: Pattern) -> None:
    """Refuse a pattern whose groups do not fill a row.

    Raises
    ------
    ProblemError
        `columns`, the weights of a row, are no multiple of ``pattern.of``.
    """
    if columns % pattern.of:
        raise ProblemError(f"pattern {pattern} does not divide rows of {columns} weights: leave that layer out.")


def keep_rows(scores: Tensor, count: int) -> Tensor:
    """Return the mask ``(M, N)`` of `count` scores, spread evenly: every row keeps its own ``⌊count / M⌋`` largest.

    The ``count mod M`` places that are left go one each to the rows whose next score is largest. So the total is exact
    and no row keeps more than one weight more than another. Of equal scores the earlier stay.

    Raises
    ------
    ProblemError
        `count` is negative or above the number of scores.
    """
    if not 0 <= count <= scores.numel():
        raise ProblemError(f"count={count} is out of range: there are {scores.numel()} weights.")
    each, left = divmod(count, scores.shape[0])
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :each], True)
    if left:
        following = order[:, each]
        more = keep_largest(scores.gather(1, following[:, None])[:, 0], left)
        mask[more, following[more]] = True
    return mask


def share_out(total: int, sizes: Sequence[int], limits: Sequence[int]) -> list[int]:
    """Divide `total` over groups in proportion to their sizes, exactly, and give none more than its limit.

    What a full group cannot take goes to the others in the same proportion. Fractions go to the groups of largest
    remainder, of equal ones to the earlier.

    Parameters
    ----------
    total : int
        ``0 ≤ total ≤ Σ limits``.
    sizes, limits : sequence of int
        One per group, ``≥ 0``; a group of size 0 has the limit 0.

    Returns
    -------
    list of int
        Adds up to `total`.

    Raises
    ------
    ProblemError
        The limits do not hold `total`.
    """
    if not 0 <= total <= sum(limits):
        raise ProblemError(f"total={total} is out of range: the groups hold {sum(limits)}.")
    shares = [0] * len(sizes)
    open_ = [i for i, limit in enumerate(limits) if limit]
    while open_:
        whole = sum(sizes[i] for i in open_)
        full = [i for i in open_ if total * sizes[i] >= limits[i] * whole]
        if not full:
            for i in open_:
                shares[i] = total * sizes[i] // whole
            by_remainder = sorted(open_, key=lambda i: -(total * sizes[i] % whole))
            for i in by_remainder[: total - sum(shares[i] for i in open_)]:
                shares[i] += 1
            break
        for i in full:
            shares[i] = limits[i]
        total -= sum(limits[i] for i in full)
        open_ = [i for i in open_ if i not in full]
    return shares
