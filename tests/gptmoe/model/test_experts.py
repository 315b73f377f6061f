"""gptmoe.model.experts: products over rows sorted by expert, against F.linear for each expert.

Letters: R rows, E experts, I in, O out.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptmoe.model.experts import MIN_ROWS, Experts, grouped_linear, product_rows

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


Inputs = tuple[Tensor, Tensor, Tensor]


def make_inputs(rows: list[int], d_in: int, d_out: int, dtype: torch.dtype) -> Inputs:
    """x [R, I], weight [E, O, I], bias [E, O]."""
    generator = torch.Generator().manual_seed(len(rows) + sum(rows))
    shapes = [(sum(rows), d_in), (len(rows), d_out, d_in), (len(rows), d_out)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    x_RI, weight_EOI, bias_EO = (tensor.to(dtype).requires_grad_() for tensor in tensors)
    return x_RI, weight_EOI, bias_EO


def per_expert_linear(x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor, rows: list[int]) -> Tensor:
    of_each_expert = zip(torch.split(x_RI, rows), weight_EOI, bias_EO, strict=True)
    return torch.cat([F.linear(x, weight, bias) for x, weight, bias in of_each_expert])


def assert_same_as_linear(rows: list[int], d_in: int, d_out: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(rows, d_in, d_out, dtype)
    found, expected = grouped_linear(*inputs, rows), per_expert_linear(*inputs, rows)
    assert found.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    probe = torch.linspace(-1, 1, found.numel(), dtype=dtype).view_as(found)
    for one, other in zip(
        torch.autograd.grad(found, inputs, probe),
        torch.autograd.grad(expected, inputs, probe),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@given(
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 9),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_equals_linear_of_each_expert(
    rows: list[int], d_in: int, d_out: int, dtype: torch.dtype
) -> None:
    assert_same_as_linear(rows, d_in, d_out, dtype)


@pytest.mark.parametrize("rows", [[0, 0, 0], [0], [0, 5, 0], [7, 0, 0]])
def test_experts_without_rows_get_zero_gradients(rows: list[int]) -> None:
    assert_same_as_linear(rows, 4, 3, torch.float64)


def test_a_gradient_that_is_not_contiguous() -> None:
    x_RI, weight_EOI, bias_EO = make_inputs([3, 2], 4, 6, torch.float64)
    rows = [3, 2]
    found, expected = (
        torch.autograd.grad(linear(x_RI, weight_EOI, bias_EO, rows).t().cumsum(0).sum(), x_RI)[0]
        for linear in (grouped_linear, per_expert_linear)
    )
    torch.testing.assert_close(found, expected)


def test_wide_weights_are_cast_to_the_rows_and_their_gradients_back() -> None:
    rows = [4, 4]
    x_RI, weight_EOI, bias_EO = make_inputs(rows, 8, 8, torch.float32)
    y_RO = grouped_linear(x_RI.bfloat16(), weight_EOI, bias_EO, rows)
    gradients = torch.autograd.grad(y_RO.float().sum(), [weight_EOI, bias_EO])
    assert y_RO.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@pytest.mark.parametrize("dtype", list(MIN_ROWS))
def test_a_row_alone_has_the_bits_it_has_among_others(dtype: torch.dtype) -> None:
    experts = Experts(2, 64, 256)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 0.1, generator=generator)
        rows_RD = torch.randn(16, 64, generator=generator).to(dtype)
        together_RD = experts(rows_RD, [10, 6])
        for row in range(16):
            expert = int(row >= 10)
            alone = experts(rows_RD[row : row + 1], [1 - expert, expert])
            assert torch.equal(alone[0], together_RD[row])


def test_products_meet_few_numbers_of_rows_and_little_padding() -> None:
    given = range(4097)
    got = [product_rows(rows, torch.bfloat16) for rows in given]
    assert len(set(got)) < 150
    assert got[:6] == [0, 2, 2, 4, 4, 8]
    assert all(
        0 <= more - rows <= max(15, rows / 16) for rows, more in zip(given, got, strict=True)
    )


@pytest.mark.parametrize("rows", [[1, 0, 3], [17, 40], [100, 5]])
def test_padded_products_have_the_gradients_of_unpadded_ones(rows: list[int]) -> None:
    """In bfloat16 products are padded; their sums stay those of float32 to its precision."""
    exact = make_inputs(rows, 24, 32, torch.float32)
    narrow = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    exact = [tensor.detach().float().requires_grad_() for tensor in narrow]
    for tensors in (exact, narrow):
        grouped_linear(*tensors, rows).float().square().sum().backward()
    for wide, other in zip(exact, narrow, strict=True):
        assert wide.grad is not None
        assert other.grad is not None
        assert (other.grad.float() - wide.grad).norm() <= 2e-2 * wide.grad.norm()


def test_the_two_layers_with_gelu_between() -> None:
    experts = Experts(3, 4, 8).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=generator)
    rows_RD = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    found = experts(rows_RD, [2, 0, 3])
    for row, expert in enumerate([0, 0, 2, 2, 2]):
        up = F.linear(rows_RD[row], experts.up_weight[expert], experts.up_bias[expert])
        hidden = F.gelu(up, approximate="tanh")
        down = F.linear(hidden, experts.down_weight[expert], experts.down_bias[expert])
        torch.testing.assert_close(found[row], down)
