"""The joint optimisation: what the removed channels carried is squeezed into those that stay, by gradient steps.

That incoming and outgoing factors are optimised together toward the dense network's embedding is the paper's; the
optimiser, its steps and the held-out choice of the iterate are our reading, since the paper's are not known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ENTRIES = 4096  # positions of the target in one step, about
_LOOKS = 20  # times that the held-out samples are looked at
_LATE, _LESS = 0.7, 0.2  # from this share of the steps on the rate is that much
_BLOCK = 256  # samples of one pass without gradients


@dataclass(frozen=True, eq=False)
class Squeezed:
    """What came of it.

    Attributes
    ----------
    parameters : list of Tensor
        Of the best iterate on the held-out samples.
    step : int
        Which that is; 0 is the start.
    held_start, held_end : float
        ``‖target − found‖² / ‖target − mean‖²`` on the held-out samples.
    """

    parameters: list[Tensor]
    step: int
    held_start: float
    held_end: float


def squeeze(
    forward: Callable[[Tensor, Sequence[Tensor]], Tensor],
    inputs: Tensor,
    target: Tensor,
    start: Sequence[Tensor],
    held: Tensor,
    steps: int,
    learning_rate: float,
    positions: int,
    generator: torch.Generator,
) -> Squeezed:
    """Minimise ``‖target − forward(inputs, parameters)‖²`` by Adam on minibatches of whole samples.

    Never worse than its start on the held-out samples, which are not trained on.

    Parameters
    ----------
    forward : callable
        Takes samples of the inputs and the parameters.
    inputs, target : Tensor (P, ...)
    start : sequence of Tensor
        The parameters to start from; left as they are.
    held : Tensor of int64
        Numbers of the samples that are held out.
    steps : int
    learning_rate : float
        A fifth of it for the last 30 % of the steps.
    positions : int
        Of one sample: the more, the fewer samples in a step.
    generator : torch.Generator
    """
    free = torch.ones(len(inputs), dtype=torch.bool)
    free[held] = False
    train = free.nonzero().flatten()
    own = target[held]
    scale = float((target[train] - target[train].mean(0)).square().mean())
    spread = float((own - own.mean(0)).square().sum())
    seen = inputs[held]

    def left(parameters: Sequence[Tensor]) -> float:
        total = 0.0
        with torch.no_grad():
            for at in range(0, len(seen), _BLOCK):
                found = forward(seen[at : at + _BLOCK], parameters)
                total += float((found - own[at : at + _BLOCK]).square().sum())
        return total / spread if spread else total

    first = left(start)
    best, at_best, best_step = [p.detach().clone() for p in start], first, 0
    if not steps or not scale or not len(train):
        return Squeezed(best, 0, first, first)
    parameters = [p.detach().clone().requires_grad_() for p in start]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    size = min(max(_ENTRIES // max(positions, 1), 8), 256, len(train))
    for step in range(1, steps + 1):
        if step == int(_LATE * steps) + 1:
            for group in optimiser.param_groups:
                group["lr"] = _LESS * learning_rate
        chosen = train[torch.randint(len(train), (size,), generator=generator)]
        loss = (forward(inputs[chosen], parameters) - target[chosen]).square().mean() / scale
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if step % max(1, steps // _LOOKS) == 0 or step == steps:
            now = left(parameters)
            if now < at_best:
                best, at_best, best_step = [p.detach().clone() for p in parameters], now, step
    return Squeezed(best, best_step, first, at_best)
