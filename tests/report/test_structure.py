"""Smaller networks and chains as text: what is gone, what it saves, and bounds that add up."""

from dataclasses import replace

from nettrim.methods.probes import ACCURACY, ProbeCurve, ProbePoint
from nettrim.network.costs import Latency, LatencyRatio
from nettrim.pipeline.records import Chain, Stage
from nettrim.report.structure import chain_lines, latency_line, probe_table

STAGES = (
    Stage("shallowing", None, 6.0, 3.0, 10.0, 600, 1000, "a", "b", "x"),
    Stage("ldrf", "distill", 2.0, 1.0, 8.0, 300, 600, "b", "c", "x"),
    Stage("magnitude", None, 0.5, 0.25, 7.0, 150, 300, "c", "d", "x"),
)
CHAIN = Chain(STAGES, 8.5, None, 2.0, 10.0, 0.25, {"held-out": {"dense": 0.9, "pruned": 0.85}})


def cells(lines):
    return [line.split() for line in lines]


def test_a_chain_is_relative_to_its_first_network_so_that_bounds_add_up():
    title, head, _, *rows, held, accuracy = "\n".join(chain_lines(CHAIN)).splitlines()
    assert title == "chain of 3 runs, from the first network to this one:"
    assert head.split() == ["run", "kept", "of", "%", "bound", "measured"]
    assert cells(rows) == [
        ["1", "shallowing", "600", "1,000", "60.00", "0.6", "0.3"],
        ["2", "ldrf", "+", "distill", "300", "600", "50.00", "0.2", "0.1"],
        ["3", "magnitude", "150", "300", "50.00", "0.05", "0.025"],
        ["all", "150", "1,000", "15.00", "0.85", "0.2"],
    ]
    assert held == "over all, on the held-out samples: measured 0.25"
    assert accuracy == "accuracy, held-out: 90.00 % of the first, 85.00 % now"


def test_a_chain_without_a_bound_says_why_and_each_run_stands_for_itself():
    why = "the runs were not all measured on the same calibration samples."
    lines = "\n".join(chain_lines(replace(CHAIN, bound=None, why=why))).splitlines()
    assert f"no bound over all: {why}" in lines
    found = {line.split()[1]: line.split()[-2:] for line in lines if line[:1].isdigit()}
    assert found["ldrf"] == ["0.25", "0.125"]  # relative to the network that it started from
    assert next(line for line in lines if line.startswith("all")).split()[-2:] == ["–", "0.2"]


def test_the_latency_is_said_with_what_it_was_measured_on():
    dense, pruned = Latency(0.030, (0.029, 0.031), 64, 2, 30), Latency(0.012, (0.011, 0.013), 64, 2, 30)
    assert latency_line(LatencyRatio(2.5, (2.25, 2.75), dense, pruned)) == (
        "latency on this CPU, 2 threads, 64 samples: 12 ms, dense 30 ms; 2.50 times as fast (quartiles 2.25 to 2.75)"
    )


def test_the_probes_of_every_unit():
    def point(name, score, gain):
        return ProbePoint(name, 8, score, 0.01, 1.0, 0.1, gain, 0.02, 0.5, 0.05)

    points = (point("stem", 0.3, 0.0), point("a", 0.5, 0.2), point("b", 0.49, -0.01))
    curve = ProbeCurve(
        ACCURACY, points, trained=70, held=30, seeds=1, regularisation=1e-3, unconverged=0, seconds=0.1,
        stages=(0, 1), removed=("b",),
    )  # fmt: skip
    title, _, head, _, *rows = probe_table(curve.as_dict()).splitlines()
    assert title == "linear probes on the features of every unit, 70 samples to train and 30 to score, 1 split"
    assert head.split()[:2] == ["unit", "stage"]
    assert cells(rows) == [
        ["stem", "30.00", "1.00"],
        ["a", "1", "50.00", "1.00", "+20.00", "2.00"],
        ["b", "2", "49.00", "1.00", "-1.00", "2.00", "gone"],
    ]
