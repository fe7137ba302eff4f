"""Newton steps for the halfspace form, whose ceiling is hard: an augmented Lagrangian around them.

Off the active set ``Z ≤ V`` has multipliers ``Λ ≥ 0``. Each step is a Newton step on ``Σ c|U| + (λ/2) (‖R_Ω‖² +
w ‖(Z − V + Λ/(wλ))₊‖²)``, after which ``Λ`` becomes what the squares off ``Ω`` pull with [Rockafellar 1976].
Multipliers, and with them the bound, settle quickly at a small ``w``; the ceiling is met quickly at a large one, where
steps need a search along the line. So ``w`` is small first and large at the end. Best bound and best weight need not
come from one step.

Where a column is constant (a bias), what is left of an excess is taken off it, which makes the weight feasible by
construction; the radius pays for that. Elsewhere a slightly lower ceiling is aimed at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nettrim.core.solution import FEASIBLE
from nettrim.core.solvers.base import Limits, constant_column
from nettrim.core.solvers.best import Best
from nettrim.core.solvers.scaling import Scaled
from nettrim.core.solvers.steps import Steps, radius_violation

# w at first, and from step _EARLIEST on, once nearly all neurons have settled
_GENTLE, _STEEP, _EARLIEST = 40.0, 1000.0, 12


class CeilingSteps(Steps):
    """Newton steps of all neurons together on a scaled halfspace problem; `best` is offered weights on the way."""

    def __init__(self, scaled: Scaled, limits: Limits, best: Best | None = None) -> None:
        # what float32 leaves uncertain
        self.rounding = 1e-5 if scaled.problem.inputs.dtype == torch.float32 else 0.0
        super().__init__(scaled, limits, best)
        p = scaled.problem
        self.ceiling = self.anchor
        self.column = constant_column(p)
        self.size = float(p.targets.abs().max()) or float(p.anchor.abs().max()) or 1.0

    @property
    def margin(self) -> float:
        """The fraction by which a smaller radius is aimed at: lowering a constant column takes some of it."""
        return 0.5 * self.limits.tol + self.rounding

    def begin(self, weight: Tensor, lam: Tensor, gamma: Tensor | None = None) -> None:
        """Start at a weight ``(M, N)``, every neuron's ``λ (M,)`` and, where there are any, multipliers ``(P, M)``."""
        self.w = _GENTLE
        self.pull = torch.zeros_like(self.ceiling)  # Λ/λ
        if gamma is not None:
            off = torch.where(self.on, 0.0, -gamma.T.to(self.x)).clamp(min=0)
            self.pull = off / torch.where(lam > 0, lam, torch.inf).to(self.x)[:, None]
        self.anchor = self.ceiling - self.pull
        super().begin(weight, lam)

    def make(self, steps: int) -> int:
        """Make up to six times `steps` steps, as long as they get anywhere, and return how many were made."""
        if not 0 < float(self.lam.max()) < torch.inf:
            return 0
        self.lam = torch.where(self.lam > 0, self.lam, self.lam.max())
        g = self._pulls() @ self.x
        gate = min(0.1, 30 * self.limits.tol)
        gentle, least, since = True, (float("inf"), float("inf")), 0
        turned: tuple[Tensor, ...] | None = None
        for made in range(1, 6 * steps + 1):
            if self.limits.out_of_time():
                break
            weight = torch.full_like(self.lam, self.w)
            d, v = self.models.directions(self.r, self.u, g, self.lam, self.limits, weight)[:2]
            if not bool(torch.isfinite(d).all()):
                break
            moved = torch.cat([d, v]) @ self.x.T
            self._step(d, v, moved[: len(d)], moved[len(d) :])
            pulls = self._pulls()
            settled = torch.ones_like(self.lam, dtype=torch.bool)
            if not gentle or made % 4 == 0 or made >= _EARLIEST:
                g = pulls @ self.x
                self._offer_with(g, pulls)
                if self.done:
                    break
                now = self.best.last_violation, self.best.last_gap
                if now[0] < 0.9 * least[0] or now[1] < 0.9 * least[1]:
                    least, since = (min(now[0], least[0]), min(now[1], least[1])), made
                elif made - since > 15:
                    break
                unsettled = self._unsettled(g)
                if not gentle:
                    settled = unsettled < gate
                    if turned and now[0] > 0.01 + 10 * least[0]:
                        # too steep for this problem: back, and gently on
                        self.u, self.z, self.lam, pulls = turned
                        gentle = True
                elif made >= _EARLIEST and not turned:
                    gentle = float((unsettled < 0.1).double().mean()) < 0.97
                    turned = None if gentle else (self.u, self.z, self.lam, pulls)
            off = torch.where(self.on, 0.0, pulls)
            self.pull = torch.where((settled | gentle)[:, None], off, self.pull)
            self.w = _GENTLE if gentle else _STEEP
            self.anchor = self._aim() - self.pull / self.w
            self.r = self._residual(self.z)
            g = self._pulls() @ self.x
        return made

    def _pulls(self) -> Tensor:
        """``−Γ/λ``: the residual, and `w` times it off the active set."""
        return torch.where(self.on, self.r, self.w * self.r)

    def _aim(self) -> Tensor:
        """Return the ceiling, lowered where nothing else makes the weight feasible by what costs a tenth of the gap."""
        if self.column is not None:
            return self.ceiling
        share = 0.1 * self.limits.tol * float((self.penalty * self.u.abs()).sum()) / len(self.u)
        lower = share / (self.lam * self.pull.sum(1)).clamp(min=1e-30)
        lower = lower.clamp(FEASIBLE * self.size, 0.01 * self.size)
        return torch.where(self.on, self.ceiling, self.ceiling - lower[:, None])

    def _unsettled(self, g: Tensor) -> Tensor:
        """The largest violation of each neuron's optimality conditions, relative to ``1/λ``."""
        mu = self.penalty / self.lam[:, None]
        violation = torch.where(self.u != 0, (g + mu * self.u.sign()).abs(), (g.abs() - mu).clamp(min=0))
        return violation.amax(1) * self.lam

    def _step(self, d: Tensor, v: Tensor, xd: Tensor, xv: Tensor) -> None:
        """Move ``λ`` so that the model meets the radius, then each neuron to the lowest point on its line."""
        t = self._radius_root(xd, xv)
        self.lam = 1 / (1 / self.lam + t)
        d, xd = d - t[:, None] * v, xd - t[:, None] * xv
        alpha = torch.ones_like(self.lam)
        everyone = torch.arange(len(alpha))
        steep = self._slope(everyone, alpha, d, xd) > 1e-3 * (self.penalty * d.abs()).sum(1)
        some = steep.nonzero().flatten()
        if len(some):
            low, high = torch.zeros_like(alpha[some]), torch.ones_like(alpha[some])
            for _ in range(6):
                middle = 0.5 * (low + high)
                rising = self._slope(some, middle, d[some], xd[some]) > 0
                low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
            alpha[some] = (0.5 * (low + high)).clamp(min=0.05)
        self.u, self.z = self.u + alpha[:, None] * d, self.z + alpha[:, None] * xd
        self.r = self._residual(self.z)

    def _slope(self, some: Tensor, alpha: Tensor, d: Tensor, xd: Tensor) -> Tensor:
        """The derivative of what is minimised along the line, at `alpha`, for some neurons."""
        u = self.u[some] + alpha[:, None] * d
        r = self.z[some] + alpha[:, None] * xd - self.anchor[some]
        r = torch.where(self.on[some], r, self.w * r.clamp(min=0))
        # from below: what ends at zero was on its way there
        norm = (self.penalty[some] * torch.where(u != 0, u.sign() * d, -d.abs())).sum(1)
        return norm + self.lam[some] * (r * xd).sum(1)

    def _radius_root(self, xd: Tensor, xv: Tensor) -> Tensor:
        """Return by how much every ``1/λ`` grows so that ``‖R_Ω + X d − t X v‖`` is the radius, 1.6-fold at most."""
        p, old = self.target, 1 / self.lam.double()
        if p.radius is None:
            return torch.zeros_like(self.lam)
        there = torch.where(self.on, self.r + xd, 0.0)
        away = torch.where(self.on, xv, 0.0)
        a, b, c = ((x * y).sum(1).double() for x, y in ((away, away), (there, away), (there, there)))
        if not isinstance(p.radius, Tensor):
            a, b, c = a.sum()[None], b.sum()[None], c.sum()[None]
        root = (b * b - a * (c - torch.as_tensor(p.radius, dtype=torch.float64) ** 2)).clamp(min=0).sqrt()
        t = torch.where(a > 0, (b + root) / a.clamp(min=1e-300), 0.0)
        return torch.minimum(torch.maximum(old + t, old / 1.6), old * 1.6).sub(old).to(self.lam)

    def _offer_with(self, g: Tensor, pulls: Tensor) -> None:
        """Offer the weight, lowered by its excess where a column is constant, and the multipliers."""
        p = self.scaled.problem
        excess = torch.where(self.on, 0.0, self.z - self.ceiling).clamp(min=0).amax(1)
        u, z, violation = self.u, self.z, 0.0
        if self.column is None:
            violation = float(excess.max()) / self.size
        else:
            u = u.clone()
            u[:, self.column] -= excess / self.x[0, self.column]
            z = z - excess[:, None]
        norms = torch.linalg.vector_norm(torch.where(self.on, z - self.ceiling, 0.0), dim=1).double()
        distance = float(norms.norm())
        violation = max(violation, radius_violation(p.tightened(self.rounding), norms, distance))
        self._keep(u, violation, distance, pulls, g)
