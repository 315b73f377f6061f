"""The kernel that attends row by row: as exact as bfloat16 allows, the same bits in any company."""

import pytest
import torch

from gptmoe.generate.cache import KVCache
from gptmoe.generate.kernels.library import kernels
from gptmoe.generate.kernels.row_attention import RowAttend, row_kernels
from gptmoe.generate.plan import Span
from gptmoe.model.spec import ModelSpec

LAYERS, HEADS, SLOTS = 3, 2, 4


def make_cache(width: int = 64, layers: range | None = None) -> KVCache:
    spec = ModelSpec(
        num_layers=LAYERS,
        d_model=HEADS * width,
        num_heads=HEADS,
        d_ff=8,
        vocab_size=8,
        max_seq_len=600,
    )
    return KVCache(spec, SLOTS, torch.bfloat16, torch.device("cpu"), layers)


def span(slot: int, start: int, count: int) -> Span:
    return Span("", slot, start, count, outputs=1)


def run(cache: KVCache, spans: list[Span], layer: int, qkv_3THK: torch.Tensor) -> torch.Tensor:
    """The answers to rows given as views of one product, as the model gives them: [T, H, K]."""
    compiled = row_kernels(cache)
    assert compiled is not None
    q_1THK, k_1THK, v_1THK = qkv_3THK.transpose(0, 1).contiguous().unsqueeze(0).unbind(2)
    return RowAttend(cache, spans, compiled)(layer, q_1THK, k_1THK, v_1THK)[0]


def numbers(tokens: int, width: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, tokens, HEADS, width, generator=generator).bfloat16()


def exact(qkv_3THK: torch.Tensor) -> torch.Tensor:
    """Causal attention of one sequence in float64, [T, H, K]."""
    q_HTK, k_HTK, v_HTK = (x.double().transpose(0, 1) for x in qkv_3THK)
    scores_HTT = q_HTK @ k_HTK.transpose(1, 2) * q_HTK.shape[-1] ** -0.5
    later_TT = torch.ones_like(scores_HTT[0], dtype=torch.bool).triu(1)
    weights_HTT = scores_HTT.masked_fill(later_TT, -torch.inf).softmax(-1)
    return (weights_HTT @ v_HTK).transpose(0, 1)


@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 128, 300])
def test_answers_are_those_of_float64_rounded(width: int, tokens: int) -> None:
    qkv = numbers(tokens, width)
    found = run(make_cache(width), [span(2, 0, tokens)], 1, qkv).double()
    expected = exact(qkv)
    # Half a unit in the last place of bfloat16, and a little for the sums in float32.
    assert ((found - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all()


def test_scores_far_apart_leave_one_key() -> None:
    qkv = numbers(40)
    qkv[:2] *= 100
    found = run(make_cache(), [span(0, 0, 40)], 0, qkv)
    assert torch.isfinite(found).all()
    assert torch.allclose(found.double(), exact(qkv), rtol=2**-7, atol=1e-2)


def test_chunks_neighbours_and_threads_change_no_bit() -> None:
    qkv, other = numbers(300), numbers(300, seed=1)
    alone = run(make_cache(), [span(1, 0, 300)], 0, qkv)
    cache = make_cache()
    run(cache, [span(3, 0, 200)], 0, other[:, :200])
    first = run(
        cache, [span(1, 0, 127), span(0, 0, 50)], 0, torch.cat([qkv[:, :127], other[:, :50]], 1)
    )
    assert torch.equal(first[:127], alone[:127])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        for position in range(127, 140):
            rows = torch.cat(
                [other[:, position + 73 : position + 74], qkv[:, position : position + 1]], 1
            )
            step = run(cache, [span(3, position + 73, 1), span(1, position, 1)], 0, rows)
            assert torch.equal(step[1], alone[position])
    finally:
        torch.set_num_threads(threads)
    rest = run(cache, [span(1, 140, 160)], 0, qkv[:, 140:])
    assert torch.equal(rest, alone[140:])


def test_layers_and_slots_are_kept_apart() -> None:
    stage = make_cache(layers=range(1, 3))
    kept = {}
    for layer in (1, 2):
        for slot in range(SLOTS):
            qkv = numbers(20, seed=10 * layer + slot)
            kept[layer, slot] = qkv, run(stage, [span(slot, 0, 20)], layer, qkv)
    for (layer, slot), (qkv, before) in kept.items():
        again = run(stage, [span(slot, 19, 1)], layer, qkv[:, 19:])
        assert torch.equal(again[0], before[19])


def test_rows_beyond_the_spans_repeat_the_last() -> None:
    qkv = numbers(5)
    padded = torch.cat([qkv, qkv[:, -1:].expand(-1, 3, -1, -1)], 1)
    found = run(make_cache(), [span(0, 0, 5)], 0, padded)
    assert torch.equal(found[:5], run(make_cache(), [span(0, 0, 5)], 0, qkv))
    assert torch.equal(found[5:], found[4:5].expand(3, -1, -1))


def test_other_caches_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert row_kernels(make_cache(width=48)) is None
    wide = make_cache()
    wide.dtype = torch.float32
    assert row_kernels(wide) is None

    monkeypatch.setattr("shutil.which", lambda name: None)
    kernels.cache_clear()
    try:
        assert row_kernels(make_cache()) is None
    finally:
        kernels.cache_clear()
