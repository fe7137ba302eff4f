"""The picture of probes shows every unit, its gain and what went."""

from __future__ import annotations

import sys

import pytest
import torch

from nettrim.errors import MissingExtraError, ProblemError
from nettrim.methods.probes import ProbeCurve, ProbePoint
from nettrim.report.probes import plot_probes


def curve(removed: tuple[str, ...]) -> ProbeCurve:
    scores = torch.linspace(0.3, 0.9, 6).tolist()
    points = [ProbePoint(f"unit{k}", 8, score, 0.01, 1 - score, 0.02, 0.12, 0.01) for k, score in enumerate(scores)]
    return ProbeCurve("accuracy", tuple(points), 700, 300, 3, 1e-3, 0, 0.1, (0, 0, 0, 1, 1), removed)


def test_a_picture_names_units_stages_and_what_went(tmp_path):
    plot_probes(curve(("unit2",)), tmp_path / "some.svg")
    some = (tmp_path / "some.svg").read_text()
    for text in (*(f"unit{k}" for k in range(6)), "stage 1", "stage 2", "300 of 1000", "removed", "stays", "accuracy"):
        assert f"<!-- {text}" in some or text in some
    plot_probes(curve(()), tmp_path / "none.svg")
    none = (tmp_path / "none.svg").read_text()
    assert "<!-- removed" not in none
    assert some.count("#e08a1e") > 3
    assert "#e08a1e" not in none
    plot_probes(curve(()), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ProblemError, match=r"\.png, \.svg or \.pdf"):
        plot_probes(curve(()), tmp_path / "picture.what")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="demo"):
        plot_probes(curve(()), tmp_path / "picture.png")
