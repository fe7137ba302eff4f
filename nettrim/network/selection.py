"""Which layers are meant: names, patterns and classes, each of which must match something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from nettrim.errors import ProblemError, UnknownNameError


def matching(patterns: Any, names: list[str], modules: Mapping[str, nn.Module], argument: str) -> set[str]:
    """Return the names of layers that any of the patterns matches; each must match one.

    Parameters
    ----------
    patterns : str, type, or sequence of them
        Names, patterns of names, classes of modules or their names; "all" where `argument` is "layers".
    names : list of str
        Of all layers.
    modules : mapping from str to nn.Module
        Of the model.
    argument : str
        What errors call the patterns.

    Raises
    ------
    ProblemError
        The patterns are of another kind.
    UnknownNameError
        One matches no layer.
    """
    if isinstance(patterns, (str, type)):
        if argument == "layers" and patterns == "all":
            return set(names)
        patterns = [patterns]
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, (str, type)) for pattern in patterns):
        raise ProblemError(f"{argument} is {patterns!r}; pass a name, a class, or a list of names, patterns or classes")
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if _matches(pattern, name, modules)}
        if not matched:
            said = pattern.__name__ if isinstance(pattern, type) else pattern
            raise UnknownNameError(f"{argument} names {said!r}, which matches no layer; the layers are {listed(names)}")
        chosen |= matched
    return chosen


def _matches(pattern: str | type, name: str, modules: Mapping[str, nn.Module]) -> bool:
    # a weight that is not called so stands for itself, and is meant where the module that owns it is
    owner = name if name in modules else name.rpartition(".")[0]
    module = modules.get(owner) if owner else None
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if any(n == pattern or fnmatchcase(n, pattern) for n in {name, owner} - {""}):
        return True
    return module is not None and any(
        base.__name__ == pattern for base in type(module).__mro__ if base is not nn.Module
    )


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence lists them."""
    return ", ".join(map(repr, names))
