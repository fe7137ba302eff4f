"""Linear probes: how well the classes can be told from the features of every unit, by logistic regression alone.

Alain and Bengio, "Understanding intermediate layers using linear classifier probes", 2016. That a layer is worth what
the probe behind it gains on the probe before it is the criterion of Chen and Zhao, "Shallowing Deep Networks:
Layer-wise Pruning based on Feature Representations", 2019; how they regularise, split and pool is not known to us, and
what is done here is our reading.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nettrim.errors import MissingExtraError, ProblemError

ACCURACY, PRECISION = "accuracy", "mean average precision"
_TOLERANCE = 1e-4  # of the gradient's largest entry
_ITERATIONS = 1000
_TINY = 1e-12  # a probability is taken for no less


@dataclass(frozen=True)
class ProbePoint:
    """The probe of one unit, on samples that it was not trained on.

    An error is the larger of two standard errors: over the held-out samples of one split, and over the splits. Splits
    draw from the same samples, so that having several does not make the first any smaller. Of a difference it is that
    of the same samples' differences; of a mean average precision, the first is over the classes.

    Attributes
    ----------
    name : str
        Of the unit, "stem" of what the first one reads.
    width : int
        Features.
    score, score_error : float
        Accuracy, or mean average precision, in [0, 1]; the mean over the splits.
    loss, loss_error : float
        Cross-entropy in nats.
    gain, gain_error : float
        Score less that of the point before; 0 of the first.
    loss_gain, loss_gain_error : float
        Cross-entropy of the point before less this one; 0 of the first.
    """

    name: str
    width: int
    score: float
    score_error: float
    loss: float
    loss_error: float
    gain: float = 0.0
    gain_error: float = 0.0
    loss_gain: float = 0.0
    loss_gain_error: float = 0.0


@dataclass(frozen=True)
class ProbeCurve:
    """The probes of all units of a network.

    Attributes
    ----------
    measure : str
        "accuracy" or "mean average precision".
    points : tuple of ProbePoint
        The stem, then the units in execution order.
    trained, held : int
        Samples that a probe is trained and evaluated on.
    seeds : int
        Splits.
    regularisation : float
    unconverged : int
        Fits that ended at the limit of iterations.
    seconds : float
    stages : tuple of int
        Of every unit, without the stem.
    removed : tuple of str
        Units that were removed on the grounds of it.
    """

    measure: str
    points: tuple[ProbePoint, ...]
    trained: int
    held: int
    seeds: int
    regularisation: float
    unconverged: int
    seconds: float
    stages: tuple[int, ...] = ()
    removed: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self) | {
            "points": [asdict(point) for point in self.points],
            "stages": list(self.stages),
            "removed": list(self.removed),
        }

    @staticmethod
    def of_dict(stored: Mapping[str, Any]) -> ProbeCurve:
        """Read what `as_dict` wrote."""
        lists = {"stages": tuple(stored["stages"]), "removed": tuple(stored["removed"])}
        return ProbeCurve(**{**stored, **lists, "points": tuple(ProbePoint(**point) for point in stored["points"])})


def probe(
    features: Mapping[str, Tensor],
    labels: Tensor,
    seeds: int = 3,
    regularisation: float = 1e-3,
    held: float = 0.3,
    seed: int = 0,
) -> ProbeCurve:
    """Train and evaluate a probe on the features of every unit.

    A probe is multinomial logistic regression on standardised features: the mean cross-entropy plus
    ``regularisation / 2 ‖W‖²`` is minimised. With several labels to a sample it is one of two classes for each label.

    Parameters
    ----------
    features : mapping from str to Tensor (P, C)
        In the order in which each one gains on the one before.
    labels : Tensor (P,) of integers, or (P, K) of 0 and 1
        Classes, or which of ``K`` labels a sample has.
    seeds : int
        Splits of the samples, at least 1.
    regularisation : float
        Positive.
    held : float
        Fraction of the samples of every class that is not trained on, in (0, 1).
    seed : int
        Decides the splits.

    Raises
    ------
    ProblemError
        There are no such labels, one class alone, or too few samples of all.
    MissingExtraError
        scikit-learn is not installed.
    """
    began = time.monotonic()
    require_sklearn()
    several = _is_several(labels)
    wanted = labels.cpu().numpy().astype(np.int64)
    if any(len(part) != len(wanted) for part in features.values()):
        raise ProblemError(f"features are of {len(next(iter(features.values())))} samples and labels of {len(wanted)}.")
    arrays = {name: part.cpu().double().numpy() for name, part in features.items()}
    judge = _several if several else _single
    judged: dict[str, list[_Judged]] = {name: [] for name in arrays}
    splits = [_split(wanted, held, seed + number) for number in range(seeds)]
    for train, test in splits:
        for name, array in arrays.items():
            judged[name].append(
                judge(*_standardised(array[train], array[test]), wanted[train], wanted[test], regularisation)
            )
    points: list[ProbePoint] = []
    before: list[_Judged] | None = None
    for name, own in judged.items():
        points.append(_point(name, arrays[name].shape[1], own, before))
        before = own
    return ProbeCurve(
        PRECISION if several else ACCURACY,
        tuple(points),
        len(splits[0][0]),
        len(splits[0][1]),
        seeds,
        regularisation,
        sum(each.unconverged for own in judged.values() for each in own),
        time.monotonic() - began,
    )


def check_labels(labels: Tensor | None, choice: str) -> Tensor:
    """Return labels that probes can be trained on.

    Raises
    ------
    ProblemError
        There are none, or they are of another form.
    """
    if labels is None:
        raise ProblemError(
            f"choice={choice!r} trains probes and batches have no labels: pass (input, label) pairs, or use one of "
            "block-influence, magnitude, reverse, forward, random."
        )
    _is_several(labels)
    return labels


def require_sklearn() -> None:
    """Raise `MissingExtraError` where no probe can be trained, so that it is said before any work."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "probes are trained by scikit-learn, which is not installed; run: pip install nettrim[demo]"
        ) from error


@dataclass(frozen=True, eq=False)
class _Judged:
    """One probe on one split: a score and a loss, and what their spread is taken over."""

    score: float
    loss: float
    parts: np.ndarray[Any, Any]  # of the score: one for each held-out sample, or for each class
    losses: np.ndarray[Any, Any]  # one for each held-out sample
    unconverged: int


def _is_several(labels: Tensor) -> bool:
    """Tell whether a sample has several labels."""
    whole = not labels.is_floating_point() and not labels.is_complex()
    if labels.dim() == 1 and whole and labels.dtype != torch.bool:
        if int(labels.min()) == int(labels.max()):
            raise ProblemError(f"all labels are {int(labels[0])}, and a probe tells classes apart; pass at least two")
        return False
    if labels.dim() == 2 and not labels.is_complex() and bool(((labels == 0) | (labels == 1)).all()):
        return True
    raise ProblemError(
        f"labels are {labels.dtype} of shape {tuple(labels.shape)}; probes take integer classes (P,), or (P, K) of 0 "
        "and 1"
    )


def _split(labels: np.ndarray[Any, Any], held: float, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the samples to train and to evaluate on: of every class the same share, and at least one to train on."""
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).numpy()
    if labels.ndim > 1:
        apart = round(held * len(labels))
        train, test = drawn[apart:], drawn[:apart]
    else:
        order = drawn[np.argsort(labels[drawn], kind="stable")]
        _, counts = np.unique(labels, return_counts=True)
        ends = np.cumsum(counts)
        cuts = [end - count + min(round(held * count), count - 1) for end, count in zip(ends, counts, strict=True)]
        parts = [(order[end - n : cut], order[cut:end]) for end, n, cut in zip(ends, counts, cuts, strict=True)]
        test, train = (np.concatenate(side) for side in zip(*parts, strict=True))
    if not len(test) or not len(train):
        raise ProblemError(f"held={held} of {len(labels)} samples leaves none to train or to evaluate on; pass more")
    return np.sort(train), np.sort(test)


def _standardised(
    train: np.ndarray[Any, Any], test: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return both with the mean and deviation of the first; a feature that is constant there is zero."""
    mean, deviation = train.mean(0), train.std(0)
    inverse = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 1e-7 * np.abs(mean))
    return (train - mean) * inverse, (test - mean) * inverse


def _fitted(train: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], regularisation: float) -> tuple[Any, int]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    # scikit-learn weighs the sum of all losses by C against half the squared weights
    model = LogisticRegression(C=1 / (regularisation * len(train)), tol=_TOLERANCE, max_iter=_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
        model.fit(train, labels)
    return model, int(model.n_iter_.max() >= _ITERATIONS)


def _single(
    train: np.ndarray[Any, Any],
    test: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any],
    wanted: np.ndarray[Any, Any],
    regularisation: float,
) -> _Judged:
    """Fit one probe of all classes."""
    model, unconverged = _fitted(train, labels, regularisation)
    chances = model.predict_proba(test)
    right = (model.classes_[chances.argmax(1)] == wanted).astype(float)
    own = chances[np.arange(len(wanted)), np.searchsorted(model.classes_, wanted)]
    losses = -np.log(np.maximum(own, _TINY))
    return _Judged(float(right.mean()), float(losses.mean()), right, losses, unconverged)


def _several(
    train: np.ndarray[Any, Any],
    test: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any],
    wanted: np.ndarray[Any, Any],
    regularisation: float,
) -> _Judged:
    """Fit one probe for each label; labels that one part has none or nothing else of do not count."""
    from sklearn.metrics import average_precision_score

    precisions, losses, unconverged = [], [], 0
    for k in range(labels.shape[1]):
        if any(not 0 < part[:, k].sum() < len(part) for part in (labels, wanted)):
            continue
        model, limited = _fitted(train, labels[:, k], regularisation)
        unconverged += limited
        chances = model.predict_proba(test)
        precisions.append(average_precision_score(wanted[:, k], chances[:, 1]))
        losses.append(-np.log(np.maximum(chances[np.arange(len(wanted)), wanted[:, k]], _TINY)))
    if not precisions:
        raise ProblemError("no label is both there and absent in what is trained and evaluated on; pass more samples")
    each = np.mean(losses, axis=0)
    return _Judged(float(np.mean(precisions)), float(each.mean()), np.array(precisions), each, unconverged)


def _point(name: str, width: int, own: list[_Judged], before: list[_Judged] | None) -> ProbePoint:
    """Return what the splits say of one unit, and of what it gains on the one before."""
    score, score_error = _mean([each.score for each in own], [each.parts for each in own])
    loss, loss_error = _mean([each.loss for each in own], [each.losses for each in own])
    if before is None:
        return ProbePoint(name, width, score, score_error, loss, loss_error)
    pairs = list(zip(own, before, strict=True))
    gain, gain_error = _mean([a.score - b.score for a, b in pairs], [a.parts - b.parts for a, b in pairs])
    less, less_error = _mean([b.loss - a.loss for a, b in pairs], [b.losses - a.losses for a, b in pairs])
    return ProbePoint(name, width, score, score_error, loss, loss_error, gain, gain_error, less, less_error)


def _mean(values: list[float], parts: list[np.ndarray[Any, Any]]) -> tuple[float, float]:
    """Return the mean over splits, and the larger of its standard errors over parts of a split and over splits."""
    within = float(np.mean([part.std() / np.sqrt(len(part)) for part in parts]))
    over = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return float(np.mean(values)), max(within, over)
