"""What the network makes of a layer's errors: the quadratic form in which they count at its output.

Let ``a_p`` be what a layer hands on in row ``p``, one position of one sample (after its ReLU, if it has one), and ``z``
the network's outputs for that sample. An error ``e_p`` of the row moves them by about ``J_p e_p`` with
``J_p = ∂z/∂a_p``, so on average over the rows it costs ``e_pᵀ G e_p`` with ``G = (1/P) Σ_p J_pᵀ C J_p``. ``C`` centres
the outputs over the classes, since adding the same to all of them changes no prediction. Errors of different positions
are taken to be unrelated. The diagonal alone says what each neuron or channel is worth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from nettrim.errors import ProblemError
from nettrim.network.batches import Batch
from nettrim.network.losses import centred
from nettrim.network.matrix import output_rows
from nettrim.network.samples import pieces
from nettrim.network.slopes import Directions, follow, rows_at_a_time, slopes
from nettrim.network.trace import LayerGraph

_ROWS = 256  # samples in one pass, at the most


def error_metrics(
    graph: LayerGraph, state: Mapping[str, Tensor], batches: Iterable[Batch], seed: int = 0
) -> dict[str, Tensor]:
    """Return ``G (M, M)`` of every layer, float64: symmetric positive semi-definite.

    One forward pass for up to 256 samples and one backward pass for each output of a sample, positions included; with
    more than 32 outputs, 32 backward passes along random signs, which have the right mean.

    Parameters
    ----------
    graph : LayerGraph
    state : mapping from str to Tensor
        Folded: `fold_state`.
    batches : iterable of Batch
        At least one; large ones are cut.
    seed : int
        Of the random signs.

    Raises
    ------
    ProblemError
        The network fails on a batch, or a derivative is NaN or infinite.
    UnsupportedError
        The output has no row for each sample, or does not depend on a layer by gradients.
    """
    directions = Directions(seed)
    totals = {spec.name: torch.zeros((), dtype=torch.float64) for spec in graph.layers}
    rows = dict.fromkeys(totals, 0)
    for batch in pieces(batches, rows_at_a_time(graph.program, _ROWS)):
        found = follow(graph, state, batch, graph.names, behind_relu=True)
        with torch.enable_grad():
            outputs = centred(found.outputs)
        for slope in slopes(outputs, found.handed, directions):
            for spec in graph.layers:
                flat = output_rows(slope[spec.name], spec.window)
                totals[spec.name] = totals[spec.name].to(flat.device) + (flat.T @ flat).double()
        for spec in graph.layers:
            rows[spec.name] += found.handed[spec.name].numel() // spec.out_features
    for name, total in totals.items():
        bad = int((~torch.isfinite(total)).sum())
        if bad:
            raise ProblemError(
                f"the derivatives of the outputs at layer {name!r} give {bad} NaN or infinite figures of "
                f"{total.numel()}; check the model's weights and the scale of the inputs"
            )
    return {name: total / rows[name] for name, total in totals.items()}
