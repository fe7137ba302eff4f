"""A stream many times the memory limit is pruned on within it; what is held is foretold, and refused where it must be.

The peak is the kernel's own (``VmHWM``), in a process of its own in which everything was loaded and used before.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import nettrim
from nettrim.core.moments import Moments
from nettrim.errors import ProblemError
from nettrim.network.batches import read_batches
from nettrim.network.trace import trace
from nettrim.pipeline.collect import Wanted, choose_rows, decide, estimate, packs
from nettrim.pipeline.memory import hand_back

MIB = 2**20
LIMIT = 64 * MIB


def mlp():
    return nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10)), (256,)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    ), (3, 32, 32)  # fmt: skip


GIVEN = {
    "mlp": (mlp, {"method": nettrim.NetTrim(tol=1e-2, on_failure="return"), "epsilon": 0.2}),
    "convolutional": (convolutional, {"method": "sparsegpt", "sparsity": 0.5}),
}


def stream(shape, size):
    """Batches of 1 MiB, so many bytes of them; the generator keeps none."""
    generator = torch.Generator().manual_seed(1)
    sample = 4 * torch.Size(shape).numel()
    rows = MIB // sample
    for _ in range(-(-size // (rows * sample))):
        yield torch.randn(rows, *shape, generator=generator)


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak(name):
    """Print the rise of the peak over the bare process, and the bytes of the stream; runs in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make, given = GIVEN[name]
    model, shape = make()
    # large enough that every solver, and numba, is loaded
    nettrim.prune(model, [torch.randn(3000, *shape)], progress=False, **given)
    hand_back()
    bare = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = nettrim.prune(model, stream(shape, 20 * LIMIT), memory_limit=LIMIT, progress=False, **given)
    assert all(0 < record.kept < record.numel for record in result.ledger.records)
    print(status("VmHWM") - bare, result.account.batches.nbytes)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", GIVEN)
def test_the_peak_stays_within_the_limit(name):
    code = f"import importlib.util as u; s = u.spec_from_file_location('t', {__file__!r}); "
    code += f"t = u.module_from_spec(s); s.loader.exec_module(t); t.peak({name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rise, size = map(int, done.stdout.split())
    model, _ = GIVEN[name][0]()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert size >= 20 * LIMIT
    print(f"{name}: {rise / MIB:.1f} MiB above the bare process, limit {LIMIT // MIB} MiB")
    # two of them in float64: the dense and the pruned one
    assert rise <= LIMIT + 2 * 2 * weights


@pytest.fixture
def graph():
    model, shape = convolutional()
    return trace(model.eval(), read_batches([torch.randn(4, *shape)]).first(4)).graph


def test_the_estimate_says_what_is_taken_of_each_layer(graph):
    batches = read_batches([torch.randn(40, 3, 32, 32)])
    found = estimate(graph, "rows", batches, None, 100, LIMIT, 7)
    assert {name: what for name, (what, _) in found.layers.items()} == {
        "0": "100 of 2,560 rows",
        "4": "100 of 640 rows",
        "7": "40 of 40 rows",
    }
    sentence = found.sentence()
    assert "7 samples at a time" in sentence
    assert "at most 64.0 MiB" in sentence
    assert "\n" not in sentence
    assert "temporary files" not in sentence
    summed = estimate(graph, "moments", batches, None, 100, LIMIT, 7).layers
    assert summed["0"][0] == "moments of 2,560 rows"
    assert summed["7"][0] == "40 of 40 rows"
    assert estimate(graph, "weight", batches, None, None, LIMIT, 7).layers["0"] == ("its weight", 0)


def test_the_estimate_counts_the_temporary_files(graph):
    parts = torch.randn(40, 3, 32, 32).split(10)
    size = parts[0].nbytes
    batches, held = (read_batches((p for p in parts), memory_limit=4 * size * k) for k in (1, 2))
    assert (batches.spooled_bytes, held.spooled_bytes) == (3 * size, 2 * size)
    assert estimate(graph, "rows", batches, held, None, LIMIT, 7).spooled == 5 * size
    assert f"{5 * size / MIB:.1f} MiB of samples in temporary files" in (
        estimate(graph, "rows", batches, held, None, LIMIT, 7).sentence()
    )


@pytest.mark.parametrize("method", ["net-trim", "sparsegpt"])
def test_a_layer_that_cannot_fit_is_refused_before_any_work(method, tmp_path):
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2500), nn.ReLU(), nn.Linear(2500, 3))
    amount = {"epsilon": 0.1} if method == "net-trim" else {"sparsity": 0.5}
    given = {"memory_limit": "64 MiB", "progress": False, "out_dir": tmp_path / "run"}
    with pytest.raises(ProblemError, match="layer '4' with 2500 inputs") as caught:
        nettrim.prune(model, [torch.randn(30, 8)], method, **amount, **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    nettrim.prune(model, [torch.randn(30, 8)], method, **amount, ignore="4", **given)


def test_the_limit_that_the_refusal_names_is_enough(graph):
    spec = replace(graph.layer("7"), in_features=3000)
    with pytest.raises(ProblemError, match="raise it to") as caught:
        decide(spec, "moments", 10**6, None, LIMIT, 0)
    enough = int(str(caught.value).split("raise it to ")[1].split(" MiB")[0])
    assert decide(spec, "moments", 10**6, None, enough * MIB, 0).moments
    with pytest.raises(ProblemError, match="raise it"):
        decide(spec, "moments", 10**6, None, (enough - 1) * MIB, 0)


def test_rows_give_way_to_moments_where_they_do_not_fit(graph):
    spec = graph.layer("7")
    assert not decide(spec, "moments", 1000, None, LIMIT, 0).moments
    assert decide(spec, "moments", 10**6, None, LIMIT, 0).moments
    assert decide(spec, "moments", 1000, 999, LIMIT, 0).moments


def test_more_memory_means_more_rows(graph):
    spec = graph.layer("4")
    counts = [len(choose_rows(spec, 10**6, 10**7, limit * MIB, 0)) for limit in (32, 64, 128)]
    assert counts[0] < counts[1] < counts[2]
    # what rows do not change is taken off first
    assert counts[2] - counts[1] == pytest.approx(2 * (counts[1] - counts[0]), abs=3)


def test_workers_each_need_room_for_a_solver(graph):
    wanted = {name: Wanted(torch.arange(2500)) for name in ("0", "4", "7")}
    apart = [list(packs(graph, wanted, 10**4, LIMIT, workers)) for workers in (1, 3)]
    assert [name for pack in apart[0] for name in pack] == ["0", "4", "7"]
    assert len(apart[1]) > len(apart[0])


@pytest.mark.parametrize("rows", [1, 511, 512, 513, 2000])
def test_moments_summed_in_blocks_are_those_of_all_rows(rows):
    """Whatever the batches: pieces that fill a block, overflow it, or leave it half empty."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(rows, 5, dtype=torch.float64)
    seen = []

    class Spy(nettrim.methods.SparseGpt):
        def prune_layer(self, task):
            seen.append(task)
            return super().prune_layer(task)

    nettrim.prune(model, list(x.split(300)), Spy(), sparsity=0.5, rows=16, schedule="parallel", progress=False)
    hidden = model[1](model[0](x)).detach()
    for task, inputs, layer in zip(seen, (x, hidden), (model[0], model[2]), strict=True):
        if rows <= 16:
            assert task.moments is None
            continue
        expected = Moments.of(inputs, layer(inputs).detach())
        assert task.moments.count == rows
        for name in ("gram", "cross", "power"):
            torch.testing.assert_close(getattr(task.moments, name), getattr(expected, name), rtol=1e-12, atol=1e-9)
