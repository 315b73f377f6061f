"""Huge pages behind memory that exists already."""

import re
from pathlib import Path

import pytest
import torch

from gptmoe.generate.kernels.pages import HUGE_BYTES, on_huge_pages
from gptmoe.generate.packed_weight import PackedWeight


def huge_bytes_of_this_process() -> int:
    found = re.search(r"AnonHugePages: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return int(found[1]) * 1024 if found else 0


def test_what_memory_holds_stays() -> None:
    values = torch.arange(3 * HUGE_BYTES // 8)
    before = huge_bytes_of_this_process()
    if not on_huge_pages(values.data_ptr(), values.nbytes):
        pytest.skip("this system makes no huge pages of others")
    assert torch.equal(values, torch.arange(len(values)))
    assert huge_bytes_of_this_process() >= before + 2 * HUGE_BYTES


def test_less_than_a_huge_page_is_left_alone() -> None:
    values = torch.zeros(HUGE_BYTES // 8 - 1, dtype=torch.int64)
    assert not on_huge_pages(values.data_ptr(), values.nbytes)
    assert not on_huge_pages(HUGE_BYTES + 1, 2 * HUGE_BYTES - 2), "none of them is whole"


def test_packed_weights_are_on_them() -> None:
    plain = torch.zeros(2 * HUGE_BYTES // 4)
    if not on_huge_pages(plain.data_ptr(), plain.nbytes):
        pytest.skip("this system makes no huge pages of others")
    before = huge_bytes_of_this_process()
    weight = PackedWeight(torch.randn(4096, 2048), torch.float32)
    assert huge_bytes_of_this_process() >= before + weight.shape.numel() * 4 - 2 * HUGE_BYTES
