"""Second moments of a layer's rows: all that least squares needs of them, in a size that does not grow with them.

With ``X₁ = [X, 1] (P, N + 1)`` and the dense network's outputs ``Y (P, M)`` before any ReLU these are ``X₁ᵀX₁``,
``X₁ᵀY`` and ``‖Y‖²``. The mean square error of any weight ``U`` and bias ``b`` follows, with ``U₁ = [U, b]``:

    (1/P) ‖X Uᵀ + b − Y‖² = (1/P) (‖Y‖² − 2 ⟨U₁ᵀ, X₁ᵀY⟩ + tr(U₁ X₁ᵀX₁ U₁ᵀ)).

Sums over disjoint sets of rows add up, so the rows may come in batches and need never be held together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.errors import ProblemError


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over the rows of a layer, in float64.

    Attributes
    ----------
    count : int
        ``P``, how many rows; 0 where none has been seen yet.
    gram : Tensor (N + 1, N + 1)
        ``Σ [x, 1] [x, 1]ᵀ``: the last row and column are the sums of the inputs, and `count` in the corner.
    cross : Tensor (N + 1, M)
        ``Σ [x, 1] yᵀ``: the last row is the sum of the outputs.
    power : Tensor ()
        ``Σ ‖y‖²``.

    Raises
    ------
    ProblemError
        The shapes do not go together, or a tensor is not float64, or `count` is no whole number ≥ 0.
    """

    count: int
    gram: Tensor
    cross: Tensor
    power: Tensor

    def __post_init__(self) -> None:
        """Refuse sums that do not go together."""
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 0:
            raise ProblemError(f"the moments' count={self.count!r} is out of range: give a whole number of rows ≥ 0.")
        size = self.gram.shape[0] if self.gram.dim() else 0
        square = size >= 1 and self.gram.shape == (size, size)
        if not square or self.cross.dim() != 2 or self.cross.shape[0] != size or self.power.dim():
            raise ProblemError(
                f"the moments' gram {tuple(self.gram.shape)}, cross {tuple(self.cross.shape)} and power "
                f"{tuple(self.power.shape)} do not match: they must be (N + 1, N + 1), (N + 1, M) and ()."
            )
        for name in ("gram", "cross", "power"):
            dtype = getattr(self, name).dtype
            if dtype != torch.float64:
                raise ProblemError(f"the moments' {name} is {dtype}: sums over many rows need torch.float64.")

    @staticmethod
    def zeros(columns: int, neurons: int, device: torch.device | str | None = None) -> Moments:
        """Return the moments of no row, for `columns` inputs and `neurons` outputs: where a sum over batches starts."""
        size = columns + 1
        gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        return Moments(0, gram, gram.new_zeros(size, neurons), gram.new_zeros(()))

    @staticmethod
    def of(inputs: Tensor, outputs: Tensor, rows: int = 8192) -> Moments:
        """Return the moments of some rows. ``2 P N (N + M)`` flops; at most `rows` of them are held in float64.

        Parameters
        ----------
        inputs : Tensor (P, N)
            Of any real dtype; summed in float64.
        outputs : Tensor (P, M)
            The dense network's outputs, before any ReLU.
        rows : int ≥ 1
            How many are taken at a time; the result depends on it by rounding alone.

        Raises
        ------
        ProblemError
            The shapes do not match. Values that are not finite are refused where the moments are used.
        """
        if inputs.dim() != 2 or outputs.dim() != 2 or len(inputs) != len(outputs):
            raise ProblemError(
                f"inputs {tuple(inputs.shape)} and outputs {tuple(outputs.shape)} do not match: they must be (P, N) "
                "and (P, M), one row per sample in both."
            )
        columns = inputs.shape[1]
        total = Moments.zeros(columns, outputs.shape[1], inputs.device)
        square = torch.zeros(columns, columns, dtype=torch.float64, device=inputs.device)
        for start in range(0, len(inputs), rows):
            x, y = inputs[start : start + rows].double(), outputs[start : start + rows].double()
            square.addmm_(x.T, x)
            total.gram[-1, :columns] += x.sum(0)
            total.cross[:columns].addmm_(x.T, y)
            total.cross[-1] += y.sum(0)
            total.power.add_(y.square().sum())
        total.gram[:columns, :columns] = square
        total.gram[:columns, -1] = total.gram[-1, :columns]
        total.gram[-1, -1] = len(inputs)
        return Moments(len(inputs), total.gram, total.cross, total.power)

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows together."""
        if self.cross.shape != other.cross.shape:
            shapes = " and ".join(f"{m.columns} inputs and {m.cross.shape[1]} outputs" for m in (self, other))
            raise ProblemError(f"moments of two layers do not add up: {shapes}.")
        return Moments(
            self.count + other.count, self.gram + other.gram, self.cross + other.cross, self.power + other.power
        )

    @property
    def columns(self) -> int:
        """``N``, the number of inputs without the ones."""
        return self.gram.shape[0] - 1

    @property
    def dead(self) -> Tensor:
        """The dead inputs, zero in every row: ``bool (N,)``."""
        return self.gram.diagonal()[:-1] == 0

    @property
    def finite(self) -> bool:
        """Whether all sums are: False after any NaN or infinity among the rows, or where squares overflow."""
        return all(bool(tensor.isfinite().all()) for tensor in (self.gram, self.cross, self.power))

    @property
    def norms(self) -> Tensor:
        """``‖X_n‖₂`` of each input over all rows ``(N,)``."""
        return self.gram.diagonal()[:-1].sqrt()

    @property
    def mean(self) -> Tensor:
        """The mean of each input ``(N,)``."""
        return self.gram[-1, :-1] / self._some()

    def second_moment(self, ones: bool = False) -> Tensor:
        """Return ``(1/P) Σ x xᵀ (N, N)``, or with a one appended to each row ``(N + 1, N + 1)``; a new tensor.

        Raises
        ------
        ProblemError
            There is no row, or an entry is not finite: the inputs hold NaN or infinity, or their squares overflow.
        """
        size = self.columns + ones
        moment = self.gram[:size, :size] / self._some()
        if not bool(moment.isfinite().all()):
            raise ProblemError(
                f"the Gram matrix of {self.columns} inputs is not finite: check the inputs for NaN, infinity and "
                "values above 1e150."
            )
        return moment

    def cross_moment(self, ones: bool = False) -> Tensor:
        """Return ``(1/P) Σ x yᵀ (N, M)``, or with a one appended to each input ``(N + 1, M)``; a new tensor.

        Raises
        ------
        ProblemError
            There is no row, or an entry is not finite.
        """
        moment = self.cross[: self.columns + ones] / self._some()
        if not bool(moment.isfinite().all()):
            raise ProblemError(
                f"the products of {self.columns} inputs and {moment.shape[1]} outputs are not finite: check both for "
                "NaN, infinity and values above 1e150."
            )
        return moment

    def shortfall(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``Σ (y − U x − b) [x, 1]ᵀ (M, N + 1)``: minus half the gradient of the error's sum over the rows.

        A difference of two sums: what it is off by is the rounding of those, also where it is zero itself.

        Parameters
        ----------
        weight : Tensor (M, N)
        bias : Tensor (M,) or None
            None stands for zero.
        """
        return self.cross.T - self._joined(weight, bias) @ self.gram

    def output_power(self, weight: Tensor, bias: Tensor | None) -> float:
        """Return ``(1/P) ‖X Uᵀ + b‖² ≥ 0``: also the error of ``Ŵ + U`` where the outputs are those of ``Ŵ``.

        A sum of squares by its quadratic form, with the rounding of sums that `error` speaks of, but relative to what
        ``U`` itself makes of the inputs: a small ``U`` loses nothing. Never negative.

        Parameters
        ----------
        weight : Tensor (M, N)
        bias : Tensor (M,) or None
            None stands for zero.
        """
        joined = self._joined(weight, bias)
        return max(float(((joined @ self.gram) * joined).sum()) / self._some(), 0.0)

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Return ``(1/P) ‖X Uᵀ + b − Y‖²``, in squared units of the outputs, ≥ 0.

        It is what is left of ``‖Y‖²/P``, so what counts is the rounding of the three sums: together about 1e-15 of that
        power for some hundred rows and 5e-14 for a million of ten inputs, as measured, growing like the root of the
        count; more where the terms of ``X Uᵀ + b`` are far larger than their sum, or a lone input is nearly constant.
        So with a million rows an error of 1e-9 of the power is right to four digits, and one below 1e-13 of it is
        rounding alone. Negative results, which only rounding makes, are returned as 0. Where the outputs are those of a
        known weight, `output_power` of the difference has no such limit.

        Parameters
        ----------
        weight : Tensor (M, N)
        bias : Tensor (M,) or None
            None stands for zero.
        """
        joined = self._joined(weight, bias)
        rest = float(((joined @ self.gram - 2 * self.cross.T) * joined).sum())
        return max((float(self.power) + rest) / self._some(), 0.0)

    def _some(self) -> int:
        """Return `count`, which a mean is divided by."""
        if not self.count:
            raise ProblemError("the moments are of no row at all: add some before a mean is taken.")
        return self.count

    def _joined(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[U, b] (M, N + 1)`` in float64."""
        neurons = self.cross.shape[1]
        if weight.shape != (neurons, self.columns) or (bias is not None and bias.shape != (neurons,)):
            found = "None" if bias is None else tuple(bias.shape)
            raise ProblemError(
                f"weight {tuple(weight.shape)} and bias {found} do not match the moments: they must be "
                f"{(neurons, self.columns)} and {(neurons,)} or None."
            )
        column = weight.new_zeros(neurons) if bias is None else bias
        return torch.cat([weight.double(), column.double()[:, None]], dim=1)
