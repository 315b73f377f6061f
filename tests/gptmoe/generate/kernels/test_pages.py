"""Huge pages behind memory that exists already."""

import re
from pathlib import Path

import pytest
import torch

from gptmoe.generate.kernels.pages import HUGE_BYTES, on_huge_pages
from gptmoe.generate.packed_weight import PackedWeight

# Of one mapping in /proc/self/smaps: where it begins and ends, and its huge pages.
MAPPING = re.compile(r"^(\w+)-(\w+) .*?^AnonHugePages: +(\d+) kB", re.MULTILINE | re.DOTALL)


def huge_bytes_around(address: int, num_bytes: int) -> int:
    """Bytes on huge pages in the mappings that hold this memory.

    Not those of the whole process: the allocator may give some back at any time.
    """
    mappings = MAPPING.findall(Path("/proc/self/smaps").read_text())
    return sum(
        int(huge_kB) * 1024
        for begin, end, huge_kB in mappings
        if int(begin, 16) < address + num_bytes and address < int(end, 16)
    )


def test_what_memory_holds_stays() -> None:
    values = torch.arange(3 * HUGE_BYTES // 8)
    if not on_huge_pages(values.data_ptr(), values.nbytes):
        pytest.skip("this system makes no huge pages of others")
    assert torch.equal(values, torch.arange(len(values)))
    assert huge_bytes_around(values.data_ptr(), values.nbytes) >= 2 * HUGE_BYTES


def test_less_than_a_huge_page_is_left_alone() -> None:
    values = torch.zeros(HUGE_BYTES // 8 - 1, dtype=torch.int64)
    assert not on_huge_pages(values.data_ptr(), values.nbytes)
    assert not on_huge_pages(HUGE_BYTES + 1, 2 * HUGE_BYTES - 2), "none of them is whole"


def test_packed_weights_are_on_them() -> None:
    plain = torch.zeros(2 * HUGE_BYTES // 4)
    if not on_huge_pages(plain.data_ptr(), plain.nbytes):
        pytest.skip("this system makes no huge pages of others")
    weight = PackedWeight(torch.randn(4096, 2048), torch.float32)
    num_bytes = weight.shape.numel() * 4
    place = torch.ops.mkldnn.data_ptr(weight.data)
    assert huge_bytes_around(place, num_bytes) >= num_bytes - 2 * HUGE_BYTES
