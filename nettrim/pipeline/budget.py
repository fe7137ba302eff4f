"""How many weights each layer keeps, when only their number in the whole network was said.

Curves of single layers do not add up: a layer that comes later repairs errors of those before it, and so deserves more
than its own curve says. So splits are tried on the whole network, by a quick cascade (`nettrim.pipeline.scout`), and
judged by the error at its output, without labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from nettrim.core.problem import check_number
from nettrim.core.support import kept_count
from nettrim.errors import ProblemError
from nettrim.pipeline.collect import Wanted
from nettrim.pipeline.scout import Scout

_FACTORS = (1.5, 1.25, 1.12)  # by which one layer's count is multiplied or divided, the others making up for it


@dataclass(frozen=True)
class Overall:
    """The fraction of zeros in all pruned layers together; how it is split is found from the data.

    Parameters
    ----------
    sparsity : float in [0, 1)

    Raises
    ------
    ProblemError
        It lies outside.
    """

    sparsity: float

    def __post_init__(self) -> None:
        """Refuse what is no fraction."""
        if not 0 <= check_number("Overall's sparsity", self.sparsity) < 1:
            raise ProblemError(f"Overall({self.sparsity}) is out of range: it is the fraction of zeros, in [0, 1).")

    def kept(self, numel: int) -> int:
        """Return how many of all weights stay."""
        return kept_count(numel, self.sparsity)


def allocate(scout: Scout, total: int, *, evaluations: int = 60, progress: bool = True) -> dict[str, int]:
    """Split `total` weights over the layers so that a quick cascade errs least at the output.

    The start keeps the weights that matter most by ``w² · E[x²] · G_mm``, one threshold for all layers (a diagonal
    Gauss-Newton model). Then one layer at a time gets more or less, by factors that become finer, and what lowers the
    measured error stays.

    Parameters
    ----------
    scout : Scout
    total : int
        At least one weight for each layer.
    evaluations : int
        Cascades that are tried, at the most; the start takes two.
    progress : bool

    Raises
    ------
    ProblemError
        `total` does not leave a weight to every layer.
    """
    sizes = {layer.name: layer.numel for layer in scout.graph.selected}
    if total < len(sizes):
        raise ProblemError(f"Overall leaves {total} weights for {len(sizes)} layers: lower the sparsity.")
    kept = _by_saliency(scout, sizes, total)
    if len(sizes) == 1 or total == sum(sizes.values()):
        return kept
    bar = tqdm(total=evaluations, desc="allocate", unit="cascade", leave=False, disable=None if progress else True)
    left = evaluations  # a bar that is not shown does not count
    with bar:

        def tried(candidate: Mapping[str, int], using: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
            nonlocal left
            # thirty iterations for each layer instead of eighty: splits are compared, not used
            state = scout.prune(candidate, using, growth=1.3)
            left -= 1
            bar.update()
            return scout.measure(state), state

        # what the dense network needs of a layer is not what the pruned one will: looked at again before splits are
        error, best = tried(kept, scout.metrics)
        metrics = scout.metrics_of(best)
        error, best = tried(kept, metrics)
        for factor in _FACTORS:
            moved = True
            while moved and left > 0:
                moved = False
                for name in sizes:
                    for change in (factor, 1 / factor):
                        candidate = shifted(kept, sizes, name, change)
                        if candidate == kept or left <= 0:
                            continue
                        found, state = tried(candidate, metrics)
                        bar.set_postfix_str(f"error {min(found, error):.4f}")
                        if found < error:
                            kept, error, best, moved = candidate, found, state, True
                            break
                if moved:
                    metrics = scout.metrics_of(best)
    return kept


def _by_saliency(scout: Scout, sizes: Mapping[str, int], total: int) -> dict[str, int]:
    scores = []
    account = scout.account
    for name in sizes:
        spec = scout.graph.layer(name)
        moments = account.collect(account.dense, {name: Wanted(moments=True)}, progress=False)[name].moments
        assert moments is not None
        weight = account.dense[spec.weight].reshape(spec.groups, -1, spec.in_features)
        energy = torch.stack([own.gram.diagonal()[: spec.in_features] / own.count for own in moments])
        # a row is an image at a position: what counts is the error of the image
        counts = scout.metrics[name].diagonal().reshape(spec.groups, -1, 1) * spec.positions
        scores.append((weight.square() * energy[:, None] * counts).flatten())
    order = torch.argsort(torch.cat(scores), descending=True, stable=True)[:total]
    edges = torch.tensor([0, *sizes.values()]).cumsum(0)
    kept = [int(((order >= a) & (order < b)).sum()) for a, b in pairwise(edges)]
    return _exactly({name: float(max(1, count)) for name, count in zip(sizes, kept, strict=True)}, sizes, total)


def shifted(kept: Mapping[str, int], sizes: Mapping[str, int], name: str, factor: float) -> dict[str, int]:
    """Return the split with one layer's count multiplied, and the others' changed in proportion."""
    total = sum(kept.values())
    wanted = min(kept[name] * factor, sizes[name])
    rest = total - kept[name]
    share = {other: count * (total - wanted) / rest for other, count in kept.items() if other != name}
    return _exactly({other: share.get(other, wanted) for other in kept}, sizes, total)


def _exactly(wanted: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Round to whole counts within 1 and each layer's size that add up to `total`."""
    kept = {name: min(sizes[name], max(1, round(value))) for name, value in wanted.items()}
    for name in sorted(kept, key=lambda n: -sizes[n]):
        missing = total - sum(kept.values())
        kept[name] = min(sizes[name], max(1, kept[name] + missing))
    return kept
