"""What a run keeps of a layer, and what its ledger says: one record per layer of what was promised and measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from nettrim.core.solution import Status


@dataclass(frozen=True, eq=False)
class LayerEvidence:
    """What is kept of one layer: both weights, and for a pruned layer how it was solved.

    Attributes
    ----------
    name : str
    relu, pruned, clean : bool
        `clean`: it was solved on the dense network's inputs.
    dense_weight, weight : Tensor (M, N), or (C_out, C_in/groups, *kernel)
        Batch norm folded; in the model's dtype, in float64 where there was one to fold.
    dense_bias, bias : Tensor (M,) or None
    multipliers : Tensor (P, M) or None
    facts : dict
        Of a grouped convolution under "blocks", one for each group.
    seconds : float
    """

    name: str
    relu: bool
    pruned: bool
    clean: bool
    dense_weight: Tensor
    dense_bias: Tensor | None
    weight: Tensor
    bias: Tensor | None
    multipliers: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def removed(self) -> bool:
        """Whether the layer is gone with its unit; its weight here is what the network without it is like."""
        return bool(self.facts.get("removed"))

    @property
    def mask(self) -> Tensor:
        """The weights that are kept, of the weight's shape; none of a layer that is gone."""
        return torch.zeros_like(self.weight, dtype=torch.bool) if self.removed else self.weight != 0


@dataclass(frozen=True)
class LayerRecord:
    """One layer's line in the ledger. Errors are Frobenius norms over the calibration samples, in the units of
    the outputs.

    Attributes
    ----------
    name, kind : str
    rows, total_rows : int
        Those that its convex program was made of (0 where there is none), and all.
    kept, numel : int
        Weights that are not zero, and all; biases are not counted.
    objective, lower_bound, gap, violation : float or None
        The certificate; None for a method that solves no convex program, bound and gap also where the weight is not
        feasible: they prove nothing there.
    promised : float or None
        What `measured` cannot exceed, where `rows` are all; else what the error on those rows cannot.
    measured : float
        ``‖σ(X Ûᵀ) − Y‖`` on the inputs that the layer was solved for, all rows.
    target_norm : float
        ``‖Y‖``.
    clean_error, clean_change : float
        ``ε̂``, the same on clean inputs, and ``‖Ẑ − Z‖`` before the activation.
    network_error : float
        ``e_l``, at this layer's output in the pruned network.
    held_out : float or None
        ``e_l / ‖Y_l‖`` on the held-out samples: relative, because their number is another.
    bounds : dict
        Name to bound on `network_error`; the names are those of `nettrim.pipeline.bounds`.
    norms : dict
        Of the dense and the pruned weight; of a convolution, those of the operator.
    norm_method : str
        How the largest singular value was bounded.
    attributed : float
        ``‖h_l − h_{l−1}‖``, its share of the error at the network's output.
    remark : str or None
        Why promise or bound lie more than tenfold above what was measured, where they do.
    bytes : dict
        Storage of the weight in each format.
    seconds : float
    facts : dict
        How the program was set up and solved.
    """

    name: str
    kind: str
    rows: int
    total_rows: int
    kept: int
    numel: int
    objective: float | None
    lower_bound: float | None
    gap: float | None
    violation: float | None
    promised: float | None
    measured: float
    target_norm: float
    clean_error: float
    clean_change: float
    network_error: float
    held_out: float | None
    bounds: dict[str, float]
    norms: dict[str, float]
    norm_method: str
    attributed: float
    remark: str | None
    bytes: dict[str, int]
    seconds: float
    facts: dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One run of a chain: from which network to which, and how far apart these are.

    Attributes
    ----------
    method : str
    finish : str or None
        How the network was trained on, if it was.
    bound, measured, output_norm : float
        Of its own ledger: on ``‖ŷ − y‖_F`` against the network that it started from.
    kept, numel : int
        Weights of all layers of the network that it started from: those that it left (in layers that it pruned, those
        that are not zero), and all, zeros too.
    before, after, data : str
        Digests of the network that it started from, of the one that it gave, and of the calibration samples.
    """

    method: str
    finish: str | None
    bound: float
    measured: float
    output_norm: float
    kept: int
    numel: int
    before: str
    after: str
    data: str


@dataclass(frozen=True)
class Chain:
    """What several runs did together, from the first network to the last.

    Attributes
    ----------
    stages : tuple of Stage
    bound : float or None
        On `measured`: the sum of the runs' bounds; None where they do not add up.
    why : str or None
        Why they do not.
    measured, output_norm : float
        ``‖y_k − y₀‖_F`` and ``‖y₀‖_F`` at the output, on the last run's calibration samples.
    held_out : float or None
        Their ratio on the held-out samples.
    accuracy : dict
        Split to {"dense", "pruned"}: of the first network and the last.
    """

    stages: tuple[Stage, ...]
    bound: float | None
    why: str | None
    measured: float
    output_norm: float
    held_out: float | None
    accuracy: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Ledger:
    """The whole network's account.

    Attributes
    ----------
    method, schedule : str
    records : tuple of LayerRecord
        One per pruned layer, in execution order.
    bounds : dict
        Name to bound on `measured`, all of them valid.
    bound : float
        The tightest of them.
    measured : float
        ``‖ŷ − y‖_F`` at the network's output, on the calibration samples.
    output_norm : float
        ``‖y‖_F``.
    held_out : float or None
        ``‖ŷ − y‖_F / ‖y‖_F`` on the held-out samples.
    accuracy : dict
        Split to {"dense", "pruned"}, where there are labels.
    guarantee : dict or None
        What the held-out samples prove about new ones: `nettrim.pipeline.guarantees.HeldOut`.
    unbounded : str or None
        The first step behind which no composed bound holds, because nothing is known of how it passes errors on.
    unsupported : dict
        Weights that were left dense because they cannot be pruned, and why.
    finish : dict or None
        How the network was trained on after pruning; None for one that is merely pruned.
    before : Ledger or None
        Of the merely pruned network, where it was trained on: certificates are of its weights.
    costs : dict
        "dense" and "pruned": weights of all layers that are there, and multiply-adds of one sample.
    chain : Chain or None
        From the network that the first of several runs started from, where there was a run before this one.
    """

    method: str
    schedule: str
    records: tuple[LayerRecord, ...]
    bounds: dict[str, float]
    bound: float
    measured: float
    output_norm: float
    held_out: float | None
    accuracy: dict[str, dict[str, float]]
    guarantee: dict[str, Any] | None = None
    unbounded: str | None = None
    unsupported: dict[str, str] = field(default_factory=dict)
    finish: dict[str, Any] | None = None
    before: Ledger | None = None
    costs: dict[str, dict[str, int]] = field(default_factory=dict)
    chain: Chain | None = None

    @property
    def kept(self) -> int:
        """Weights kept in all pruned layers."""
        return sum(record.kept for record in self.records)

    @property
    def numel(self) -> int:
        """Weights of all pruned layers."""
        return sum(record.numel for record in self.records)

    @property
    def uncertified(self) -> dict[str, str]:
        """Layers whose certificate missed the tolerance, and how; before it was trained on, if it was."""
        records = self.records if self.before is None else self.before.records
        ended = {record.name: Status[record.facts.get("status", "SOLVED")] for record in records}
        return {name: status.name for name, status in ended.items() if not status.accepted}

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        before = None if self.before is None else self.before.as_dict()
        return asdict(self) | {"records": [asdict(record) for record in self.records], "before": before}
