"""The table of pruning methods. A new one is one file and one row here."""

from __future__ import annotations

from collections.abc import Callable

from nettrim.errors import ProblemError, UnknownNameError
from nettrim.methods.alps import Alps
from nettrim.methods.base import AMOUNTS, LayerResult, LayerTask, Method, Shrinks
from nettrim.methods.exact_obs import Obs, Trace
from nettrim.methods.ldrf import Ldrf
from nettrim.methods.magnitude import Magnitude
from nettrim.methods.masks import Pattern
from nettrim.methods.net_trim import NetTrim
from nettrim.methods.obs import LObs, Ranking, ToleranceCurve, tolerance_curve
from nettrim.methods.shallowing import Shallowing
from nettrim.methods.sparsegpt import SparseGpt
from nettrim.methods.wanda import Wanda

#: name -> factory of the method with its default settings
METHODS: dict[str, Callable[[], Method | Shrinks]] = {
    "net-trim": NetTrim,
    "l-obs": LObs,
    "magnitude": Magnitude,
    "obs": Obs,
    "wanda": Wanda,
    "sparsegpt": SparseGpt,
    "alps": Alps,
    "ldrf": Ldrf,
    "shallowing": Shallowing,
}


def make_method(method: str | Method | Shrinks) -> Method | Shrinks:
    """Return the method of that name, or the object itself.

    Raises
    ------
    UnknownNameError
        The name is not in `METHODS`.
    ProblemError
        The object is no method: a class that is still to be called, None, or anything that neither prunes layers nor
        shrinks networks.
    """
    if not isinstance(method, str):
        complete = isinstance(method, Shrinks) or (
            callable(getattr(method, "prune_layer", None)) and hasattr(method, "amounts")
        )
        if isinstance(method, type) or not complete or not hasattr(method, "name"):
            found = f"the class {method.__name__}" if isinstance(method, type) else f"a {type(method).__name__}"
            raise ProblemError(
                f"method is {found}, and no method object: use one of {', '.join(METHODS)}, or an object such as "
                "NetTrim()."
            )
        return method
    if method not in METHODS:
        raise UnknownNameError(f"method={method!r} is unknown: use one of {', '.join(METHODS)}, or a method object.")
    return METHODS[method]()


__all__ = [
    "AMOUNTS",
    "METHODS",
    "Alps",
    "LObs",
    "LayerResult",
    "LayerTask",
    "Ldrf",
    "Magnitude",
    "Method",
    "NetTrim",
    "Obs",
    "Pattern",
    "Ranking",
    "Shallowing",
    "Shrinks",
    "SparseGpt",
    "ToleranceCurve",
    "Trace",
    "Wanda",
    "make_method",
    "tolerance_curve",
]
