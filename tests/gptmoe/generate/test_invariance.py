"""The promise: what a request gets does not depend on its neighbours, on chunking or on the cache.

Equal means equal bits, on the CPU, for a given number of threads (packed: for any number).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptmoe.generate import executor
from gptmoe.generate.beams import Beams
from gptmoe.generate.delta import Delta
from gptmoe.generate.engine import Engine
from gptmoe.generate.executor import LocalExecutor
from gptmoe.generate.output import TextStream, end_ids
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.plan import Span
from gptmoe.generate.request import Request
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.loaded import LoadedModel
from gptmoe.model.routers import ROUTERS

from .conftest import Make

GROWING = SamplingParams(max_new_tokens=40, ignore_end=True, logprobs=True, seed=4)
LENGTHS = (1, 2, 5, 37, 63, 64, 65, 128, 129, 255, 257)
"""Prompts around the borders of what attention reads at once."""
NEW_TOKENS = 6
CASES: dict[str, tuple[Any, ...]] = {  # dtype, has experts, packed, threads, router, residual MoE
    "float32-dense": (torch.float32, False, False, 1),
    "float32-moe": (torch.float32, True, False, 1),
    "float32-moe-2threads": (torch.float32, True, False, 2),
    "float32-moe-packed-2threads": (torch.float32, True, True, 2),
    "bfloat16-dense": (torch.bfloat16, False, False, 1),
    "bfloat16-moe-2threads": (torch.bfloat16, True, False, 2),
    "bfloat16-moe-packed": (torch.bfloat16, True, True, 1),
    "bfloat16-moe-packed-2threads": (torch.bfloat16, True, True, 2),
}
OTHERS = [kind for kind in ROUTERS if kind != "switch"]
CASES |= {f"float32-{kind}": (torch.float32, True, False, 1, kind) for kind in OTHERS}
CASES |= {
    f"float32-{kind}-packed-3threads": (torch.float32, True, True, 3, kind) for kind in OTHERS
}
CASES["float32-dense-packed-3threads"] = (torch.float32, False, True, 3)
CASES |= {f"bfloat16-{kind}-packed": (torch.bfloat16, True, True, 2, kind) for kind in OTHERS}
CASES["bfloat16-residual-moe-packed"] = (torch.bfloat16, True, True, 2, "switch", True)
TORCH_ATTENDS = (CASES["bfloat16-dense"], CASES["bfloat16-moe-packed"])
"""Cases that attend as they would without compiled kernels."""
each_case = pytest.mark.parametrize("model", CASES.values(), indirect=True, ids=CASES.keys())


@pytest.fixture
def model(
    request: pytest.FixtureRequest, make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LoadedModel]:
    dtype, experts, packed, threads, *rest = request.param
    if request.param in TORCH_ATTENDS:
        monkeypatch.setattr(executor, "row_kernels", lambda cache: None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield make_model(dtype, experts, packed, *rest)
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
    """What each request was told, but for times and what the cache saved."""
    return run_in(model.engine(config), *wanted)


def run_in(engine: Engine, *wanted: Request) -> dict[str, list[Delta]]:
    deltas: dict[str, list[Delta]] = {request.request_id: [] for request in wanted}
    for request in wanted:
        engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            deltas[delta.request_id].append(replace(delta, timings=None, cached_tokens=0))
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
def test_with_any_state_of_the_cache(model: LoadedModel) -> None:
    """Begun from what others left, put off and computed again, with scores of the prompt."""
    wanted = requests(model)
    longest = max(wanted, key=lambda request: len(request.prompt_ids))
    heirs = [
        Request(f"heir {count}", longest.prompt_ids[:count], longest.sampling)
        for count in (len(longest.prompt_ids), 17, 64, 100)
    ]
    growing = [
        Request(f"grows {first}", longest.prompt_ids[first : first + 47], GROWING)
        for first in range(6)
    ]
    small = EngineConfig(
        max_batch_size=6, max_queue=64, token_budget=37, kv_tokens=model.spec.max_seq_len
    )
    engine = model.engine(small)
    for some in (wanted, heirs, growing):
        alone = {r.request_id: run(model, EngineConfig(), r)[r.request_id] for r in some}
        assert run_in(engine, *some) == alone
    assert engine.stats.preemptions > 0
    assert engine.stats.prefix_hits > 0
    assert engine.stats.kv_used_blocks == 0


@each_case
def test_scores_of_a_prompt_are_those_of_one_pass(model: LoadedModel) -> None:
    longest = max(requests(model), key=lambda request: len(request.prompt_ids))
    engine = model.engine(EngineConfig(token_budget=50, max_batch_size=2))
    ids, vocab = longest.prompt_ids, model.tokenizer.vocab_size
    logits_TV = model.logits([ids])[0, :, :vocab].float().log_softmax(-1)
    for score_from in (1, 40, len(ids) - 1):
        asked = Request("a", ids, SamplingParams(), score_from=score_from, score_only=True)
        (delta,) = run_in(engine, asked)["a"]
        assert delta.finish_reason == "length"
        rows = logits_TV[score_from - 1 : -1]
        expected = [float(row[token]) for row, token in zip(rows, ids[score_from:], strict=True)]
        assert [score.logprob for score in delta.prompt_scores] == expected
        given = zip(rows, ids[score_from:], strict=True)
        greedy = [int(row.argmax()) == token for row, token in given]
        assert [score.greedy for score in delta.prompt_scores] == greedy


@each_case
def test_several_answers_share_the_prompt_and_the_first_is_the_only_one(model: LoadedModel) -> None:
    ids = requests(model)[-1].prompt_ids
    sampling = SamplingParams(max_new_tokens=6, seed=3, n=3, logprobs=True, ignore_end=True)
    several = run(model, EngineConfig(token_budget=40), Request("a", ids, sampling))["a"]
    one = run(model, EngineConfig(), Request("a", ids, replace(sampling, n=1)))["a"]
    assert [delta for delta in several if delta.index == 0] == one
    tokens = {
        index: [delta.token_ids[0] for delta in several if delta.index == index]
        for index in range(3)
    }
    assert {len(ids) for ids in tokens.values()} == {6}
    assert len({tuple(ids) for ids in tokens.values()}) == 3
    for index, said in tokens.items():
        logits_TV = model.logits([[*ids, *said]])[0, len(ids) - 1 : -1]
        rows = logits_TV[:, : model.tokenizer.vocab_size].float().log_softmax(-1)
        expected = [float(row[token]) for row, token in zip(rows, said, strict=True)]
        assert [d.logprobs[0] for d in several if d.index == index] == expected


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
        expected[name] = alone.hidden([Span(name, 0, 0, len(row), outputs=1)], 0, ids)
    executor = LocalExecutor(model.network, slots=5)
    done = dict.fromkeys(ids, 0)
    while left := [name for name in ids if done[name] < len(ids[name])]:
        spans = []
        for name in data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True)):
            most = len(ids[name]) - done[name]
            count = data.draw(st.sampled_from((1, 2, 3, 5, 64, 127, 300)))
            spans.append(Span(name, slots[int(name)], done[name], min(count, most), outputs=1))
        spans.sort(key=lambda span: (span.count > 1, span.slot))
        decoding = sum(span.count == 1 for span in spans)
        parts = executor.hidden(spans, decoding, ids).split([span.count for span in spans])
        for span, part in zip(spans, parts, strict=True):
            done[span.key] += span.count
            wanted = expected[span.key][span.start : done[span.key]]
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


@each_case
def test_a_beam_search_in_the_engine_is_the_one_over_whole_passes(model: LoadedModel) -> None:
    """Whatever was copied, put off or cut into chunks on the way."""
    ids = requests(model)[-1].prompt_ids
    sampling = SamplingParams(
        temperature=0,
        max_new_tokens=6,
        n=3,
        num_beams=4,
        num_beam_groups=2,
        diversity_penalty=0.7,
        logprobs=True,
    )
    vocab = model.tokenizer.vocab_size
    search = Beams(
        sampling,
        ids,
        end_ids=end_ids(model.tokenizer, sampling),
        stream=TextStream(model.tokenizer, ()),
        max_new_tokens=6,
    )
    done = False
    while not done:
        rows = [model.logits([[*ids, *said]])[0, -1, :vocab] for said in search.living]
        done = search.advance(torch.stack(rows)).done
    expected = [(h.token_ids, h.text, h.logprobs, h.finish_reason) for h in search.best(3)]
    tight = EngineConfig(
        max_batch_size=5, token_budget=37, kv_tokens=5 * (len(ids) + 16), prefix_cache=False
    )
    for config in (EngineConfig(), tight):
        others = [
            Request(str(index), ids[index:], SamplingParams(max_new_tokens=9)) for index in range(3)
        ]
        deltas = run(model, config, Request("a", ids, sampling), *others)["a"]
        found = [(d.token_ids, d.text, d.logprobs, d.finish_reason) for d in deltas]
        assert [delta.index for delta in deltas] == [0, 1, 2]
        assert found == expected
