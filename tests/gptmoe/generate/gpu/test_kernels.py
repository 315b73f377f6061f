"""Each kernel against torch in float64, over shapes that fill no tile."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptmoe.generate.gpu.attention import PART, attend_chunk, attend_rows, store
from gptmoe.generate.gpu.products import OneNorm, TiledWeight, few_rows
from gptmoe.generate.slots import BLOCK
from gptmoe.model.experts import Experts
from gptmoe.model.layers import LayerNorm

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: Triton compiles (tests/gpu)"
)
HEADS = 2


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 16, 21])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 64), (130, 33), (7, 12)])
def test_products(rows: int, inputs: int, outputs: int) -> None:
    x, w, b = random(2, rows, inputs), random(outputs, inputs, seed=1), random(outputs, seed=2)
    weight = TiledWeight(w, requires_grad=False)
    expected = F.linear(x.double(), w.double(), b.double())
    close(weight.product(x, b), expected)
    close(weight.product(x, None), expected - b.double())
    close(weight.activated(x, b), F.gelu(expected, approximate="tanh"))


@pytest.fixture(scope="module")
def experts() -> Experts:
    made = Experts(8, 48, 64).requires_grad_(False)
    for seed, parameter in enumerate(made.parameters()):
        parameter.copy_(random(*parameter.shape, seed=seed))
    return made


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("tokens", [1, 5, 21])
def test_experts(experts: Experts, tokens: int, choices: int) -> None:
    """Some have no rows, one may have more than a tile."""
    expert_R = torch.randint(
        3, (choices * tokens,), generator=torch.Generator().manual_seed(tokens)
    )
    expert_R[expert_R == 1] = 7
    h_TD = random(tokens, 48)
    answer_RD = few_rows(experts, h_TD, expert_R)
    wide = [parameter.double() for parameter in experts.parameters()]
    for row, expert in list(enumerate(expert_R.tolist()))[::5]:
        up, up_bias, down, down_bias = (parameter[expert] for parameter in wide)
        hidden = F.gelu(F.linear(h_TD[row % tokens].double(), up, up_bias), approximate="tanh")
        torch.testing.assert_close(
            answer_RD[row].double(), F.linear(hidden, down, down_bias), rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("width", [64, 24, 1])
def test_norms(width: int) -> None:
    norm = LayerNorm(width)
    for seed, parameter in enumerate(norm.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    x = 3 + random(2, 2, width, seed=9)
    expected = F.layer_norm(
        x.double(), (width,), norm.weight.double(), norm.bias.double(), eps=1e-5
    )
    norm.requires_grad_(False).__class__ = OneNorm
    close(norm(x), expected)


def pages_of(lengths: list[int], most: int) -> Tensor:
    """Tables of sequences of these lengths, [S, X]: pages in no order, from 1 on."""
    counts = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)) + 1
    table_SX = torch.zeros(len(lengths), most, dtype=torch.int32)
    for row, pages in enumerate(order.split(counts)):
        table_SX[row, : len(pages)] = pages
    return table_SX


def filled(k: list[Tensor], v: list[Tensor], table_SX: Tensor) -> tuple[Tensor, Tensor]:
    """Pages [P, H, BLOCK, K] with these keys and values [C, H, K] of each sequence; NaN else."""
    shape = (int(table_SX.max()) + 1, HEADS, BLOCK, k[0].shape[-1])
    keys, values = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    slot_R = torch.cat([torch.full((len(x),), slot) for slot, x in enumerate(k)])
    position_R = torch.cat([torch.arange(len(x)) for x in k])
    # As a model has them: keys and values beside each other.
    k_RHK, v_RHK = torch.stack((torch.cat(k), torch.cat(v)), 1).unbind(1)
    store(keys, values, k_RHK, v_RHK, slot_R, position_R, table_SX)
    return keys, values


@pytest.mark.parametrize("width", [32, 20])
def test_attention(width: int) -> None:
    """Of the last token of each sequence, and of a chunk, whatever lies in the other pages."""
    lengths = [1, 17, PART, PART + 1]
    k, v = ([random(n, HEADS, width, seed=n + at) for n in lengths] for at in (1, 2))
    table_SX = pages_of(lengths, 33)  # three parts, of which none reaches the last
    keys, values = filled(k, v, table_SX)
    q_RHK = random(len(lengths), 3, HEADS, width, seed=5)[:, 0]
    slot_R, position_R = torch.arange(len(lengths)), torch.tensor(lengths) - 1
    out_RHK = torch.empty(len(lengths), HEADS, width)
    attend_rows(out_RHK, q_RHK, keys, values, slot_R, position_R, table_SX)
    for row, (k_CHK, v_CHK) in enumerate(zip(k, v, strict=True)):
        score_HC = torch.einsum("hk,chk->hc", q_RHK[row].double(), k_CHK.double()) * width**-0.5
        close(out_RHK[row], torch.einsum("hc,chk->hk", score_HC.softmax(-1), v_CHK.double()))
        alone = torch.empty(1, HEADS, width)
        one = slice(row, row + 1)
        attend_rows(alone, q_RHK[one], keys, values, slot_R[one], position_R[one], table_SX)
        assert torch.equal(alone[0], out_RHK[row])


def test_a_chunk_is_its_rows() -> None:
    length, chunk, width = 50, 6, 32
    k, v = ([random(length, HEADS, width, seed=at)] for at in (1, 2))
    table_SX = pages_of([length], 4)
    keys, values = filled(k, v, table_SX)
    q_NHK = random(chunk, HEADS, width, seed=3)
    position_N = torch.arange(length - chunk, length)
    rows_NHK = torch.empty(chunk, HEADS, width)
    attend_rows(rows_NHK, q_NHK, keys, values, torch.zeros_like(position_N), position_N, table_SX)
    chunk_NHK = attend_chunk(q_NHK, keys, values, table_SX[0].long(), length)
    torch.testing.assert_close(chunk_NHK, rows_NHK, rtol=1e-5, atol=1e-5)
