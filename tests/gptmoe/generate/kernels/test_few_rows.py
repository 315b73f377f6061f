"""The kernel for few rows: oneDNN's bits, or it is not used."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from gptmoe.generate.kernels.few_rows import KERNELS, MOST_ROWS
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


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """One that has a kernel on this CPU."""
    found: torch.dtype = request.param
    if found == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU does not multiply pairs of bfloat16 numbers")
    if PackedWeight(torch.randn(64, 64), found).few_rows is None:
        assert torch.cpu._is_avx512_supported(), "seen to be as the kernel has it without AVX512"
        pytest.skip(
            "oneDNN packs or adds up in another way on this CPU, and computes few rows, too"
        )
    return found


def weight_of(outputs: int, inputs: int, dtype: torch.dtype) -> PackedWeight:
    numbers = torch.Generator().manual_seed(outputs)
    return PackedWeight(torch.randn(outputs, inputs, generator=numbers), dtype)


def rows_of(count: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(count)
    return torch.randn(count, inputs, generator=numbers).to(dtype)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_bits_are_those_of_many_rows(
    outputs: int, inputs: int, has_bias: bool, dtype: torch.dtype
) -> None:
    weight = weight_of(outputs, inputs, dtype)
    assert weight.few_rows is not None
    x_RI = rows_of(16, inputs, dtype)  # too many for the kernel
    # Results near 0 show the last bits of the sums.
    bias_O = -weight.product(x_RI, None)[0] if has_bias else None
    expected_RO = weight.product(x_RI, bias_O)
    for rows in range(1, MOST_ROWS[dtype] + 1):
        for first in range(0, 16 - rows, rows):
            found_RO = weight.few_rows.product(x_RI[first : first + rows], bias_O)
            assert torch.equal(found_RO, expected_RO[first : first + rows])


def test_one_row_of_any_shape_is_answered_in_that_shape(dtype: torch.dtype) -> None:
    weight = weight_of(768, 768, dtype)
    x_RI = rows_of(4, 768, dtype)
    expected_RO = weight._of_many(x_RI, None)
    assert torch.equal(weight.product(x_RI[1], None), expected_RO[1])
    assert torch.equal(weight.product(x_RI[None, None, 3:], None), expected_RO[None, None, 3:])
    six_RI = rows_of(6, 768, dtype)
    assert torch.equal(weight.product(six_RI[::6], None), weight.product(six_RI, None)[:1])


def test_threads_and_several_callers_give_the_same_bits(dtype: torch.dtype) -> None:
    weight, x_RI = weight_of(3072, 768, dtype), rows_of(1, 768, dtype)
    expected_RO = weight._of_many(x_RI.expand(4, -1), None)[:1]
    check_callers_and_threads(partial(weight.product, bias=None), x_RI, expected_RO)


def test_a_chunk_with_other_bits_is_found_out(dtype: torch.dtype) -> None:
    weight = weight_of(768, 3072, dtype)
    assert weight.few_rows is not None
    task = Product.from_buffer_copy(weight.few_rows.task)
    assert task.chunk == 1024 // KERNELS[dtype][1]
    task.chunk //= 2
    other = replace(weight.few_rows, task=task)
    x_RI = rows_of(4, 3072, dtype)
    bias_O = -weight._of_many(x_RI, None)[0]
    assert not torch.equal(other.product(x_RI, bias_O), weight._of_many(x_RI, bias_O))


def test_odd_widths_are_left_to_onednn(dtype: torch.dtype) -> None:
    weight = weight_of(64, 33, dtype)
    assert weight.few_rows is None
    x_RI = rows_of(4, 33, dtype)
    assert torch.equal(weight.product(x_RI[:1], None), weight._of_many(x_RI, None)[:1])


def test_without_a_compiler_onednn_computes_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_kernel = weight_of(768, 768, dtype)
    row_RI = rows_of(1, 768, dtype)
    monkeypatch.setattr("shutil.which", lambda name: None)
    kernels.cache_clear()
    try:
        plain = weight_of(768, 768, dtype)
        assert plain.few_rows is None
        assert torch.equal(plain.product(row_RI, None), with_kernel.product(row_RI, None))
    finally:
        kernels.cache_clear()
