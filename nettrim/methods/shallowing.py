"""Shallowing: whole layers or residual blocks go whose features tell the classes apart hardly better than those before.

Chen and Zhao, "Shallowing Deep Networks: Layer-wise Pruning based on Feature Representations", TPAMI 2019. Theirs is
that a layer is judged by the improvement of its features, diagnosed on the labels, and goes below a threshold; that the
shortened network is then trained with the original one as its teacher, which is what finishing is for. Everything else
here is our reading or addition: pooled features, how the probes are trained, removing by count, gains counted from the
last unit that stays, the choices to compare with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from nettrim.errors import ProblemError, UnknownNameError, UnsupportedError

#: those that look at the labels
PROBED = ("probe", "probe-loss", "largest")
CHOICES = (*PROBED, "block-influence", "magnitude", "reverse", "forward", "random")
#: those whose scores a threshold can be compared with
_MEASURED = ("probe", "probe-loss", "block-influence")


@dataclass(frozen=True)
class Shallowing:
    """Removal of whole units in one shot, by what their features are worth.

    Parameters
    ----------
    choice : str
        Which units go first. "probe": those behind which linear probes gain the least accuracy (or mean average
        precision, of several labels to a sample). "probe-loss": the least cross-entropy. To compare with: "largest",
        those that gain the most; "block-influence", those that turn their input least; "magnitude", those of the least
        mean ``|w|``; "reverse" and "forward", the last and the first; "random", by the seed.
    rule : {"gain", "accumulate"}
        Whether a probe's gain is counted from the unit before, or from the last one that stays: many small gains add
        up.
    probe_seeds : int
        Splits of the samples into those that probes are trained and evaluated on, at least 1.
    probe_samples : int
        Calibration samples that are probed on at most, drawn by the seed.
    regularisation : float
        Of the probes: half of it times the squared weights is added to the mean cross-entropy; positive.
    held : float
        Fraction of those samples that a probe is evaluated on, in (0, 1).

    Raises
    ------
    ProblemError, UnknownNameError
        A setting is out of its range.
    """

    choice: str = "probe"
    rule: str = "gain"
    probe_seeds: int = 3
    probe_samples: int = 10_000
    regularisation: float = 1e-3
    held: float = 0.3

    name: ClassVar[str] = "shallowing"
    amounts: ClassVar[tuple[str, ...]] = ("units", "tolerance", "sparsity")
    removes: ClassVar[str] = "units"

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.choice not in CHOICES:
            raise UnknownNameError(f"choice={self.choice!r} is unknown: use one of {', '.join(CHOICES)}.")
        if self.rule not in ("gain", "accumulate"):
            raise UnknownNameError(f"rule={self.rule!r} is unknown: use gain or accumulate.")
        if self.rule == "accumulate" and self.choice not in ("probe", "probe-loss"):
            raise ProblemError(f"rule='accumulate' adds up the gains of probes: choice={self.choice!r} has none.")
        for name in ("probe_seeds", "probe_samples"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ProblemError(f"{name} is {count!r}; pass an integer of at least 1")
        if not 0 < self.regularisation < math.inf:
            raise ProblemError(f"regularisation is {self.regularisation!r}; pass a positive number such as 1e-3")
        if not 0 < self.held < 1:
            raise ProblemError(f"held is {self.held!r}; pass a fraction of the samples in (0, 1)")

    @property
    def probes(self) -> bool:
        """Whether it trains probes, for which the samples need labels."""
        return self.choice in PROBED

    def needs(self) -> str:
        """Return "weight": of a single layer no rows are looked at."""
        return "weight"

    def check_amount(self, amount: str, biased: bool) -> None:
        """Refuse a threshold on what is no measure of a unit's worth.

        Raises
        ------
        UnsupportedError
            It is.
        """
        if amount == "tolerance" and self.choice not in _MEASURED:
            raise UnsupportedError(
                f"tolerance is the gain that a unit has to have, and choice={self.choice!r} measures none: give units "
                "or sparsity."
            )
