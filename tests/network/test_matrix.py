"""A convolution is exactly a Linear layer on its patches: every stride, padding, dilation and number of groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nettrim.network.matrix import Window, input_rows, output_rows, patches


@st.composite
def convolutions(draw):
    """Shapes and settings of a convolution that has at least one position."""
    dims = draw(st.sampled_from([1, 2]))
    several = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, dilation = several(1, 3), several(1, 2)
    groups = draw(st.integers(1, 3))
    channels, filters = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    padding = draw(st.sampled_from(["same", "valid", "number", "tuple"]))
    stride = (1,) * dims if padding == "same" else several(1, 3)
    if padding == "number":
        padding = draw(st.integers(0, 2))
    elif padding == "tuple":
        padding = several(0, 2)
    size = tuple(d * (k - 1) + 1 + draw(st.integers(0, 4)) for k, d in zip(kernel, dilation, strict=True))
    how = {
        "stride": draw(st.sampled_from([stride, stride[0]])) if len(set(stride)) == 1 else stride,
        "padding": padding,
        "dilation": dilation,
    }
    return (draw(st.integers(1, 3)), channels, *size), (filters, channels // groups, *kernel), groups, how


def product(inputs: Tensor, weight: Tensor, window: Window | None, groups: int) -> Tensor:
    """The rows of a layer, block by block of the groups."""
    rows = input_rows(inputs, window)
    blocks = rows.reshape(len(rows), groups, -1)
    matrix = weight.reshape(groups, len(weight) // groups, -1)
    return torch.einsum("pgn,gmn->pgm", blocks, matrix).reshape(len(rows), -1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=150, deadline=None)
@given(convolutions(), st.integers(0, 2**31))
def test_a_convolution_is_the_product_of_its_rows(convolution, seed):
    shape, weight_shape, groups, how = convolution
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(shape, dtype=torch.float64, generator=generator)
    weight = torch.randn(weight_shape, dtype=torch.float64, generator=generator)
    window = Window.of(weight_shape[2:], how["stride"], how["padding"], how["dilation"])
    conv = {3: F.conv1d, 4: F.conv2d}[len(shape)]
    wanted = output_rows(conv(inputs, weight, groups=groups, **how), window)
    torch.testing.assert_close(product(inputs, weight, window, groups), wanted, rtol=0, atol=1e-12)


def test_sides_of_different_padding():
    inputs, weight = torch.randn(2, 3, 5, 6).double(), torch.randn(4, 3, 2, 3).double()
    window = Window((2, 3), (1, 2), (1, 1), ((1, 0), (2, 1)))
    wanted = F.conv2d(F.pad(inputs, (2, 1, 1, 0)), weight, stride=(1, 2))
    torch.testing.assert_close(product(inputs, weight, window, 1), output_rows(wanted, window), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [2, 4])
def test_same_with_an_even_kernel_has_the_odd_zero_behind(kernel):
    assert Window.of((kernel,), 1, "same", 1).padding == (((kernel - 1) // 2, kernel // 2),)


def test_depthwise():
    inputs, weight = torch.randn(2, 6, 7, 5).double(), torch.randn(12, 1, 3, 3).double()
    window = Window.of((3, 3), 2, 1, 1)
    wanted = F.conv2d(inputs, weight, stride=2, padding=1, groups=6)
    assert input_rows(inputs, window).shape == (2 * 4 * 3, 6 * 9)
    torch.testing.assert_close(product(inputs, weight, window, 6), output_rows(wanted, window), rtol=0, atol=1e-12)


def test_columns_are_channel_by_channel_and_positions_row_by_row():
    inputs = torch.arange(2 * 3 * 3.0).reshape(1, 2, 3, 3)
    seen = patches(inputs, Window.of((2, 2), 1, 0, 1))
    assert seen.shape == (1, 4, 8)
    assert seen[0, 0].tolist() == [0, 1, 3, 4, 9, 10, 12, 13]
    assert seen[0, 1].tolist() == [1, 2, 4, 5, 10, 11, 13, 14]
    assert seen[0, 2].tolist() == [3, 4, 6, 7, 12, 13, 15, 16]


def test_a_linear_layer_takes_its_last_dimension():
    inputs, weight = torch.randn(2, 3, 4).double(), torch.randn(5, 4).double()
    wanted = output_rows(F.linear(inputs, weight), None)
    assert wanted.shape == (6, 5)
    torch.testing.assert_close(product(inputs, weight, None, 1), wanted, rtol=0, atol=1e-12)


def test_inputs_without_a_batch_dimension():
    inputs, weight = torch.randn(3, 6, 6).double(), torch.randn(4, 3, 3, 3).double()
    window = Window.of((3, 3), 1, 1, 1)
    wanted = output_rows(F.conv2d(inputs, weight, padding=1), window)
    assert wanted.shape == (36, 4)
    torch.testing.assert_close(product(inputs, weight, window, 1), wanted, rtol=0, atol=1e-12)
