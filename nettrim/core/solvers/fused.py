"""What an iteration of ADMM does entry by entry, as two functions; how they run on a GPU; and what memory it all takes.

On the CPU the functions run as they stand. On a GPU each is compiled once (`torch.compile`), which makes one or two
kernels of it instead of a dozen; where that fails they run as they stand there too, and the answer says so. Neither
waits for the device: norms and shrink factors stay tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nettrim.core.problem import LayerProblem
from nettrim.core.prox import ball_step, soft_threshold
from nettrim.errors import UnsupportedError

Stage = Callable[..., Any]


def fit_stage(
    z: Tensor,
    z_dual: Tensor,
    step: Tensor,
    anchor: Tensor,
    floor: Tensor | None,
    active: Tensor | None,
    radius: Tensor | None,
    shrink: Tensor | None,
    alpha: float,
) -> None:
    """Write ``A − W₁`` into `step` and ``T₁ = α W₁ + (1 − α) Z + D₁`` into `z`, where ``A = Z − D₁``.

    Parameters
    ----------
    z, z_dual, step : Tensor (P, M)
        ``Z`` and ``D₁``, and where the step goes. In place, because these are what fills a GPU.
    anchor, floor : Tensor (P, M)
        ``R = max(A − T, floor)``; no floor for the linear form.
    active : Tensor (P, M), optional
        For a hard ceiling: off this set ``R`` is taken whole, as the projection on the ceiling.
    radius : Tensor () or (M,), optional
        Of the ball, or of every neuron's own.
    shrink : Tensor () or (M,), optional
        Without a radius: the share of ``R`` that the quadratic step takes, ``λ/(λ + a)``.
    """
    torch.sub(z, z_dual, out=step)
    step.sub_(anchor)
    if floor is not None:
        torch.maximum(step, floor, out=step)
    counted = step if active is None else torch.where(active, step, 0.0)
    if radius is not None:
        moved = ball_step(counted, radius, per_neuron=radius.dim() == 1)
    else:
        assert shrink is not None
        moved = counted * shrink
    step.copy_(moved if active is None else torch.where(active, moved, step))
    # with W₁ = (Z − D₁) − step
    z.add_(z_dual, alpha=1 - alpha).sub_(step, alpha=alpha)


def sparse_stage(u: Tensor, u_dual: Tensor, limit: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return ``W₂ = soft(U − D₂, limit)`` and ``T₂ = α W₂ + (1 − α) U + D₂``, all ``(N, M)``."""
    w2 = soft_threshold(u - u_dual, limit)
    return w2, alpha * w2 + (1 - alpha) * u + u_dual


class Stages:
    """The two stages on one device: as they stand, or compiled and with a way back.

    `note` says in one sentence where compiling failed.
    """

    def __init__(self, device: torch.device, backend: str | None = None) -> None:
        if backend is None and device.type == "cuda":
            backend = "inductor"
        self.note = ""
        self._fit: Stage = fit_stage
        self._sparse: Stage = sparse_stage
        if backend is not None:
            self._fit, self._sparse = _compiled(fit_stage, backend), _compiled(sparse_stage, backend)

    def fit(self, *arguments: Any) -> None:
        """Run `fit_stage`."""
        self._fit = self._run(self._fit, fit_stage, arguments)[0]

    def sparse(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Run `sparse_stage`."""
        self._sparse, result = self._run(self._sparse, sparse_stage, arguments)
        w2, t2 = result
        return w2, t2

    def _run(self, stage: Stage, plain: Stage, arguments: tuple[Any, ...]) -> tuple[Stage, Any]:
        """Return the stage to use from now on, and what it gave."""
        if stage is plain:
            return plain, plain(*arguments)
        try:
            return stage, stage(*arguments)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler, or the want of one, raises: before anything was written
            self.note = f"The elementwise steps ran uncompiled, because torch.compile failed ({type(error).__name__})."
            return plain, plain(*arguments)


_COMPILED: dict[tuple[Stage, str], Stage] = {}


def _compiled(stage: Stage, backend: str) -> Stage:
    """Return the stage compiled, for any shape, once in a process."""
    key = stage, backend
    if key not in _COMPILED:
        try:
            _COMPILED[key] = torch.compile(stage, dynamic=True, backend=backend)
        except Exception:  # torch.compile does not know this Python, or this system
            _COMPILED[key] = stage
    return _COMPILED[key]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep TF32 out of float32 products on a GPU: its 10 bits resolve no gap below 1e-3. It is off by default."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


#: ``(P, M)`` arrays at the peak, which is while the certificate is evaluated
_ARRAYS = {"linear": 10, "ball": 12, "halfspace": 17}


def memory_needed(samples: int, inputs: int, outputs: int, dtype: torch.dtype, form: str = "ball") -> int:
    """Return the bytes that ADMM allocates at its peak, beside the problem that it is given.

    ==========  ===================================================================================================
    ``(P, N)``  the scaled inputs
    ``(P, M)``  seven stay (targets, anchor, floor, ``Z``, its dual, the step, the best multipliers); while a weight
                is repaired and certified it is 12, of the linear form 10, of the halfspace form 17
    ``(N, M)``  six (nine where ``P < N``), and the penalty in float64
    ``(N, N)``  in float64 the Gram matrix, and five more while it is factorised; the inverse in `dtype`
    rows        a block of 8192 inputs in float64, while the Gram matrix is formed
    ==========  ===================================================================================================

    Where ``P < N`` the Gram matrix is ``(P, P)``. Libraries keep workspaces of their own beside this.
    """
    width = torch.finfo(dtype).bits // 8
    small, large = min(samples, inputs), max(samples, inputs)
    fit, square = width * samples * outputs, small * small
    sparse = ((6 if samples >= inputs else 9) * width + 8) * inputs * outputs
    forming = 8 * square + 8 * min(8192, large) * small
    certifying = _ARRAYS[form] * fit + sparse + (8 + width) * square
    factorising = 7 * fit + sparse + (6 * 8 + width) * square
    return width * samples * inputs + max(forming, certifying, factorising)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a GPU, what torch holds in reserve included; None on the CPU."""
    if device.type != "cuda":
        return None
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reserve


def check_memory(problem: LayerProblem, dtype: torch.dtype) -> None:
    """Refuse what does not fit on the GPU, before any work.

    Raises
    ------
    UnsupportedError
    """
    p, n, m = problem.samples, problem.n_inputs, problem.n_outputs
    device = problem.inputs.device
    free, needed = free_memory(device), memory_needed(p, n, m, dtype, problem.form)
    if free is not None and needed > free:
        single = "" if dtype == torch.float32 else "solver=Admm(dtype='float32'), "
        raise UnsupportedError(
            f"ADMM needs {needed / 2**30:.3g} GiB on {device} for {p} samples, {n} inputs and {m} outputs in "
            f"{str(dtype).removeprefix('torch.')}, and {free / 2**30:.3g} GiB are free: use {single}fewer samples, "
            "fewer outputs at a time where the neurons have balls of their own, or tensors on the CPU."
        )
