"""Validation against a plain loop in float64."""

import math

import numpy as np
import pytest
import torch

from gptmoe.data import Batch
from gptmoe.evaluate import Evaluation, evaluate
from gptmoe.model.initialize import initialize
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT

VOCABULARY, LENGTH, SAMPLES = 40, 10, 11
CHARACTERS = [token % 4 for token in range(VOCABULARY)]


class Rows:
    """Samples with padding, and labels without weight, at random."""

    num_samples = SAMPLES

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.tokens = random.integers(VOCABULARY, size=(SAMPLES, LENGTH + 1))
        self.valid = np.arange(LENGTH) < random.integers(1, LENGTH + 1, size=(SAMPLES, 1))
        self.weight = self.valid & (random.random((SAMPLES, LENGTH)) < 0.8)
        self.asked: list[tuple[int, int]] = []

    def batch(self, first: int, count: int) -> Batch:
        self.asked.append((first, count))
        rows = slice(first, first + count)
        tokens = np.where(self.valid[rows], self.tokens[rows, :-1], 0)
        return Batch(tokens, self.tokens[rows, 1:], self.weight[rows], self.valid[rows])


@pytest.fixture
def rows() -> Rows:
    return Rows()


@pytest.fixture(params=[(), (4,)], ids=["dense", "moe"])
def model(request: pytest.FixtureRequest) -> GPT:
    spec = ModelSpec(
        num_layers=2,
        d_model=16,
        num_heads=2,
        d_ff=32,
        vocab_size=VOCABULARY,
        max_seq_len=LENGTH,
        num_experts=request.param,
        dropout=0.5,
        init_std=0.5,
    )
    model = GPT(spec, torch.float64).double()
    initialize(model, seed=0)
    return model


def by_a_loop(model: GPT, rows: Rows, samples: int = SAMPLES) -> Evaluation:
    """One sample at a time, without its padding; one label at a time."""
    loss, tokens, characters = 0.0, 0, 0
    model.eval()
    for row in range(samples):
        length = int(rows.valid[row].sum())
        token_BT = torch.from_numpy(rows.tokens[row : row + 1, :length])
        with torch.no_grad():
            logits_TV = model.logits(model(token_BT).hidden_BTD)[0]
        for position in range(length):
            if rows.weight[row, position]:
                label = int(rows.tokens[row, position + 1])
                total = sum(math.exp(score) for score in logits_TV[position].tolist())
                loss += math.log(total) - float(logits_TV[position, label])
                tokens += 1
                characters += CHARACTERS[label]
    return Evaluation(loss, tokens, characters)


@pytest.mark.parametrize("batch_size", [1, 3, 11, 20])
def test_equals_a_plain_loop(model: GPT, rows: Rows, batch_size: int) -> None:
    """Nothing is dropped, padding does not count, dropout is off, whatever the batch."""
    expected = by_a_loop(model, rows)
    found = evaluate(model.train(), rows, CHARACTERS, batch_size)
    assert (found.tokens, found.characters) == (expected.tokens, expected.characters)
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-12)
    assert model.training


def test_means() -> None:
    evaluation = Evaluation(loss_sum=20.0, tokens=8, characters=5)
    assert evaluation.loss == 2.5
    assert evaluation.perplexity == pytest.approx(math.exp(2.5))
    assert evaluation.bits_per_char == pytest.approx(20 / math.log(2) / 5)
    assert Evaluation(1e9, 1, 1).perplexity == math.exp(700)
    nothing = Evaluation(0.0, 0, 0)
    assert math.isnan(nothing.loss)
    assert math.isnan(nothing.bits_per_char)


@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_shares_add_up_after_as_many_calls(model: GPT, of: int) -> None:
    whole = evaluate(model, Rows(), CHARACTERS, 2)
    shares, calls = [], set()
    for index in range(of):
        rows = Rows()
        shares.append(evaluate(model, rows, CHARACTERS, 2, share=(index, of)))
        calls.add(len(rows.asked))
    assert len(calls) == 1
    assert sum(share.tokens for share in shares) == whole.tokens
    assert sum(share.characters for share in shares) == whole.characters
    assert sum(share.loss_sum for share in shares) == pytest.approx(whole.loss_sum, rel=1e-12)


@pytest.mark.parametrize(("limit", "seen"), [(None, SAMPLES), (5, 5), (100, SAMPLES)])
def test_the_first_samples_and_the_progress(
    model: GPT, rows: Rows, limit: int | None, seen: int
) -> None:
    done: list[int] = []
    found = evaluate(model, rows, CHARACTERS, 4, limit=limit, progress=done.append)
    assert found.loss_sum == pytest.approx(by_a_loop(model, rows, seen).loss_sum, rel=1e-12)
    assert sum(count for _, count in rows.asked) == seen
    assert done[-1] == seen
    assert done == sorted(done)
