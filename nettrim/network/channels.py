"""Which layers' channels can be taken out: those that one other layer reads, and nothing else.

These are the inner widths of a network. Channels of a trunk that residual branches are added to stay, because all
branches would have to lose the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nettrim.network.program import Count, Ref, Step
from nettrim.network.trace import LayerGraph, LayerSpec

#: functions that act on every number alone
_ELEMENTWISE = {"relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "sigmoid", "tanh"}
_ELEMENTWISE |= {"hardtanh", "hardswish", "hardsigmoid", "softplus", "softsign", "logsigmoid", "tanhshrink"}
_ELEMENTWISE |= {"hardshrink", "softshrink", "threshold", "clamp", "clip", "clamp_min", "clamp_max", "abs", "square"}
_ELEMENTWISE |= {"dropout", "dropout1d", "dropout2d", "feature_dropout", "alpha_dropout", "identity", "contiguous"}
_ELEMENTWISE |= {"clone", "to", "float", "double"}
#: functions on maps (B, C, *size) that act on every channel alone, and how many dimensions of the map they take
_POOLS = {f"{kind}_pool{n}d": n for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max") for n in (1, 2)}
_AVERAGES = {"mean", "sum", "amax", "amin"}
#: how channels lie in a tensor: (B, C, *size), (B, C · pixels) or (B, ..., C)
_LAYOUTS = ("map", "flat", "last")


@dataclass(frozen=True)
class Coupling:
    """Two layers, the second of which alone reads what the first gives, channel by channel.

    Attributes
    ----------
    producer, consumer : str
        Names of layers.
    start : int
        The step of the producer: its output before any activation.
    stop : int
        The step whose value the consumer reads. The steps in between act on every channel alone: activations, pooling,
        dropout, flattening.
    channels : int
        ``C``, outputs of the producer.
    taps : int
        Columns of the consumer's matrix for one channel: entries of its kernel, or pixels where the channels were
        flattened. Channel ``c`` has the columns ``c · taps ... (c + 1) · taps − 1``.
    """

    producer: str
    consumer: str
    start: int
    stop: int
    channels: int
    taps: int


def couplings(graph: LayerGraph) -> tuple[dict[str, Coupling], dict[str, str]]:
    """Find the layers whose output channels can be taken out.

    Returns
    -------
    found : dict of str to Coupling
        By producer, in execution order.
    why : dict of str to str
        For every other layer that is selected, why its channels stay.
    """
    users, by_step = graph.program.users(), {layer.step: layer for layer in graph.layers}
    found: dict[str, Coupling] = {}
    why: dict[str, str] = {}
    for layer in graph.selected:
        result = _follow(graph, layer, users, by_step)
        if isinstance(result, Coupling):
            found[layer.name] = result
        else:
            why[layer.name] = result
    return found, why


def planes(value: Tensor, reader: LayerSpec, taps: int) -> Tensor:
    """Return what a layer reads as ``(P, C, pixels)``; `taps` are those of its coupling."""
    if reader.window is not None:
        return value.flatten(2)
    if taps > 1:
        return value.reshape(len(value), -1, taps)
    return value.reshape(len(value), -1, value.shape[-1]).transpose(1, 2)


def from_planes(found: Tensor, like: Tensor, reader: LayerSpec, taps: int) -> Tensor:
    """Return ``(P, C', pixels)`` in the shape in which a layer reads channels, that of `like` but for their number."""
    if reader.window is not None:
        return found.reshape(*found.shape[:2], *like.shape[2:])
    return found.flatten(1) if taps > 1 else found.transpose(1, 2).reshape(*like.shape[:-1], found.shape[1])


def _follow(
    graph: LayerGraph, layer: LayerSpec, users: list[list[int]], by_step: Mapping[int, LayerSpec]
) -> Coupling | str:
    """Follow a layer's output to the one that reads it; return why that does not lead there where it does not."""
    if layer.groups != 1:
        return "it is a grouped convolution"
    steps, here = graph.program.steps, layer.step
    layout = _first_layout(layer, steps[here])
    if layout is None:
        return "its output has no dimension of samples"
    while True:
        if graph.program.output.step == here:
            return "its output is the network's"
        if len(users[here]) != 1:
            return f"{len(users[here])} steps read its output"
        before, here = here, users[here][0]
        step = steps[here]
        reader = by_step.get(here)
        if reader is not None:
            return _coupled(layer, reader, before, layout, step)
        if len(step.refs) != 1 or step.held or step.refs[0] != Ref(before):
            return f"its output flows into {step.op}, together with something else"
        following = _passed(step, steps[before], layout)
        if following not in _LAYOUTS:
            return following
        layout = following


def _first_layout(layer: LayerSpec, step: Step) -> str | None:
    """Return how a layer's channels lie in its output: "map" (B, C, *size) or "last" (B, ..., C)."""
    shape = step.shape or ()
    if len(shape) < 2 or not isinstance(shape[0], Count) or shape[0].fixed:
        return None
    if layer.window is None:
        return "last"
    return "map" if len(shape) == len(layer.window.kernel) + 2 else None


def _coupled(layer: LayerSpec, reader: LayerSpec, stop: int, layout: str, step: Step) -> Coupling | str:
    if reader.groups != 1:
        return f"layer {reader.name!r}, which reads its output, is a grouped convolution"
    if not reader.prune:
        return f"layer {reader.name!r}, which reads its output, is not selected"
    if (reader.window is not None) != (layout == "map") or step.argument("input") != Ref(stop):
        return f"layer {reader.name!r} reads its output along another dimension"
    taps, rest = divmod(reader.in_features, layer.out_features)
    if rest or (layout == "last" and taps != 1):
        return f"layer {reader.name!r} reads its output in another shape"
    return Coupling(layer.name, reader.name, layer.step, stop, layer.out_features, taps)


def _passed(step: Step, before: Step, layout: str) -> str:
    """Return the layout behind a step, or a sentence why channels do not pass it: layouts are single words."""
    if step.shape is None or before.shape is None:
        return f"{step.op} gives several tensors"
    size = len(before.shape)
    flat = layout == "flat" or (layout == "last" and size == 2)
    if step.op in _ELEMENTWISE:
        return layout
    if step.op in _POOLS:
        fits = layout == "map" and size == _POOLS[step.op] + 2
        return layout if fits else f"{step.op} acts across its channels"
    if step.op in _AVERAGES and layout == "map":
        given = step.args[1] if len(step.args) > 1 else step.kwargs.get("dim")
        dims = {d % size for d in _numbers(given)}
        if not dims or min(dims) < 2:
            return f"{step.op} acts across its channels"
        return "map" if len(step.shape) > 2 else "flat"
    if step.op == "squeeze" and layout == "map":
        given = _numbers(step.args[1] if len(step.args) > 1 else step.kwargs.get("dim"))
        if not given or min(d % size for d in given) < 2:
            return "squeeze could take away the dimension of a single channel"
        return "map" if len(step.shape) > 2 else "flat"
    if step.op == "flatten":
        first = (step.args[1] if len(step.args) > 1 else step.kwargs.get("start_dim", 0)) % size
        last = (step.args[2] if len(step.args) > 2 else step.kwargs.get("end_dim", -1)) % size
        if flat and first == last == 1:
            return layout
        if layout == "map" and first == 1 and last == size - 1:
            return "flat"
        return layout if layout == "map" and first >= 2 else "flatten mixes its channels with other dimensions"
    if step.op in ("reshape", "view"):
        return _reshaped(step, before, layout, flat)
    return f"its output flows into {step.op}"


def _reshaped(step: Step, before: Step, layout: str, flat: bool) -> str:
    """Return the layout behind a view: right with fewer channels only where their number is what is left over."""
    sizes = step.args[1:] if len(step.args) > 1 else (step.kwargs.get("shape", step.kwargs.get("size")),)
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = tuple(sizes[0])
    assert before.shape is not None
    if len(sizes) < 2 or sizes[0] != before.shape[0] or sizes[1] != -1:
        return f"forward names a fixed size ({step.op}), which would be wrong with fewer channels"
    if len(sizes) == 2 and (flat or layout == "map"):
        return layout if flat else "flat"
    if layout == "map" and _product(sizes[2:]) == _product(before.shape[2:]):
        return "map"
    return f"{step.op} mixes its channels with other dimensions"


def _numbers(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, tuple | list) else [int(value)]


def _product(sizes: Any) -> Any:
    result = 1
    for size in sizes:
        if isinstance(size, Count):
            return None
        result *= size
    return result
