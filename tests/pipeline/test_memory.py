"""The rise of the resident set: what is taken counts, what was there before and what is freed between does not."""

import time

import pytest
import torch

from nettrim.pipeline.memory import PeakMemory

MIB = 2**17  # float64 numbers


def test_it_sees_the_peak_and_not_what_is_left():
    with PeakMemory() as memory:
        held = torch.ones(200 * MIB, dtype=torch.float64)
        time.sleep(0.05)
        del held
        time.sleep(0.05)
    assert 190 <= memory.rise <= 260


def test_what_the_process_held_before_does_not_count():
    held = torch.ones(200 * MIB, dtype=torch.float64)
    with PeakMemory() as memory:
        more = torch.ones(50 * MIB, dtype=torch.float64)
        time.sleep(0.05)
    assert 45 <= memory.rise <= 110
    assert len(held) > len(more)


def test_what_the_allocator_kept_is_counted_again():
    """Small pieces stay with the C library when they are freed; they are given back before the next look."""
    for _ in range(2):
        with PeakMemory() as memory:
            pieces = [torch.ones(MIB // 16, dtype=torch.float64) for _ in range(16 * 100)]
            pin = torch.ones(8)  # above them in the heap, so that it cannot simply shrink
            time.sleep(0.05)
        del pieces
        assert 90 <= memory.rise <= 160
        assert len(pin) == 8


def test_it_ends_with_the_work_even_where_that_fails():
    with pytest.raises(ValueError, match="mine"), PeakMemory() as memory:
        raise ValueError("mine")
    assert not memory._thread.is_alive()
    assert memory.rise >= 0
