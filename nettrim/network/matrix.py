"""Every layer as a product of matrices: a convolution is a Linear layer on the patches that its window passes over.

Columns of a patch lie in the order of the flattened weight ``(C_in/groups, *kernel)``, group after group, so that the
weight of the convolution is the matrix: ``weight.reshape(M, N)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """How a convolution passes over its input, per dimension.

    Attributes
    ----------
    kernel, stride, dilation : tuple of int
    padding : tuple of (int, int)
        Zeros before and behind.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    @staticmethod
    def of(kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> Window:
        """Read the arguments of `torch.nn.functional.conv2d`: numbers, tuples, "same" and "valid"."""
        size = len(kernel)
        stride, dilation = _each(stride, size), _each(dilation, size)
        if padding == "same":
            # torch puts the odd zero behind
            total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            sides = tuple((t // 2, t - t // 2) for t in total)
        else:
            sides = tuple((p, p) for p in _each(0 if padding == "valid" else padding, size))
        return Window(tuple(kernel), stride, dilation, sides)


def _each(value: Any, size: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * size if len(values) == 1 else values


def patches(inputs: Tensor, window: Window) -> Tensor:
    """Return what the window sees at every position.

    Parameters
    ----------
    inputs : Tensor, shape (B, C, *size)
        With one or two dimensions behind the channels.
    window : Window

    Returns
    -------
    Tensor, shape (B, L, C · K)
        ``L`` positions in row-major order, ``K`` entries of the kernel; column ``c · K + k`` is entry ``k`` of channel
        ``c``.
    """
    padded = F.pad(inputs, [side for sides in reversed(window.padding) for side in sides])
    kernel, stride, dilation = window.kernel, window.stride, window.dilation
    if len(kernel) == 1:
        padded, kernel, stride, dilation = padded.unsqueeze(-2), (1, *kernel), (1, *stride), (1, *dilation)
    return F.unfold(padded, kernel, dilation, 0, stride).transpose(1, 2)


def input_rows(inputs: Tensor, window: Window | None) -> Tensor:
    """Return a layer's inputs as rows ``(P, G · N)``: vectors where there is no window, else patches."""
    if window is None:
        return inputs.reshape(-1, inputs.shape[-1])
    seen = patches(inputs if inputs.dim() == len(window.kernel) + 2 else inputs.unsqueeze(0), window)
    return seen.reshape(-1, seen.shape[-1])


def output_rows(outputs: Tensor, window: Window | None) -> Tensor:
    """Return a layer's outputs as rows ``(P, M)``, in the order of `input_rows`."""
    if window is None:
        return outputs.reshape(-1, outputs.shape[-1])
    batched = outputs if outputs.dim() == len(window.kernel) + 2 else outputs.unsqueeze(0)
    return batched.flatten(2).transpose(1, 2).reshape(-1, batched.shape[1])
