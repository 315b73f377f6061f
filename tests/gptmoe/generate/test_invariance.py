"""The promise: what a request gets does not depend on its neighbours, on chunking or on the cache.

Equal means equal bits, on the CPU, for a given number of threads (packed: for any number).
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptmoe.generate.delta import Delta
from gptmoe.generate.executor import LocalExecutor
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request
from gptmoe.generate.scheduler import EngineConfig, Span
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
    """All deltas of each request, without their times."""
    engine = model.engine(config)
    deltas: dict[str, list[Delta]] = {request.request_id: [] for request in wanted}
    for request in wanted:
        engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            deltas[delta.request_id].append(replace(delta, timings=None))
    return deltas


def make_tokens(model: LoadedModel, rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(model.tokenizer.vocab_size, (rows, length), generator=generator)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=8)
@given(data=st.data())
def test_any_steps_give_the_same_hidden_states(
    make_model: Make, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Random lengths and slots, random spans in each step, some of one token as decoding."""
    model = make_model(dtype, True, True)
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=4))
    slots = data.draw(st.permutations(range(5)))
    tokens = {str(n): make_tokens(model, n + 1, length)[n] for n, length in enumerate(lengths)}
    ids = {name: row.tolist() for name, row in tokens.items()}
    expected = {}
    for name, row in ids.items():
        alone = LocalExecutor(model.network, slots=1)
        expected[name] = alone.hidden([Span(name, 0, 0, len(row), samples=True)], 0, ids)
    executor = LocalExecutor(model.network, slots=5)
    done = dict.fromkeys(ids, 0)
    while left := [name for name in ids if done[name] < len(ids[name])]:
        spans = []
        for name in data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True)):
            most = len(ids[name]) - done[name]
            count = data.draw(st.sampled_from((1, 2, 3, 5, 64, 127, 300)))
            spans.append(Span(name, slots[int(name)], done[name], min(count, most), samples=True))
        spans.sort(key=lambda span: (span.count > 1, span.slot))
        decoding = sum(span.count == 1 for span in spans)
        parts = executor.hidden(spans, decoding, ids).split([span.count for span in spans])
        for span, part in zip(spans, parts, strict=True):
            done[span.request_id] += span.count
            wanted = expected[span.request_id][span.start : done[span.request_id]]
            assert torch.equal(part, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights_give_the_same_bits_on_any_number_of_threads(
    make_model: Make, dtype: torch.dtype
) -> None:
    model = make_model(dtype, True, True)
    tokens_BT = make_tokens(model, 3, 100)
    before = torch.get_num_threads()
    logits = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        logits.append(model.logits(tokens_BT))
    torch.set_num_threads(before)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("has_experts", [False, True])
def test_training_s_forward_pass_agrees(make_model: Make, has_experts: bool) -> None:
    model = make_model(torch.float32, has_experts, False)
    tokens_BT = make_tokens(model, 2, 150)
    with torch.no_grad():
        hidden_BTD = model.network(tokens_BT).hidden_BTD
        expected = model.network.logits(hidden_BTD)
    scale = float(expected.abs().max())
    assert float((model.logits(tokens_BT) - expected).abs().max()) <= 1e-5 * scale
