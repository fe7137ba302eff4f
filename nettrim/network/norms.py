"""Upper bounds on the operator norms of linear and convolutional layers, each with its proof in short.

A power iteration tells how much a layer amplifies at least. These bounds tell how much it amplifies at most, for inputs
of any size or of one given size, without the bias.

**Symbol.** A zero-padded convolution of stride 1 is a section of a convolution over the infinite lattice, so its norm
is at most ``sup_ω ‖K(ω)‖₂`` with ``K(ω) = Σ_k K_k exp(i⟨k, ω⟩)`` (Parseval; Sedghi, Gupta and Long, "The singular
values of convolutional layers", 2019, for the circular case).

**Stride and dilation.** With stride ``s`` and dilation ``d``, output ``n`` reads inputs ``s n + d j``, all on the
lattice of multiples of ``gcd(s, d)``: divide both by it. Now write ``j = s q + a``. Tap ``q`` of phase ``a`` reads
``s (n + d q) + d a``; as ``s`` and ``d`` share no factor, the phases ``d a mod s`` differ, so each is a channel of its
own. Their shifts ``⌊d a / s⌋`` are unitary and ``d`` only scales the frequency: ``K'[m, (c, a), q] = K[m, c, s q + a]``
at stride 1 without dilation has the same supremum.

**From a grid to every frequency.** At the supremum ``M = u* K(ω₀) v`` with unit vectors. Along one dimension with ``k``
taps, ``t ↦ Re u* K(ω₀ + t) v``, centred, is a real trigonometric polynomial of degree ``d = (k − 1) / 2`` that is
``M`` at 0 and nowhere larger, so it is at least ``M cos(d t)`` for ``|t| ≤ π / d`` (M. Riesz; for half-integers put
``t = 2 s``). Some point of a grid of ``N`` lies within ``π / N``: ``M ≤ max_grid ‖K‖₂ / cos(π d / N)`` (Ehlich and
Zeller, 1964, for polynomials). One dimension after another, the factors multiply.

**At the points of the grid.** ``K K* = Σ_τ R_τ exp(i⟨τ, ω⟩)`` with the autocorrelation ``R`` of the kernel, and
``‖K(ω)‖₂² ≤ U`` where ``U I − K K*`` has a Cholesky factor: that of an ``n × n`` matrix, once it comes to its end,
proves every eigenvalue ``≥ −O(n ε) trace`` (Rump, "Verification of positive definiteness", 2006). ``U`` starts low and
is raised to the largest eigenvalue where it fails; the rounding of all steps is added at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from nettrim.errors import ProblemError

_ROUNDING = 1e-9  # far above what float64 loses in a decomposition or a sum of squares
_STEP = 1e-4  # by how much an eigenvalue is exceeded when the level is raised: saves further raises, costs half of it
_FINENESS = (32, 24, 16, 12, 10, 8, 6, 5)  # points of the grid per tap beyond the first; 5 exceeds by 5% a dimension
_GRID_WORK = 1.3e11  # floating point operations that a grid finer than the coarsest may take: seconds on one core
_CHUNK = 2**18  # complex numbers worked on at a time: what a cache holds
_SMALL = 1024  # rows or columns up to which the operator is written out as a matrix ...
_ENTRIES = 2**24  # ... unless it has more entries


@dataclass(frozen=True)
class NormBound:
    """A proven upper bound on an operator norm.

    Attributes
    ----------
    value : float
        ``max ‖A x‖₂ / ‖x‖₂`` is at most this; 0.0 for weights that are all zero.
    method : str
        What proves it: "singular value", "operator eigenvalue", "symbol 32x32" (with the grid), "absolute taps" or
        "frobenius".
    """

    value: float
    method: str


def linear_norm(weight: Tensor) -> NormBound:
    """Return the largest singular value of ``weight (M, N)`` in float64, raised by 1e-9 for its rounding.

    Raises
    ------
    ProblemError
        Not a real matrix, or empty, or with NaN or infinity.
    """
    matrix = _checked(weight, (2,))
    return NormBound(float(torch.linalg.matrix_norm(matrix, ord=2)) * (1 + _ROUNDING), "singular value")


def conv_norm(
    weight: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int = 1,
    input_size: Sequence[int] | None = None,
) -> NormBound:
    """Bound the norm of a zero-padded convolution, bias left out, by the smallest of the bounds that can be computed.

    A kernel of one tap a phase (such as 1x1) has an exact norm. So has an operator with few rows or columns on a given
    input size, which is then written out. Otherwise the supremum of the symbol is taken, see the module: on a grid that
    is as fine as some seconds allow, at most 0.5% a dimension above it for 512 x 512 channels and 3 x 3 taps.

    Parameters
    ----------
    weight : Tensor (C_out, C_in / groups, L) or (C_out, C_in / groups, H, W)
    stride, dilation : sequence of int
        One per dimension, at least 1.
    padding : sequence of (int, int)
        Zeros before and after, per dimension.
    groups : int
        The norm is the largest over the groups.
    input_size : sequence of int, optional
        ``(L,)`` or ``(H, W)`` without the padding; None where it is unknown: the bound then holds for every size.

    Raises
    ------
    ProblemError
        A weight that is no real kernel or has NaN or infinity; settings of another length or out of range; an input
        too small for one window.
    """
    kernel = _checked(weight, (3, 4))
    shape = tuple(kernel.shape[2:])
    _check_settings(kernel, stride, padding, dilation, groups, input_size)
    scale = float(kernel.abs().max())
    if scale == 0.0:
        return NormBound(0.0, "singular value")
    kernel = kernel / scale  # squares neither overflow nor vanish
    phases = _polyphase(kernel.reshape(groups, -1, *kernel.shape[1:]), stride, dilation)
    found = [
        NormBound(_spectral(phases.abs().flatten(3).sum(-1)), "absolute taps"),
        NormBound(frobenius_conv_norm(kernel, stride=stride, dilation=dilation), "frobenius"),
    ]
    exact = None
    if input_size is not None:
        sizes = [
            (size + before + after - d * (k - 1) - 1) // s + 1
            for size, (before, after), d, k, s in zip(input_size, padding, dilation, shape, stride, strict=True)
        ]
        exact = _operator_norm(kernel, stride, padding, dilation, groups, list(input_size), sizes)
    if phases[0, 0, 0].numel() == 1:
        found.append(NormBound(_spectral(phases.flatten(2)), "singular value"))
    elif exact is None:
        found.append(_symbol_norm(phases))
    if exact is not None:
        found.append(NormBound(exact, "operator eigenvalue"))
    best = min(found, key=lambda bound: bound.value)
    return NormBound(best.value * scale, best.method)


def cover(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> int:
    """Return how many windows cover one input pixel at most: ``‖unfold(x)‖ ≤ √cover ‖x‖`` on inputs of any size.

    Tap ``j`` of a window reads pixel ``x`` where ``d j ≡ x (mod s)``. The residues of ``d j`` come back every
    ``s / gcd(s, d)`` taps, so ``⌈k gcd(s, d) / s⌉`` taps share one; dimensions multiply.

    Raises
    ------
    ProblemError
        Settings of different lengths, or below 1.
    """
    for name, values in (("kernel", kernel), ("stride", stride), ("dilation", dilation)):
        _check_positive(name, values, len(kernel))
    return math.prod(-(-k // period) for k, period in zip(kernel, _periods(stride, dilation), strict=True))


def frobenius_conv_norm(weight: Tensor, *, stride: Sequence[int], dilation: Sequence[int]) -> float:
    """Return ``‖K‖_F √cover``, the bound that theorems on kernel matrices give: crude, for inputs of any size.

    Parameters
    ----------
    weight : Tensor (C_out, C_in / groups, L) or (C_out, C_in / groups, H, W)
    stride, dilation : sequence of int

    Raises
    ------
    ProblemError
        As in `conv_norm`.
    """
    kernel = _checked(weight, (3, 4))
    return float(kernel.norm()) * math.sqrt(cover(tuple(kernel.shape[2:]), stride, dilation)) * (1 + _ROUNDING)


def l1_conv_norm(weight: Tensor) -> float:
    """Return ``Σ |K|`` over all entries: every tap is a shift of norm at most 1. Crude, for inputs of any size.

    Parameters
    ----------
    weight : Tensor (C_out, C_in / groups, L) or (C_out, C_in / groups, H, W)

    Raises
    ------
    ProblemError
        As in `conv_norm`.
    """
    return float(_checked(weight, (3, 4)).abs().sum()) * (1 + _ROUNDING)


def _checked(weight: Tensor, dimensions: tuple[int, ...]) -> Tensor:
    """Return the weight in float64 on the CPU, free of gradients."""
    if weight.dim() not in dimensions or weight.numel() == 0 or weight.is_complex():
        kind = " or ".join(str(d) for d in dimensions)
        raise ProblemError(
            f"weight has shape {tuple(weight.shape)} and type {weight.dtype}: give real, non-empty weights with {kind} "
            "dimensions."
        )
    double = weight.detach().to("cpu", torch.float64)
    bad = int((~torch.isfinite(double)).sum())
    if bad:
        raise ProblemError(f"weight has {bad} NaN or infinite entries: mend the layer, no norm bounds it.")
    return double


def _check_positive(name: str, values: Sequence[int], length: int) -> None:
    if len(values) != length or any(not isinstance(value, int) or value < 1 for value in values):
        raise ProblemError(f"{name} is {tuple(values)}: give {length} whole numbers of at least 1, one per dimension.")


def _check_settings(
    kernel: Tensor,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    input_size: Sequence[int] | None,
) -> None:
    shape = tuple(kernel.shape[2:])
    _check_positive("stride", stride, len(shape))
    _check_positive("dilation", dilation, len(shape))
    if len(padding) != len(shape) or any(len(pair) != 2 or min(pair) < 0 for pair in padding):
        raise ProblemError(
            f"padding is {tuple(padding)}: give {len(shape)} pairs (before, after) of whole numbers of at least 0."
        )
    if groups < 1 or len(kernel) % groups:
        raise ProblemError(f"groups is {groups}: it must divide the {len(kernel)} output channels of the weight.")
    if input_size is None:
        return
    _check_positive("input_size", input_size, len(shape))
    for size, (before, after), d, k in zip(input_size, padding, dilation, shape, strict=True):
        if size + before + after < d * (k - 1) + 1:
            raise ProblemError(
                f"input_size {tuple(input_size)} is smaller than one window of the kernel {shape} with dilation "
                f"{tuple(dilation)}: give the size that the layer really sees, without its padding."
            )


def _periods(stride: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return after how many taps a window comes back to the same phase of the stride."""
    return [s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]


def _polyphase(kernel: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Return the kernel ``(G, M, C a, *q)`` of stride 1 and dilation 1 with the same norm as ``(G, M, C, *k)``."""
    shape = kernel.shape[3:]
    periods = [min(period, k) for period, k in zip(_periods(stride, dilation), shape, strict=True)]
    short = [-k % period for k, period in zip(shape, periods, strict=True)]
    padded = F.pad(kernel, [end for gap in reversed(short) for end in (0, gap)])
    split = [n for size, period in zip(padded.shape[3:], periods, strict=True) for n in (size // period, period)]
    count = len(shape)
    taps, phases = [3 + 2 * axis for axis in range(count)], [4 + 2 * axis for axis in range(count)]
    moved = padded.reshape(*kernel.shape[:3], *split).permute(0, 1, 2, *phases, *taps)
    return moved.flatten(2, 2 + count)


def _spectral(matrices: Tensor) -> float:
    """Return the largest singular value of ``(G, M, N)``, raised for its rounding."""
    return float(torch.linalg.matrix_norm(matrices, ord=2).max()) * (1 + _ROUNDING)


def _rounding(n: int, m: int, taps: int = 1) -> float:
    """Return what float64 can lose of ``λ_max`` of a Gram matrix ``(n, n)`` of rows of ``taps m`` numbers, relatively.

    Sums of ``m`` products lose ``m ε ‖A‖_F² ≤ m n ε λ_max``, a Cholesky factor ``n ε trace ≤ n² ε λ_max``. Those of an
    autocorrelation have ``taps m`` terms, and together ``(Σ_k ‖K_k‖_F)² ≤ taps n λ_max`` in place of ``‖A‖_F²``. Four
    times that leaves room for complex arithmetic and for the phases.
    """
    return _ROUNDING + 4 * torch.finfo(torch.float64).eps * n * taps * (n + taps * m)


def _operator_norm(
    kernel: Tensor,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    inputs: list[int],
    outputs: list[int],
) -> float | None:
    """Return the largest singular value of the operator, written out by group; None where it is too large."""
    channels, width = kernel.shape[1], len(kernel) // groups
    columns, rows = channels * math.prod(inputs), width * math.prod(outputs)
    if min(columns, rows) > _SMALL or groups * columns * rows > _ENTRIES:
        return None
    if columns <= rows:
        # each column stands in every group at once: the groups do not mix
        units = torch.eye(columns, dtype=kernel.dtype).reshape(columns, 1, channels, *inputs)
        units = F.pad(units.expand(-1, groups, *units.shape[2:]).flatten(1, 2), _flat(padding))
        forward = F.conv1d if len(inputs) == 1 else F.conv2d
        written = forward(units, kernel, stride=tuple(stride), dilation=tuple(dilation), groups=groups)
    else:
        units = torch.eye(rows, dtype=kernel.dtype).reshape(rows, 1, width, *outputs)
        units = units.expand(-1, groups, *units.shape[2:]).flatten(1, 2)
        backward = F.conv_transpose1d if len(inputs) == 1 else F.conv_transpose2d
        written = backward(units, kernel, stride=tuple(stride), dilation=tuple(dilation), groups=groups)
        # pixels behind the last window take no part; those of the padding are cut off
        written = F.pad(written, [-before if at == 0 else 0 for before, _ in reversed(padding) for at in (0, 1)])
        for axis, size in enumerate(inputs, start=2):
            written = written.narrow(axis, 0, min(size, written.shape[axis]))
    matrices = written.reshape(len(written), groups, -1).transpose(0, 1)
    top = torch.linalg.eigvalsh(matrices @ matrices.mT).max().clamp(min=0.0)
    return math.sqrt(float(top) * (1 + _rounding(min(columns, rows), max(columns, rows)))) * (1 + _ROUNDING)


def _flat(padding: Sequence[tuple[int, int]]) -> list[int]:
    """Return the padding as `torch.nn.functional.pad` takes it: last dimension first."""
    return [zeros for pair in reversed(padding) for zeros in pair]


def _symbol_norm(kernel: Tensor) -> NormBound:
    """Bound the supremum of the symbol of ``(G, M, C, *k)``, stride and dilation 1, from a grid."""
    if kernel.shape[1] > kernel.shape[2]:
        kernel = kernel.transpose(1, 2)  # the symbol's transpose has the same norm and a smaller Gram matrix
    groups, n, m = kernel.shape[:3]
    shape = kernel.shape[3:]
    offsets, correlations = _autocorrelation(kernel)
    sizes = _grid_sizes(shape, groups * (3.0 * n**3 + 4.0 * len(offsets) * n**2 + 1e4) + 100.0 * len(offsets))
    frequencies = _half_grid(sizes)
    # the mean of ‖K(ω)‖_F² is ‖K‖_F², so this is no more than the supremum, and it is positive where K(ω) is zero
    level = float(kernel.flatten(1).square().sum(1).max()) / n
    count = max(1, _CHUNK // max(groups * n * n, len(offsets)))
    for start in range(0, len(frequencies), count):
        angles = frequencies[start : start + count] @ offsets.T
        real, imaginary = ((f(angles) @ correlations).reshape(-1, n, n) for f in (torch.cos, torch.sin))
        level = _raised(level, torch.complex(real + real.mT, imaginary - imaginary.mT))
    level *= 1 + _rounding(n, m, math.prod(shape))
    factor = math.prod(1 / math.cos(math.pi * (k - 1) / (2 * size)) for k, size in zip(shape, sizes, strict=True))
    return NormBound(math.sqrt(level) * factor * (1 + _ROUNDING), f"symbol {'x'.join(map(str, sizes))}")


def _grid_sizes(shape: Sequence[int], work: float) -> list[int]:
    """Return the points per dimension: the finest grid that the work allows, at ``work`` operations a frequency."""
    for fineness in _FINENESS:
        sizes = [max(1, fineness * (k - 1)) for k in shape]
        if work * math.prod(sizes) / 2 <= _GRID_WORK:
            break
    return sizes


def _half_grid(sizes: Sequence[int]) -> Tensor:
    """Return frequencies ``(F, dimensions)``, one of each pair ``±ω``: a real kernel's symbols there are conjugate."""
    points = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).reshape(-1, len(sizes))
    counts = torch.tensor(sizes)
    weights = torch.tensor([math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))])
    kept = points[(points * weights).sum(1) <= ((-points % counts) * weights).sum(1)]
    return kept * (2 * math.pi / counts.double())


def _autocorrelation(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Return offsets ``τ (T, dimensions)``, one of each pair ``±τ``, and ``R_τ (T, G n n)``, with half of ``R_0``.

    ``R_τ = Σ_k K_{k+τ} K_kᵀ`` and ``R_{−τ} = R_τᵀ``, so ``K K* = Σ_τ (R_τ exp(i⟨τ, ω⟩) + its adjoint)``.
    """
    shape = kernel.shape[3:]
    zero = (0,) * len(shape)
    offsets = [tau for tau in product(*(range(1 - k, k) for k in shape)) if tau >= zero]
    blocks = torch.stack([_correlation(kernel, tau) for tau in offsets])
    blocks[offsets.index(zero)] /= 2
    return torch.tensor(offsets, dtype=torch.float64), blocks.flatten(1)


def _correlation(kernel: Tensor, tau: Sequence[int]) -> Tensor:
    ahead, behind = kernel, kernel
    for axis, (shift, taps) in enumerate(zip(tau, kernel.shape[3:], strict=True), start=3):
        ahead = ahead.narrow(axis, max(shift, 0), taps - abs(shift))
        behind = behind.narrow(axis, max(-shift, 0), taps - abs(shift))
    return ahead.flatten(2) @ behind.flatten(2).mT


def _raised(level: float, grams: Tensor) -> float:
    """Return a level from ``level > 0`` upwards that no eigenvalue of the Hermitian matrices ``(B, n, n)`` exceeds."""
    unit = torch.eye(grams.shape[-1], dtype=grams.dtype)
    while len(grams := grams[torch.linalg.cholesky_ex(level * unit - grams).info > 0]):
        # the largest by its Frobenius norm is a good guess of the one with the largest eigenvalue: few raises
        likely = grams[torch.linalg.matrix_norm(grams).argmax()]
        level = max(level, float(torch.linalg.eigvalsh(likely)[-1])) * (1 + _STEP)
    return level
