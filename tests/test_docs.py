"""What the README and the docs show is run; what they name exists."""

import re
from pathlib import Path

import pytest

from nettrim.cli import _parser

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("certificates", "solvers", "methods", "exact", "networks", "outputs", "structure")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES))
BLOCKS = [
    (path.name, i, code)
    for path in PAGES
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.S))
]


@pytest.mark.parametrize(("name", "number", "code"), BLOCKS, ids=[f"{name}-{i}" for name, i, _ in BLOCKS])
def test_every_python_block_runs(name, number, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{name}, block {number}", "exec"), {})


def test_the_readme_has_two_commands_and_no_third():
    assert len(re.findall(r"^```sh$", (ROOT / "README.md").read_text(), re.M)) == 2


def test_the_shell_examples_parse():
    lines = re.findall(r"^\$ nettrim (.*)$", (ROOT / "README.md").read_text(), re.M)
    assert len(lines) == 4
    for line in lines:
        _parser().parse_args(line.split())


def test_links_lead_somewhere():
    for path in PAGES:
        prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)  # in code, an item may be called: a[0](b)
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
