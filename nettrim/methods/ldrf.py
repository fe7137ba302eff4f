"""LDRF: neurons and channels are taken out, and what they carried is squeezed into those that stay.

Every layer is read as what it takes of its input channels (its embedding, `nettrim.methods.decompose`) and what it
makes of that. Channels are chosen simply, and incoming and outgoing factors of those that stay are optimised together,
through the activation, until they carry the dense network's embedding again. The factors are multiplied back, so depth
does not change. Decomposition, Top-k, the joint objective and the recomposition are the paper's; the form that works
on recomposed weights ("direct"), its start at the least squares solution and all numbers are our reading.

The same steps without the joint optimisation are the least-squares baselines: ThiNet, channel pruning by LASSO.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError
from nettrim.methods.channel_selection import SELECTORS

_CHOICES = {
    "variant": ("direct", "core"),
    "selector": tuple(SELECTORS),
    "target": ("embedding", "outputs"),
    "basis": ("weight", "response"),
    "allocate": ("uniform", "capacity"),
    "head": ("fit", "compose"),
}


@dataclass(frozen=True)
class Ldrf:
    """Neuron and channel pruning by decomposition and recomposition.

    Parameters
    ----------
    variant : {"direct", "core"}
        "direct" optimises recomposed weights, from the least squares solution on. "core", as published, optimises the
        decomposition's factors and multiplies them back: of a convolution fewer numbers, and fewer freedoms.
    selector : {"l1", "energy", "lasso", "thinet", "random"}
        What chooses the channels that stay.
    steps : int ≥ 0
        Gradient steps for each layer; without any it is the least-squares baseline.
    learning_rate : float > 0
    target : {"embedding", "outputs"}
        Whether the steps fit the dense network's embedding, or as a control of the same effort the next layer's
        outputs, whose weight is then free.
    basis : {"weight", "response"}
        Whether the embedding is ordered by the weight alone, or by the responses on the data.
    energy : float in (0, 1]
        Share of the squared singular values that the embedding's rank keeps; 1 keeps all.
    capacity_tolerance : float in [0, 1), optional
        Instead of `energy`: the least common energy with which at most that share of the samples change, in accuracy
        where there are labels, else in the class that the network gives. The rank is then a layer's valid capacity.
    allocate : {"uniform", "capacity"}
        How a budget is split: the same fraction of every layer's channels, or in proportion to the ranks.
    ridge : float ≥ 0
        Of least squares, relative to the mean of the diagonal.
    rows : int ≥ 16, optional
        The most rows of a least squares; by default 16,384, as many as there are samples, or ten for every column.
    held : float in (0, 0.5]
        Share of the samples that decides which iterate is taken.
    refit : bool
        Whether the next layer is fitted to the dense network's outputs by least squares; without it, and without
        steps, channels are merely cut.
    head : {"fit", "compose"}
        In "core": whether a layer whose own channels stay is fitted to the dense network's outputs, or composed of the
        factors, too.

    Raises
    ------
    ProblemError, UnknownNameError, UnsupportedError
        A setting is out of range or unknown, or two do not go together.
    """

    variant: str = "direct"
    selector: str = "l1"
    steps: int = 1000
    learning_rate: float = 1e-2
    target: str = "embedding"
    basis: str = "weight"
    energy: float = 1.0
    capacity_tolerance: float | None = None
    allocate: str = "uniform"
    ridge: float = 1e-6
    rows: int | None = None
    held: float = 0.1
    refit: bool = True
    head: str = "fit"

    name: ClassVar[str] = "ldrf"
    amounts: ClassVar[tuple[str, ...]] = ("channels", "macs", "sparsity")
    removes: ClassVar[str] = "channels"

    def __post_init__(self) -> None:
        """Refuse settings that make no method."""
        for key, known in _CHOICES.items():
            if getattr(self, key) not in known:
                raise UnknownNameError(f"{key}={getattr(self, key)!r} is unknown: use {' or '.join(known)}.")
        _whole("steps", self.steps, 0)
        if self.rows is not None:
            _whole("rows", self.rows, 16)
        _within("learning_rate", self.learning_rate, 0, float("inf"), "(0, ∞)")
        _within("energy", self.energy, 0, 1, "(0, 1]")
        _within("ridge", self.ridge, 0, float("inf"), "[0, ∞)")
        _within("held", self.held, 0, 0.5, "(0, 0.5]")
        if self.capacity_tolerance is not None:
            _within("capacity_tolerance", self.capacity_tolerance, 0, 1, "[0, 1)")
            if self.energy != 1:
                raise ProblemError(
                    f"energy={self.energy} and capacity_tolerance={self.capacity_tolerance} both say the rank: give "
                    "one."
                )
        if self.variant == "core" and self.target == "outputs":
            raise UnsupportedError("target='outputs' has no factors for variant='core' to compose: use 'direct'.")
        if not self.refit and (self.steps or self.variant == "core"):
            raise UnsupportedError("refit=False merely cuts channels: give steps=0 and variant='direct' with it.")

    @classmethod
    def thinet(cls, **settings: Any) -> Ldrf:
        """Return ThiNet: greedy choice by the next layer's outputs, and its least squares."""
        return cls(**{**dict[str, Any](selector="thinet", steps=0), **settings})

    @classmethod
    def lasso(cls, **settings: Any) -> Ldrf:
        """Return channel pruning by LASSO (He 2017), and its least squares."""
        return cls(**{**dict[str, Any](selector="lasso", steps=0), **settings})

    @classmethod
    def cut(cls, **settings: Any) -> Ldrf:
        """Return the plain cut: the largest ``ℓ1`` norms stay, and nothing is fitted."""
        return cls(**{**dict[str, Any](steps=0, refit=False), **settings})

    @classmethod
    def control(cls, **settings: Any) -> Ldrf:
        """Return the control of the same effort: as many steps toward the next layer's outputs."""
        return cls(**{**dict[str, Any](target="outputs"), **settings})

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ProblemError(f"{name}={value!r} is out of range: give a whole number ≥ {least}.")


def _within(name: str, value: object, low: float, high: float, where: str) -> None:
    """Refuse what is no number between two; brackets in `where` say which ends it may be."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (value == low and where[0] == "(") or (value == high and where[-1] == ")"):
        raise ProblemError(f"{name}={value!r} is out of range: give a number in {where}.")
