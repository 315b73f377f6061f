"""Scores and resumed texts of a real engine, against the model's own logits and texts."""

import asyncio
import math
from collections.abc import Iterator

import pytest
import torch

import gptmoe
from gptmoe.generate.params import SamplingParams
from serve.scoring import ScoreCall
from serve.service import Call, Service
from tests import small_model

from .small_service import served

PROMPT = "春风又绿江南岸，"
CONTINUATIONS = ("明月何时照我还。", "明月", "疑是地上霜", "的")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> gptmoe.LoadedModel:
    folder = tmp_path_factory.mktemp("run")
    return gptmoe.load(small_model.write(folder, num_layers=2, d_model=32))


@pytest.fixture
def service(model: gptmoe.LoadedModel) -> Iterator[Service]:
    with served(model, model.engine()) as service:
        yield service


def test_scores_are_the_models_log_probabilities(
    service: Service, model: gptmoe.LoadedModel
) -> None:
    scores = asyncio.run(service.score(ScoreCall(prompt=PROMPT, continuations=CONTINUATIONS)))
    prompt_ids = model.tokenizer.encode(PROMPT)
    for text, score in zip(CONTINUATIONS, scores, strict=True):
        ids = model.tokenizer.encode(text)
        logits_TV = model.logits([prompt_ids + ids])[0, :, : model.tokenizer.vocab_size]
        logprobs_TV = torch.log_softmax(logits_TV.double(), dim=-1)[len(prompt_ids) - 1 : -1]
        expected = [float(row_V[token]) for row_V, token in zip(logprobs_TV, ids, strict=True)]
        assert score.token_ids == tuple(ids)
        assert score.logprobs == pytest.approx(expected, abs=1e-5)
        assert score.logprob == pytest.approx(math.fsum(expected), abs=1e-4)
        assert score.greedy == (logprobs_TV.argmax(dim=-1).tolist() == ids)


def test_a_broken_text_goes_on_as_if_it_had_not(service: Service) -> None:
    sampling = SamplingParams(seed=7, max_new_tokens=12, repetition_penalty=1.3)
    whole = asyncio.run(service.complete(Call(prompt=PROMPT, sampling=sampling)))
    for said in (1, 5, 11):
        resume_ids = whole.token_ids[:said]
        call = Call(prompt=PROMPT, sampling=sampling, resume_ids=resume_ids)
        rest = asyncio.run(service.complete(call))
        assert resume_ids + rest.token_ids == whole.token_ids
        assert whole.text.endswith(rest.text)
