"""Fixtures that every test may use: a seeded generator, small networks, and the data beside the checkout."""

import os
import zlib
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is there: workers that each take all cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed(request):
    """The same numbers in every run: one thread, and a seed from the test's own name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data_directory():
    """The folder with mnist/ and lenet300-100/."""
    path = Path(os.environ.get("NETTRIM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (path / "mnist").is_dir():
        pytest.skip(f"no data sets in {path}: set NETTRIM_DATA")
    return path


@pytest.fixture
def network():
    """A dense random ReLU network 12-16-10-5 with dropout, in training mode as a user may hand it over."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 5)
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


@pytest.fixture
def batches():
    """Sixty labelled samples for `network`, in three batches of unequal size."""
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(60, 12, generator=generator), torch.randint(0, 5, (60,), generator=generator)
    return [(x[:10], y[:10]), (x[10:45], y[10:45]), (x[45:], y[45:])]


@pytest.fixture
def held_out():
    """Twenty-five labelled samples that are not calibrated on."""
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(25, 12, generator=generator), torch.randint(0, 5, (25,), generator=generator))]
