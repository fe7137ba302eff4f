"""A comparison as a table and a picture: every row is there, in order, and nothing that failed passes for a figure."""

import sys
from dataclasses import replace

import pytest

from nettrim.errors import MissingExtraError, ProblemError, RunError
from nettrim.pipeline.rows import Comparison, LayerRow, Row
from nettrim.report import comparison as module
from nettrim.report.comparison import comparison_table, plot_comparison, require_matplotlib

ABOUT = {
    "schema": 1,
    "host": {"processor": "a processor", "cores": 4, "threads": 2, "versions": {"torch": "2.0"}},
    "commit": None,
    "seed": 3,
    "chain": [
        {"name": "fc1", "in_features": 20, "out_features": 30, "prune": True},
        {"name": "fc2", "in_features": 30, "out_features": 10, "prune": True},
        {"name": "fc3", "in_features": 10, "out_features": 5, "prune": False},
    ],
    "samples": {"calibration": 1000, "held-out": 200},
}


def row(method, budget, error, right, schedule="cascade", kept=None, **changes):
    """A row with an output error and an accuracy on the held-out samples; those on the calibration samples are half."""
    found = Row(
        method=method,
        settings=f"{method}()",
        budget=budget,
        schedule=schedule,
        layers=(LayerRow("fc1", 1, 600, 0.125, 0.25, 0.5, True), LayerRow("fc2", 1, 300, error, 0.5, 0.5, True)),
        kept=kept if kept is not None else round(900 * (1 - float(budget))),
        numel=900,
        accuracy={"calibration": {"dense": 1.0, "pruned": right / 2}, "held-out": {"dense": 0.9, "pruned": right}},
        error={"calibration": error / 2, "held-out": error},
        bound=2 * error,
        layer_seconds=1.25,
        seconds=2.5,
        peak_mib=100.4,
    )
    return replace(found, **changes)


ROWS = (
    row("slow", "0.9", 0.30, 0.70),
    row("slow", "0.5", 0.02, 0.88),
    row("fast", "0.9", 0.20, 0.60),
    row("fast", "0.5", 0.04, 0.89),
    row("fast", "0.9", 0.25, 0.65, "parallel"),
    Row("ill", "ill()", "0.9", "cascade", failure="RuntimeError: no factor"),
)
WHOLE = Comparison(ROWS, ABOUT)


def lines(comparison):
    """The cells of the table's rows."""
    text = comparison_table(comparison).splitlines()
    start = next(i for i, line in enumerate(text) if line.startswith("---"))
    end = next(i for i, line in enumerate(text) if line.startswith("* best"))
    return [line.split() for line in text[start + 1 : end] if line.split()]


def test_rows_stand_budget_by_budget_the_least_error_first():
    found = lines(WHOLE)
    assert [line[:3] for line in found] == [
        ["slow", "cascade", "0.5"],
        ["fast", "cascade", "0.5"],
        ["fast", "cascade", "0.9"],
        ["fast", "parallel", "0.9"],
        ["slow", "cascade", "0.9"],
        ["ill", "cascade", "0.9"],
    ]
    assert found[0][3:] == ["50.00", "88.00", "0.0200*", "0.125", "/", "0.020", "1.25", "2.50", "100"]
    assert found[5][3:] == ["FAILED", *["–"] * 6]


def test_the_best_of_each_budget_are_starred():
    found = lines(WHOLE)
    assert [line[4].endswith("*") for line in found[:5]] == [False, True, False, False, True]  # accuracy
    assert [line[5].endswith("*") for line in found[:5]] == [True, False, True, False, False]  # error
    # those that are equal are starred alike
    tied = lines(Comparison((ROWS[0], replace(ROWS[0], method="same"), ROWS[2]), ABOUT))
    assert [line[4] for line in tied] == ["60.00", "70.00*", "70.00*"]


def test_the_text_around_the_table():
    text = comparison_table(WHOLE)
    head = text.splitlines()
    assert head[0] == (
        "network 20-30-10-5: 900 weights to prune, 90.00 % right on the held-out samples before; "
        "1,000 calibration, 200 held-out samples"
    )
    assert head[1] == "a processor, 2 of 4 threads; nettrim installed, torch 2.0, seed 3"
    assert "FAILED  ill, cascade, 0.9: RuntimeError: no factor" in text
    assert "NOT certified" not in text
    assert "another host" not in text
    assert all(line == line.rstrip() for line in head)


def test_what_is_uncertified_finished_or_from_elsewhere_is_said():
    doubtful = replace(ROWS[0], layers=(replace(ROWS[0].layers[0], certified=False), ROWS[0].layers[1]))
    trained = replace(ROWS[2], finish="distill", host={"host": {}, "commit": "abc"})
    text = comparison_table(Comparison((doubtful, trained), ABOUT))
    assert "NOT certified within the tolerance  slow, cascade, 0.9: fc1" in text
    assert "fast + distill" in text
    assert "1 of the rows were made on another host or version" in text


def test_what_smaller_networks_cost_stands_beside_what_is_kept():
    def costs(weights, sums):
        return {"dense": {"weights": 900, "multiply_adds": 4000}, "pruned": {"weights": weights, "multiply_adds": sums}}

    latency = {"speedup": 2.345, "lower": 2.1, "upper": 2.6, "dense_seconds": 2.0, "pruned_seconds": 0.9}
    small = replace(ROWS[0], costs=costs(225, 800), latency=latency | {"samples": 64, "threads": 1})
    sparse = replace(ROWS[2], costs=costs(900, 4000))
    found = Comparison((small, sparse, ROWS[4], ROWS[5]), ABOUT)  # the third is of a file of the first version
    assert "kept %  weights %  multiply-adds %  times as fast  held-out accuracy %" in comparison_table(found)
    assert [line[3:7] for line in lines(found)] == [
        ["10.00", "100.00", "100.00", "–"],
        ["10.00", "–", "–", "–"],
        ["10.00", "25.00", "20.00", "2.35"],
        ["FAILED", *["–"] * 3],
    ]
    assert len(lines(found)[3]) == 3 + 1 + 9
    assert "against the dense one on this CPU, 1 thread, 64 samples, by turns." in comparison_table(found)
    assert "times as fast" not in comparison_table(Comparison((sparse, *ROWS), ABOUT))
    unlabelled = comparison_table(Comparison((replace(small, accuracy={}),), ABOUT))
    assert "accuracy" not in unlabelled
    assert "times as fast" in unlabelled


def test_without_held_out_samples_the_calibration_samples_decide():
    about = ABOUT | {"samples": {"calibration": 1000}}
    plain = tuple(
        replace(r, error={"calibration": r.error["calibration"]}, accuracy={"calibration": r.accuracy["calibration"]})
        for r in ROWS[:5]
    )
    text = comparison_table(Comparison(plain, about))
    assert "calibration accuracy %" in text
    assert "held-out" not in text
    assert lines(Comparison(plain, about))[0][3:6] == ["50.00", "44.00", "0.0100*"]
    unlabelled = comparison_table(Comparison(tuple(replace(r, accuracy={}) for r in plain), about))
    assert "accuracy" not in unlabelled
    assert "right" not in unlabelled


def test_deep_networks_show_their_worst_layer():
    layers = tuple(LayerRow(f"fc{i}", 1, 2, i / 10, None, 0.0, True) for i in (3, 7, 1, 2, 4, 5))
    assert "at most 0.700 (fc7)" in comparison_table(Comparison((replace(ROWS[0], layers=layers),), ABOUT))


def test_other_budgets_come_last_in_the_order_asked():
    rows = [row("m", budget, 0.5, 0.5, kept=400) for budget in ("2:4", "fc1=0.9,fc2=0.8", "0.95", "1:4", "0.5")]
    found = [line[2] for line in lines(Comparison(tuple(rows), ABOUT))]
    assert found == ["0.5", "0.95", "2:4", "fc1=0.9,fc2=0.8", "1:4"]


def test_a_comparison_of_failures_is_a_table_too():
    only = Comparison((ROWS[5],), ABOUT)
    assert lines(only) == [["ill", "cascade", "0.9", "FAILED", *["–"] * 5]]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw a comparison and return the figure behind the picture."""
    pytest.importorskip("matplotlib")
    plain, kept = module._figure_class(), []

    class Figure(plain):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            kept.append(self)

    monkeypatch.setattr(module, "_figure_class", lambda: Figure)

    def draw(comparison):
        plot_comparison(comparison, tmp_path / "picture.png")
        return kept[-1]

    return draw


def curves(axis):
    """Dashes and points of every curve: its schedule is the dashes, its method the marker."""
    return {
        (line.get_marker(), line.get_linestyle()): [
            (round(float(x), 6), round(float(y), 6)) for x, y in line.get_xydata()
        ]
        for line in axis.lines
        if line.get_linestyle() != ":"
    }


def test_every_finished_row_is_drawn_once_in_every_panel(drawn, tmp_path):
    figure = drawn(Comparison(ROWS[::-1], ABOUT))  # curves run from sparse to dense, whatever the order of the rows
    right, error, seconds, memory = figure.axes
    assert curves(error) == {
        ("o", "-"): [(10, 0.2), (50, 0.04)],
        ("o", "--"): [(10, 0.25)],
        ("s", "-"): [(10, 0.3), (50, 0.02)],
    }
    # logarithmic in what is wrong, and labelled with what is right
    assert curves(right)["s", "-"] == [(10, 30), (50, 12)]
    assert right.get_yscale() == error.get_yscale() == seconds.get_yscale() == "log"
    assert right.yaxis_inverted()
    assert right.yaxis.get_major_formatter()(20, None) == "80"
    assert [text.get_text() for text in right.texts] == ["dense"]
    assert curves(seconds)["o", "--"] == [(10, 1.25)]
    assert curves(memory)["o", "--"] == [(10, 100.4)]
    assert all(axis.get_xscale() == "log" for axis in figure.axes)
    assert [label.get_text() for label in error.get_xticklabels()] == ["10", "50"]
    content = (tmp_path / "picture.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") == 1200


def test_the_legend_names_methods_and_schedules_and_covers_no_data(drawn):
    figure = drawn(WHOLE)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["fast", "slow", "cascade", "parallel"]
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes)
    assert box.x0 >= 0
    assert box.x1 <= 1200


def test_long_names_still_fit_into_the_width(drawn):
    rows = [row(f"method (a setting={i:030d})", "0.9", 0.5, 0.5) for i in range(12)]
    figure = drawn(Comparison(tuple(rows), ABOUT))
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= 1200
    assert len({(line.get_color(), line.get_marker()) for line in figure.axes[1].lines}) == 12


def test_accuracies_that_are_alike_stay_on_a_plain_axis(drawn):
    near = tuple(replace(r, accuracy={"held-out": {"dense": 0.9, "pruned": 0.87}}) for r in ROWS[:5])
    axis = drawn(Comparison(near, ABOUT)).axes[0]
    assert axis.get_yscale() == "linear"
    assert curves(axis)["o", "--"] == [(10, 87)]
    # all right: no logarithm of nothing wrong
    perfect = (*near, replace(ROWS[0], method="exact", accuracy={"held-out": {"dense": 1.0, "pruned": 1.0}}))
    assert drawn(Comparison(perfect, ABOUT)).axes[0].get_yscale() == "linear"


def test_an_error_of_zero_is_drawn(drawn):
    exact = row("exact", "0.0", 0.0, 0.9, layer_seconds=0.0)
    figure = drawn(Comparison((*ROWS, exact), ABOUT))
    assert figure.axes[1].get_yscale() == figure.axes[2].get_yscale() == "linear"
    assert [point for points in curves(figure.axes[1]).values() for point in points].count((100, 0)) == 1


def test_without_labels_three_panels(drawn):
    figure = drawn(Comparison(tuple(replace(r, accuracy={}) for r in ROWS), ABOUT))
    assert [axis.get_title(loc="left").split(",")[0] for axis in figure.axes] == [
        "Output error",
        "Time of the method on all layers",
        "Peak memory of the call",
    ]


def test_lines_join_only_budgets_of_one_kind(drawn):
    rows = [row("m", "0.9", 0.5, 0.5), row("m", "0.5", 0.2, 0.8)]
    rows += [row("m", text, 0.3, 0.7, kept=450) for text in ("2:4", "fc1=0.5,fc2=0.5")]
    rows += [row("m", f"Overall(sparsity={s})", 0.1, 0.7, kept=k) for s, k in ((0.6, 360), (0.8, 180))]
    axis = drawn(Comparison(tuple(rows), ABOUT)).axes[1]
    assert sorted(len(line.get_xdata()) for line in axis.lines) == [1, 1, 2, 2]
    assert sorted(text.get_text() for text in axis.texts) == ["2:4", "Overall", "Overall", "by layer"]


def test_what_cannot_be_drawn_is_said(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    with pytest.raises(ProblemError, match="nothing to draw"):
        plot_comparison(Comparison((ROWS[5],), ABOUT), tmp_path / "picture.png")
    with pytest.raises(ProblemError, match=r"end in \.png"):
        plot_comparison(WHOLE, tmp_path / "picture.doc")
    with pytest.raises(RunError, match="cannot be written"):
        plot_comparison(WHOLE, tmp_path / "no" / "picture.png")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        require_matplotlib()
