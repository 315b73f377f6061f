"""Where keys and values live, and what attention reads of them."""

import pytest
import torch
import torch.nn.functional as F

from gptmoe.generate.attention import CachedAttend, attend
from gptmoe.generate.cache import KVCache, segment_ends
from gptmoe.generate.plan import Span
from gptmoe.model.spec import ModelSpec

SPEC = ModelSpec(num_layers=2, d_model=24, num_heads=3, d_ff=8, vocab_size=10, max_seq_len=600)


def make_cache(slots: int = 4) -> KVCache:
    return KVCache(SPEC, slots, torch.float64, torch.device("cpu"))


@pytest.mark.parametrize(
    ("max_seq_len", "ends"),
    [
        (1, [128]),
        (128, [128]),
        (129, [128, 256]),
        (320, [128, 256, 384]),
        (2048, [128, 256, 512, 1024, 2048]),
    ],
)
def test_segments_double_and_end_with_the_context(max_seq_len: int, ends: list[int]) -> None:
    assert segment_ends(max_seq_len) == ends


def test_a_segment_exists_once_it_is_reached() -> None:
    cache = make_cache()
    assert cache.reserve(1) == 1
    assert cache.reserve(128) == 1
    assert [(s.first, s.size) for s in cache.segments] == [(0, 128)]
    assert cache.reserve(300) == 3
    assert [(s.first, s.size) for s in cache.segments] == [(0, 128), (128, 128), (256, 256)]
    assert cache.segments[2].keys.shape == (2, 4, 3, 256, 8)
    assert cache.reserve(100) == 1
    assert len(cache.segments) == 3


def test_attend_is_softmax_attention_over_all_segments() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 2, 3, 384, 8, dtype=torch.float64, generator=generator)
    seen = torch.rand(2, 1, 5, 384, generator=generator) < 0.5
    bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    out = attend(q, k.split(128, 2), v.split(128, 2), bias)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("idle_bytes", [0, 1 << 20])
def test_decoding_with_idle_slots_between_and_chunks_over_borders(
    idle_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of two decoding sequences and a chunk against plain causal attention."""
    monkeypatch.setattr("gptmoe.generate.attention.IDLE_BYTES", idle_bytes)
    generator = torch.Generator().manual_seed(1)
    lengths = {3: 130, 0: 7, 2: 290}  # by slot
    shape = (3, 300, 3, 8)  # queries, keys, values
    made = {s: torch.randn(shape, dtype=torch.float64, generator=generator) for s in lengths}
    cache = make_cache()

    def run(spans: list[Span], num_decoding: int) -> list[torch.Tensor]:
        rows = [made[span.slot][:, span.start : span.start + span.count] for span in spans]
        q, k, v = torch.cat(rows, 1).unsqueeze(1)
        call = CachedAttend(cache, spans, num_decoding)
        return list(call(1, q, k, v)[0].split([span.count for span in spans]))

    for slot, length in lengths.items():
        for start, end in ((0, 5), (5, length - 1)):
            run([Span("", slot, start, end - start, outputs=0)], 0)
    last = [Span("", slot, lengths[slot] - 1, 1, outputs=1) for slot in (0, 3)]
    chunk = Span("", 2, lengths[2] - 1, 6, outputs=1)
    for span, out in zip([*last, chunk], run([*last, chunk], 2), strict=True):
        q, k, v = made[span.slot][:, : span.start + span.count].transpose(1, 2)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)
        assert torch.allclose(out, expected[span.start :], rtol=0, atol=1e-12)


def test_padding_repeats_the_last_row() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 1, 4, 3, 8, dtype=torch.float64, generator=generator)
    call = CachedAttend(make_cache(), [Span("", 1, 0, 2, outputs=1)], 0)
    out = call(0, q, k, v)[0]
    assert torch.equal(out[2], out[1])
    assert torch.equal(out[3], out[1])
