"""What each expert answered, over versions of the weights that come and go."""

import torch

from gptmoe.model.initialize import initialize
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT
from serve.rows import AnsweredRows

SPEC = ModelSpec(
    num_layers=2, d_model=16, num_heads=2, d_ff=32, vocab_size=64, max_seq_len=32, num_experts=(4,)
)


def network() -> GPT:
    made = GPT(SPEC)
    initialize(made, seed=1)
    return made.requires_grad_(False).eval()


def test_rows_of_weights_that_are_gone_still_count() -> None:
    rows, networks = AnsweredRows(SPEC), [network() for _ in range(3)]
    for version, made in enumerate(networks):
        rows.count(version, made)
        made(torch.arange(10)[None])
    assert sum(rows.read({0, 1, 2})[1]) == 30
    networks[1](torch.arange(5)[None])
    assert sum(rows.read({2})[1]) == 35, "read once more"
    networks[1](torch.arange(5)[None])
    assert sum(rows.read({2})[1]) == 35, "and then no more"
    networks[2](torch.arange(5)[None])
    assert sum(rows.read({2})[1]) == 40
