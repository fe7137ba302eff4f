"""What both Optimal Brain Surgeons start from: one layer's quadratic, its damped inverse, and an order of removals.

For inputs ``X (P, N)``, with a column of ones appended where a bias is fitted, and linear targets ``Z (P, M)`` the
error of a weight ``U`` is the mean square over the samples

    E(U) = (1/P) ‖X Uᵀ − Z‖² = E(U₀) + 2 ⟨U − U₀, G⟩ + tr((U − U₀) H (U − U₀)ᵀ),      H = (1/P) XᵀX,

where ``U₀`` is the weight that pruning starts from and ``G = U₀ H − (1/P) ZᵀX``. On the dense network's own inputs
``U₀`` is the dense weight, and ``E(U₀)`` and ``G`` are zero. On inputs through pruned layers the dense weight is not
the minimiser; there ``U₀`` minimises ``E(U) + damping ‖U − W‖²`` on the support of the dense weight ``W``, a least
squares fit that stays with ``W`` where the inputs leave it free. In either case the methods prune the *damped*
quadratic ``tr((U − U₀)(H + damping·I)(U − U₀)ᵀ)``, whose minimiser is ``U₀``.

With this ``H`` the removal of one weight raises the damped quadratic by ``w_q²/[H⁻¹]_qq = 2 L_q``, twice the
sensitivity ``L_q = w_q²/(2 [H⁻¹]_qq)`` that the paper ranks by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nettrim.core.linalg import damped_inverse
from nettrim.core.support import refit_linear
from nettrim.errors import ProblemError, UnsupportedError
from nettrim.methods.base import LayerTask
from nettrim.methods.fit import check_task, mean_error
from nettrim.methods.masks import Pattern

RELEASED_DAMPING = 1e-6  # 1/α with the α = 1e6 of the released code


def check_damping(owner: str, damping: float | None, relative: float | None) -> float | None:
    """Return the absolute damping of a method's settings, None where the relative one is meant.

    Raises
    ------
    ProblemError
        Both are given, or one is no number ≥ 0.
    """
    if damping is not None and relative is not None:
        raise ProblemError(
            f"{owner}'s damping={damping!r} and relative_damping={relative!r} are both given: give one of them."
        )
    for name, value in (("damping", damping), ("relative_damping", relative)):
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value >= 0):
            raise ProblemError(f"{owner}'s {name}={value!r} is out of range: give a finite number ≥ 0.")
    return RELEASED_DAMPING if damping is None and relative is None else damping


def tolerance_of(task: LayerTask) -> float:
    """Return the tolerance or the epsilon that a task asks for.

    Raises
    ------
    ProblemError
        It is negative or no number.
    """
    value = task.value
    if isinstance(value, Pattern) or not value >= 0:
        raise ProblemError(f"layer {task.name!r}: {task.amount}={value} is out of range: give a number ≥ 0.")
    return float(value)


@dataclass(frozen=True, eq=False)
class Quadratic:
    """One layer's quadratic. ``D = N + 1`` where the bias is fitted, as the last column, and ``D = N`` otherwise.

    Attributes
    ----------
    start : Tensor (M, D)
        ``U₀``.
    hessian : Tensor (D, D)
        ``H``, without damping.
    damped : Tensor (D, D)
        With it; a dead input (a column of zeros in ``X``) has 1 on the diagonal, which changes nothing else.
    inverse : Tensor (D, D)
        Of `damped`.
    support : bool Tensor (M, D)
        False where the weight was zero before: it stays zero. True for a fitted bias.
    dead : bool Tensor (D,)
        The dead inputs.
    gradient : Tensor (M, D)
        ``G``.
    floor : float
        ``E(U₀)``, in squared units of the outputs.
    power : float
        ``(1/P) ‖Z‖²``, the whole bias included: what a relative error refers to.
    damping, extra : float
        The absolute damping in all, and the part of it that the Cholesky factorisation needed beyond what was asked.
    bias : Tensor (M,) or None
        The bias where it is not fitted.
    fitted : bool
        Whether the last column is a bias.
    """

    start: Tensor
    hessian: Tensor
    damped: Tensor
    inverse: Tensor
    support: Tensor
    dead: Tensor
    gradient: Tensor
    floor: float
    power: float
    damping: float
    extra: float
    bias: Tensor | None
    fitted: bool

    @property
    def columns(self) -> int:
        """``N``, the number of inputs without the ones."""
        return self.start.shape[1] - self.fitted

    @property
    def live(self) -> Tensor:
        """Where removal costs something, ``bool (M, D)``: on the support, and on inputs that are not dead."""
        return self.support & ~self.dead

    def error(self, weight: Tensor) -> float:
        """Return ``E`` of a weight ``(M, D)``, in squared units of the outputs, without damping."""
        change = weight - self.start
        return self.floor + float(((change @ self.hessian + 2 * self.gradient) * change).sum())

    def refit(self, mask: Tensor) -> Tensor:
        """Return the minimiser ``(M, D)`` of the damped quadratic on a mask ``bool (M, D)``: group OBS."""
        return refit_linear(self.damped, self.damped @ self.start.T, mask & self.support)

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight ``(M, N)`` and bias ``(M,)`` of a ``(M, D)``."""
        return (weight[:, :-1], weight[:, -1]) if self.fitted else (weight, self.bias)

    def facts(self, weight: Tensor, sensitivity: float) -> dict[str, Any]:
        """Return what a `LayerResult` says of a weight ``(M, D)`` whose removals had a `sensitivity` ``Σ L_q``."""
        return {
            "E": self.error(weight),
            "floor": self.floor,
            "predicted_E": self.floor + 2 * sensitivity,
            "damping": self.damping,
            "extra_damping": self.extra,
        }


def layer_quadratic(
    task: LayerTask,
    damping: float | None,
    relative_damping: float | None,
    fit_bias: bool = True,
    recursive: bool = False,
) -> Quadratic:
    """Set a layer's quadratic up, from the moments of its rows: ``2 P N (N + M)`` flops where they are not given.

    Parameters
    ----------
    task : LayerTask
    damping : float or None
        Absolute, in squared units of the inputs; None where the relative one is meant.
    relative_damping : float or None
        Times the mean diagonal of ``H``.
    fit_bias : bool
        False: the bias stays as it is, and the inputs get no column of ones.
    recursive : bool
        Form the inverse by `recursive_inverse`, which needs a damping above 0, and all rows.

    Raises
    ------
    ProblemError
        Shapes do not match; there is no sample; NaN or infinity; the inverse has a diagonal entry that is not positive.
    UnsupportedError
        `recursive`, and the task has only a sample of its rows, or their moments alone.
    """
    check_task(task)
    if recursive and not task.complete:
        raise UnsupportedError(
            f"layer {task.name!r}: inverse='recursive' goes through every row, and {len(task.inputs)} of "
            f"{task.statistics().count} are at hand: use inverse='cholesky', which takes the moments of all of them."
        )
    statistics, fitted, columns = task.statistics(), fit_bias and task.bias is not None, task.weight.shape[1]
    hessian, mean = statistics.second_moment(ones=fitted), statistics.mean
    dense, bias = task.weight, task.bias
    if fitted and bias is not None:
        dense, bias = torch.cat([dense, bias[:, None]], dim=1), None
    dead = hessian.diagonal() == 0
    amount = damping if damping is not None else (relative_damping or 0.0) * float(hessian.diagonal().mean())
    damped, inverse, extra = _invert(task, hessian, dead, amount, recursive)
    support = dense != 0
    if fitted:
        support[:, -1] = True
    if task.clean:
        power = float(((dense @ hessian) * dense).sum())
        if bias is not None:
            power += float((2 * (dense @ mean) * bias + bias.square()).sum())
        start, gradient, floor = dense, torch.zeros_like(dense), 0.0
    else:
        cross = statistics.cross_moment(ones=fitted)
        if bias is not None:
            cross -= mean[:, None] * bias
        # the two differ in their diagonals alone: a pull to the dense weight, and on dead inputs nothing else
        pull = (damped - hessian).diagonal()[:, None] * dense.T
        start = refit_linear(damped, cross + pull, support)
        gradient = start @ hessian - cross.T
        floor = mean_error(task, start[:, :columns], start[:, -1] if fitted else bias)
        power = float(statistics.power) / statistics.count
    return Quadratic(
        start, hessian, damped, inverse, support, dead, gradient, floor, power, amount + extra, extra, bias, fitted
    )


def recursive_inverse(inputs: Tensor, damping: float) -> Tensor:
    """Return ``((1/P) XᵀX + damping·I)⁻¹ (D, D)`` by the paper's recursion over samples (Woodbury's identity).

    ``A ← A − A x xᵀ A / (P + xᵀ A x)``, from ``A = I/damping``. The paper prints the sample before in the numerator;
    with the constant ``P`` that it prints in the denominator, ``1/damping`` is its ``α``. ``P`` steps of ``4 D²``
    flops, one after the other: far slower than a Cholesky factor.
    """
    inverse = torch.eye(inputs.shape[1], dtype=torch.float64, device=inputs.device) / damping
    for x in inputs.double():
        change = inverse @ x
        inverse.addr_(change, change, alpha=-1 / (inputs.shape[0] + float(x @ change)))
    return inverse


@dataclass(frozen=True, eq=False)
class Removals:
    """In which order the weights of a layer go, neuron by neuron and in the layer as a whole.

    Attributes
    ----------
    order : int64 Tensor (M, D)
        The columns of each neuron, the first to go first.
    cost : Tensor (M, D)
        ``L_q`` of each when it goes, in that order: 0 for weights that were zero before and for dead inputs, infinite
        where it never goes.
    step : int64 Tensor (M, D)
        At which position of the whole layer's list each goes; ascending in each row.
    """

    order: Tensor
    cost: Tensor
    step: Tensor

    @staticmethod
    def make(place: Tensor, cost: Tensor, support: Tensor, greedy: bool) -> Removals:
        """Merge the neurons' own orders into one.

        Parameters
        ----------
        place : Tensor (M, D)
            For each weight its position in its neuron's order; ties are broken by the column.
        cost : Tensor (M, D)
            ``L_q``, for each weight.
        support : bool Tensor (M, D)
            Weights off it are zero already and go before all others.
        greedy : bool
            True: at every removal the cheapest of the neurons' next ones goes. False: as many weights of each neuron go
            as it has costs among the lowest of the layer, as in OBC. The same where costs ascend in every neuron.
        """
        order = torch.argsort(place, dim=1, stable=True)
        cost = cost.gather(1, order)
        # a neuron's next removal cannot be passed over, so a lower cost behind it waits until it goes
        keys = cost.cummax(1).values if greedy else cost
        keys = keys.where(support.gather(1, order), -1.0)
        rank = torch.empty_like(order).flatten()
        flat = torch.argsort(keys.flatten(), stable=True)
        rank[flat] = torch.arange(len(flat), device=rank.device)
        return Removals(order, cost, rank.reshape(order.shape).sort(1).values)

    def counts(self, removed: int) -> Tensor:
        """Return how many weights of each neuron ``(M,)`` are among the first `removed` of the layer."""
        return (self.step < removed).sum(1)

    def within(self, limit: float) -> Tensor:
        """Return how many weights of each neuron ``(M,)`` go before the first whose ``L_q`` is above a limit."""
        return (self.cost.cummax(1).values <= limit).sum(1)

    def total(self, counts: Tensor) -> float:
        """Return ``Σ L_q`` over the first ``counts (M,)`` removals of each neuron."""
        return float(self.cost[self._first(counts)].sum())

    def mask(self, counts: Tensor) -> Tensor:
        """Return the mask ``bool (M, D)`` after the first ``counts (M,)`` removals of each neuron; True = kept."""
        gone = self._first(counts)
        return torch.empty_like(gone).scatter_(1, self.order, ~gone)

    def _first(self, counts: Tensor) -> Tensor:
        return torch.arange(self.order.shape[1], device=counts.device) < counts[:, None]


def _invert(
    task: LayerTask, hessian: Tensor, dead: Tensor, damping: float, recursive: bool
) -> tuple[Tensor, Tensor, float]:
    """Return the damped Hessian, its inverse, and the damping that the factorisation added."""
    live = ~dead
    damped = hessian + torch.diag(torch.where(live, damping, 1.0).to(hessian.dtype))
    inverse, extra = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device), 0.0
    both = live[:, None] & live
    count = int(live.sum())
    if recursive:
        if not damping > 0:
            raise ProblemError(f"layer {task.name!r}: damping={damping:g}: the recursive inverse needs one above 0.")
        ones = task.inputs.new_ones(len(task.inputs), len(hessian) - task.inputs.shape[1])
        inverse[both] = recursive_inverse(torch.cat([task.inputs, ones], 1)[:, live], damping).flatten()
    elif count:
        block, extra = damped_inverse(damped[both].reshape(count, count))
        inverse[both] = block.flatten()
        damped.diagonal().add_(torch.where(live, extra, 0.0))
    diagonal = inverse.diagonal()
    wrong = int((~(diagonal.isfinite() & (diagonal > 0))).sum())
    if wrong:
        raise ProblemError(
            f"layer {task.name!r}: {wrong} of {len(diagonal)} diagonal entries of the inverse Hessian are not positive "
            f"and finite: raise the damping above {damping + extra:g}."
        )
    return damped, inverse, extra
