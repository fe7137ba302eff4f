"""`kill -9` at random moments of a run, in the middle of writing too: gone on with, it ends as if nothing had happened.

Every run is a process of its own, forked from a server that has imported torch already.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Block, batches_of, network_of, seeded
from safetensors.torch import load_file
from torch import nn

import nettrim
from nettrim.errors import RunError
from nettrim.pipeline import files

PATIENCE = 120  # seconds, on any machine
WAYS = ("half written", "written", "in place")


def small() -> nn.Module:
    """A residual block of two convolutions with batch norms between a convolution and a Linear layer."""
    return seeded(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, 1, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True),
            Block(3, 3, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3),
        )
    )  # fmt: skip


def given(name: str) -> tuple[nn.Module, list[Any]]:
    """Return a network and its samples."""
    if name == "resnet":
        return network_of(name), batches_of(name)
    return small(), list(torch.randn(40, 2, 6, 6, generator=torch.Generator().manual_seed(7)).split(15))


def die_at(moment: int) -> None:
    """Let this process kill itself at a moment of its writing: each file has one for every entry of `WAYS`."""
    passed = 0
    fsync, replace = files.os.fsync, Path.replace

    def reached() -> bool:
        nonlocal passed
        passed += 1
        return passed == moment

    def torn(descriptor: int) -> None:
        if reached():
            # what a disk may hold of a file before it is flushed
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    def moved(path: Path, target: Path) -> Path:
        if reached():
            os.kill(os.getpid(), signal.SIGKILL)
        there = replace(path, target)
        if reached():
            os.kill(os.getpid(), signal.SIGKILL)
        return there

    files.os.fsync, Path.replace = torn, moved


def work(line: Connection, name: str, settings: dict[str, Any], moment: int | None) -> None:
    """Prune in a process of its own, and tell when it starts and how long it took."""
    torch.set_num_threads(1)
    if moment is not None:
        die_at(moment)
    model, batches = given(name)
    line.send("started")
    start = time.perf_counter()
    nettrim.prune(model, batches, progress=False, resume=True, **settings)
    line.send(time.perf_counter() - start)


@dataclass
class Runs:
    """The processes of a test module."""

    context: Any

    def prune(
        self, name: str, *, after: float | None = None, moment: int | None = None, **settings: Any
    ) -> float | None:
        """Run in a process, killed after so many seconds or at a moment of writing; return what it took, or None
        where it was killed before it was done.
        """
        line, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=work, args=(theirs, name, settings, moment))
        process.start()
        theirs.close()
        try:
            assert line.poll(PATIENCE)
            assert line.recv() == "started"
            if after is not None:
                time.sleep(after)
                process.kill()
            took = None
            # a killed process leaves an end of file
            with suppress(EOFError):
                assert line.poll(PATIENCE)
                took = line.recv()
        finally:
            if after is None and moment is None:
                process.join(PATIENCE)
            process.kill()
            process.join(PATIENCE)
            line.close()
        if after is None and moment is None:
            assert process.exitcode == 0
        elif took is None:
            assert process.exitcode == -signal.SIGKILL
        return took


@pytest.fixture(scope="module")
def runs():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nettrim"])
    with pytest.MonkeyPatch.context() as patch:
        # read when the server imports torch
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Runs(context)


RESNET = {"sparsity": 0.5, "schedule": "cascade"}


@pytest.fixture(scope="module")
def undisturbed(runs, tmp_path_factory):
    """The small network's run, and nothing happened to it."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    runs.prune("small", out_dir=path, **RESNET)
    return path


def timeless(value: Any) -> Any:
    """Return JSON without what a clock says."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not key.startswith("seconds")}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def assert_same(path: Path, wanted: Path) -> None:
    """Hold two finished run directories against each other: bits, and files, and that `verify` holds."""
    for name in ("model", "masks", "network", "samples/calibration"):
        found, right = (load_file(place / f"{name}.safetensors") for place in (path, wanted))
        assert found.keys() == right.keys()
        for key, tensor in right.items():
            # bytes, since -0.0 is equal to 0.0
            assert files.digest_tensors({key: found[key]}) == files.digest_tensors({key: tensor}), key
    ledgers = [timeless(json.loads((place / "ledger.json").read_text())) for place in (path, wanted)]
    assert ledgers[0] == ledgers[1]
    files_of = [{p.relative_to(place) for p in place.rglob("*") if p.is_file()} for place in (path, wanted)]
    assert files_of[0] == files_of[1]
    verification = nettrim.verify(path)
    assert verification.failures == ()
    assert verification.state == "finished"


def progress(path: Path) -> tuple[str, list[str]]:
    """Return how far a killed run says that it got, and which layers it has."""
    if not (path / "run.json").exists():
        return "not begun", []
    run = json.loads((path / "run.json").read_text())
    return run["state"], [name for name in run["files"] if name.startswith("layers/")]


def test_ten_kills_at_random_moments_change_nothing(runs, tmp_path):
    whole = tmp_path / "whole"
    took = runs.prune("resnet", out_dir=whole, **RESNET)
    run = json.loads((whole / "run.json").read_text())
    seconds = {
        name: files.read_tensors(whole / name)[1]["seconds"] for name in run["files"] if name.startswith("layers/")
    }
    assert len(seconds) == 7
    generator = random.Random(2016)
    said, interrupted, inside = [], 0, 0
    for chain, kills in enumerate((4, 3, 3)):
        path = tmp_path / f"chain {chain}"
        for kill in range(kills):
            # what finished layers took need not be taken again
            left = took - sum(seconds[name] for name in progress(path)[1])
            after = generator.uniform(0, left)
            done = runs.prune("resnet", out_dir=path, after=after, **RESNET)
            state, layers = progress(path)
            interrupted += done is None
            inside += done is None and 0 < len(layers) < 7
            outcome = "killed" if done is None else "done before"
            said.append(f"chain {chain}, after {after:.2f} of {left:.2f} s: {outcome}, {len(layers)} of 7 layers")
            if done is None:
                assert state in ("not begun", "started") or len(layers) == 7
        runs.prune("resnet", out_dir=path, **RESNET)
        assert_same(path, whole)
    print(f"\n{took:.2f} s undisturbed; {interrupted} of 10 kills interrupted a run, {inside} between two layers")
    print("\n".join(said))
    assert interrupted >= 6
    assert inside >= 2


@pytest.mark.parametrize("seed", [1, 2])
def test_kills_in_the_middle_of_writing_change_nothing(runs, tmp_path, undisturbed, seed):
    path, generator = tmp_path / "run", random.Random(seed)
    ways, layers, parts = dict.fromkeys(WAYS, 0), [], 0
    for _ in range(30):
        # of the 51 moments of an undisturbed run
        moment = generator.randint(1, 30)
        if runs.prune("small", out_dir=path, moment=moment, **RESNET) is not None:
            break
        ways[WAYS[(moment - 1) % 3]] += 1
        layers.append(len(progress(path)[1]))
        left = list(path.rglob("*.part"))
        parts += len(left)
        assert len(left) == (WAYS[(moment - 1) % 3] != "in place")
        if (path / "run.json").exists():
            # every file that the run has named is whole
            found = nettrim.verify(path).failures
            assert [each for each in found if "the run did not write this file" not in each] == []
    else:
        pytest.fail("it never came to its end")
    print(f"\n{sum(ways.values())} kills: {ways}; {parts} torn or unmoved files; layers finished at each: {layers}")
    assert sum(ways.values()) >= 4
    assert parts
    assert_same(path, undisturbed)


@pytest.mark.parametrize("moment", range(1, 4))
def test_a_run_killed_in_its_first_file_leaves_nothing_in_the_way(runs, tmp_path, undisturbed, moment):
    path = tmp_path / "run"
    assert runs.prune("small", out_dir=path, moment=moment, **RESNET) is None
    assert (path / "run.json").exists() == (moment == 3)
    runs.prune("small", out_dir=path, **RESNET)
    assert_same(path, undisturbed)


def test_a_finished_run_that_is_gone_on_with_and_killed_holds_again(runs, tmp_path, undisturbed):
    path = tmp_path / "run"
    runs.prune("small", out_dir=path, **RESNET)
    # run.json, then the model: its successor is there in part
    assert runs.prune("small", out_dir=path, moment=4, **RESNET) is None
    assert [part.name for part in path.rglob("*.part")] == ["model.safetensors.part"]
    runs.prune("small", out_dir=path, **RESNET)
    assert_same(path, undisturbed)


@pytest.mark.parametrize("schedule", ["parallel", "cascade"])
def test_two_workers_give_what_one_gives(runs, tmp_path, undisturbed, schedule):
    one, two = undisturbed, tmp_path / "two"
    settings = RESNET | {"schedule": schedule}
    if schedule == "parallel":
        one = tmp_path / "one"
        runs.prune("small", out_dir=one, **settings)
        # the first layer is noted in the seventh file
        assert runs.prune("small", out_dir=two, moment=21, executor=2, **settings) is None
        assert len(progress(two)[1]) == 1
    runs.prune("small", out_dir=two, executor=2, **settings)
    assert_same(two, one)


def nudge(name: str) -> nn.Module:
    """Return the small network with one number moved."""
    model = small()
    model.state_dict()[name].reshape(-1)[0].add_(1e-3)
    return model


REFUSED = {
    "seed": {"seed": 1},
    "residual": {"residual": "sum"},
    "amount": {"sparsity": 0.6},
    "schedule": {"schedule": "parallel"},
    "method_settings": {"method": nettrim.NetTrim(kappa=0.3)},
    "layers": {"ignore": ["6"]},
    "model": {"model": "3.conv2.weight"},
    "model, for a batch norm": {"model": "3.bn2.running_var"},
    "data": {"batches": "one number"},
}


@pytest.mark.parametrize("what", REFUSED)
def test_another_run_is_refused_by_what_is_other(undisturbed, what):
    model, batches = given("small")
    settings = {"model": model, "batches": batches} | RESNET | REFUSED[what]
    if isinstance(settings["model"], str):
        settings["model"] = nudge(settings["model"])
    if isinstance(settings["batches"], str):
        settings["batches"] = [batches[0], batches[1], batches[2] + 1e-6 * (torch.arange(10) == 3)[:, None, None, None]]
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=rf"holds a run with another (\w+, )*{what.split(',')[0]}\b"):
        nettrim.prune(out_dir=undisturbed, resume=True, progress=False, **settings)
    assert {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("schema", [2, 4, None])
def test_a_run_of_another_schema_is_refused(runs, tmp_path, schema):
    assert runs.prune("small", out_dir=tmp_path / "run", moment=21, **RESNET) is None
    path = tmp_path / "run" / "run.json"
    stored = json.loads(path.read_text())
    if schema is None:
        del stored["schema"]
    else:
        stored["schema"] = schema
    path.write_text(json.dumps(stored))
    model, batches = given("small")
    with pytest.raises(RunError, match="holds a run with another schema: "):
        nettrim.prune(model, batches, out_dir=tmp_path / "run", resume=True, progress=False, **RESNET)
    assert json.loads(path.read_text()) == stored
