"""The ledger of a network: every figure of `nettrim.pipeline.records`, and the bounds that join them.

`build_ledger` makes every figure from weights, multipliers and activations alone. `prune` calls it once, and
`verify` calls it again on what is stored: that the two agree is the check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from nettrim.network.matrix import Window
from nettrim.network.norms import NormBound, conv_norm, frobenius_conv_norm, l1_conv_norm, linear_norm
from nettrim.network.trace import LayerGraph, LayerSpec, weight_of, window_of
from nettrim.pipeline.bounds import Link, compose, telescoped
from nettrim.pipeline.measure import Measured
from nettrim.pipeline.outputs import sizes
from nettrim.pipeline.proof import Proof
from nettrim.pipeline.records import LayerEvidence, LayerRecord, Ledger

_APART = 10.0  # a bound that is further above what it bounds is explained


def build_ledger(
    method: str,
    schedule: str,
    graph: LayerGraph,
    layers: Sequence[LayerEvidence],
    proofs: Mapping[str, Proof],
    measured: Measured,
    held_out: Measured | None,
    state: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    finish: dict[str, Any] | None = None,
    before: Ledger | None = None,
    costs: dict[str, dict[str, int]] | None = None,
) -> Ledger:
    """Make the ledger from evidence.

    Parameters
    ----------
    method, schedule : str
    graph : LayerGraph
    layers : sequence of LayerEvidence
        Every layer of the graph, pruned or not.
    proofs : mapping from str to Proof
        Of the pruned layers whose method solves a convex program.
    measured, held_out : Measured
        Of both networks on the calibration samples, and on the held-out ones.
    state : mapping from str to Tensor
        Of the pruned network: for weights that are no layers of the graph, such as tied ones.
    dtypes : mapping from str to dtype
        Those of the model.
    finish : dict, optional
        How the network was trained on.
    before : Ledger, optional
        Of the merely pruned network.
    costs : dict, optional
        Of the dense and the pruned network.
    """
    specs = {spec.name: spec for spec in graph.layers}
    norms = {layer.name: _norms(specs[layer.name], layer, graph) for layer in layers}
    links = [
        _link(specs[layer.name], layer, proofs.get(layer.name), norms[layer.name][0], measured) for layer in layers
    ]
    others = _others(graph, measured, state)
    composed = compose(graph.program, measured.passages, [*links, *others], schedule)
    shares = dict(zip((layer.name for layer in layers if layer.pruned), measured.ladder, strict=False))
    records = tuple(
        _record(
            specs[layer.name],
            layer,
            proofs.get(layer.name),
            link,
            norms[layer.name],
            composed,
            shares,
            measured,
            held_out,
            dtypes[specs[layer.name].weight],
        )
        for layer, link in zip(layers, links, strict=True)
        if layer.pruned
    )
    last = graph.program.output.step
    bounds = {name: values[last] for name, values in composed.items() if math.isfinite(values[last])}
    bounds["telescoped"] = telescoped(measured.ladder)
    splits = {"calibration": measured} | ({} if held_out is None else {"held-out": held_out})
    return Ledger(
        method=method,
        schedule=schedule,
        records=records,
        bounds=bounds,
        bound=min(bounds.values()),
        measured=math.sqrt(measured.passages[last].error),
        output_norm=math.sqrt(measured.passages[last].norm),
        held_out=None if held_out is None else _relative(held_out, last),
        accuracy={split: figures.accuracy for split, figures in splits.items() if figures.accuracy is not None},
        guarantee=None if held_out is None or held_out.guarantee is None else asdict(held_out.guarantee),
        unbounded=_unbounded(graph, measured, composed["operator"]),
        unsupported=dict(graph.unsupported),
        finish=finish,
        before=before,
        costs=costs or {},
    )


def _record(
    spec: LayerSpec,
    layer: LayerEvidence,
    proof: Proof | None,
    link: Link,
    norms: tuple[dict[str, float], NormBound],
    composed: Mapping[str, list[float]],
    shares: Mapping[str, float],
    measured: Measured,
    held_out: Measured | None,
    dtype: torch.dtype,
) -> LayerRecord:
    at = _handed_on(spec, layer)
    bounds = {name: values[at] for name, values in composed.items() if math.isfinite(values[at])}
    network_error = math.sqrt(measured.passages[at].error)
    own = link.clean_error if layer.clean else network_error
    promised = None if proof is None else proof.promised
    total = measured.samples * spec.positions
    return LayerRecord(
        name=layer.name,
        kind=spec.kind,
        rows=0 if proof is None else proof.rows,
        total_rows=total,
        kept=int(layer.mask.sum()),
        numel=layer.weight.numel(),
        objective=None if proof is None else proof.objective,
        lower_bound=None if proof is None else proof.lower_bound,
        gap=None if proof is None else proof.gap,
        violation=None if proof is None else proof.violation,
        promised=promised,
        measured=own,
        target_norm=math.sqrt(measured.passages[at].norm),
        clean_error=link.clean_error,
        clean_change=link.clean_change,
        network_error=network_error,
        held_out=None if held_out is None else _relative(held_out, at),
        bounds=bounds,
        norms=norms[0],
        norm_method=norms[1].method,
        attributed=math.sqrt(shares.get(layer.name, 0.0)),
        remark=_remark(promised if link.whole else None, own, bounds, network_error, link),
        bytes=sizes(layer.weight.to(dtype), compressed=False),
        seconds=layer.seconds,
        facts=layer.facts if proof is None else proof.facts,
    )


def _norms(spec: LayerSpec, layer: LayerEvidence, graph: LayerGraph) -> tuple[dict[str, float], NormBound]:
    """Return the norms that bounds are made of, and how the pruned weight's largest singular value was bounded."""
    before, after = (
        _operator(weight.double(), spec.window, spec.groups, spec.step, graph)
        for weight in (layer.dense_weight, layer.weight)
    )
    norms = {"dense_l1": before[0], "dense_l2": before[1].value}
    return norms | {"pruned_l1": after[0], "pruned_l2": after[1].value, "pruned_fro": after[2]}, after[1]


def _operator(
    weight: Tensor, window: Window | None, groups: int, step: int, graph: LayerGraph
) -> tuple[float, NormBound, float]:
    """Return the ``ℓ1`` norm, the largest singular value and the Frobenius norm of what a weight does in a step."""
    if window is None:
        return float(weight.abs().sum()), linear_norm(weight), float(weight.norm())
    source = graph.program.steps[graph.program.steps[step].argument("input").step].shape
    size = None if source is None else [n for n in source[-len(window.kernel) :] if isinstance(n, int)]
    size = size if size is not None and len(size) == len(window.kernel) else None
    stride, dilation = window.stride, window.dilation
    largest = conv_norm(
        weight, stride=stride, padding=window.padding, dilation=dilation, groups=groups, input_size=size
    )
    return l1_conv_norm(weight), largest, frobenius_conv_norm(weight, stride=stride, dilation=dilation)


def _others(graph: LayerGraph, measured: Measured, state: Mapping[str, Tensor]) -> list[Link]:
    """Return links of the weights that are no layers of the graph, because they are tied or shared: left dense."""
    layers = {spec.step for spec in graph.layers}
    links = []
    for index, step in enumerate(graph.program.steps):
        name = None if index in layers else weight_of(step)
        if name is None or name not in state or len(step.refs) != 1:
            continue
        l1, l2, fro = _operator(state[name], *window_of(step, state[name].shape), index, graph)
        own = math.sqrt(measured.passages[index].own)
        kind = dict(pruned=False, clean=True, promised=None, whole=False, asked=None, halfspace=False)
        zero = dict.fromkeys(("floor", "violation", "excess"), 0.0) | {"gamma": 1.0, "kappa": 1.0}
        norms = {"dense_l1": l1, "dense_l2": l2.value, "pruned_l1": l1, "pruned_l2": l2.value, "pruned_fro": fro}
        links.append(Link(index, index, index, clean_error=own, clean_change=own, **kind, **zero, **norms))  # type: ignore[arg-type]
    return links


def _link(
    spec: LayerSpec, layer: LayerEvidence, proof: Proof | None, norms: dict[str, float], measured: Measured
) -> Link:
    passage = measured.passages[spec.step]
    known = {} if proof is None else proof.facts
    return Link(
        step=spec.step,
        output=spec.output,
        promised_at=_handed_on(spec, layer),
        pruned=layer.pruned,
        clean=layer.clean,
        promised=None if proof is None else proof.promised,
        whole=proof is not None and proof.rows == measured.samples * spec.positions,
        asked=known.get("asked"),
        floor=known.get("floor", 0.0),
        excess=0.0 if proof is None else proof.excess,
        gamma=known.get("gamma", 1.0),
        kappa=known.get("kappa", 1.0),
        violation=0.0 if proof is None else proof.violation or 0.0,
        # groups have radii of their own, each the larger of two: they add up in quadrature as a ceiling does
        halfspace=known.get("form") == "halfspace" or spec.groups > 1,
        clean_error=math.sqrt(passage.own_after),
        clean_change=math.sqrt(passage.own),
        **norms,
    )


def _handed_on(spec: LayerSpec, layer: LayerEvidence) -> int:
    """Return the step whose error a layer answers for: the sum, where it was fitted to what is missing there."""
    return spec.sum if layer.facts.get("residual") and spec.sum is not None else spec.output


def _relative(measured: Measured, step: int) -> float:
    passage = measured.passages[step]
    return math.sqrt(passage.error / passage.norm) if passage.norm > 0 else 0.0


def _unbounded(graph: LayerGraph, measured: Measured, bounds: Sequence[float]) -> str | None:
    """Name the first step that makes a composed bound infinite."""
    for step, passage, bound in zip(graph.program.steps, measured.passages, bounds, strict=True):
        if math.isinf(bound):
            why = "" if passage.flow is None else f" ({passage.flow.method})"
            return f"{step.target} in {step.where or 'forward'}{why}"
    return None


def _remark(promised: float | None, own: float, bounds: Mapping[str, float], error: float, link: Link) -> str | None:
    """Say why a promise or the tightest bound lies more than tenfold above what was measured."""
    said = []
    if promised is not None and promised > _APART * own:
        why = (
            "the radius is no smaller than the dense weights' own error on the pruned inputs"
            if link.asked is not None and link.asked * link.kappa < promised / 2
            else "the weight lies well inside the radius, as where the radius is loose"
        )
        said.append(f"promised {promised:.3g}, measured {own:.3g}: {why}.")
    tightest = min(bounds.values(), default=0.0)
    if tightest > _APART * error:
        name = min(bounds, key=lambda key: bounds[key])
        said.append(
            f"bound {tightest:.3g} ({name}), measured {error:.3g}: a composed bound takes every layer's worst "
            f"direction (here a norm of {link.pruned_l2:.3g}) and lets no two errors cancel."
        )
    return " ".join(said) or None
