"""Beam search against that of transformers, on a small GPT-2 with random weights."""

import pytest
import torch
import transformers
from torch import Tensor

from gptmoe.generate.params import SamplingParams
from tests.gptmoe.generate.beam_reference import Ids, Search, run

ENDS = frozenset({5, 11, 23})
PENALTIES = [-2.0, -0.3, 0.0, 0.7, 1.0, 3.0]


@pytest.fixture(scope="module")
def gpt2() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(2)
    config = transformers.GPT2Config(
        vocab_size=40,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("length_penalty", PENALTIES)
@pytest.mark.parametrize("beams", [2, 5])
def test_as_transformers(
    gpt2: transformers.GPT2LMHeadModel, beams: int, length_penalty: float
) -> None:
    prompt_ids = (7, 1, 30)
    theirs = gpt2.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, 3, dtype=torch.int64),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=12,
        length_penalty=length_penalty,
        early_stopping="never",
        do_sample=False,
        eos_token_id=sorted(ENDS),
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )

    def model(token_ids: Ids) -> list[float]:
        with torch.inference_mode():
            scores: Tensor = gpt2(torch.tensor([prompt_ids + token_ids])).logits[0, -1]
        return scores.tolist()  # type: ignore[no-any-return]

    asked = SamplingParams(temperature=0, num_beams=beams, length_penalty=length_penalty)
    found = run(Search(model, asked, ENDS, 12, prompt_ids)).best(beams)
    wanted = [to_the_end(row[3:]) for row in theirs.sequences.tolist()]
    assert [it.token_ids for it in found] == wanted
    assert [it.score for it in found] == pytest.approx(theirs.sequences_scores.tolist(), rel=1e-5)
    if length_penalty < 1:
        assert any(ids[-1] in ENDS for ids in wanted)


def to_the_end(token_ids: list[int]) -> Ids:
    """Without the padding behind an end token."""
    lengths = [at + 1 for at, token in enumerate(token_ids) if token in ENDS]
    return tuple(token_ids[: min(lengths, default=len(token_ids))])
