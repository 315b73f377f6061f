"""Log-probabilities of answers and prompts, against Python's floats."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.errors import CheckpointError
from gptmoe.generate.delta import TokenScore
from gptmoe.generate.sampling import likeliest, log_probabilities, token_scores
from tests.gptmoe.generate.reference import softmax

SCORES = [2.0, -1.0, 0.5, 3.0, 1.0, -4.0, 2.5, 0.0]


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=9), st.integers(0, 8), st.integers(0, 12))
def test_log_probabilities_as_the_reference(scores: list[float], token: int, top: int) -> None:
    token %= len(scores)
    expected = [math.log(p) for p in softmax(scores)]
    logprob, best = log_probabilities(torch.tensor(scores, dtype=torch.float64), token, top)
    assert logprob == pytest.approx(expected[token], abs=1e-12)
    assert len(best) == min(top, len(scores))
    ranked = sorted(expected, reverse=True)[:top]
    assert [value for _, value in best] == pytest.approx(ranked, abs=1e-12)
    for token_id, value in best:
        assert value == pytest.approx(expected[token_id], abs=1e-12)
    assert len({token_id for token_id, _ in best}) == len(best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_of_narrow_scores_are_float32s(dtype: torch.dtype) -> None:
    scores = [score / 2 for score in SCORES]
    logprob, best = log_probabilities(torch.tensor(scores, dtype=dtype), 4, 2)
    expected = [math.log(p) for p in softmax(scores)]
    assert logprob == pytest.approx(expected[4], abs=1e-6)
    assert [token for token, _ in best] == [3, 6]
    assert [value for _, value in best] == pytest.approx([expected[3], expected[6]], abs=1e-6)


def test_of_equals_the_lower_tokens_are_the_likeliest() -> None:
    scores_V = torch.zeros(5000)
    scores_V[[4000, 7]] = 1.0
    assert likeliest(scores_V, 4) == ((7, 1.0), (4000, 1.0), (0, 0.0), (1, 0.0))
    assert likeliest(scores_V, 0) == ()


def test_scores_of_a_prompt_have_the_bits_of_single_places() -> None:
    """Whatever pieces a prompt is computed in, and as in generation: 51,200 tokens, 130 places."""
    generator = torch.Generator().manual_seed(1)
    logits_TV = torch.randn(130, 51_200, generator=generator).to(torch.bfloat16)
    token_ids = torch.randint(0, 51_200, (130,), generator=generator).tolist()
    token_ids[5] = int(logits_TV[5].float().argmax())
    whole = token_scores(logits_TV, token_ids)
    pieces = token_scores(logits_TV[:37], token_ids[:37]) + token_scores(
        logits_TV[37:], token_ids[37:]
    )
    assert whole == pieces
    assert [score.logprob for score in whole] == [
        log_probabilities(logits_V, token, 0)[0]
        for logits_V, token in zip(logits_TV, token_ids, strict=True)
    ]
    assert [place for place, score in enumerate(whole) if score.greedy] == [5]


def test_the_likeliest_at_a_prompts_places_are_those_of_generation() -> None:
    """To the bit: who asks whether a token is the likeliest compares the numbers."""
    logits_TV = torch.randn(70, 1000, generator=torch.Generator().manual_seed(2))
    token_ids = [int(logits_V.argmax()) for logits_V in logits_TV]
    scores = token_scores(logits_TV, token_ids, 3)
    assert [(score.logprob, score.likeliest) for score in scores] == [
        log_probabilities(logits_V, token, 3)
        for logits_V, token in zip(logits_TV, token_ids, strict=True)
    ]
    assert all(score.likeliest[0][1] == score.logprob for score in scores)
    assert {score.likeliest for score in token_scores(logits_TV, token_ids)} == {()}


def test_scores_of_a_prompt_as_the_reference() -> None:
    logits_TV = torch.tensor([SCORES, SCORES[::-1], [0.0] * 8], dtype=torch.float64)
    scores = token_scores(logits_TV, [3, 3, 7])
    expected = [
        math.log(softmax(SCORES)[3]),
        math.log(softmax(SCORES[::-1])[3]),
        math.log(1 / 8),
    ]
    assert [score.logprob for score in scores] == pytest.approx(expected, abs=1e-14)
    assert [score.greedy for score in scores] == [True, False, True]
    assert token_scores(logits_TV[:0], []) == ()
    assert isinstance(scores[0], TokenScore)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_prompts_with_such_scores_are_refused(bad: float) -> None:
    logits_TV = torch.zeros(70, 3)
    logits_TV[68] = bad
    with pytest.raises(CheckpointError, match=f"found {bad}"):
        token_scores(logits_TV, [0] * 70)
