"""How much memory a piece of work takes, the rise of the process's resident set, sampled while it runs; and giving
back what was let go.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from types import TracebackType

import psutil

from nettrim.errors import ProblemError

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_LEAST = 2**24


def check_bytes(limit: int | str) -> int:
    """Return a limit of memory in bytes, from a number or a text such as "512 MiB" or "2 GB".

    Raises
    ------
    ProblemError
        It is neither, or less than 16 MiB.
    """
    found = None
    if isinstance(limit, int) and not isinstance(limit, bool):
        found = limit
    elif isinstance(limit, str):
        text = limit.strip().upper()
        digits = text.rstrip("BGIKM ").strip()
        with contextlib.suppress(ValueError, KeyError):
            found = int(float(digits) * _UNITS[text[len(digits) :].strip()])
    if found is None or found < _LEAST:
        raise ProblemError(f"memory_limit={limit!r} is out of range: give at least 16 MiB, as bytes or as '512 MiB'.")
    return found


class PeakMemory:
    """Watches the resident set of this process for the length of a ``with``.

    What earlier work has let go is given back to the system first: allocators keep it, and work that is served from
    there would seem to take less than it does. The set is read every `interval` seconds by a thread: a peak that is
    shorter can be missed.

    Parameters
    ----------
    interval : float
        Seconds, positive.

    Attributes
    ----------
    rise : float
        MiB above what the process held at the start; at least 0.
    """

    def __init__(self, interval: float = 0.005) -> None:
        self.interval = interval
        self.rise = 0.0
        self._process = psutil.Process()
        self._before = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        hand_back()
        self._before = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        # looked at once more after the end: work that is shorter than the interval is seen too
        while not self._stop.wait(self.interval):
            self._look()
        self._look()

    def _look(self) -> None:
        self.rise = max(self.rise, (self._process.memory_info().rss - self._before) / 2**20)


def hand_back() -> None:
    """Collect garbage, and give free memory back to the system."""
    gc.collect()
    trim()


def trim() -> None:
    """Have the C library give free memory back to the system, where it can (glibc)."""
    give = getattr(ctypes.CDLL(None) if psutil.LINUX else None, "malloc_trim", None)
    if give is not None:
        give(0)
