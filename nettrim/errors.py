"""Every error that nettrim raises on purpose: one tree, so that users need to catch one class.

The text of each names the offending argument, what was found, and a way out. Errors of other libraries never
reach the user bare.
"""


class NetTrimError(Exception):
    """Base of every error that nettrim raises on purpose."""


class ProblemError(NetTrimError, ValueError):
    """A value cannot make a problem: NaN, mismatched shapes, an amount out of range, two amounts at once."""


class UnsupportedError(NetTrimError):
    """A layer, model or solver is asked for something that it does not do; the text says what does."""


class UnknownNameError(NetTrimError, KeyError):
    """A name is in no table; the text lists the names that are."""

    def __str__(self) -> str:
        """Return the sentence itself: `KeyError` would show its `repr`."""
        return str(self.args[0]) if self.args else ""


class SolverError(NetTrimError):
    """A solver ended without a certified answer. `solution` holds the best that it had, certificate included."""

    def __init__(self, message: str, solution: object = None) -> None:
        super().__init__(message)
        self.solution = solution


class DataError(NetTrimError):
    """A data file or directory is missing, truncated or not what its name says."""


class RunError(NetTrimError):
    """A run directory cannot be read or written: missing, truncated, foreign or of another schema."""


class MissingExtraError(NetTrimError, ImportError):
    """An optional library is absent; the text names the extra that brings it."""
