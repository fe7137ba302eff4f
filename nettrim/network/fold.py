"""Batch norm folded into the layer before it, and out again: zeros stay zeros both ways.

In evaluation mode ``BN(W x + b) = s (W x + b − μ) + β`` with ``s = γ / √(σ² + ε)`` is the layer
``s W x + s (b − μ) + β``. A layer is pruned in that form; what is handed back has its batch norm again, with the weight
divided by ``s`` and the change of the bias added to ``β``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nettrim.network.program import Held, Program, Ref, Step, leaves, substitute

_LAYERS = {"linear": None, "conv1d": 1, "conv2d": 2}


@dataclass(frozen=True)
class Fold:
    """One batch norm that is folded into the layer before it; all are names in a state.

    Attributes
    ----------
    weight : str
        Of the layer.
    bias : str or None
        Of the layer, where it has one.
    folded_bias : str
        Where the folded bias is found.
    mean, variance : str
        Running statistics.
    scale, shift : str or None
        ``γ`` and ``β``.
    eps : float
    """

    weight: str
    bias: str | None
    folded_bias: str
    mean: str
    variance: str
    scale: str | None
    shift: str | None
    eps: float


def fold(program: Program) -> tuple[Program, tuple[Fold, ...]]:
    """Return the program without the batch norms that directly follow a layer, and those batch norms."""
    users, steps, folds = program.users(), list(program.steps), []
    readers = _readers(program)
    moved: dict[int, int] = {}
    for index, step in enumerate(program.steps):
        source = _foldable(program, index, step, users, readers)
        if source is None:
            continue
        before = program.steps[source]
        weight, bias = before.argument("weight"), before.argument("bias")
        named = {key: step.argument(key) for key in ("running_mean", "running_var", "weight", "bias")}
        folded_bias = bias.name if bias is not None else _bias_of(weight.name)
        folds.append(
            Fold(
                weight.name,
                None if bias is None else bias.name,
                folded_bias,
                named["running_mean"].name,
                named["running_var"].name,
                named["weight"] and named["weight"].name,
                named["bias"] and named["bias"].name,
                float(step.argument("eps", 1e-5)),
            )
        )
        if bias is None:
            steps[source] = _with_bias(before, Held(folded_bias))
        moved[index] = source
    steps = [rewired(step, moved) for step in steps]
    output = program.output._replace(step=moved.get(program.output.step, program.output.step))
    return without_unused(replace(program, steps=tuple(steps), output=output)), tuple(folds)


def fold_state(state: Mapping[str, Tensor], folds: Sequence[Fold]) -> dict[str, Tensor]:
    """Return a state with every fold's weight and bias folded; tensors that no fold touches are the same objects."""
    result = dict(state)
    for f in folds:
        scale, shift = _affine(state, f)
        weight = state[f.weight]
        result[f.weight] = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
        result[f.folded_bias] = shift if f.bias is None else state[f.bias] * scale + shift
    return result


def unfold(f: Fold, state: Mapping[str, Tensor], weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Return the entries of a state, unfolded, that fold to a weight and a bias.

    Parameters
    ----------
    f : Fold
    state : mapping from str to Tensor
        Unfolded, in float64; its batch norm's ``γ``, ``μ`` and ``σ`` stay.
    weight, bias : Tensor (M, ...), Tensor (M,)
        Folded.

    Returns
    -------
    dict of str to Tensor
        The layer's weight, zero where the folded one is and in channels with ``γ = 0``; and whatever takes up the bias:
        ``β``, else the layer's own bias, else ``μ``. Of channels whose weight and bias are zero, all of them are: the
        rounding of a sum would leave a bias that is nearly so.
    """
    scale, shift = _affine(state, f)
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    result = {f.weight: weight * inverse.reshape(-1, *[1] * (weight.dim() - 1))}
    before = shift if f.bias is None else state[f.bias] * scale + shift
    if f.shift is not None:
        result[f.shift] = state[f.shift] + (bias - before)
    elif f.bias is not None:
        result[f.bias] = torch.where(scale == 0, state[f.bias], (bias - shift) * inverse)
    else:
        result[f.mean] = torch.where(scale == 0, state[f.mean], -bias * inverse)
    dead = (weight.flatten(1) == 0).all(1) & (bias == 0)
    if dead.any():
        for name in (f.mean, f.shift, f.bias):
            if name is not None:
                result[name] = result.get(name, state[name]).masked_fill(dead, 0)
    return result


def without_unused(program: Program) -> Program:
    """Return the program without the steps that do not reach its output; inputs stay."""
    needed = {program.output.step, *range(len(program.inputs))}
    for index in range(len(program.steps) - 1, -1, -1):
        if index in needed:
            needed.update(ref.step for ref in program.steps[index].refs)
    order = sorted(needed)
    place = {old: new for new, old in enumerate(order)}
    steps = tuple(rewired(program.steps[old], place) for old in order)
    return replace(program, steps=steps, output=program.output._replace(step=place[program.output.step]))


def _foldable(
    program: Program, index: int, step: Step, users: list[list[int]], readers: Mapping[str, int]
) -> int | None:
    """Return the step of the layer that a batch norm can be folded into, or None."""
    if step.op != "batch_norm" or step.argument("training", False) is not False:
        return None
    source = step.argument("input")
    if not isinstance(source, Ref) or users[source.step] != [index] or program.output.step == source.step:
        return None
    before = program.steps[source.step]
    if before.op not in _LAYERS:
        return None
    weight, bias = before.argument("weight"), before.argument("bias")
    statistics = [step.argument(key) for key in ("running_mean", "running_var", "weight", "bias")]
    plain = [weight, *([] if bias is None else [bias]), *(s for s in statistics[2:] if s is not None), *statistics[:2]]
    if not all(isinstance(item, Held) for item in plain) or any(readers[item.name] > 1 for item in plain):
        return None
    if bias is None and _bias_of(weight.name) in readers:
        return None  # that name is another tensor's
    # on (B, T, M) a linear layer's features are last, and batch norm's channels second
    return source.step if before.op != "linear" or len(before.shape or ()) == 2 else None


def _bias_of(weight: str) -> str:
    """Return the name of a bias that a layer without one gets."""
    return f"{weight.removesuffix('weight')}bias" if weight.endswith(".weight") else f"{weight}_bias"


def _affine(state: Mapping[str, Tensor], f: Fold) -> tuple[Tensor, Tensor]:
    """Return ``s`` and ``β − s μ``."""
    scale = torch.rsqrt(state[f.variance] + f.eps)
    if f.scale is not None:
        scale = scale * state[f.scale]
    shift = -scale * state[f.mean]
    return scale, shift if f.shift is None else shift + state[f.shift]


def _readers(program: Program) -> dict[str, int]:
    """Return how many steps read each name."""
    found: dict[str, int] = {}
    for step in program.steps:
        for name in step.held:
            found[name] = found.get(name, 0) + 1
    return found


def _with_bias(step: Step, bias: Held) -> Step:
    if len(step.args) > 2:
        return replace(step, args=(*step.args[:2], bias, *step.args[3:]))
    return replace(step, kwargs=step.kwargs | {"bias": bias})


def rewired(step: Step, place: Mapping[int, int]) -> Step:
    """Return a step that reads other steps: the keys of `place` are exchanged for its values."""

    def change(leaf: Any) -> Any:
        return leaf._replace(step=place.get(leaf.step, leaf.step)) if isinstance(leaf, Ref) else leaf

    if not any(isinstance(leaf, Ref) for leaf in leaves((step.args, step.kwargs))):
        return step
    args, kwargs = substitute((step.args, step.kwargs), change)
    return replace(step, args=args, kwargs=kwargs)
