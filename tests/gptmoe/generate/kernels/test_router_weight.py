"""The kernel for what routers decide by: exact enough, and alike among any rows."""

import pytest
import torch
from torch import Tensor

from gptmoe.generate.kernels.library import kernels
from gptmoe.generate.kernels.router_weight import RouterWeight, router_weight


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(outputs: int, inputs: int) -> RouterWeight:
    """Skips where there is no compiler."""
    held = router_weight(random(outputs, inputs))
    if held is None:
        pytest.skip("no C compiler (cc) is installed")
    return held


@pytest.mark.parametrize("inputs", [16, 96, 768])
@pytest.mark.parametrize("outputs", [1, 2, 7, 8, 64])
@pytest.mark.parametrize("has_bias", [True, False])
def test_scores_are_products(outputs: int, inputs: int, has_bias: bool) -> None:
    held, x_RD = weight_of(outputs, inputs), random(9, inputs, seed=1)
    bias_E = random(outputs, seed=2) if has_bias else None
    exact_RE = x_RD.double() @ random(outputs, inputs).double().t()
    exact_RE += 0 if bias_E is None else bias_E.double()
    assert torch.allclose(held.product(x_RD, bias_E).double(), exact_RE, rtol=0, atol=5e-5)
    shaped = held.product(x_RD.view(3, 3, inputs), bias_E)
    assert torch.equal(shaped.view(9, outputs), held.product(x_RD, bias_E))


def test_rows_and_threads_change_no_bit() -> None:
    held, x_RD = weight_of(13, 384), random(130, 384, seed=1)
    expected_RE = held.product(x_RD, None)
    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        for rows in (0, 1, 2, 3, 4, 5, 7, 8, 17, 64, 130):
            assert torch.equal(held.product(x_RD[:rows], None), expected_RE[:rows])
            assert torch.equal(held.product(x_RD[130 - rows :], None), expected_RE[130 - rows :])
    torch.set_num_threads(threads)
    spread = x_RD.repeat(1, 2)[:, ::2]
    assert torch.equal(held.product(spread, None), held.product(spread.contiguous(), None))


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
@pytest.mark.parametrize("outputs", [3, 8])
def test_rows_in_bfloat16_are_widened(outputs: int, rows: int) -> None:
    held, half_RD = weight_of(outputs, 96), random(rows, 96, seed=1).bfloat16()
    out_RE = torch.empty(rows, outputs)
    held.compiled.run("scores", held.task(half_RD, out_RE))
    assert torch.equal(out_RE, held.product(half_RD.float(), None))


def test_what_it_cannot_hold_is_left_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert router_weight(random(8, 40)) is None
    monkeypatch.setattr("shutil.which", lambda name: None)
    kernels.cache_clear()
    try:
        assert router_weight(random(8, 64)) is None
    finally:
        kernels.cache_clear()
