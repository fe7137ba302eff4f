"""What a network costs: parameters, multiply-adds and bytes, which are counted; and latency, which is measured.

A count is the same everywhere; a time is of one machine at one moment. So times come as a median with quartiles, and
two networks are compared by turns in one run, as ratios.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from nettrim.errors import ProblemError
from nettrim.network.batches import Batch
from nettrim.network.edit import evaluating
from nettrim.network.samples import forward_checked, moved
from nettrim.network.trace import LayerGraph, LayerSpec, trace
from nettrim.network.training import check_count

_SHORTEST = 5e-3  # seconds that a timing lasts at least: the clock and a call from Python cost microseconds
_MOST = 1000  # calls in one timing
_WARM = 2  # calls before the first timing: the first ones choose kernels and reserve memory


@dataclass(frozen=True)
class Costs:
    """What a network holds, and what one sample makes it compute.

    Attributes
    ----------
    parameters : int
        Entries of all parameters, zeros too; shared ones count once.
    weights : int
        Entries of the weight matrices of its Linear and convolutional layers, zeros too.
    multiply_adds : int
        Of those layers, for one sample. A bias, batch norm, activation or pooling counts nothing.
    bytes : int
        Of all parameters and buffers, in the dtypes that they have.
    uncounted : tuple of str
        Weights that are in `parameters` and not in `weights` and `multiply_adds`: those that tracing finds and cannot
        prune, such as tied ones and transposed convolutions.
    """

    parameters: int
    weights: int
    multiply_adds: int
    bytes: int
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Latency:
    """How long a network takes for a batch on the CPU.

    Attributes
    ----------
    seconds : float
        Median time of one call.
    quartiles : (float, float)
        Lower and upper quartile of the times, in seconds.
    samples : int
        In the batch.
    threads : int
        Of torch.
    repeats : int
        Timings. Where a call is short, each is the mean over several in a row.
    """

    seconds: float
    quartiles: tuple[float, float]
    samples: int
    threads: int
    repeats: int


@dataclass(frozen=True)
class LatencyRatio:
    """How many times faster one network is than another, on one batch and in one run.

    Attributes
    ----------
    speedup : float
        Median over the pairs of timings of the dense network's time divided by the pruned one's: 2 is twice as fast.
    quartiles : (float, float)
        Lower and upper quartile of those ratios.
    dense, pruned : Latency
        Of the same timings, each network for itself.
    """

    speedup: float
    quartiles: tuple[float, float]
    dense: Latency
    pruned: Latency


def multiply_adds(layer: LayerSpec) -> int:
    """Return how many products of a weight and an input a layer sums for one sample.

    Every weight meets one input at every position, in a grouped convolution too, whose matrix has the columns of one
    group. A window that hangs over the edge counts as whole, padding included, as is usual.
    """
    return layer.positions * layer.numel


def costs(graph: LayerGraph, model: nn.Module) -> Costs:
    """Count what a network costs.

    Parameters
    ----------
    graph : LayerGraph
        Of the model; which layers it selects does not matter. Positions are those of the samples it was traced on.
    model : nn.Module

    Raises
    ------
    ProblemError
        A layer of the graph is not in the model, or of another shape there.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for layer in graph.layers:
        if shapes.get(layer.weight) != layer.shape:
            held = f"of shape {shapes[layer.weight]}" if layer.weight in shapes else "missing"
            raise ProblemError(
                f"graph is of another model: {layer.weight!r} has shape {layer.shape} in it and is {held} in the "
                "model; trace this model, or use costs_of"
            )
    tensors = [*model.parameters(), *model.buffers()]
    return Costs(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights=sum(layer.numel for layer in graph.layers),
        multiply_adds=sum(multiply_adds(layer) for layer in graph.layers),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        uncounted=tuple(name for name, _ in graph.unsupported),
    )


def costs_of(model: nn.Module, batch: Batch) -> Costs:
    """Trace a network, and count what it costs.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    batch : Batch
        Samples to trace the forward on; few will do. Their shape decides how often a convolution's weights are used.

    Raises
    ------
    UnsupportedError
        What the forward does cannot be followed; the text names it.
    ProblemError
        A weight is NaN or infinite, or no layer is counted.
    """
    return costs(trace(model, batch, on_unsupported="keep").graph, model)


def latency(model: nn.Module, batch: Batch, *, repeats: int = 30, threads: int = 1) -> Latency:
    """Measure how long a network takes for a batch on the CPU, in evaluation mode and without gradients.

    Parameters
    ----------
    model : nn.Module
        On the CPU. Left as it is, in the mode that it was in.
    batch : Batch
        What one call is given; brought to the model's dtype before the clock starts.
    repeats : int
        Timings, at least 1. Each lasts some milliseconds: a fast network is called several times in it.
    threads : int
        Of torch while it is measured, at least 1; the number before is put back.

    Returns
    -------
    Latency
        Of this machine, with what else runs on it: compare networks by `latency_ratio`.

    Raises
    ------
    ProblemError
        An argument is out of its range, the model is not on the CPU, or it fails on the batch.
    UnsupportedError
        The model returns no tensor, or several.
    """
    (seconds,) = _measured([("model", model)], batch, repeats, threads)
    return _summary(seconds, batch, threads)


def latency_ratio(
    dense: nn.Module, pruned: nn.Module, batch: Batch, *, repeats: int = 30, threads: int = 1
) -> LatencyRatio:
    """Measure how many times faster one network is than another on the CPU, by turns.

    The two of a pair follow each other within milliseconds, and in every other pair the pruned one comes first: what
    else slows the machine for longer than that falls on both, and so does what a first place costs.

    Parameters
    ----------
    dense, pruned : nn.Module
        On the CPU. Left as they are, in the modes that they were in.
    batch : Batch
        What one call of either is given; brought to the model's dtype before the clock starts.
    repeats : int
        Pairs of timings, at least 1.
    threads : int
        Of torch while they are measured, at least 1; the number before is put back.

    Raises
    ------
    ProblemError
        An argument is out of its range, a model is not on the CPU, or it fails on the batch.
    UnsupportedError
        A model returns no tensor, or several.
    """
    before, after = _measured([("dense", dense), ("pruned", pruned)], batch, repeats, threads)
    lower, speedup, upper = _quartiles([slow / fast for slow, fast in zip(before, after, strict=True)])
    return LatencyRatio(speedup, (lower, upper), _summary(before, batch, threads), _summary(after, batch, threads))


def _measured(models: list[tuple[str, nn.Module]], batch: Batch, repeats: int, threads: int) -> list[list[float]]:
    """Return the seconds of a call in every timing, for each of some named models."""
    check_count("repeats", repeats)
    check_count("threads", threads)
    for name, model in models:
        elsewhere = {tensor.device for tensor in (*model.parameters(), *model.buffers())} - {torch.device("cpu")}
        if elsewhere:
            raise ProblemError(
                f"{name} is on {', '.join(sorted(map(str, elsewhere)))} and latency is measured on the CPU; "
                f"pass {name}.cpu()"
            )
    seconds: list[list[float]] = [[] for _ in models]
    with _threads(threads), torch.no_grad():
        timers = [_timer(model, batch) for _, model in models]
        order = list(enumerate(timers))
        for _ in range(repeats):
            for index, timer in order:
                seconds[index].append(timer())
            order.reverse()
    return seconds


def _timer(model: nn.Module, batch: Batch) -> Callable[[], float]:
    """Warm a model up; return a function that times as many calls as last long enough, and gives the seconds of one."""
    like = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), torch.empty(0))
    # a copy: a first layer that works in place would change the caller's samples
    batch = moved(batch, like)
    inputs = [tensor.clone() for tensor in batch.inputs]
    kwargs = {key: tensor.clone() for key, tensor in batch.kwargs.items()}

    def timed(calls: int) -> float:
        with evaluating(model):
            began = time.perf_counter()
            for _ in range(calls):
                model(*inputs, **kwargs)
            return (time.perf_counter() - began) / calls

    with evaluating(model):
        forward_checked(model, batch)
    # the clock can stand still over one call of an empty network
    calls = min(_MOST, math.ceil(_SHORTEST / max(timed(_WARM), 1e-9)))
    return lambda: timed(calls)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run with `count` threads in torch, and put the number before back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _summary(seconds: list[float], batch: Batch, threads: int) -> Latency:
    """Return median and quartiles of some timings."""
    lower, median, upper = _quartiles(seconds)
    return Latency(median, (lower, upper), len(batch), threads, len(seconds))


def _quartiles(figures: list[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile, interpolated between the figures beside them."""
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    lower, median, upper = torch.quantile(torch.tensor(figures, dtype=torch.float64), at).tolist()
    return lower, median, upper
