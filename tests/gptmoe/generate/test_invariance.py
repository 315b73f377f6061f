"""The promise: what a request gets does not depend on its neighbours, on chunking or on the cache.

Equal means equal bits, on the CPU, for a given number of threads.
"""

from collections.abc import Iterator

import pytest
import torch

from gptmoe.generate.engine import Delta
from gptmoe.generate.request import Request, SamplingParams
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.loaded import LoadedModel

from .conftest import Make

LENGTHS = (1, 2, 5, 37, 63, 64, 65, 128, 129, 255, 257)
"""Prompts around the borders of what attention reads at once."""
NEW_TOKENS = 6
CASES = {  # dtype, has experts, packed, threads
    "float32-dense": (torch.float32, False, False, 1),
    "float32-moe": (torch.float32, True, False, 1),
    "float32-moe-2threads": (torch.float32, True, False, 2),
    "float32-moe-packed-2threads": (torch.float32, True, True, 2),
    "bfloat16-dense": (torch.bfloat16, False, False, 1),
    "bfloat16-moe-2threads": (torch.bfloat16, True, False, 2),
    "bfloat16-moe-packed": (torch.bfloat16, True, True, 1),
    "bfloat16-moe-packed-2threads": (torch.bfloat16, True, True, 2),
}
each_case = pytest.mark.parametrize("model", CASES.values(), indirect=True, ids=CASES.keys())


@pytest.fixture
def model(request: pytest.FixtureRequest, make_model: Make) -> Iterator[LoadedModel]:
    dtype, experts, packed, threads = request.param
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield make_model(dtype, experts, packed)
    torch.set_num_threads(before)


def requests(model: LoadedModel) -> list[Request]:
    """Random prompts; every second one is sampled, the others are greedy."""
    generator = torch.Generator().manual_seed(1)
    vocab_size = model.tokenizer.vocab_size
    return [
        Request(
            str(length),
            tuple(torch.randint(vocab_size, (length,), generator=generator).tolist()),
            SamplingParams(
                max_new_tokens=NEW_TOKENS,
                ignore_end=True,
                logprobs=True,
                temperature=float(index % 2),
                top_p=0.9,
                seed=5,
            ),
        )
        for index, length in enumerate(LENGTHS)
    ]


def run(model: LoadedModel, config: EngineConfig, *wanted: Request) -> dict[str, list[Delta]]:
    """All deltas of each request."""
    engine = model.engine(config)
    deltas: dict[str, list[Delta]] = {request.request_id: [] for request in wanted}
    for request in wanted:
        engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    return deltas


@each_case
def test_alone_in_a_batch_and_in_chunks(model: LoadedModel) -> None:
    wanted = requests(model)
    alone = {r.request_id: run(model, EngineConfig(), r)[r.request_id] for r in wanted}
    together = EngineConfig(max_batch_size=16, token_budget=4096)
    assert run(model, together, *wanted) == alone
    few_slots = EngineConfig(max_batch_size=3, max_queue=64, token_budget=37)
    assert run(model, few_slots, *reversed(wanted)) == alone


@each_case
def test_decoding_gives_the_logits_of_one_pass(model: LoadedModel) -> None:
    for request in requests(model)[::2]:
        deltas = run(model, EngineConfig(), request)[request.request_id]
        tokens = [token for delta in deltas for token in delta.token_ids]
        logits_TV = model.logits([[*request.prompt_ids, *tokens]])[0]
        rows = logits_TV[len(request.prompt_ids) - 1 : -1, : model.tokenizer.vocab_size]
        expected = [
            float(row.float().log_softmax(0)[t]) for row, t in zip(rows, tokens, strict=True)
        ]
        assert [value for delta in deltas for value in delta.logprobs] == expected


@pytest.mark.parametrize("has_experts", [False, True])
def test_training_s_forward_pass_agrees(make_model: Make, has_experts: bool) -> None:
    model = make_model(torch.float32, has_experts, False)
    tokens_BT = torch.randint(model.tokenizer.vocab_size, (2, 150))
    with torch.no_grad():
        hidden_BTD = model.network(tokens_BT).hidden_BTD
        expected = model.network.logits(hidden_BTD)
    scale = float(expected.abs().max())
    assert float((model.logits(tokens_BT) - expected).abs().max()) <= 1e-5 * scale
