"""Imports point one way: errors < core, network < methods < pipeline < report < cli; core and network never meet."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "nettrim"

# room -> the rooms that it may import, beside itself
ALLOWED = {
    "errors": set(),
    "core": {"errors"},
    "network": {"errors"},
    "data": {"errors"},
    "loading": {"errors"},
    "methods": {"errors", "core", "network"},
    "pipeline": {"errors", "core", "network", "methods"},
    "report": {"errors", "core", "network", "methods", "pipeline"},
    "demo": {"errors", "core", "network", "methods", "pipeline", "report", "data"},
    "cli_compare": {"errors", "network", "methods", "pipeline", "report", "data", "loading", "cli_network"},
    "cli_network": {"errors", "core", "network", "methods", "pipeline", "loading"},
    "cli_prune": {
        *("errors", "network", "methods", "pipeline", "report", "data", "loading", "cli_network", "cli_compare"),
    },
    "cli": {
        *("errors", "core", "network", "methods", "pipeline", "report", "data", "loading", "demo", ""),
        *("cli_compare", "cli_network", "cli_prune"),
    },
    "__main__": {"cli"},
    # the package's own face hands names on from everywhere below the reports
    "": {"errors", "core", "network", "methods", "pipeline"},
}


def room_of(parts):
    """The room of a module's path below the package: 'core' for core/problem.py, '' for __init__.py."""
    name = parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def imported_rooms(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nettrim":
            parts = node.module.split(".")[1:]
            yield from ((room_of(parts), node.lineno),) if parts else ((a.name, node.lineno) for a in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "nettrim":
                    yield room_of([*alias.name.split(".")[1:], "__init__"]), node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "relative imports are not used", node.lineno


def wrong_imports(source, room):
    return [
        f"line {line}: {room or 'the package'} imports {other or 'the package'}"
        for other, line in imported_rooms(ast.parse(source))
        if other != room and other not in ALLOWED[room]
    ]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path):
    room = room_of(path.relative_to(ROOT).parts)
    assert room in ALLOWED, f"{room} is a new room: give it a place in ALLOWED"
    assert wrong_imports(path.read_text(), room) == []


@pytest.mark.parametrize(
    ("source", "room"),
    [
        ("from nettrim.network.trace import trace", "core"),
        ("import nettrim.core.problem", "network"),
        ("def f():\n    from nettrim.pipeline.prune import prune", "methods"),
        ("from nettrim import cli", "report"),
        ("from . import errors", "core"),
    ],
)
def test_the_check_sees_a_wrong_import(source, room):
    assert len(wrong_imports(source, room)) == 1


def test_import_brings_neither_cvxpy_nor_matplotlib():
    code = "import sys, nettrim, nettrim.cli; print(sorted({'cvxpy', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
