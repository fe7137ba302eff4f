"""The loops over neurons of `Newton`, compiled by numba. Everything here is one neuron's small quadratic program."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor


def directions(
    x: Tensor, r: Tensor, u: Tensor, g: Tensor, penalty: Tensor, lam: Tensor, floor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return for every neuron its step and how the step depends on ``λ``.

    Parameters
    ----------
    x : Tensor (P, N)
    r : Tensor (M, P)
        Residuals.
    u, g, penalty : Tensor (M, N)
        Weights, ``XᵀR`` and ``c``.
    lam : Tensor (M,)
    floor : Tensor (M, P) or None
        ``−∞`` on the active set, 0 off it; None where everything is active.

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
    arrays = [t.numpy() for t in (x, r, u, g, penalty, 1 / lam, u[:0] if floor is None else floor)]
    workers = torch.get_num_threads()

    def work(start: int) -> None:
        _directions(*arrays, d, v, sums, start, workers)

    # threads of Python's, since the kernels let go of the interpreter; BLAS must not start others inside each
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    linear, square, b = (torch.from_numpy(sums[:, k].copy()) for k in range(3))
    return torch.from_numpy(d), torch.from_numpy(v), linear, square, b


@numba.njit(nogil=True, cache=True)
def _directions(
    x: Any, r: Any, u: Any, g: Any, c: Any, mu: Any, floor: Any, d: Any, v: Any, sums: Any, start: int, stride: int
) -> None:
    for m in range(start, u.shape[0], stride):
        _one(x, r[m], u[m], g[m], c[m] * mu[m], c[m], floor[m] if floor.shape[0] else r[m][:0], d[m], v[m], sums[m])


@numba.njit(cache=True)
def _one(x: Any, r: Any, u: Any, g: Any, mu: Any, c: Any, floor: Any, d: Any, v: Any, sums: Any) -> None:
    columns = _working_set(u, g, mu)
    size = columns.shape[0]
    if size == 0:
        return
    rows = np.nonzero((r > 0) | (floor < 0))[0] if floor.shape[0] else np.arange(r.shape[0])
    if rows.shape[0] == 0:
        # a dead neuron: no residual, so the zero weight is free
        for j in range(size):
            n = columns[j]
            if mu[n] > 0:
                d[n] = -u[n]
        return
    block = np.empty((rows.shape[0], size), x.dtype)
    for i in range(rows.shape[0]):
        row = x[rows[i]]
        for j in range(size):
            block[i, j] = row[columns[j]]
    h = np.dot(block.T, block)
    here, step, q = u[columns].copy(), np.zeros(size, x.dtype), g[columns].copy()
    weight = mu[columns].copy()
    _coordinate_descent(h, q, here, step, weight, 40)
    for _ in range(12):
        if _polish(h, q, here, step, weight):
            break
    _coordinate_descent(h, q, here, step, weight, 4)
    _polish(h, q, here, step, weight)
    for j in range(size):
        d[columns[j]] = step[j]
        sums[0] += g[columns[j]] * step[j]
        sums[1] += step[j] * (q[j] - g[columns[j]])
    # how the minimiser moves with λ
    kept = np.nonzero(here + step)[0]
    if kept.shape[0]:
        sign = np.empty(kept.shape[0], x.dtype)
        for i in range(kept.shape[0]):
            n = columns[kept[i]]
            sign[i] = c[n] * np.sign(here[kept[i]] + step[kept[i]])
        move = _solve(h, kept, sign)
        for i in range(kept.shape[0]):
            v[columns[kept[i]]] = move[i]
            sums[2] += sign[i] * move[i]


@numba.njit(cache=True)
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


@numba.njit(cache=True)
def _coordinate_descent(h: Any, q: Any, here: Any, step: Any, mu: Any, sweeps: int) -> None:
    """Minimise ``gᵀs + ½ sᵀHs + Σ μ|u + s|`` over single coordinates; `q` is ``g + Hs`` throughout."""
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


@numba.njit(cache=True)
def _polish(h: Any, q: Any, here: Any, step: Any, mu: Any) -> bool:
    """Move to the minimiser on the present support, or to the first change of sign; return whether it was reached."""
    kept = np.nonzero(here + step)[0]
    if kept.shape[0] == 0:
        return True
    rhs = np.empty(kept.shape[0], h.dtype)
    for i in range(kept.shape[0]):
        j = kept[i]
        rhs[i] = -(q[j] + mu[j] * np.sign(here[j] + step[j]))
    move = _solve(h, kept, rhs)
    length, first = 1.0, -1
    for i in range(kept.shape[0]):
        now = here[kept[i]] + step[kept[i]]
        if mu[kept[i]] > 0 and now * (now + move[i]) < 0 and -now / move[i] < length:
            length, first = -now / move[i], i
    for i in range(kept.shape[0]):
        j = kept[i]
        change = length * move[i]
        if i == first:
            change = -(here[j] + step[j])
            step[j] = -here[j]
        else:
            step[j] += change
        for k in range(q.shape[0]):
            q[k] += h[j, k] * change
    return first < 0


@numba.njit(cache=True)
def _solve(h: Any, kept: Any, rhs: Any) -> Any:
    """Return ``H_SS⁻¹ rhs``, with the damping that keeps a rank-deficient block solvable."""
    size = kept.shape[0]
    block = np.empty((size, size), h.dtype)
    trace = 0.0
    for i in range(size):
        for j in range(size):
            block[i, j] = h[kept[i], kept[j]]
        trace += block[i, i]
    damping = (2e-6 if h.itemsize == 4 else 1e-12) * trace / size + 1e-300
    for i in range(size):
        block[i, i] += damping
    return np.linalg.solve(block, rhs)
