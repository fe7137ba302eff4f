"""Which units go: by what each is worth, under the one constraint that some unit of every stage stays.

Removing units that gain less than a threshold is the rule of Chen and Zhao, 2019. Removing by count, and counting gains
from the last unit that stays, are our additions; so is that a stage which would lose all keeps the one worth most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nettrim.errors import ProblemError
from nettrim.network.trace import LayerGraph
from nettrim.network.units import Unit

#: says of the units that would be removed whether they are enough
Enough = Callable[[Sequence[Unit]], bool]


def never(going: Sequence[Unit]) -> bool:
    """Say that no units are enough."""
    return False


def most(units: Sequence[Unit]) -> int:
    """Return how many units can go."""
    total = Counter(unit.stage for unit in units)
    free = Counter(unit.stage for unit in units if unit.removable)
    return sum(min(count, total[stage] - 1) for stage, count in free.items())


def least(units: Sequence[Unit], worth: Mapping[str, float], enough: Enough = never) -> tuple[Unit, ...]:
    """Return the units that are worth least, one after the other until they are enough or no more can go.

    Parameters
    ----------
    units : sequence of Unit
        In execution order.
    worth : mapping from str to float
        Of the units that may go; of equals the earlier goes first.
    enough : callable

    Returns
    -------
    tuple of Unit
        In execution order.
    """
    left = Counter(unit.stage for unit in units)
    going: list[Unit] = []
    named = [unit for unit in units if unit.removable and unit.name in worth]
    for unit in sorted(named, key=lambda unit: worth[unit.name]):
        if enough(going):
            break
        if left[unit.stage] > 1:
            left[unit.stage] -= 1
            going.append(unit)
    return tuple(unit for unit in units if unit in going)


def below(units: Sequence[Unit], worth: Mapping[str, float], threshold: float) -> tuple[Unit, ...]:
    """Return the units that are worth less than a threshold; a stage that would lose all keeps the best of them."""
    return least(units, {name: value for name, value in worth.items() if value < threshold})


def accumulated(units: Sequence[Unit], levels: Mapping[str, float], start: float, threshold: float) -> tuple[Unit, ...]:
    """Return the units that do not rise by a threshold above the last one that stays.

    Parameters
    ----------
    units : sequence of Unit
        In execution order.
    levels : mapping from str to float
        Of every unit.
    start : float
        The level before the first.
    threshold : float
    """
    going: list[Unit] = []
    last = start
    for stage in dict.fromkeys(unit.stage for unit in units):
        own = [unit for unit in units if unit.stage == stage]
        stays = _rising(own, levels, last, threshold)
        if not stays:  # the one that rises furthest; none behind it rises above it
            stays = [max(own, key=lambda unit: levels[unit.name])]
        last = levels[stays[-1].name]
        going += [unit for unit in own if unit not in stays]
    return tuple(going)


def accumulated_until(
    units: Sequence[Unit], levels: Mapping[str, float], start: float, enough: Enough
) -> tuple[Unit, ...]:
    """Return the units that go by `accumulated` at the least threshold at which they are enough.

    What goes changes only at thresholds that are a rise from one level to another, so all of those are tried. Where
    several units go at once and are more than enough, those that rise furthest above what stays before them come back.
    Where no threshold is enough, it is the highest.
    """
    heights = [start, *(levels[unit.name] for unit in units)]
    going: list[Unit] = []
    for rise in sorted({above - under for under in heights for above in heights}):
        # just above, so that this rise is not enough to stay
        going = list(accumulated(units, levels, start, rise + 1e-12 * (1 + abs(rise))))
        if enough(going):
            break
    while going:
        rises = _rises(units, levels, start, going)
        back = max(going, key=lambda unit: rises[unit.name])
        fewer = [unit for unit in going if unit is not back]
        if not enough(fewer):
            break
        going = fewer
    return tuple(going)


def magnitude(graph: LayerGraph, state: Mapping[str, Tensor], units: Sequence[Unit]) -> dict[str, float]:
    """Return the mean ``|w|`` over the weights of all layers of a unit, batch norms folded; biases do not count."""
    worth = {}
    for unit in units:
        weights = [state[graph.layer(name).weight] for name in unit.layers]
        total = sum(float(weight.abs().sum()) for weight in weights)
        worth[unit.name] = total / sum(weight.numel() for weight in weights)
    return worth


def drawn(units: Sequence[Unit], seed: int) -> dict[str, float]:
    """Return random worths."""
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))
    return {unit.name: float(place) for unit, place in zip(units, order, strict=True)}


def check_count(units: Sequence[Unit], count: int) -> None:
    """Refuse to remove more units than can go.

    Raises
    ------
    ProblemError
        There are not as many.
    """
    can = most(units)
    if count <= can:
        return
    if not units:
        raise ProblemError(f"units={count} of a network that has none: no layer with a ReLU, no sum, on its one path.")
    fixed = [f"{unit.name!r}: {unit.why}" for unit in units if not unit.removable]
    why = f" ({'; '.join(fixed[:3])}{'; ...' if len(fixed) > 3 else ''})" if fixed else ""
    raise ProblemError(
        f"units={count} of {len(units)}, and {can} can go: one of every stage stays, and {len(fixed)} cannot be left "
        f"out{why}; lower it."
    )


def _rising(own: Sequence[Unit], levels: Mapping[str, float], last: float, threshold: float) -> list[Unit]:
    """Return the units of a stage that stay."""
    stays = []
    for unit in own:
        if not unit.removable or levels[unit.name] - last >= threshold:
            stays.append(unit)
            last = levels[unit.name]
    return stays


def _rises(units: Sequence[Unit], levels: Mapping[str, float], start: float, going: Sequence[Unit]) -> dict[str, float]:
    """Return how far every unit rises above the last one before it that stays."""
    rises, last = {}, start
    for unit in units:
        rises[unit.name] = levels[unit.name] - last
        if unit not in going:
            last = levels[unit.name]
    return rises
