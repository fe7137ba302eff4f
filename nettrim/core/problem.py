"""One layer as a convex program: the data, the active set and the amount, checked once and then frozen.

Every form asks that the pre-activation ``Z = X Uᵀ`` stay near a convex set that is described by an *anchor* ``T
(P, M)`` and an *active set* ``Ω``: on ``Ω`` the value ``T`` itself is wanted, off ``Ω`` everything up to ``T``
is welcome.

==========  ======================================  ============================================
form        off Ω                                   fit
==========  ======================================  ============================================
ball        soft: ``(Z − T)₊`` counts               ``‖(Z − T)_Ω‖² + ‖(Z − T)₊,Ωᶜ‖² ≤ r²``
halfspace   hard: ``Z ≤ T``                         ``‖(Z − T)_Ω‖ ≤ r``
linear      (everything is active)                  ``‖Z − T‖ ≤ r``
==========  ======================================  ============================================

``T`` is ``targets`` on ``Ω`` and ``ceiling`` (0 unless given) off it. With ``lam`` instead of ``radius`` the
squared fit enters the objective with the factor ``lam / 2``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nettrim.errors import ProblemError

FORMS = ("ball", "halfspace", "linear")


@dataclass(frozen=True, eq=False)
class LayerProblem:
    r"""Minimise ``Σ c_mn |U_mn|`` over ``weight U (M, N)``, subject to a fit of ``X Uᵀ`` to the targets.

    Parameters
    ----------
    inputs : Tensor or ndarray (P, N)
        ``X``, one sample a row, float32 or float64. A fitted bias is a column of ones among them.
    targets : Tensor or ndarray (P, M)
        ``Y``: the outputs of the dense layer, after the ReLU for ``ball`` and ``halfspace``.
    form : {"ball", "halfspace", "linear"}
        See the module's table.
    radius : float, or Tensor, ndarray or list (M,), optional
        ``r > 0``, in the units of ``targets``. A vector asks for one ball per output neuron.
    lam : float, optional
        ``λ > 0`` of the regularised twin ``min Σ c|U| + (λ/2) dist²``. Exactly one of `radius` and `lam`.
    ceiling : Tensor or ndarray (P, M), optional
        ``V``, the right-hand side off ``Ω``; 0 when absent. Net-Trim's cascade sets it.
    penalty : float, Tensor or ndarray (N,) or (M, N), optional
        ``c ≥ 0``; 1 when absent, 0 for a free bias column.
    active : bool Tensor or ndarray (P, M), optional
        ``Ω``. ``targets > 0`` when absent (everything for ``linear``); give it where the targets were shifted,
        by a frozen bias for example.

    Raises
    ------
    ProblemError
        NaN or infinity, no rows, rows or shapes that do not match, a dtype that is no float32 or float64, none or
        two of the amounts, an amount ≤ 0, negative targets of a ReLU form, a ceiling for ``linear``.
    """

    inputs: Tensor
    targets: Tensor
    form: str = "ball"
    radius: float | Tensor | None = None
    lam: float | None = None
    ceiling: Tensor | None = None
    penalty: Tensor | None = None
    active: Tensor | None = None

    def __post_init__(self) -> None:
        """Check everything once; what passes here needs no check later."""
        if self.form not in FORMS:
            raise ProblemError(f"form={self.form!r} is unknown: use one of {', '.join(FORMS)}.")
        inputs, targets = check_pair(self.inputs, self.targets)
        self._set(inputs=inputs, targets=targets)
        if self.form == "linear" and self.ceiling is not None:
            raise ProblemError("form='linear' has no inactive samples: leave ceiling out.")
        if self.ceiling is not None:
            self._set(ceiling=self._matching("ceiling", self.ceiling))
        self._set_active()
        self._set_penalty()
        if (self.radius is None) == (self.lam is None):
            raise ProblemError(
                f"give exactly one of radius and lam: radius={self.radius!r}, lam={self.lam!r} were given."
            )
        if self.lam is not None:
            self._set(lam=check_amount("lam", self.lam))
        else:
            self._set_radius()

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _matching(self, name: str, value: Any) -> Tensor:
        tensor = as_float_tensor(name, value)
        if tensor.shape != self.targets.shape:
            raise ProblemError(
                f"{name} has shape {tuple(tensor.shape)}, targets has {tuple(self.targets.shape)}: they must match."
            )
        return tensor.to(self.targets)

    def _set_active(self) -> None:
        if self.active is not None:
            active = as_plain_tensor("active", self.active)
            if active.dtype != torch.bool or active.shape != self.targets.shape:
                raise ProblemError(
                    f"active has dtype {active.dtype} and shape {tuple(active.shape)}: it must be bool and "
                    f"{tuple(self.targets.shape)}, like targets."
                )
            if self.form == "linear" and not bool(active.all()):
                raise ProblemError("form='linear' has no inactive samples: leave active out, or use form='ball'.")
            self._set(active=active.to(self.targets.device))
        elif self.form == "linear":
            # an expanded scalar: no memory is spent on a mask that says nothing
            everything = torch.ones((), dtype=torch.bool, device=self.targets.device)
            self._set(active=everything.expand(self.targets.shape))
        else:
            if bool((self.targets < 0).any()):
                raise ProblemError(
                    f"targets has negative entries (minimum {float(self.targets.min()):.3g}), which no ReLU gives: "
                    "pass targets.clamp(min=0), or form='linear' for a layer without ReLU."
                )
            self._set(active=self.targets > 0)

    def _set_penalty(self) -> None:
        shape = (self.n_outputs, self.n_inputs)
        if self.penalty is None:
            penalty = torch.ones((), dtype=torch.float64)
        else:
            penalty = as_plain_tensor("penalty", self.penalty)
            if penalty.is_complex():
                raise ProblemError(f"penalty is {penalty.dtype}: weights of the norm are real numbers ≥ 0.")
            penalty = penalty.double()
            if not bool(torch.isfinite(penalty).all()) or bool((penalty < 0).any()):
                raise ProblemError("penalty has negative or non-finite entries: weights of the norm are ≥ 0.")
            if penalty.shape not in (torch.Size([]), torch.Size([shape[1]]), torch.Size(shape)):
                raise ProblemError(
                    f"penalty has shape {tuple(penalty.shape)}: it must be a number, ({shape[1]},) or {shape}."
                )
        self._set(penalty=penalty.to(self.inputs.device).expand(shape))

    def _set_radius(self) -> None:
        radius = _as_radius(self.radius)
        if isinstance(radius, Tensor):
            radius = radius.to(self.inputs.device)
            if radius.shape[0] != self.n_outputs:
                raise ProblemError(
                    f"radius has {radius.shape[0]} entries for {self.n_outputs} output neurons: "
                    "give one each, or a number."
                )
            # a dead neuron's own ball has radius 0, and its zero column lies in it
            if not bool(torch.isfinite(radius).all()) or bool((radius < 0).any()) or not bool((radius > 0).any()):
                raise ProblemError("radius has negative or non-finite entries, or no positive one.")
        self._set(radius=radius)

    @property
    def samples(self) -> int:
        """``P``."""
        return self.inputs.shape[0]

    @property
    def n_inputs(self) -> int:
        """``N``."""
        return self.inputs.shape[1]

    @property
    def n_outputs(self) -> int:
        """``M``."""
        return self.targets.shape[1]

    @property
    def per_neuron(self) -> bool:
        """Whether each output neuron has a ball of its own."""
        return isinstance(self.radius, Tensor)

    @property
    def anchor(self) -> Tensor:
        """``T (P, M)``: the targets on the active set, the ceiling off it."""
        if self.form == "linear":
            return self.targets
        off = torch.zeros((), dtype=self.targets.dtype, device=self.targets.device)
        return torch.where(self._mask, self.targets, off if self.ceiling is None else self.ceiling)

    @property
    def _mask(self) -> Tensor:
        assert self.active is not None
        return self.active

    def residual(self, outputs: Tensor) -> Tensor:
        """Return ``R (P, M)``: what of ``Z`` counts against the fit (and, for ``halfspace``, breaks the ceiling)."""
        difference = outputs - self.anchor
        if self.form == "linear":
            return difference
        return torch.where(self._mask, difference, difference.clamp(min=0))

    def with_radius(self, radius: float | Tensor) -> LayerProblem:
        """Return the same problem with this radius instead of its own or of `lam`; what was checked is not again."""
        other = copy.copy(self)
        other._set(radius=radius, lam=None)
        other._set_radius()
        return other

    def tightened(self, margin: float) -> LayerProblem:
        """Return the same problem with the radius shrunk by the fraction `margin`, so that what nearly fits, fits."""
        return self if self.radius is None else self.with_radius(self.radius * (1 - margin))


def check_pair(inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Return `inputs` and `targets` as tensors of one floating dtype and device, or say what is wrong with them."""
    x, y = as_float_tensor("inputs", inputs), as_float_tensor("targets", targets)
    for name, tensor, axes in (("inputs", x, "(P, N)"), ("targets", y, "(P, M)")):
        if tensor.dim() != 2:
            raise ProblemError(f"{name} has shape {tuple(tensor.shape)}: it must be {axes}.")
        if 0 in tensor.shape:
            raise ProblemError(f"{name} has shape {tuple(tensor.shape)}, an empty batch: at least one row and column.")
    if x.shape[0] != y.shape[0]:
        raise ProblemError(
            f"inputs has {x.shape[0]} rows, targets has {y.shape[0]}: one row per sample in both "
            f"(shapes {tuple(x.shape)} and {tuple(y.shape)})."
        )
    if x.dtype != y.dtype or x.device != y.device:
        raise ProblemError(
            f"inputs is {x.dtype} on {x.device}, targets is {y.dtype} on {y.device}: convert one to match the other."
        )
    return x, y


def as_float_tensor(name: str, value: Any) -> Tensor:
    """Return `value` as a float32 or float64 tensor without NaN or infinity, or say what is wrong with it."""
    tensor = as_plain_tensor(name, value)
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ProblemError(f"{name} is {tensor.dtype}: convert it to float32 or float64, with .float() for example.")
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        bad = (~finite).nonzero()
        raise ProblemError(
            f"{name} holds {bad.shape[0]} NaN or infinite entries, the first at {tuple(bad[0].tolist())}: "
            "remove those samples."
        )
    return tensor


def as_plain_tensor(name: str, value: Any) -> Tensor:
    """Return `value` as a dense tensor of numbers or truth values, without gradient, or say what is wrong with it."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested or value.is_quantized:
            kind = "nested" if value.is_nested else "quantized" if value.is_quantized else "sparse"
            raise ProblemError(f"{name} is a {kind} tensor: pass a dense one, as {name}.to_dense() makes it.")
        if value.is_meta:
            raise ProblemError(f"{name} is a tensor on the meta device, which holds no numbers: load it first.")
        return value.detach()
    if isinstance(value, np.ma.MaskedArray):
        raise ProblemError(f"{name} is a masked array, whose mask would be lost: pass {name}.filled(value).")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ProblemError(f"{name} is a {type(value).__name__}: pass a torch tensor or a NumPy array.") from error
    if array.dtype.kind not in "fiubc":
        found = f"an array of {array.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise ProblemError(f"{name} is {found}: pass a torch tensor or a NumPy array of numbers.")
    if array.dtype.itemsize > (16 if array.dtype.kind == "c" else 8):
        raise ProblemError(f"{name} is {array.dtype}, wider than torch knows: convert it with .astype('float64').")
    native = array.dtype.newbyteorder("=")
    odd = any(stride < 0 or stride % array.itemsize for stride in array.strides)
    if odd or array.dtype != native or not array.flags.writeable:
        # copied: torch warns of read-only memory and takes neither negative strides nor foreign byte orders
        array = np.array(array, dtype=native, order="C")
    return torch.from_numpy(array)


def check_amount(name: str, value: Any) -> float:
    """Return `value` as a positive finite float, or say what is wrong with it."""
    number = check_number(name, value)
    if not 0 < number < float("inf"):
        raise ProblemError(f"{name}={number:g} is out of range: give a positive, finite number.")
    return number


def check_number(name: str, value: Any) -> float:
    """Return `value` as a float, or say that it is none; text is not read as a number."""
    refused = (str, bytes, bool, np.bool_, complex, np.complexfloating)
    try:
        if isinstance(value, refused) or np.ndim(value) > 0:
            raise TypeError(type(value).__name__)
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ProblemError(f"{name}={_shown(value)} is no number: give a positive one.") from error


def check_count(name: str, value: Any) -> int:
    """Return `value` as a whole number ≥ 1; a whole float such as 1e4 is one."""
    number = check_number(name, value)
    if not (number >= 1 and number.is_integer()):
        raise ProblemError(f"{name}={number:g} is out of range: give a whole number ≥ 1.")
    return int(number)


def check_seed(seed: Any) -> int:
    """Return `seed` where torch's generators take it, or say what they take."""
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not -(2**63) <= seed < 2**64:
        raise ProblemError(f"seed={_shown(seed)} is out of range: give a whole number from -2**63 to 2**64 - 1.")
    return int(seed)


def _shown(value: Any) -> str:
    """Return the value as it is written where that is short, else its kind, so that the sentence stays one."""
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else f"<{type(value).__name__}>"


def _as_radius(value: Any) -> float | Tensor:
    """Return one positive radius as a float, or one for each neuron as a float64 tensor (M,)."""
    if not isinstance(value, (Tensor, np.ndarray, list, tuple)):
        return check_amount("radius", value)
    radius = as_plain_tensor("radius", value)
    if radius.dim() == 0:
        return check_amount("radius", radius.item())
    if radius.dim() != 1 or radius.is_complex():
        raise ProblemError(
            f"radius is {radius.dtype} of shape {tuple(radius.shape)}: give a number, or one for each output neuron."
        )
    return radius.double()


def build_problem(
    inputs: Any,
    targets: Any,
    *,
    epsilon: float | None = None,
    radius: float | Tensor | None = None,
    lam: float | None = None,
    form: str = "ball",
    ceiling: Any = None,
    penalty: Any = None,
    per_neuron: bool = False,
) -> LayerProblem:
    """Make a problem from exactly one of `epsilon`, `radius` and `lam`.

    ``epsilon`` is relative: ``r = epsilon · ‖Y‖_F`` (the published scripts' convention), for each neuron's own column
    with `per_neuron`. ``epsilon ≥ 1`` is allowed: the zero weight then solves the problem.

    Raises
    ------
    ProblemError
        As `LayerProblem`, and where not exactly one amount is given.
    """
    given = {k: v for k, v in {"epsilon": epsilon, "radius": radius, "lam": lam}.items() if v is not None}
    if len(given) != 1:
        found = "none was given" if not given else " and ".join(f"{k}={v}" for k, v in given.items()) + " were given"
        raise ProblemError(f"give exactly one of epsilon, radius and lam: {found}.")
    if per_neuron and lam is not None:
        raise ProblemError("per_neuron=True needs epsilon or radius: with lam the neurons are independent already.")
    if epsilon is not None:
        epsilon = check_amount("epsilon", epsilon)
        inputs, targets = check_pair(inputs, targets)
        if per_neuron:
            radius = epsilon * torch.linalg.vector_norm(targets.double(), dim=0)
        else:
            radius = epsilon * float(torch.linalg.vector_norm(targets.double()))
        if float(torch.as_tensor(radius, dtype=torch.float64).max()) == 0:
            # all targets are zero (only dead neurons): any radius gives the zero weight
            radius = torch.finfo(torch.float64).tiny ** 0.5
    elif radius is not None:
        radius = _as_radius(radius)
        if per_neuron and not isinstance(radius, Tensor):
            inputs, targets = check_pair(inputs, targets)
            radius = torch.full((targets.shape[1],), radius, dtype=torch.float64)
    return LayerProblem(inputs, targets, form, radius, lam, ceiling, penalty)
