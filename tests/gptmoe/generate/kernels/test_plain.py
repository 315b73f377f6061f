"""Weights as they lie in a checkpoint: rounded once, and bits that depend on the row alone."""

from functools import partial

import pytest
import torch

from gptmoe.generate.kernels.library import kernels
from gptmoe.generate.kernels.plain import PlainWeight, plain_weight
from gptmoe.generate.packed_weight import can_pack
from tests.gptmoe.generate.kernels.callers import check_callers_and_threads

SHAPES = [  # outputs, inputs: blocks that are not full, widths that are filled up
    (768, 768),
    (3072, 768),
    (768, 3072),
    (5001, 128),
    (96, 32),
    (10, 7),
]
ROWS = (1, 2, 3, 4, 5, 8, 33, 100)


def numbers_of(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(*shape, generator=generator).bfloat16()


def weight_of(plain_OI: torch.Tensor) -> PlainWeight:
    weight = plain_weight(plain_OI)
    if weight is None:
        pytest.skip("this machine has no C compiler")
    return weight


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_are_rounded_once(outputs: int, inputs: int, has_bias: bool) -> None:
    plain_OI, x_RI = numbers_of(outputs, inputs), numbers_of(13, inputs)
    bias_O = numbers_of(outputs) if has_bias else None
    expected_RO = x_RI.double() @ plain_OI.double().t()
    if bias_O is not None:
        expected_RO += bias_O.double()
    found_RO = weight_of(plain_OI).product(x_RI, bias_O)
    assert found_RO.dtype == torch.bfloat16
    # Half a unit in the last of 8 bits, and what float32 sums of `inputs` numbers may be off.
    off_RO = (found_RO.double() - expected_RO).abs()
    assert bool((off_RO <= expected_RO.abs() * 2**-8 + inputs * 2**-20).all())


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_other_rows_change_no_bit(outputs: int, inputs: int) -> None:
    plain_OI, x_RI = numbers_of(outputs, inputs), numbers_of(100, inputs)
    weight = weight_of(plain_OI)
    # Results near 0 show the last bits of the sums.
    bias_O = -weight.product(x_RI[:1], None)[0]
    expected_RO = torch.cat([weight.product(x_RI[row : row + 1], bias_O) for row in range(100)])
    for rows in ROWS:
        for first in range(0, 101 - rows, rows):
            found_RO = weight.product(x_RI[first : first + rows], bias_O)
            assert torch.equal(found_RO, expected_RO[first : first + rows])


def test_rows_of_any_shape_are_answered_in_that_shape() -> None:
    weight, x_RI = weight_of(numbers_of(64, 32)), numbers_of(6, 32)
    expected_RO = weight.product(x_RI, None)
    assert torch.equal(weight.product(x_RI[1], None), expected_RO[1])
    assert torch.equal(weight.product(x_RI.view(2, 3, 32), None), expected_RO.view(2, 3, 64))
    assert torch.equal(weight.product(x_RI[::2], None), expected_RO[::2])
    assert weight.product(x_RI[:0], None).shape == (0, 64)


def test_threads_and_several_callers_give_the_same_bits() -> None:
    weight, x_RI = weight_of(numbers_of(3072, 768)), numbers_of(5, 768)
    product = partial(weight.product, bias=None)
    check_callers_and_threads(product, x_RI, product(x_RI))


def test_without_a_compiler_and_onednn_bfloat16_is_not_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: False)
    cpu = torch.device("cpu")
    assert can_pack(torch.bfloat16, cpu) == (kernels() is not None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    kernels.cache_clear()
    try:
        assert not can_pack(torch.bfloat16, cpu)
        assert can_pack(torch.float32, cpu)
    finally:
        kernels.cache_clear()
