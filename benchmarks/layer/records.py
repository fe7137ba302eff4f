"""The file of results: rows that are kept as they come, so that an interrupted benchmark goes on where it was."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cvxpy
import numpy as np
import torch

import nettrim
from benchmarks.model.net_trim_table import git, processor
from nettrim.errors import RunError

SCHEMA = 1
# what makes two rows the same run of the same thing
_KEY = ("instance", "solver", "level", "seed", "threads", "drawn")

Row = dict[str, Any]


class Records:
    """All rows of one ``results.json``; `add` writes the file anew, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "schema": SCHEMA, "same": {}, "runs": [], "instances": {}, "shares": {}, "rows": []
        }  # fmt: skip
        if path.exists():
            try:
                content = json.loads(path.read_text())
                complete = content["schema"] == SCHEMA and set(self.content) <= set(content)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise RunError(f"{path} holds no results of this benchmark: give another --out.") from error
            if not complete:
                raise RunError(f"{path} is of another schema: give another --out.")
            self.content = content
        self._run: int | None = None
        self._at = {_key(row): i for i, row in enumerate(self.rows)}

    def agree(self, seed: int, threads: int) -> None:
        """Refuse rows that would stand beside others and not be comparable: of other data, threads or machines."""
        here = {"seed": seed, "threads": threads, "processor": processor(), "cores": os.cpu_count()}
        there = self.content["same"] or here
        if there != here:
            different = ", ".join(
                f"{name} {there[name]} (now {here[name]})" for name in here if there[name] != here[name]
            )
            raise RunError(f"{self.path} holds rows with {different}: give another --out.")
        self.content["same"] = here

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order in which they came."""
        rows: list[Row] = self.content["rows"]
        return rows

    @property
    def instances(self) -> dict[str, dict[str, Any]]:
        """What is known of every instance that has a row."""
        instances: dict[str, dict[str, Any]] = self.content["instances"]
        return instances

    @property
    def tolerances(self) -> list[float]:
        """Every tolerance that was asked of a solver, the loosest first; none where none was."""
        return sorted({row["level"] for row in self.rows if row["knob"] == "tolerance"}, reverse=True)

    def of(self, instance: str, solver: str | None = None) -> Iterator[Row]:
        """Return the rows of an instance, of one solver or of all."""
        return (r for r in self.rows if r["instance"] == instance and solver in (None, r["solver"]))

    def find(self, key: Row, max_seconds: float | None) -> Row | None:
        """Return the row with this key; not a failure, nor one that an earlier, shorter clock has cut off."""
        at = self._at.get(_key(key))
        if at is None:
            return None
        row = self.rows[at]
        cut_short = row["timed_out"] and (max_seconds is None or row["max_seconds"] < max_seconds)
        return None if row["failure"] or cut_short else row

    def add(self, row: Row) -> None:
        """Keep a row, in the place of one with the same key."""
        row = {**row, "run": self._this_run()}
        at = self._at.get(_key(row))
        if at is None:
            self._at[_key(row)] = len(self.rows)
            self.rows.append(row)
        else:
            self.rows[at] = row
        self.write()

    def write(self) -> None:
        """Write the file through a temporary one beside it."""
        try:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def _this_run(self) -> int:
        """Return the number of this process among the runs, and say where and with what it runs."""
        if self._run is None:
            self._run = len(self.content["runs"])
            self.content["runs"].append(provenance())
        return self._run


def provenance() -> dict[str, Any]:
    """Return what a reader needs to repeat a run: commit, host, versions, threads, date."""
    return {
        "commit": git("describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": {"processor": processor(), "cores": os.cpu_count(), "load": list(os.getloadavg())},
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "nettrim": nettrim.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "cvxpy": cvxpy.__version__,
            **_versions("numba", "scs", "clarabel", "osqp"),
        },
    }


def _versions(*names: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _KEY)


def in_order(names: Iterable[str], order: Iterable[str]) -> list[str]:
    """Return `names` once each, in the order of the table; unknown ones (of an older table) come last."""
    order, unique = list(order), dict.fromkeys(names)
    return sorted(unique, key=lambda name: order.index(name) if name in order else len(order))
