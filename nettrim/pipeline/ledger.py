"""One record per layer of what was promised and what was measured, and the bounds that join them.

`build_ledger` makes every figure from weights, multipliers and activations alone. `prune` calls it once, and
`verify` calls it again on what is stored: that the two agree is the check.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from nettrim.core.refine import evidence_of
from nettrim.core.solution import FEASIBLE, Status, judge
from nettrim.methods.program import derive, join_bias, layer_problem, promise
from nettrim.pipeline.bounds import Link, layer_bounds, spectral_norm, telescoped
from nettrim.pipeline.evaluate import accuracy


@dataclass(frozen=True, eq=False)
class LayerEvidence:
    """What is kept of one layer of the chain: both weights, and for a pruned layer how it was solved.

    Attributes
    ----------
    name : str
    relu, pruned, clean : bool
        `clean`: it was solved on the dense network's inputs.
    dense_weight, weight : Tensor (M, N)
    dense_bias, bias : Tensor (M,) or None
    multipliers : Tensor (P, M) or None
    facts : dict
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


@dataclass(frozen=True, eq=False)
class Activations:
    """Inputs and raw outputs of every layer of the chain, on one split.

    Attributes
    ----------
    split : str
    inputs, outputs : list of Tensor (P, N) and (P, M)
    """

    split: str
    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass(frozen=True)
class LayerRecord:
    """One layer's line in the ledger. Errors are Frobenius norms over the calibration samples, in the units of
    the outputs.

    Attributes
    ----------
    name : str
    kept, numel : int
        Weights that are not zero, and all; biases are not counted.
    objective, lower_bound, gap, violation : float or None
        The certificate; None for a method that solves no convex program, bound and gap also where the weight is not
        feasible: they prove nothing there.
    promised : float or None
        What `measured` cannot exceed.
    measured : float
        ``‖σ(X Ûᵀ) − Y‖`` on the inputs that the layer was solved for.
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
        Of the dense and the pruned weight.
    bytes : dict
        Storage of the weight in each format.
    seconds : float
    facts : dict
        How the program was set up and solved.
    """

    name: str
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
    bytes: dict[str, int]
    seconds: float
    facts: dict[str, Any]


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
    finish : dict or None
        How the network was trained on after pruning; None for one that is merely pruned.
    before : Ledger or None
        Of the merely pruned network, where it was trained on: certificates are of its weights.
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
    finish: dict[str, Any] | None = None
    before: Ledger | None = None

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


def build_ledger(
    method: str,
    schedule: str,
    layers: list[LayerEvidence],
    dense: Activations,
    pruned: Activations,
    ladder: list[Tensor],
    labels: Tensor | None = None,
    held_out: tuple[Activations, Activations, Tensor | None] | None = None,
    finish: dict[str, Any] | None = None,
    before: Ledger | None = None,
) -> Ledger:
    """Make the ledger from evidence.

    Parameters
    ----------
    method, schedule : str
    layers : list of LayerEvidence
        Every Linear layer of the chain, pruned or not.
    dense, pruned : Activations
        Of both networks on the calibration samples.
    ladder : list of Tensor
        The output with 0, 1, … of the pruned layers in place.
    labels : Tensor (P,), optional
        Of the calibration samples.
    held_out : (Activations, Activations, Tensor or None), optional
        Of both networks on the held-out samples, and their labels.
    finish : dict, optional
        How the network was trained on.
    before : Ledger, optional
        Of the merely pruned network.
    """
    measures = [_measure(layer, i, dense, pruned) for i, layer in enumerate(layers)]
    bounds = layer_bounds([_link(layer, m) for layer, m in zip(layers, measures, strict=True)], schedule)
    bounds[-1]["telescoped"] = telescoped(ladder)
    relative = [_relative_error(layers, i, *held_out[:2]) if held_out else None for i in range(len(layers))]
    records = tuple(
        LayerRecord(
            name=layer.name,
            held_out=relative[i],
            bounds=bounds[i],
            seconds=layer.seconds,
            **{key: value for key, value in measures[i].items() if key != "excess"},
        )
        for i, layer in enumerate(layers)
        if layer.pruned
    )
    splits = {"calibration": (dense, pruned, labels)}
    if held_out:
        splits[held_out[0].split] = held_out
    return Ledger(
        method=method,
        schedule=schedule,
        records=records,
        bounds=bounds[-1],
        bound=min(bounds[-1].values()),
        measured=measures[-1]["network_error"],
        output_norm=measures[-1]["target_norm"],
        held_out=relative[-1],
        accuracy={
            split: {"dense": accuracy(y, lab), "pruned": accuracy(y_hat, lab)}
            for split, (first, after, lab) in splits.items()
            if lab is not None
            for y, y_hat in [(_act(layers[-1], first.outputs[-1]), _act(layers[-1], after.outputs[-1]))]
        },
        finish=finish,
        before=before,
    )


def storage_bytes(weight: Tensor) -> dict[str, int]:
    """Return the bytes of a weight ``(M, N)``: dense, CSR (int32 indices), and a bitmask with packed values."""
    item, kept = weight.element_size(), int((weight != 0).sum())
    return {
        "dense": weight.numel() * item,
        "csr": kept * (item + 4) + 4 * (weight.shape[0] + 1),
        "bitmask": kept * item + math.ceil(weight.numel() / 8),
    }


def _measure(layer: LayerEvidence, i: int, dense: Activations, pruned: Activations) -> dict[str, Any]:
    def apply(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
        outputs = inputs @ weight.double().T
        return outputs if bias is None else outputs + bias.double()

    targets = _act(layer, dense.outputs[i])
    on_clean = apply(layer.weight, layer.bias, dense.inputs[i])
    error = float((_act(layer, on_clean) - targets).norm())
    network_error = float((_act(layer, pruned.outputs[i]) - targets).norm())
    weight, dense_weight = layer.weight.double(), layer.dense_weight.double()
    certificate, promised, facts, excess = None, None, layer.facts, 0.0
    if layer.multipliers is not None:
        inputs = dense.inputs[i] if layer.clean else pruned.inputs[i]
        bias = None if layer.dense_bias is None else layer.dense_bias.double()
        # what follows from the data is derived again, not read
        solved = join_bias(layer.weight, layer.bias, facts["bias"]).double()
        facts = facts | derive(facts, layer.clean, inputs, targets, dense_weight, bias, solved)
        problem = layer_problem(facts, inputs, targets, dense_weight, bias)
        evidence = evidence_of(problem, solved, layer.multipliers.double())
        certificate = evidence.certificate
        promised = promise(facts, certificate, targets)
        excess = certificate.excess * math.sqrt(int((targets <= 0).sum()))
        ended = Status[facts["status"]]
        otherwise = Status.MAX_ITER if ended is Status.SOLVED else ended
        facts = facts | {"status": judge(certificate, facts["tol"], otherwise).name}
        if ended is Status.REFINED:
            facts = facts | {"nearest": evidence.nearest}
    # the bound of a problem whose weight is not feasible proves nothing, and may be as large as you like
    proven = certificate is not None and certificate.violation <= FEASIBLE
    return {
        "facts": facts,
        "promised": promised,
        "excess": excess,
        "kept": int((layer.weight != 0).sum()),
        "numel": layer.weight.numel(),
        "objective": certificate and certificate.objective,
        "lower_bound": certificate.lower_bound if certificate is not None and proven else None,
        "gap": certificate.gap if certificate is not None and proven else None,
        "violation": certificate and certificate.violation,
        "measured": error if layer.clean else network_error,
        "target_norm": float(targets.norm()),
        "clean_error": error,
        "clean_change": float((on_clean - dense.outputs[i]).norm()),
        "network_error": network_error,
        "norms": {
            "dense_l1": float(dense_weight.abs().sum()),
            "dense_l2": spectral_norm(dense_weight),
            "pruned_l1": float(weight.abs().sum()),
            "pruned_l2": spectral_norm(weight),
            "pruned_fro": float(weight.norm()),
        },
        "bytes": storage_bytes(layer.weight),
    }


def _act(layer: LayerEvidence, outputs: Tensor) -> Tensor:
    return outputs.clamp(min=0) if layer.relu else outputs


def _link(layer: LayerEvidence, measure: dict[str, Any]) -> Link:
    facts = measure["facts"]
    return Link(
        pruned=layer.pruned,
        clean=layer.clean,
        promised=measure["promised"],
        asked=facts.get("asked"),
        floor=facts.get("floor", 0.0),
        excess=measure["excess"],
        gamma=facts.get("gamma", 1.0),
        kappa=facts.get("kappa", 1.0),
        violation=measure["violation"] or 0.0,
        halfspace=facts.get("form") == "halfspace",
        clean_error=measure["clean_error"],
        clean_change=measure["clean_change"],
        **measure["norms"],
    )


def _relative_error(layers: list[LayerEvidence], i: int, dense: Activations, pruned: Activations) -> float:
    y, y_hat = _act(layers[i], dense.outputs[i]), _act(layers[i], pruned.outputs[i])
    size = float(torch.linalg.vector_norm(y))
    return float((y_hat - y).norm()) / size if size > 0 else 0.0
