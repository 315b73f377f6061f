"""The kernel for few rows: oneDNN's bits, or it is not used."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from gptmoe.generate.kernels.few_rows import MOST_ROWS
from gptmoe.generate.kernels.library import kernels
from gptmoe.generate.kernels.tasks import Product
from gptmoe.generate.packed_weight import PackedWeight
from tests.gptmoe.generate.kernels.callers import check_callers_and_threads

SHAPES = [  # outputs, inputs: sums in one, two and three chunks, blocks that are not full
    (768, 768),
    (2304, 768),
    (3072, 768),
    (768, 3072),
    (1024, 2048),
    (5001, 128),
    (96, 32),
]


def weight_of(outputs: int, inputs: int) -> PackedWeight:
    """A packed weight; skips where the CPU has no such instruction."""
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU does not multiply pairs of bfloat16 numbers")
    numbers = torch.Generator().manual_seed(outputs)
    return PackedWeight(torch.randn(outputs, inputs, generator=numbers), torch.bfloat16)


def rows_of(count: int, inputs: int) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(count)
    return torch.randn(count, inputs, generator=numbers).bfloat16()


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_bits_are_those_of_many_rows(outputs: int, inputs: int, has_bias: bool) -> None:
    weight = weight_of(outputs, inputs)
    assert weight.few_rows is not None
    x_RI = rows_of(16, inputs)  # too many for the kernel
    # Results near 0 show the last bits of the sums.
    bias_O = -weight.product(x_RI, None)[0] if has_bias else None
    expected_RO = weight.product(x_RI, bias_O)
    for rows in range(1, MOST_ROWS + 1):
        for first in range(0, 16 - rows, rows):
            found_RO = weight.few_rows.product(x_RI[first : first + rows], bias_O)
            assert torch.equal(found_RO, expected_RO[first : first + rows])


def test_one_row_of_any_shape_is_answered_in_that_shape() -> None:
    weight = weight_of(768, 768)
    x_RI = rows_of(3, 768)
    expected_RO = weight._of_many(x_RI, None)
    assert torch.equal(weight.product(x_RI[1], None), expected_RO[1])
    assert torch.equal(weight.product(x_RI[None, None, 2:], None), expected_RO[None, None, 2:])
    assert torch.equal(
        weight.product(rows_of(6, 768)[::6], None), weight.product(rows_of(6, 768), None)[:1]
    )


def test_threads_and_several_callers_give_the_same_bits() -> None:
    weight, x_RI = weight_of(3072, 768), rows_of(1, 768)
    expected_RO = weight._of_many(x_RI.expand(2, -1), None)[:1]
    check_callers_and_threads(partial(weight.product, bias=None), x_RI, expected_RO)


def test_a_chunk_with_other_bits_is_found_out() -> None:
    weight = weight_of(768, 3072)
    assert weight.few_rows is not None
    assert weight.few_rows.task.chunk == 1024 // 2
    task = Product.from_buffer_copy(weight.few_rows.task)
    task.chunk = 512 // 2
    other = replace(weight.few_rows, task=task)
    x_RI = rows_of(2, 3072)
    bias_O = -weight._of_many(x_RI, None)[0]
    assert not torch.equal(other.product(x_RI, bias_O), weight._of_many(x_RI, bias_O))


def test_float32_and_odd_widths_are_left_to_onednn() -> None:
    weight_of(64, 64)
    assert PackedWeight(torch.randn(64, 64), torch.float32).few_rows is None
    assert PackedWeight(torch.randn(64, 33), torch.bfloat16).few_rows is None


def test_without_a_compiler_onednn_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernel = weight_of(768, 768)
    row_RI = rows_of(1, 768)
    monkeypatch.setattr("shutil.which", lambda name: None)
    kernels.cache_clear()
    try:
        plain = weight_of(768, 768)
        assert plain.few_rows is None
        assert torch.equal(plain.product(row_RI, None), with_kernel.product(row_RI, None))
    finally:
        kernels.cache_clear()
