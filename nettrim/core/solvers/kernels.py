"""The loops over neurons of `Newton`, compiled by numba: one neuron's small quadratic program with an ``ℓ1`` term.

numba and not torch, since gathering rows and coordinate descent are what torch is slowest at. The first use on a
machine compiles for some ten seconds; numba keeps the result.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import numba
import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from nettrim.core.solvers.base import Limits

_BUDGET = 2**30  # bytes of Hessians that are kept between steps
_ONE_AT_A_TIME = Lock()  # the limit on BLAS threads is the whole process's


class Models:
    """The quadratic models of all neurons of one problem, whose Hessians are kept from step to step.

    Between steps few samples change between active and inactive and few columns enter, so a Hessian ``X_SᵀX_S`` is
    changed by those, not built anew. Up to 1 GiB is kept in all; one that exceeds its neuron's share is built at every
    step.

    Parameters
    ----------
    x : Tensor (P, N)
    penalty : Tensor (M, N)
        ``c``.
    on : bool Tensor (M, P) or None
        The active set ``Ω``; None where everything is active.
    """

    def __init__(self, x: Tensor, penalty: Tensor, on: Tensor | None) -> None:
        # columns are gathered, so they lie in one piece
        self.columns_of_x = np.ascontiguousarray(x.numpy().T)
        self.penalty = penalty.numpy()
        self.on = None if on is None else on.numpy()
        self.everything = np.ones(x.shape[0], np.bool_)
        self.nothing = np.empty(0, np.int64), np.empty((0, 0), self.columns_of_x.dtype), self.everything
        self.no_rows = np.empty(0, np.int64)
        self.kept: dict[int, tuple[Any, Any, Any]] = {}

    def directions(
        self, r: Tensor, u: Tensor, g: Tensor, lam: Tensor, limits: Limits, off_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return for every neuron its step and how the step depends on ``λ``.

        Parameters
        ----------
        r : Tensor (M, P)
            Residuals.
        u, g : Tensor (M, N)
            Weights and ``XᵀR``.
        lam : Tensor (M,)
        limits : Limits
            Neurons whose turn comes after the deadline stay where they are.
        off_weight : Tensor (M,), optional
            How much squares off the active set count more than those on it. When given, what they add to a Hessian is
            made anew at every step, since few of them are positive and the weights change.

        Returns
        -------
        d : Tensor (M, N)
            The step to the minimiser of the model at ``λ``.
        v : Tensor (M, N)
            ``H_SS⁻¹ (c ∘ sign)`` on the new support: the minimiser moves by ``−(1/λ' − 1/λ) v``.
        linear, square, b : Tensor (M,)
            ``⟨G, d⟩``, ``dᵀHd`` and ``⟨c ∘ sign, v⟩``, in float64.
        """
        m, n = u.shape
        d, v = np.zeros((m, n), u.numpy().dtype), np.zeros((m, n), u.numpy().dtype)
        sums = np.zeros((m, 3))
        weights = np.ones(m) if off_weight is None else off_weight.numpy()
        # relative to the mean diagonal: what float32 needs; no more than rounding in float64, where columns that are
        # nearly alike carry the answer; more for hard ceilings, under which H may be singular and steps without end
        ridge = 2e-6 if u.dtype == torch.float32 else (1e-12 if off_weight is None else 1e-8)
        r_, u_, g_, mu = r.numpy(), u.numpy(), g.numpy(), (1 / lam).numpy()

        def work(i: int) -> None:
            if limits.out_of_time():
                return
            on = self.everything if self.on is None else self.on[i]
            positive = on | (r_[i] > 0)
            extra = self.no_rows
            if off_weight is not None:
                positive, extra = on, np.nonzero(positive & ~on)[0]
            old = self.kept.get(i, self.nothing)
            try:
                new = _step(
                    *(self.columns_of_x, positive, extra, weights[i], ridge, old),
                    *(u_[i], g_[i], self.penalty[i], mu[i], d[i], v[i], sums[i]),
                )
            except np.linalg.LinAlgError:
                # a program that cannot be solved leaves its neuron where it is
                d[i] = v[i] = sums[i] = 0
                return
            if new[1].nbytes <= _BUDGET // m:
                self.kept[i] = new

        # threads of Python's, since the kernels let go of the interpreter; BLAS must not start others inside each
        with _ONE_AT_A_TIME, threadpool_limits(1, "blas"), ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(work, range(m)))
        linear, square, b = (torch.from_numpy(sums[:, k].copy()) for k in range(3))
        return torch.from_numpy(d), torch.from_numpy(v), linear, square, b


@numba.njit(nogil=True, cache=True)
def _step(
    xt: Any,
    active: Any,
    extra: Any,
    weight: Any,
    ridge: Any,
    kept: Any,
    u: Any,
    g: Any,
    c: Any,
    per_lam: Any,
    d: Any,
    v: Any,
    sums: Any,
) -> Any:
    """Solve one neuron's model, write what `Models.directions` returns, and return columns, Hessian and its samples."""
    mu = c * per_lam
    wanted = _working_set(u, g, mu)
    if not active.any() and extra.shape[0] == 0:
        # a dead neuron: no residual, so the zero weight is free
        for n in range(u.shape[0]):
            if mu[n] > 0:
                d[n] = -u[n]
        return np.empty(0, np.int64), np.empty((0, 0), xt.dtype), active
    columns, h = _hessian(xt, active, wanted, *kept)
    full = h
    if extra.shape[0]:
        full = _product(_gather(xt, columns, extra))
        full *= weight
        full += h
    here, step, q = u[columns], np.zeros(columns.shape[0], xt.dtype), g[columns]
    move = _minimise(full, q, here, step, mu[columns], ridge)
    for j in range(columns.shape[0]):
        n = columns[j]
        d[n] = step[j]
        v[n] = move[j]
        sums[0] += g[n] * step[j]
        sums[1] += step[j] * (q[j] - g[n])
        sums[2] += c[n] * np.sign(here[j] + step[j]) * move[j]
    # `v` was solved for c/λ
    for j in range(columns.shape[0]):
        v[columns[j]] /= per_lam
    sums[2] /= per_lam
    return columns, h, active


@numba.njit(nogil=True, cache=True)
def _working_set(u: Any, g: Any, mu: Any) -> Any:
    """Return the support, the free columns, and the columns that press hardest, half as many as the support and 20."""
    n = u.shape[0]
    support, pressing = 0, 0
    score = np.zeros(n)
    for i in range(n):
        if u[i] != 0 or mu[i] == 0:
            support += 1
            score[i] = 1e30
        elif abs(g[i]) > 0.95 * mu[i]:
            pressing += 1
            score[i] = abs(g[i]) / mu[i]
    count = support + min(pressing, support // 2 + 20)
    return np.sort(np.argsort(-score)[:count])


@numba.njit(nogil=True, cache=True)
def _hessian(xt: Any, active: Any, wanted: Any, columns: Any, h: Any, before: Any) -> Any:
    """Return ``X_SᵀX_S`` over the active samples for the wanted columns (and some kept ones), and those columns."""
    rows = np.nonzero(active)[0]
    old = columns.shape[0]
    if old == 0 or wanted.shape[0] == 0 or rows.shape[0] == 0:
        return wanted, _product(_gather(xt, wanted, rows))
    place = np.full(xt.shape[0], -1)
    for j in range(old):
        place[columns[j]] = j
    new = 0
    for j in range(wanted.shape[0]):
        if place[wanted[j]] < 0:
            new += 1
    came = np.nonzero(active & ~before)[0]
    went = np.nonzero(before & ~active)[0]
    size = wanted.shape[0]
    # in units of |A| |S|² multiplications and additions
    if (came.shape[0] + went.shape[0]) / rows.shape[0] + 2.0 * new / size > 0.7:
        return wanted, _product(_gather(xt, wanted, rows))
    # all old columns may stay, unless they are too many
    stay = np.arange(old)
    if old + new > 1.3 * size + 30:
        is_wanted = np.zeros(xt.shape[0], np.bool_)
        is_wanted[wanted] = True
        stay = np.nonzero(is_wanted[columns])[0]
    k = stay.shape[0]
    joined = np.empty(k + new, np.int64)
    joined[:k] = columns[stay]
    i = k
    for j in range(size):
        if place[wanted[j]] < 0:
            joined[i] = wanted[j]
            i += 1
    out = np.empty((k + new, k + new), xt.dtype)
    for i in range(k):
        for j in range(k):
            out[i, j] = h[stay[i], stay[j]]
    if came.shape[0]:
        out[:k, :k] += _product(_gather(xt, joined[:k], came))
    if went.shape[0]:
        out[:k, :k] -= _product(_gather(xt, joined[:k], went))
    if new:
        block = _gather(xt, joined, rows)
        corner = np.dot(block[k:], block.T)
        out[k:, :] = corner
        out[:k, k:] = corner[:, :k].T
    return joined, out


@numba.njit(nogil=True, cache=True)
def _gather(xt: Any, columns: Any, rows: Any) -> Any:
    block = np.empty((columns.shape[0], rows.shape[0]), xt.dtype)
    for j in range(columns.shape[0]):
        column = xt[columns[j]]
        for i in range(rows.shape[0]):
            block[j, i] = column[rows[i]]
    return block


@numba.njit(nogil=True, cache=True)
def _product(block: Any) -> Any:
    """Return ``B Bᵀ``, where stripes of rows spare most of what symmetry makes double."""
    size = block.shape[0]
    out = np.empty((size, size), block.dtype)
    stripe = max(32, -(-size // 8))
    for start in range(0, size, stripe):
        stop = min(size, start + stripe)
        part = np.dot(block[start:stop], block[:stop].T)
        out[start:stop, :stop] = part
        out[:start, start:stop] = part[:, :start].T
    return out


@numba.njit(nogil=True, cache=True)
def _minimise(h: Any, q: Any, here: Any, step: Any, mu: Any, ridge: Any) -> Any:
    """Minimise ``gᵀs + ½ sᵀHs + Σ μ|u + s|`` and return ``H_SS⁻¹ (μ ∘ sign)`` on the support of ``u + s``.

    `q` comes as ``g`` and is ``g + Hs`` throughout. Coordinate descent finds most signs cheaply, and the direct solve
    then what it is hopelessly slow at, columns that are nearly alike.
    """
    _coordinate_descent(h, q, here, step, mu, 20)
    # small programs get more rounds: nearly alike columns need them, and they cost nothing
    for _ in range(max(6, min(60, int(1e8 / (q.shape[0] + 1.0) ** 3)))):
        crossed, move = _solve_support(h, q, here, step, mu, ridge)
        if crossed == 0 and _worst(q, here, step, mu) < 1e-3:
            return move
        _coordinate_descent(h, q, here, step, mu, 8)
    sign = np.sign(here + step)
    return _on_support(h, np.nonzero(sign)[0], mu * sign, mu * sign, ridge)[1]


@numba.njit(nogil=True, cache=True)
def _worst(q: Any, here: Any, step: Any, mu: Any) -> float:
    """The largest violation of the optimality conditions, relative to ``μ``."""
    worst = 0.0
    for j in range(q.shape[0]):
        if mu[j] > 0:
            now = here[j] + step[j]
            worst = max(worst, (abs(q[j] + mu[j] * np.sign(now)) if now != 0 else abs(q[j]) - mu[j]) / mu[j])
    return worst


@numba.njit(nogil=True, cache=True)
def _coordinate_descent(h: Any, q: Any, here: Any, step: Any, mu: Any, sweeps: int) -> None:
    size = q.shape[0]
    for _ in range(sweeps):
        largest = 0.0
        for j in range(size):
            curve = h[j, j]
            if curve <= 0:
                continue
            old = here[j] + step[j]
            if old == 0 and abs(q[j]) <= mu[j]:
                continue
            b = old - q[j] / curve
            t = mu[j] / curve
            new = b - t if b > t else (b + t if b < -t else 0.0)
            move = new - old
            if move != 0:
                for i in range(size):
                    q[i] += h[j, i] * move
                step[j] = new - here[j]
                largest = max(largest, abs(move) * curve**0.5)
        if largest < 1e-7:
            break


@numba.njit(nogil=True, cache=True)
def _solve_support(h: Any, q: Any, here: Any, step: Any, mu: Any, ridge: Any) -> Any:
    """Move to the minimiser on the present support; return how many weights would have changed sign, and stop at zero.

    Where some would, the move is halved until the objective falls.
    """
    sign = np.sign(here + step)
    kept = np.nonzero(sign)[0]
    full, move = _on_support(h, kept, -(q + mu * sign), mu * sign, ridge)
    crossed = 0
    for j in kept:
        now = here[j] + step[j]
        if mu[j] > 0 and now * (now + full[j]) < 0:
            full[j] = -now
            crossed = crossed + 1
    change = np.dot(h, full)
    length = 1.0
    if crossed:
        linear, square = np.dot(q, full), np.dot(full, change)
        for _ in range(6):
            norm = 0.0
            for j in kept:
                now = here[j] + step[j]
                norm += mu[j] * (abs(now + length * full[j]) - abs(now))
            if length * linear + 0.5 * length * length * square + norm < 0:
                break
            length *= 0.5
    for i in range(q.shape[0]):
        q[i] += length * change[i]
        # an exact zero, where rounding would leave a crumb
        step[i] = -here[i] if length == 1.0 and full[i] == -(here[i] + step[i]) else step[i] + length * full[i]
    return crossed, move


@numba.njit(nogil=True, cache=True)
def _on_support(h: Any, kept: Any, first: Any, second: Any, ridge: Any) -> Any:
    """Return ``H_SS⁻¹`` times two vectors, zero off ``S``, damped so that a rank-deficient block is solvable."""
    size = len(kept)
    block, sides = np.empty((size, size), h.dtype), np.empty((size, 2), h.dtype)
    trace = 0.0
    for i in range(size):
        for j in range(size):
            block[i, j] = h[kept[i], kept[j]]
        trace += block[i, i]
        sides[i, 0], sides[i, 1] = first[kept[i]], second[kept[i]]
    out = np.zeros(h.shape[0], h.dtype), np.zeros(h.shape[0], h.dtype)
    if size:
        damping = ridge * trace / size + 1e-30
        for i in range(size):
            block[i, i] += damping
        solved = np.linalg.solve(block, sides)
        for i in range(size):
            out[0][kept[i]], out[1][kept[i]] = solved[i, 0], solved[i, 1]
    return out
