"""The instances: names, and builders that are called when their turn comes, so that one problem is held at a time.

==========================  ============================================================================================
``fc1-E``, ``fc2-E``        LeNet-300-100 with the dense weights published with L-OBS, on MNIST's training images; the
                            bias is a penalised column of ones; radius ``E ‖Y‖``
``fc2-halfspace-E`` (fc1)   the same in the papers' form
``conv3-E``, ``conv5-E``    3x3 or 5x5 patches of CIFAR-10 training images (32 of each image, at random places), and 64
                            filters with their bias: whitened image patches, the random-patch dictionary of Coates and
                            Ng (ICML 2011), each scaled to norm one and active on 30 % of the patches
``planted-N-P``             ``X`` is like a hidden layer's input: ``ReLU`` of factors (rank N/16, half of the variance)
                            plus noise. 128 neurons with 10 % of their weights, of size 0.5 to 1.5 and random sign;
                            ``Y = ReLU(X Uᵀ + 5 % noise)``. The radius is 1.2 times the planted weight's distance:
                            the planted weights are then found again, with 97 % of the norm or more (at 1.0 too, but
                            among twice as many tiny ones)
==========================  ============================================================================================

``-P2500`` or ``-M50`` at the end of a name says how many samples or neurons there are, where that is not the usual
number. The rows of a data set are a random subset that the seed fixes; a smaller one is part of a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import unfold

from benchmarks.model.lenet import DATA, lenet_300_100
from nettrim.core.problem import LayerProblem, build_problem
from nettrim.core.solvers.scaling import relative_radius
from nettrim.data import load
from nettrim.errors import DataError, ProblemError

SAMPLES = 10_000
AXES = ("P", "N", "M", "kept")
_WIDTHS = {"fc1": 300, "fc2": 100}
# above so many entries inputs are kept in float32, so that a problem and what solvers make of it fit in memory
_SINGLE = 20_000_000


@dataclass(frozen=True, eq=False)
class Built:
    """A problem, and what is worth knowing of it beyond its tensors."""

    problem: LayerProblem
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Instance:
    """A name, where the numbers come from, and the builder. `usual` instances run where none are named."""

    name: str
    source: str
    build: Callable[[], Built]
    usual: bool = True


@dataclass(frozen=True, eq=False)
class Catalogue:
    """All instances by name, and for each axis of the scaling plots the names along it."""

    instances: dict[str, Instance]
    families: dict[str, list[str]]


def catalogue(samples: int = SAMPLES, seed: int = 0, quick: bool = False) -> Catalogue:
    """Return the instances with `samples` rows of the data sets each, or a handful of tiny ones."""
    return _quick(seed) if quick else _full(samples, seed)


def facts_of(instance: Instance, built: Built, seed: int) -> dict[str, Any]:
    """Return what a record says of an instance."""
    p = built.problem
    return {
        "samples": p.samples,
        "inputs": p.n_inputs,
        "outputs": p.n_outputs,
        "form": p.form,
        "epsilon": relative_radius(p),
        "active": float(p.active.double().mean()) if p.active is not None else 1.0,
        "dtype": str(p.inputs.dtype).removeprefix("torch."),
        "source": instance.source,
        "seed": seed,
        **built.facts,
    }


def _full(samples: int, seed: int) -> Catalogue:
    found: dict[str, Instance] = {}

    def lenet(layer: str, epsilon: float, p: int = samples, m: int = 0, form: str = "ball", usual: bool = False) -> str:
        m = m or _WIDTHS[layer]
        name = f"{layer}{'' if form == 'ball' else '-' + form}-{epsilon:g}{_suffix(p, m, _WIDTHS[layer])}"
        build = partial(_lenet_layer, layer, epsilon, p, m, form, seed)
        found.setdefault(name, Instance(name, "LeNet-300-100 of L-OBS, MNIST training images", build, usual))
        return name

    def planted(n: int, p: int, usual: bool = True) -> str:
        name = f"planted-{n}-{p}"
        found.setdefault(name, Instance(name, "planted", partial(planted_layer, n, p, 128, seed=seed), usual))
        return name

    for layer in _WIDTHS:
        for epsilon in (0.05, 0.1, 0.3):
            lenet(layer, epsilon, usual=True)
        lenet(layer, 0.1, form="halfspace", usual=True)
    for size, epsilon in ((3, 0.1), (5, 0.1), (5, 0.3)):
        name = f"conv{size}-{epsilon:g}{_suffix(samples, 64, 64)}"
        build = partial(_conv_patches, size, epsilon, samples, seed)
        found[name] = Instance(name, "CIFAR-10 training patches, whitened-patch filters", build)
    for p in (1000, 10_000, 100_000):
        planted(256, p)
    for n in (512, 1024, 2048, 4096):
        planted(n, 8192)
    families = {
        "P": [lenet("fc1", 0.1, p=p) for p in (2500, 5000, 10_000, 20_000, 40_000, 60_000)],
        "N": [planted(n, 8192, usual=False) for n in (256, 512, 1024, 2048, 4096)],
        "M": [lenet("fc1", 0.1, m=m) for m in (25, 50, 100, 200, 300)],
        "kept": [lenet("fc1", epsilon) for epsilon in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)],
    }
    return Catalogue(found, families)


def _quick(seed: int) -> Catalogue:
    found: dict[str, Instance] = {}

    def tiny(n: int = 16, p: int = 240, m: int = 6, widen: float = 1.0, form: str = "ball", usual: bool = False) -> str:
        name = f"tiny-{n}-{p}-{m}" + (f"-{widen:g}r" if widen != 1 else "") + ("" if form == "ball" else f"-{form}")
        build = partial(planted_layer, n, p, m, seed=seed, form=form, widen=widen)
        found.setdefault(name, Instance(name, "planted", build, usual))
        return name

    tiny(usual=True)
    tiny(form="halfspace", usual=True)
    families = {
        "P": [tiny(p=p) for p in (120, 240, 480)],
        "N": [tiny(n=n) for n in (8, 16, 32)],
        "M": [tiny(m=m) for m in (3, 6)],
        "kept": [tiny(widen=widen) for widen in (1, 2, 4)],
    }
    return Catalogue(found, families)


def _suffix(samples: int, outputs: int, usual: int) -> str:
    return (f"-P{samples}" if samples != SAMPLES else "") + (f"-M{outputs}" if outputs != usual else "")


@lru_cache(maxsize=1)
def _images(spec: str) -> Tensor:
    """Return a data set's training images; one set is held at a time."""
    return load(spec).train.inputs


def _lenet_layer(layer: str, epsilon: float, samples: int, outputs: int, form: str, seed: int) -> Built:
    images = _images(f"mnist:{DATA / 'mnist'}")
    if samples > len(images):
        raise ProblemError(f"{samples} samples were asked for, and MNIST has {len(images)} training images.")
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:samples]
    try:
        model = lenet_300_100().double()
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read: set NETTRIM_DATA to the folder with lenet300-100."
        ) from error
    with torch.no_grad():
        x = images[rows].double().flatten(1)
        if layer == "fc2":
            x = model.relu1(model.fc1(x))  # type: ignore[operator]
        y = getattr(model, layer)(x).clamp(min=0)[:, :outputs].contiguous()
    return Built(build_problem(_with_ones(x), y, epsilon=epsilon, form=form))


def _conv_patches(size: int, epsilon: float, samples: int, seed: int, filters: int = 64) -> Built:
    generator = torch.Generator().manual_seed(seed)
    x = _patches(_images(f"cifar10:{DATA / 'cifar10'}"), size, samples, generator).double()
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / samples)
    # the smallest directions are noise of the image format: damped, as is usual where patches are whitened
    whitening = vectors @ torch.diag(1 / (values + 1e-2 * values.mean())) @ vectors.T
    chosen = centred[torch.randperm(samples, generator=generator)[:filters]]
    weight = torch.nn.functional.normalize(chosen @ whitening, dim=1)
    z = x @ weight.T
    y = (z - z.quantile(0.7, dim=0)).clamp(min=0)
    return Built(build_problem(_with_ones(x), y, epsilon=epsilon), {"filters": filters})


def _patches(images: Tensor, size: int, samples: int, generator: torch.Generator, each: int = 32) -> Tensor:
    """Return `samples` patches as rows, `each` at random places of as many images as that takes."""
    needed = math.ceil(samples / each)
    if needed > len(images):
        raise ProblemError(f"{samples} patches were asked for: {each} each of {len(images)} images give fewer.")
    rows = []
    chosen = torch.randperm(len(images), generator=generator)[:needed]
    for chunk in range(0, needed, 256):
        some = images[chosen[chunk : chunk + 256]]
        columns = unfold(some, size)  # (images, 3·size², places)
        places = torch.rand(len(some), columns.shape[2], generator=generator).argsort(1)[:, :each]
        picked = columns.gather(2, places[:, None, :].expand(-1, columns.shape[1], -1))
        rows.append(picked.transpose(1, 2).reshape(-1, columns.shape[1]))
    return torch.cat(rows)[:samples]


def planted_layer(
    n: int, p: int, m: int, seed: int = 0, form: str = "ball", widen: float = 1.0, density: float = 0.1
) -> Built:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if n * p >= _SINGLE else torch.float64

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    rank = max(2, n // 16)
    x = random(p, n).addmm_(random(p, rank), random(rank, n) / rank**0.5).clamp_(min=0)
    kept = max(1, round(density * n))
    support = torch.rand(m, n, generator=generator).argsort(1)[:, :kept]
    values = random(m, kept).sign() * (0.5 + torch.rand(m, kept, generator=generator, dtype=dtype))
    weight = torch.zeros(m, n, dtype=dtype).scatter_(1, support, values)
    z = x @ weight.T
    if form == "halfspace":
        # a hard ceiling is met by the planted weight where there is no noise
        problem = build_problem(x, z.clamp(min=0), epsilon=0.05 * widen, form=form)
    else:
        y = (z + 0.05 * z.std() * random(p, m)).clamp_(min=0)
        distance = torch.linalg.vector_norm(build_problem(x, y, radius=1.0).residual(z).double())
        problem = build_problem(x, y, radius=1.2 * widen * float(distance))
    return Built(
        problem, {"planted": int((weight != 0).sum()), "planted_objective": float(weight.double().abs().sum())}
    )


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)
