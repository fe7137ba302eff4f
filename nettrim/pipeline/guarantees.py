"""What held-out samples prove about new samples of the same distribution, at a stated confidence.

Two statements, each on its own and not jointly. The rate of changed predictions: the exact binomial bound of Clopper
and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", Biometrika 1934. The
size of the output error: split-conformal prediction, Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random
World", 2005. Both need samples that had no part in the pruning: not in calibration, not in a choice between runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from fractions import Fraction

import torch
from scipy.special import betaincinv
from torch import Tensor

from nettrim.errors import ProblemError

#: what rounding may take from a margin or add to an error, relative; far above float64's own
_ROUNDING = 1e-9


def changed_rate_bound(changed: int, total: int, confidence: float = 0.95) -> float:
    """Return the exact one-sided upper bound on the rate of changed predictions (Clopper, Pearson 1934).

    It is the largest rate at which `changed` or fewer of `total` independent samples still change with probability
    ``1 − confidence``: the `confidence` quantile of ``Beta(changed + 1, total − changed)``. With no change it is
    ``1 − (1 − confidence)^(1/total)``; with nothing but changes it is 1.

    Parameters
    ----------
    changed : int
        Samples whose prediction changed, ``0 ≤ changed ≤ total``.
    total : int
        Samples, at least 1.
    confidence : float
        In ``(0, 1)``: over the draw of the samples, the bound is below the true rate with probability at most
        ``1 − confidence``.

    Returns
    -------
    float
        In ``(0, 1]``.

    Raises
    ------
    ProblemError
        A count or the confidence is out of range.
    """
    _check_confidence(confidence)
    for name, value in (("changed", changed), ("total", total)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ProblemError(f"{name}={value!r} is no count: give a whole number of samples.")
    if not (total >= 1 and 0 <= changed <= total):
        raise ProblemError(
            f"changed={changed} of total={total} is out of range: it takes a sample, and 0 ≤ changed ≤ total."
        )
    return 1.0 if changed == total else float(betaincinv(changed + 1, total - changed, confidence))


def conformal_quantile(errors: Tensor, confidence: float = 0.95) -> float | None:
    """Return the ``⌈(n + 1) · confidence⌉``-th smallest of n errors (split-conformal, Vovk et al. 2005).

    The error of one new sample is at most this with probability at least `confidence`, over the draw of the n samples
    and the new one together: not for each set of n samples. Ties only make that probability larger. It takes
    ``n ≥ confidence / (1 − confidence)`` samples, 19 for 0.95; fewer prove nothing, and the answer is None.

    Parameters
    ----------
    errors : Tensor (n,)
        One number per sample, finite; exchangeable with the new sample's.
    confidence : float
        In ``(0, 1)``, taken as the decimal that it is written as: 0.9 is nine tenths.

    Returns
    -------
    float or None
        One of the errors; None where n is too small.

    Raises
    ------
    ProblemError
        The errors are no vector of finite numbers, or the confidence is out of range.
    """
    level = _check_confidence(confidence)
    if errors.dim() != 1 or errors.is_complex():
        raise ProblemError(
            f"errors has shape {tuple(errors.shape)} and dtype {errors.dtype}: give one real number per sample."
        )
    values = errors.detach().double()
    _check_finite("errors", values)
    rank = math.ceil((len(values) + 1) * level)
    return float(values.kthvalue(rank).values) if rank <= len(values) else None


@dataclass(frozen=True)
class HeldOut:
    """What the held-out samples show, and what they prove about new ones; JSON values only.

    Attributes
    ----------
    total : int
        Held-out samples.
    changed : int or None
        Those whose prediction the pruning changed; None where the outputs are no class scores.
    changed_bound : float or None
        Upper bound on the rate of changed predictions among new samples, in ``(0, 1]``.
    certain : int or None
        Those whose prediction cannot have changed, because the dense margin exceeds ``√2‖d_p‖₂``;
        ``changed + certain ≤ total``.
    error_quantile : float or None
        What the error ``‖d_p‖₂`` of a new sample does not exceed, in units of the outputs; None where there are too
        few samples.
    confidence : float
        Of each of the two statements on its own.
    """

    total: int
    changed: int | None
    changed_bound: float | None
    certain: int | None
    error_quantile: float | None
    confidence: float

    def sentence(self) -> str:
        """Return one plain sentence. Numbers that bound are rounded up, so that it claims no more than was proven."""
        percent = f"{100 * self.confidence:.10g} %"
        if self.changed is None or self.changed_bound is None:
            classes = f"The outputs of {self.total} held-out samples are no class scores, so no class is compared"
        else:
            classes = (
                f"{self.changed} of {self.total} held-out samples change their predicted class ({self.certain} "
                f"provably keep it), so with {percent} confidence at most {_above(100 * self.changed_bound)} % of new "
                "samples of the same distribution do"
            )
        if self.error_quantile is None:
            level = _check_confidence(self.confidence)
            error = (
                f"they are too few to bound the output error of a new sample with probability {percent}, which takes "
                f"{math.ceil(level / (1 - level))}"
            )
        else:
            error = (
                f"with probability {percent} the output error (l2 norm) of a new sample of the same distribution is at "
                f"most {_above(self.error_quantile)}"
            )
        return f"{classes}, and {error}."


@dataclass(frozen=True, eq=False)
class SampleFigures:
    """What a guarantee needs of each sample, so that outputs of many batches need not be kept.

    Attributes
    ----------
    errors : Tensor (P,)
        ``‖d_p‖₂``, float64.
    changed, certain : int or None
        As in `HeldOut`.
    """

    errors: Tensor
    changed: int | None
    certain: int | None

    @staticmethod
    def of(dense_outputs: Tensor, pruned_outputs: Tensor, class_dim: int | None = -1) -> SampleFigures:
        """Compare both networks on one batch; arguments and errors are those of `held_out_guarantee`."""
        for name, outputs in (("dense_outputs", dense_outputs), ("pruned_outputs", pruned_outputs)):
            if outputs.dim() == 0 or outputs.numel() == 0 or not outputs.is_floating_point():
                raise ProblemError(
                    f"{name} has shape {tuple(outputs.shape)} and dtype {outputs.dtype}: give the raw floating-point "
                    "outputs of at least one sample, one row per sample."
                )
            _check_finite(name, outputs)
        if dense_outputs.shape != pruned_outputs.shape:
            raise ProblemError(
                f"dense_outputs has shape {tuple(dense_outputs.shape)} and pruned_outputs "
                f"{tuple(pruned_outputs.shape)}: give both networks the same samples."
            )
        dense = dense_outputs.detach().double()
        pruned = pruned_outputs.detach().to(dense)
        errors = (pruned - dense).reshape(len(dense), -1).norm(dim=1)
        scores = _class_scores(dense, pruned, class_dim)
        if scores is None:
            return SampleFigures(errors, None, None)
        dense, pruned = scores
        changed = int((dense.argmax(-1) != pruned.argmax(-1)).any(1).sum())
        top = dense.topk(2, dim=-1).values
        moved = math.sqrt(2) * (pruned - dense).norm(dim=-1)
        certain = int((top[..., 0] - top[..., 1] > moved * (1 + _ROUNDING)).all(1).sum())
        return SampleFigures(errors, changed, certain)

    @staticmethod
    def joined(figures: Sequence[SampleFigures]) -> SampleFigures:
        """Return those of all batches together.

        Raises
        ------
        ProblemError
            There are none, or only some of them are of class scores.
        """
        if not figures:
            raise ProblemError("figures is empty: nothing is proven without held-out samples.")
        changed = [part.changed for part in figures if part.changed is not None]
        certain = [part.certain for part in figures if part.certain is not None]
        if len(changed) not in (0, len(figures)):
            raise ProblemError("figures are of class scores in some batches only: give batches of one network.")
        errors = torch.cat([part.errors for part in figures])
        return SampleFigures(errors, sum(changed) if changed else None, sum(certain) if certain else None)

    def guarantee(self, confidence: float = 0.95) -> HeldOut:
        """Return what these samples prove.

        Raises
        ------
        ProblemError
            The confidence is out of range, or an error is not finite.
        """
        total, quantile = len(self.errors), conformal_quantile(self.errors, confidence)
        bound = None if self.changed is None else changed_rate_bound(self.changed, total, confidence)
        return HeldOut(total, self.changed, bound, self.certain, quantile, confidence)


def held_out_guarantee(
    dense_outputs: Tensor, pruned_outputs: Tensor, confidence: float = 0.95, class_dim: int | None = -1
) -> HeldOut:
    """Compare both networks on held-out samples, and say what that proves about new ones.

    One row of the leading dimension is one sample, because samples are drawn independently and the positions inside
    one are not. So a sample's error ``‖d_p‖₂`` goes over all of its other dimensions, and of outputs with many
    positions, such as ``(B, T, V)``, a sample counts as changed where the class of any position does, and as certain
    where that of every position is.

    A class is certain where the dense margin, largest score less second largest, exceeds ``√2‖d_p‖₂``: the difference
    of two scores moves by at most ``|d_i| + |d_j| ≤ √2‖d_p‖₂``.

    Parameters
    ----------
    dense_outputs, pruned_outputs : Tensor (P, C) or (P, ...)
        Raw outputs on the same samples, finite; compared in float64.
    confidence : float
        In ``(0, 1)``.
    class_dim : int or None
        The dimension that the classes compete in: the last, or 1 for maps ``(P, C, H, W)``. None where the outputs are
        no class scores (regression, embeddings); then, and where there are fewer than two classes or only one
        dimension, `changed`, `changed_bound` and `certain` are None: the sign or a threshold of a single score is not
        known here.

    Raises
    ------
    ProblemError
        There are no samples, shapes differ, values are not finite, or an option is out of range.
    """
    return SampleFigures.of(dense_outputs, pruned_outputs, class_dim).guarantee(confidence)


def _class_scores(dense: Tensor, pruned: Tensor, class_dim: int | None) -> tuple[Tensor, Tensor] | None:
    """Return both as ``(P, positions, C)``, or None where there are no two classes to compare."""
    if class_dim is None or dense.dim() == 1:
        return None
    # dimension 0 is the samples, by either of its names
    if class_dim == 0 or not -dense.dim() < class_dim < dense.dim():
        raise ProblemError(
            f"class_dim={class_dim} is no class dimension of outputs of shape {tuple(dense.shape)}: the first holds "
            "the samples; name another, or None for outputs that are no class scores."
        )
    classes = dense.shape[class_dim]
    if classes < 2:
        return None
    moved = (scores.movedim(class_dim, -1).reshape(len(dense), -1, classes) for scores in (dense, pruned))
    return next(moved), next(moved)


def _check_confidence(confidence: float) -> Fraction:
    """Return the confidence as the decimal that it is written as, so that ``(n + 1) · 0.9`` rounds as on paper."""
    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 < confidence < 1:
        raise ProblemError(f"confidence={confidence!r} is out of range: it lies between 0 and 1, such as 0.95.")
    return Fraction(repr(float(confidence)))


def _check_finite(name: str, values: Tensor) -> None:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ProblemError(f"{name} has {bad} NaN or infinite entries: nothing is proven about those; look for why.")


def _above(value: float) -> str:
    """Write a number with three digits, rounded up."""
    return f"{float(Context(prec=3, rounding=ROUND_CEILING).create_decimal(value)):.3g}"
