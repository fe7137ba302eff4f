"""What each weight counts for at the network's outputs.

``W_mn² · E Σ_c (∂z_c/∂W_mn)²`` is what the removal of a weight adds to ``‖z − z₀‖²`` to second order, other weights
left alone: the saliency of LeCun, Denker, Solla, "Optimal Brain Damage", NIPS 1989, with the Gauss-Newton diagonal. It
takes one backward pass for each output ``z_c``. That a batch norm is folded into a weight changes nothing: the weight
grows by what the derivative shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nettrim.errors import ProblemError, UnsupportedError
from nettrim.network.batches import Batch, Batches
from nettrim.network.matrix import input_rows, output_rows
from nettrim.network.program import Count
from nettrim.network.samples import moved, pieces, taken
from nettrim.network.slopes import Directions, follow, rows_at_a_time, slopes
from nettrim.network.trace import LayerGraph, LayerSpec

_ENTRIES = 2**24  # of the gradients (B, M, N) of single samples that are held at a time
_PROBED = 5  # samples that show to which of them a row belongs
_TRIES = 8  # changes of one of them, until it is clear
_ROUNDING = 1e-5  # of the largest activation: what is less is no change


def gauss_newton_saliency(
    graph: LayerGraph,
    state: Mapping[str, Tensor],
    inputs: Batch | Batches,
    names: Sequence[str],
    *,
    batch_size: int = 512,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return what each weight counts for at the outputs: ``W_mn²`` times the mean of ``Σ_c (∂z_c/∂W_mn)²``.

    For a layer on vectors that is ``W_mn² · E[a_n² Σ_c (∂z_c/∂z̄_m)²]``, with its inputs ``a`` and its outputs ``z̄``
    before any activation, and takes two products of matrices. A layer that a sample meets in several positions, a
    convolution say, adds up ``a_n ∂z_c/∂z̄_m`` over them before it squares, and takes the gradients of single samples.

    Parameters
    ----------
    graph : LayerGraph
    state : mapping from str to Tensor
        Folded: `fold_state`. It is computed in the dtype of this.
    inputs : Batch or Batches
    names : sequence of str
        Layers of the graph.
    batch_size : int
        Samples in one pass, at the most; fewer where their activations and patches are large. It decides memory and, by
        rounding alone, the result.
    seed : int
        Of the random signs that stand for all outputs where a sample has more than 32 of them, positions included.

    Returns
    -------
    dict of str to Tensor, shape (M, N)
        float64, not negative, comparable between layers, in the order of `names`: in the layout of
        ``weight.reshape(M, -1)``.

    Raises
    ------
    ProblemError
        `inputs` do not fit the network, or a derivative is NaN or infinite.
    UnknownNameError
        A name is that of no layer.
    UnsupportedError
        The outputs do not depend on a layer, have no row for each sample, or a layer mixes samples.
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ProblemError(f"batch_size is {batch_size!r}; pass an integer of at least 1")
    if not names:
        raise ProblemError("names is empty; name at least one layer")
    specs = [graph.layer(name) for name in names]
    layouts = {spec.name: _layout(graph, state, inputs, spec) for spec in specs}
    totals = {
        spec.name: torch.zeros(spec.out_features, spec.in_features, dtype=torch.float64, device=_device(state, spec))
        for spec in specs
    }
    directions = Directions(seed)
    patches = sum(spec.positions * spec.in_features * spec.groups for spec in specs)
    count = 0
    for batch in pieces(inputs, rows_at_a_time(graph.program, batch_size, patches)):
        count += len(batch)
        found = follow(graph, state, batch, names)
        entering = {
            spec.name: layouts[spec.name].by_sample(input_rows(found.inputs[spec.name], spec.window), len(batch))
            for spec in specs
        }
        squares: dict[str, Tensor] = {}
        for slope in slopes(found.outputs, found.handed, directions):
            for spec in specs:
                name = spec.name
                gradient = layouts[name].by_sample(output_rows(slope[name], spec.window), len(batch))
                if spec.positions == 1:
                    # the inputs are the same for every output, so their product can wait
                    squares[name] = squares[name] + gradient.square() if name in squares else gradient.square()
                else:
                    totals[name] += _squared_sample_gradients(gradient, entering[name], spec.groups)
        for spec in specs:
            if spec.name in squares:
                left, right = _grouped(squares[spec.name][:, 0], entering[spec.name][:, 0].square(), spec.groups)
                totals[spec.name] += (left.permute(1, 2, 0) @ right.transpose(0, 1)).reshape(spec.out_features, -1)
    for spec in specs:
        total = totals[spec.name]
        total *= state[spec.weight].detach().reshape(spec.out_features, -1).double().square() / count
        bad = int((~torch.isfinite(total)).sum())
        if bad:
            raise ProblemError(
                f"the derivatives of the outputs at layer {spec.name!r} give {bad} NaN or infinite figures of "
                f"{total.numel()}; check the model's weights and the scale of the inputs"
            )
    return totals


@dataclass(frozen=True)
class _Layout:
    """Where the rows of one sample lie: rows are numbered as by an index (before, sample, behind)."""

    before: int
    behind: int

    def by_sample(self, rows: Tensor, samples: int) -> Tensor:
        """Return rows ``(P, F)`` as ``(B, L, F)``."""
        split = rows.reshape(self.before, samples, self.behind, rows.shape[-1])
        return split.transpose(0, 1).reshape(samples, self.before * self.behind, rows.shape[-1])


def _layout(graph: LayerGraph, state: Mapping[str, Tensor], inputs: Batch | Batches, spec: LayerSpec) -> _Layout:
    """Return where the rows of one sample lie among those of a layer."""
    shape = graph.program.steps[spec.step].shape
    assert shape is not None
    sizes = list(shape[:-1]) if spec.window is None else [shape[0], *shape[2:]]
    following = [k for k, size in enumerate(sizes) if isinstance(size, Count)]
    size = sizes[following[0]] if len(following) == 1 else None
    if not isinstance(size, Count) or size.fixed:
        raise UnsupportedError(f"layer {spec.name!r} mixes samples: its output is {shape}; leave it out")
    at = following[0]
    before, behind = (math.prod(s for s in part if isinstance(s, int)) for part in (sizes[:at], sizes[at + 1 :]))
    inner = 1 if size.each == 1 else _inner(graph, state, inputs, spec, size.each, at)
    return _Layout(before * size.each // inner, inner * behind)


def _inner(
    graph: LayerGraph, state: Mapping[str, Tensor], inputs: Batch | Batches, spec: LayerSpec, each: int, dim: int
) -> int:
    """Return how many rows of one sample lie side by side where a dimension is made of samples and positions.

    No shape says that, so one sample is changed, and the rows that change with it tell.
    """
    first = next(pieces(inputs, _PROBED))
    like = state[spec.weight]
    some = moved(taken(first, torch.arange(_PROBED) % len(first)), like)
    draw = torch.Generator().manual_seed(0)
    at = dim if spec.window is None or dim == 0 else dim + 1
    before = follow(graph, state, some, [spec.name]).handed[spec.name].detach()
    fitting = [inner for inner in range(1, each + 1) if each % inner == 0]
    for _ in range(_TRIES):
        other = Batch(
            tuple(_disturbed(tensor, draw) for tensor in some.inputs),
            {key: _disturbed(tensor, draw) for key, tensor in some.kwargs.items()},
        )
        moves = (follow(graph, state, other, [spec.name]).handed[spec.name].detach() - before).abs()
        changed = (moves > _ROUNDING * before.abs().max()).movedim(at, 0).flatten(1).any(1).nonzero()[:, 0].cpu()
        fitting = [inner for inner in fitting if bool(((changed // inner) % _PROBED == _PROBED // 2).all())]
        if len(fitting) == 1:
            return fitting[0]
    found = "a change of one reaches others" if not fitting else "no change of one shows which rows are its own"
    raise UnsupportedError(f"layer {spec.name!r} mixes samples, or hides them ({found}); leave it out")


def _disturbed(tensor: Tensor, draw: torch.Generator) -> Tensor:
    """Return a tensor with its middle sample changed, within what its values are."""
    changed, middle = tensor.clone(), len(tensor) // 2
    if tensor.is_floating_point():
        scale = tensor.abs().mean() + torch.finfo(tensor.dtype).tiny
        changed[middle] += scale * torch.randn(tensor.shape[1:], generator=draw).to(tensor)
    elif tensor.dtype != torch.bool:
        values = tensor.flatten()
        changed[middle] = values[torch.randint(len(values), tensor.shape[1:], generator=draw).to(tensor.device)]
    return changed


def _device(state: Mapping[str, Tensor], spec: LayerSpec) -> torch.device:
    return state[spec.weight].device


def _grouped(left: Tensor, right: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Split the features of outputs and inputs ``(..., G·F)`` into groups ``(..., G, F)``."""
    return left.reshape(*left.shape[:-1], groups, -1), right.reshape(*right.shape[:-1], groups, -1)


def _squared_sample_gradients(gradient: Tensor, inputs: Tensor, groups: int) -> Tensor:
    """Return ``Σ_p (Σ_q g_pqm a_pqn)² (M, N)`` for samples ``p`` with positions ``q``."""
    left, right = _grouped(gradient, inputs, groups)
    left, right = left.permute(0, 2, 3, 1), right.transpose(1, 2)
    shape = (*left.shape[1:3], right.shape[-1])
    total = torch.zeros(shape, dtype=torch.float64, device=left.device)
    samples = max(1, _ENTRIES // total.numel())
    for some, others in zip(torch.split(left, samples), torch.split(right, samples), strict=True):
        total += (some @ others).square().sum(0)
    return total.flatten(0, 1)
