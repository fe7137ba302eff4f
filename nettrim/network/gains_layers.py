"""How pooling, padding, resizing, normalisation and attention pass errors on.

A maximum over windows moves by no more than the largest change inside, so its square is at most the sum over the
window, and every pixel counts as often as windows cover it: ``√cover``. The other formulas stand in
`nettrim.network.gains_data`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nettrim.network import gains_data as data
from nettrim.network.gains_call import Call, Found, one

Rule = Callable[[Call], "Found | None"]

_AVERAGES = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area")
_POOL = ("input", "kernel_size", "stride", "padding")


def _dimensions(call: Call) -> int:
    """Return over how many dimensions a pooling goes: its name says so."""
    return next(count for count in (1, 2, 3) if f"{count}d" in call.step.op)


def _each(value: int | Sequence[int], count: int) -> list[int]:
    """Return a setting for every dimension."""
    found = [value] if isinstance(value, int) else list(value)
    return found * count if len(found) == 1 else found


def _max_pool(call: Call) -> Found | None:
    own, count = call.tensor(), _dimensions(call)
    if own is None:
        return None
    kernel = _each(call.setting("kernel_size"), count)
    strides = _each(call.setting("stride") or kernel, count)
    settings = zip(
        own.shape[-count:],
        call.out.shape[-count:],
        kernel,
        strides,
        _each(call.setting("padding", 0), count),
        _each(call.setting("dilation", 1), count),
        strict=True,
    )
    cover = 1
    for size, windows, k, s, p, d in settings:
        starts = torch.arange(windows) * s - p
        cover *= data.windows(starts, starts + d * (k - 1) + 1, size, d)
    return one(math.sqrt(cover), "windows per pixel")


def _adaptive_max_pool(call: Call) -> Found | None:
    own, count = call.tensor(), _dimensions(call)
    if own is None:
        return None
    cover = 1
    for size, windows in zip(own.shape[-count:], call.out.shape[-count:], strict=True):
        at = torch.arange(windows)
        cover *= data.windows(at * size // windows, -(-(at + 1) * size // windows), size)
    return one(math.sqrt(cover), "windows per pixel")


def _average_pool(call: Call) -> Found | None:
    return one(call.linear(keep=_dimensions(call)), "windows per pixel")


def _pad(call: Call) -> Found | None:
    if call.setting("mode", "constant") == "constant":
        return one(1.0, "moved")
    return one(call.linear(keep=len(call.setting("pad")) // 2), "copies")


def _interpolate(call: Call) -> Found | None:
    own = call.tensor()
    # others, such as a cubic, have negative weights
    if own is None or call.setting("antialias", False) or call.setting("mode", "nearest") not in _AVERAGES:
        return None
    return one(call.linear(keep=own.dim() - 2), "copies")


def _weight(call: Call) -> float | None:
    """Return the largest weight of a normalisation; None where it comes from another step."""
    weight = call.find("weight")
    if weight is None or weight.pruned is None:
        return 1.0
    return None if weight.refs else data.peak(weight.pruned)


def _batch_norm(call: Call) -> Found | None:
    mean, variance, weight = call.find("running_mean"), call.find("running_var"), call.find("weight")
    measured = call.setting("training", False) or call.setting("use_input_stats", False)
    if measured or mean is None or variance is None or mean.refs or variance.refs or variance.pruned is None:
        return None
    if weight is not None and weight.refs:
        return None
    scales: Tensor = (variance.pruned.double() + call.setting("eps", 1e-5)).rsqrt()
    if weight is not None and weight.pruned is not None:
        scales = scales * weight.pruned.double()
    return one(data.peak(scales), "batch norm")


def _normalised(shape: Callable[[Call, Tensor], Tensor], eps: float | None = 1e-5, centred: bool = True) -> Rule:
    """Return the rule of a normalisation; `shape` brings what is normalised together into the last dimension."""

    def rule(call: Call) -> Found | None:
        weight, own = _weight(call), call.tensor()
        if weight is None or own is None:
            return None
        small = call.setting("eps", torch.finfo(own.dtype).eps if eps is None else eps)
        dense, pruned = (shape(call, x) for x in call.pair("input"))
        return one(weight * data.norm_gain(dense, pruned, (-1,), small, centred), "measured norm")

    return rule


def _last(call: Call, x: Tensor) -> Tensor:
    size = call.setting("normalized_shape")
    return x.flatten(-(1 if isinstance(size, int) else len(size)))


def _groups(call: Call, x: Tensor) -> Tensor:
    return x.reshape(len(x), call.setting("num_groups"), -1)


def _spatial(call: Call, x: Tensor) -> Tensor:
    return x.flatten(2)


_instance = _normalised(_spatial)


def _instance_norm(call: Call) -> Found | None:
    return _instance(call) if call.setting("use_input_stats", True) else _batch_norm(call)


def _normalize(call: Call) -> Found | None:
    if call.setting("p", 2.0) != 2 or call.setting("out") is not None:
        return None
    dense, pruned = call.pair("input")
    return one(data.unit_gain(dense, pruned, call.setting("dim", 1), call.setting("eps", 1e-12)), "measured norm")


def _attention(call: Call) -> Found | None:
    if call.setting("dropout_p", 0.0):
        return None
    query, key, value = (call.pair(name) for name in ("query", "key", "value"))
    mask = call.find("attn_mask")
    copies = 1.0
    if call.setting("enable_gqa", False):
        heads = query[0].shape[-3] // key[0].shape[-3]
        key, value = ((x.repeat_interleave(heads, -3), y.repeat_interleave(heads, -3)) for x, y in (key, value))
        copies = math.sqrt(heads)
    gains = data.attention_gains(
        query,
        key,
        value,
        None if mask is None or mask.pruned is None else mask.pair,
        bool(call.setting("is_causal", False)),
        call.setting("scale"),
    )
    names = ("query", "key", "value", "attn_mask")
    return Found(
        "measured scale", dict(zip(names, (gains[0], gains[1] * copies, gains[2] * copies, gains[3]), strict=True))
    )


_MAX = (*_POOL, "dilation", "ceil_mode", "return_indices")
_NORM = ("input", "running_mean", "running_var", "weight", "bias")
#: the names of the positional arguments and the rule of each function
LAYERS: dict[str, tuple[Sequence[str], Callable[[Call], Found | None]]] = {
    **{f"max_pool{n}d{end}": (_MAX, _max_pool) for n in (1, 2, 3) for end in ("", "_with_indices")},
    **{
        f"adaptive_max_pool{n}d{end}": (("input", "output_size"), _adaptive_max_pool)
        for n in (1, 2, 3)
        for end in ("", "_with_indices")
    },
    **{f"avg_pool{n}d": (_POOL, _average_pool) for n in (1, 2, 3)},
    **{f"adaptive_avg_pool{n}d": (("input", "output_size"), _average_pool) for n in (1, 2, 3)},
    "pad": (("input", "pad", "mode", "value"), _pad),
    "interpolate": (("input", "size", "scale_factor", "mode", "align_corners", "x", "antialias"), _interpolate),
    "batch_norm": ((*_NORM, "training", "momentum", "eps"), _batch_norm),
    "instance_norm": ((*_NORM, "use_input_stats", "momentum", "eps"), _instance_norm),
    "layer_norm": (("input", "normalized_shape", "weight", "bias", "eps"), _normalised(_last)),
    "rms_norm": (("input", "normalized_shape", "weight", "eps"), _normalised(_last, None, False)),
    "group_norm": (("input", "num_groups", "weight", "bias", "eps"), _normalised(_groups)),
    "normalize": (("input", "p", "dim", "eps", "out"), _normalize),
    "scaled_dot_product_attention": (
        ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
        _attention,
    ),
}
