"""One coupling's problem: which channels of a layer stay, and what it and the layer that reads them become.

All is decided on activations that are given: the dense network's as the target, the pruned prefix's as the input.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nettrim.core.moments import Moments
from nettrim.methods.channel_selection import Candidates, select
from nettrim.methods.decompose import Decomposition, recompose
from nettrim.methods.ldrf import Ldrf
from nettrim.methods.squeeze import squeeze
from nettrim.network.channels import Coupling, planes
from nettrim.network.matrix import Window
from nettrim.network.program import Count, Program
from nettrim.network.segment import applied, between
from nettrim.network.trace import LayerSpec

_BLOCK = 256  # samples or, eightfold, rows that are worked on at a time
_ROWS = 16384
_PER_COLUMN = 10


@dataclass(frozen=True, eq=False)
class Site:
    """A producer, its consumer, and their data.

    Attributes
    ----------
    program : Program
    pair : Coupling
    producer, consumer : LayerSpec
    incoming : Tensor (C, N)
        The producer's dense weight.
    inputs : Tensor (P, ...)
        What `weight` is applied to, behind the pruned prefix: the channels that are left, or their embedding.
    weight : Tensor (C, ...)
        The producer's as it stands, for those inputs; float64, in its module's shape.
    bias : Tensor (C,) or None
    outgoing : Tensor (M, C, taps)
        The consumer's dense weight.
    out_bias : Tensor (M,) or None
    reference : Tensor (P, ...)
        What the consumer reads in the dense network: behind activation and pooling, which do not commute with the
        embedding.
    drift : Tensor (P, M, ...) or None
        What the trunk that the consumer is added to lacks; its outputs are to make up for it.
    split : Decomposition
        Of the consumer's dense weight, truncated.
    last : bool
        Whether the consumer's own channels all stay.
    seed : int
    """

    program: Program
    pair: Coupling
    producer: LayerSpec
    consumer: LayerSpec
    incoming: Tensor
    inputs: Tensor
    weight: Tensor
    bias: Tensor | None
    outgoing: Tensor
    out_bias: Tensor | None
    reference: Tensor
    drift: Tensor | None
    split: Decomposition
    last: bool
    seed: int

    @property
    def intercept(self) -> bool:
        """Whether the embedding may have an intercept: no zeros are padded that it would be missing on."""
        window = self.consumer.window
        return self.out_bias is not None and (window is None or not any(side for pad in window.padding for side in pad))

    @property
    def total(self) -> int:
        """How many rows the consumer has: where tokens are flattened to samples before, a position is none of its."""
        first = (self.program.steps[self.consumer.step].shape or (Count(0, 1),))[0]
        return len(self.reference) * self.consumer.positions // (first.each if isinstance(first, Count) else 1)

    @cached_property
    def pixels(self) -> int:
        """Pixels of a channel that the consumer reads."""
        return self.planes(self.reference[:1]).shape[2]

    def numbers(self, what: str) -> list[int]:
        """Return a seed of its own for every coupling and purpose."""
        return [self.seed, zlib.crc32(self.pair.producer.encode()), zlib.crc32(what.encode())]

    def draw(self, total: int, columns: int, rows: int | None, what: str) -> Tensor:
        """Draw the rows of a least squares, without replacement, ascending."""
        most = max(_ROWS, len(self.inputs), _PER_COLUMN * columns) if rows is None else rows
        if total <= most:
            return torch.arange(total)
        drawing = np.random.default_rng(self.numbers(what))
        return torch.from_numpy(np.sort(drawing.choice(total, most, replace=False, shuffle=False)))

    def made(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the consumer reads where the producer has other arrays; gradients are followed."""
        value = applied(self.program.steps[self.pair.start], inputs, weight, bias)
        return between(self.program, self.pair.start, self.pair.stop, value)

    def activations(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return that on all samples, in the inputs' dtype."""
        like = self.inputs
        weight, bias = weight.to(like), None if bias is None else bias.to(like)
        with torch.no_grad():
            blocks = [self.made(like[at : at + _BLOCK], weight, bias) for at in range(0, len(like), _BLOCK)]
        return torch.cat(blocks)

    def planes(self, value: Tensor) -> Tensor:
        """Return what the consumer reads as ``(P, C, pixels)``."""
        return planes(value, self.consumer, self.pair.taps)

    def embed(self, value: Tensor, reading: Tensor, shift: Tensor | None) -> Tensor:
        """Return ``Qᵀ y + q`` as ``(P, r, pixels)``, or ``(P, r)`` of a single pixel."""
        read = self.planes(value)
        if read.shape[2] == 1:
            flat = read[:, :, 0] @ reading
            return flat if shift is None else flat + shift
        result = torch.matmul(reading.T, read)
        return result if shift is None else result + shift[:, None]

    def rows(self, value: Tensor, chosen: Tensor) -> Tensor:
        """Return some of the consumer's rows ``(R, C · taps)``."""
        window = self.consumer.window
        return value.reshape(-1, value.shape[-1])[chosen] if window is None else some_patches(value, window, chosen)

    def moments(self, value: Tensor, chosen: Tensor) -> Moments:
        """Return the moments of the consumer's rows against the dense network's outputs, trunk's drift made up for."""
        flat = self.outgoing.flatten(1)
        total = Moments.zeros(self.rows(value[:1], torch.zeros(1, dtype=torch.int64)).shape[1], len(flat))
        for at in range(0, len(chosen), 8 * _BLOCK):
            some = chosen[at : at + 8 * _BLOCK]
            wanted = self.rows(self.reference, some).double() @ flat.T
            if self.out_bias is not None:
                wanted = wanted + self.out_bias
            if self.drift is not None:
                wanted = wanted + self.outputs_at(self.drift, some).double()
            total = total + Moments.of(self.rows(value, some), wanted)
        return total

    def outputs_at(self, value: Tensor, chosen: Tensor) -> Tensor:
        """Return some rows ``(R, M)`` of what has the shape of the consumer's outputs."""
        if self.consumer.window is None:
            return value.reshape(-1, value.shape[-1])[chosen]
        maps = value.flatten(2)
        return maps[chosen // maps.shape[2], :, chosen % maps.shape[2]]

    def targets(self) -> Tensor:
        """Return the dense network's outputs of the consumer on all samples, trunk's drift made up for."""
        like = self.reference
        weight = self.outgoing.reshape(self.consumer.shape).to(like)
        bias = None if self.out_bias is None else self.out_bias.to(like)
        step = self.program.steps[self.consumer.step]
        with torch.no_grad():
            blocks = [applied(step, like[at : at + _BLOCK], weight, bias) for at in range(0, len(like), _BLOCK)]
        found = torch.cat(blocks)
        return found if self.drift is None else found + self.drift


@dataclass(frozen=True, eq=False)
class Recovered:
    """What the two layers become, in float64.

    Attributes
    ----------
    kept : Tensor of int64 (n,)
        The producer's channels that stay, ascending.
    weight : Tensor (n, ...)
        The producer's, for the site's inputs.
    bias : Tensor (n,) or None
    outgoing : Tensor (M, n, taps)
        The consumer's.
    out_bias : Tensor (M,) or None
    reading : Tensor (n, r) or None
        ``Q'``, of the variant that is composed of factors.
    shift : Tensor (r,) or None
    error : float
        ``‖z − found‖ / ‖z‖`` at the consumer's outputs, on the rows of its least squares.
    facts : dict
    """

    kept: Tensor
    weight: Tensor
    bias: Tensor | None
    outgoing: Tensor
    out_bias: Tensor | None
    reading: Tensor | None
    shift: Tensor | None
    error: float
    facts: dict[str, Any]


def recover(site: Site, how: Ldrf, count: int) -> Recovered:
    """Choose a producer's channels, squeeze, and fit its consumer.

    Parameters
    ----------
    site : Site
    how : Ldrf
    count : int
        Channels that stay.
    """
    flat = site.outgoing.flatten(1)

    def everything() -> Moments:
        value = site.activations(site.weight, site.bias)
        return site.moments(value, site.draw(site.total, flat.shape[1], how.rows, "select"))

    generator = _generator(site, "choice")
    candidates = Candidates(site.incoming, site.outgoing, site.out_bias, everything, generator)
    kept = select(how.selector, candidates, count)
    chosen = site.draw(site.total, count * site.pair.taps, how.rows, "rows")
    weight, bias = site.weight[kept], None if site.bias is None else site.bias[kept]
    value = site.activations(weight, bias)
    start = _closed(site, how, kept, weight, bias, value, chosen)
    facts: dict[str, Any] = {"error_start": start.error, "error_end": start.error, "images": len(site.inputs)}
    if not how.steps:
        return _with(start, facts | {"steps_kept": 0})
    held = _held(site, how)
    parts: list[Tensor | None]
    if how.target == "embedding":
        target = site.embed(site.reference, site.split.reading.to(site.reference), None)
        if start.reading is None:
            parts = [weight, bias, *_reading(site, how, value)]
        else:
            parts = [weight, bias, start.reading, start.shift]
    else:
        target = site.targets()
        shape = (site.consumer.out_features, count, *site.consumer.shape[2:])
        outgoing = start.outgoing.reshape(shape if site.consumer.window is not None else (shape[0], -1))
        parts = [weight, bias, outgoing, start.out_bias]
    del value
    there = [part is not None for part in parts]

    def forward(inputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        given = iter(parameters)
        first, second, third, fourth = (next(given) if has else None for has in there)
        assert first is not None and third is not None
        found = site.made(inputs, first, second)
        if how.target == "embedding":
            return site.embed(found, third, fourth)
        return applied(site.program.steps[site.consumer.step], found, third, fourth)

    squeezed = squeeze(
        forward,
        site.inputs,
        target,
        [part.to(site.inputs) for part in parts if part is not None],
        held,
        how.steps,
        how.learning_rate,
        site.pixels,
        _generator(site, "steps"),
    )
    del target
    weight = squeezed.parameters[0].double()
    bias = squeezed.parameters[1].double() if bias is not None else None
    end = _closed(site, how, kept, weight, bias, site.activations(weight, bias), chosen)
    facts |= {"held_start": squeezed.held_start, "held_end": squeezed.held_end}
    # what is better for the embedding may be worse for the layer; NaN is no better either
    if not end.error < start.error:
        return _with(start, facts | {"steps_kept": 0})
    return _with(end, facts | {"error_end": end.error, "steps_kept": squeezed.step})


def _closed(
    site: Site, how: Ldrf, kept: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor, chosen: Tensor
) -> Recovered:
    """Return what the consumer becomes in closed form, behind a producer of these arrays."""
    moments = site.moments(value, chosen)
    reading, shift, out_bias = None, None, site.out_bias
    outgoing = site.outgoing[:, kept]
    if how.variant == "core":
        reading, shift = _reading(site, how, value)
        outgoing = recompose(site.split.making, reading)
        if shift is not None:
            assert out_bias is not None
            out_bias = out_bias + site.split.making.sum(2) @ shift
    if how.refit and not (how.variant == "core" and (how.head == "compose" or not site.last)):
        fitted, out_bias = least_squares(moments, how.ridge, site.out_bias is not None)
        outgoing = fitted.reshape(outgoing.shape)
    power = float(moments.power) / moments.count
    left = moments.error(outgoing.flatten(1), out_bias)
    error = (left / power) ** 0.5 if power else left**0.5
    return Recovered(kept, weight, bias, outgoing, out_bias, reading, shift, error, {})


def _reading(site: Site, how: Ldrf, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return ``Q'``, and an intercept where there may be one: the least squares of the dense network's embedding."""
    columns = site.planes(value[:1]).shape[1]
    chosen = site.draw(len(value) * site.pixels, columns, how.rows, "embedding")
    total = Moments.zeros(columns, site.split.rank)
    samples, pixels = chosen // site.pixels, chosen % site.pixels
    found, wanted = site.planes(value), site.planes(site.reference)
    for at in range(0, len(chosen), 8 * _BLOCK):
        some = slice(at, at + 8 * _BLOCK)
        dense = wanted[samples[some], :, pixels[some]].double() @ site.split.reading
        total = total + Moments.of(found[samples[some], :, pixels[some]], dense)
    reading, shift = least_squares(total, how.ridge, site.intercept)
    return reading.T.contiguous(), shift


def least_squares(moments: Moments, ridge: float, intercept: bool) -> tuple[Tensor, Tensor | None]:
    """Return the weight ``(M, N)`` and bias that come nearest to the outputs, the weight by ridge regression.

    Parameters
    ----------
    moments : Moments
    ridge : float
        Relative to the mean of the Gram matrix's diagonal; the intercept is free.
    intercept : bool
    """
    gram, cross = moments.second_moment(ones=True), moments.cross_moment(ones=True)
    mean, mean_out = gram[-1, :-1], cross[-1]
    gram, cross = gram[:-1, :-1], cross[:-1]
    if intercept:
        gram, cross = gram - mean[:, None] * mean, cross - mean[:, None] * mean_out
    size = float(gram.diagonal().mean())
    damped = gram + ridge * size * torch.eye(len(gram), dtype=gram.dtype)
    factor, info = torch.linalg.cholesky_ex(damped)
    diagonal = factor.diagonal()
    if not int(info) and float(diagonal.min()) > 1e-7 * float(diagonal.max()):
        solved = torch.cholesky_solve(cross, factor)
    else:  # inputs that hang together: of all solutions the smallest
        values, vectors = torch.linalg.eigh(damped)
        inverse = torch.where(values > 1e-13 * values[-1], 1 / values, 0.0)
        solved = vectors @ (inverse[:, None] * (vectors.T @ cross))
    weight = solved.T.contiguous()
    return weight, mean_out - weight @ mean if intercept else None


def some_patches(inputs: Tensor, window: Window, chosen: Tensor) -> Tensor:
    """Return some rows of `nettrim.network.matrix.patches`, of all samples' positions by number, ``(R, C · K)``.

    The numbers are ascending, so that only samples from the first to the last of them are padded.
    """
    shape = inputs.shape[2:]
    sizes = [
        (size + sum(sides) - d * (k - 1) - 1) // s + 1
        for size, sides, k, s, d in zip(
            shape, window.padding, window.kernel, window.stride, window.dilation, strict=True
        )
    ]
    per = int(np.prod(sizes))
    first, last = int(chosen[0]) // per, int(chosen[-1]) // per
    chosen = chosen - first * per
    padded = F.pad(inputs[first : last + 1], [side for sides in reversed(window.padding) for side in sides])
    kernel, stride, dilation = window.kernel, window.stride, window.dilation
    if len(kernel) == 1:
        padded, kernel, stride, dilation = padded.unsqueeze(-2), (1, *kernel), (1, *stride), (1, *dilation)
    wide = sizes[-1]
    sample, position = chosen // per, chosen % per
    down = (position // wide * stride[0])[:, None, None] + dilation[0] * torch.arange(kernel[0])[:, None]
    across = (position % wide * stride[1])[:, None, None] + dilation[1] * torch.arange(kernel[1])
    found = padded.permute(0, 2, 3, 1)[sample[:, None, None], down, across]
    return found.permute(0, 3, 1, 2).reshape(len(chosen), -1)


def _held(site: Site, how: Ldrf) -> Tensor:
    """Draw the samples that decide which iterate is taken: at least one, and one is left."""
    count = min(max(1, round(how.held * len(site.inputs))), len(site.inputs) - 1)
    drawing = np.random.default_rng(site.numbers("held"))
    return torch.from_numpy(np.sort(drawing.choice(len(site.inputs), count, replace=False, shuffle=False)))


def _generator(site: Site, what: str) -> torch.Generator:
    seed = int(np.random.default_rng(site.numbers(what)).integers(2**62))
    return torch.Generator().manual_seed(seed)


def _with(found: Recovered, facts: dict[str, Any]) -> Recovered:
    own = found.__dict__ | {"facts": facts}
    return Recovered(**own)
