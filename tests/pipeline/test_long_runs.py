"""A run that is killed at any moment goes on to the very same end, and never to that of another run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import nettrim
from nettrim.errors import RunError
from nettrim.pipeline import files

AMOUNT = {"epsilon": 0.15, "progress": False}


def network():
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 16), nn.ReLU(),
        nn.Linear(16, 4),
    )  # fmt: skip
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5)
    return model.eval()


def samples(count):
    return [torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(7))]


def run(directory, count=40, tol=1e-2, **changed):
    """One run; a longer one has more samples and a finer tolerance."""
    given = {"method": nettrim.NetTrim(tol=tol, on_failure="return"), "seed": 3, **AMOUNT, **changed}
    model, data = given.pop("model", None) or network(), given.pop("data", None) or samples(count)
    return nettrim.prune(model, data, out_dir=directory, held_out=samples(30), **given)


def small(directory, **more):
    """A run of a tenth of a second."""
    generator = torch.Generator().manual_seed(8)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    data = [torch.randn(20, 6, generator=generator)]
    return nettrim.prune(model, data, out_dir=directory, seed=3, **AMOUNT, **more)


def without_seconds(value):
    """A ledger as plain values, but for how long things took."""
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if "seconds" not in key}
    return [without_seconds(item) for item in value] if isinstance(value, (list, tuple)) else value


def assert_same_end(found, expected):
    """Weights, masks and ledger, bit for bit, in memory and on disk."""
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensor, found.model.state_dict()[name]), name
    assert found.masks.keys() == expected.masks.keys()
    assert all(torch.equal(mask, found.masks[name]) for name, mask in expected.masks.items())
    assert without_seconds(found.ledger.as_dict()) == without_seconds(expected.ledger.as_dict())


def check(directory, expected, work=run, **settings):
    """Go on with what a kill left, and hold its end against the undisturbed run's; return how many layers it had."""
    started = directory / "run.json"
    had = [name for name in json.loads(started.read_text())["files"] if "layers/" in name] if started.exists() else []
    found = work(directory, resume=True, **settings)
    assert_same_end(found, expected)
    assert [path for path in directory.rglob("*.part")] == []
    verified = nettrim.verify(directory)
    assert verified.failures == ()
    assert verified.state == "finished"
    for name in ("model.safetensors", "masks.safetensors"):
        assert (directory / name).read_bytes() == (directory.parent / "whole" / name).read_bytes()
    stored = [json.loads((path / "ledger.json").read_text()) for path in (directory, directory.parent / "whole")]
    assert without_seconds(stored[0]) == without_seconds(stored[1])
    return len(had)


# ------------------------------------------------------------------------ in a process of its own, which forks for runs


def forked(work):
    """Run it in a child; return the child's number."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def kill_at_moments(directory, settings, count):
    """Time one run, then kill others after random shares of that; print what fraction of the time each had."""
    torch.set_num_threads(1)
    directory = Path(directory)
    run(directory / "warm")
    began = time.monotonic()
    os.waitpid(forked(lambda: run(directory / "timed", **settings)), 0)
    whole = time.monotonic() - began
    draw = random.Random(11)
    for index in range(count):
        # one in each tenth of the duration
        moment = (index + draw.random()) / count
        child = forked(lambda index=index: run(directory / f"run{index}", **settings))
        time.sleep(moment * whole)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(whole)


def kill_at_writes(directory):
    """Kill runs at every file that they write, before it is in place and after."""
    torch.set_num_threads(1)
    small(Path(directory) / "warm")
    place = Path.replace
    for when in ("before", "after"):
        for number in range(100):
            written = []

            def replace(part, path, number=number, when=when, written=written):
                if len(written) == number and when == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                place(part, path)
                if len(written) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                written.append(path)

            Path.replace = replace
            child = forked(lambda number=number, when=when: small(Path(directory) / f"{when}{number}"))
            Path.replace = place
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
                shutil.rmtree(Path(directory) / f"{when}{number}")
                break
    print(number)


def elsewhere(call):
    code = f"import importlib.util as u; s = u.spec_from_file_location('t', {__file__!r}); "
    code += f"t = u.module_from_spec(s); s.loader.exec_module(t); t.{call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_fork = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")


@needs_fork
def test_a_run_killed_at_random_moments_goes_on_to_the_same_end(tmp_path):
    settings = {"count": 400, "tol": 1e-4}
    elsewhere(f"kill_at_moments({str(tmp_path)!r}, {settings!r}, 10)")
    expected = run(tmp_path / "whole", **settings)
    had = [check(tmp_path / f"run{index}", expected, **settings) for index in range(10)]
    # the kills did not all come before the first layer, nor after the last
    assert min(had) < 2
    assert max(had) >= 3


@needs_fork
def test_a_run_killed_at_any_file_goes_on_to_the_same_end(tmp_path):
    elsewhere(f"kill_at_writes({str(tmp_path)!r})")
    expected = small(tmp_path / "whole")
    killed = sorted(path for path in tmp_path.iterdir() if path.name.startswith(("before", "after")))
    # settings, network twice, samples, two layers, what comes at the end thrice, and the notes of most of them
    assert len(killed) >= 2 * 12
    left = [path for path in killed if list(path.rglob("*.part"))]
    assert len(left) >= 12
    assert {check(path, expected, small) for path in killed} == {0, 1, 2}


def test_parts_that_no_run_would_write_again_go_too(tmp_path):
    expected = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    (tmp_path / "again" / "layers" / "old.safetensors.part").write_bytes(b"half")
    assert not nettrim.verify(tmp_path / "again").holds
    assert check(tmp_path / "again", expected) == 4


@pytest.mark.parametrize("schedule", ["cascade", "parallel"])
def test_one_worker_and_two_give_the_same(tmp_path, schedule):
    one, two = (run(tmp_path / str(executor), executor=executor, schedule=schedule) for executor in (1, 2))
    assert_same_end(two, one)


def wider():
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1e-3
    return model


OTHERS = {
    "model": {"model": wider()},
    "data": {"data": [samples(40)[0].flip(0)]},
    "rows": {"rows": 200},
    "memory_limit": {"memory_limit": "1 GiB"},
    "forms": {"forms": {"9": "linear"}},
    "seed": {"seed": 4},
    "amount": {"epsilon": 0.2},
    "schedule": {"schedule": "parallel"},
    "method_settings": {"tol": 2e-2},
    "layers": {"ignore": "9"},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    run(path)
    return path


@pytest.mark.parametrize("named", OTHERS)
def test_another_run_is_refused_and_what_differs_is_named(finished, named):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=rf"holds a run with another [\w, ]*\b{named}\b"):
        run(finished, resume=True, **OTHERS[named])
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_another_schema_is_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"schema": stored["schema"] - 1}))
    with pytest.raises(RunError, match="another schema"):
        run(tmp_path / "run", resume=True)


def test_a_layer_that_was_cut_short_is_solved_again(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "whole")
    shutil.copytree(finished, tmp_path / "run")
    layer = tmp_path / "run" / "layers" / "3.safetensors"
    layer.write_bytes(layer.read_bytes()[:-9])
    check(tmp_path / "run", nettrim.load_result(tmp_path / "whole", network()))
    assert files.read_json(tmp_path / "run" / "run.json")["state"] == "finished"
