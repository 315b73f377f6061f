"""Speed of decoding: ours against transformers' GPT-2 `generate` with the same weights.

    python tests/bench/bench_decode.py [--rounds 9] [--json FILE]

12 layers x 768, 12 heads, vocabulary 50,257, random weights, bf16, greedy, prompts of 20 tokens,
128 new ones, two threads. First it checks that both compute the same: the same greedy tokens in
fp32, and in bf16 logits over one text within 0.02 of the largest (transformers' own eager and SDPA
attention differ by 0.012 of it).
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from gptmoe.checkpoint import read_gpt2
from gptmoe.generate.engine import Engine
from gptmoe.generate.packed import pack
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request
from gptmoe.loaded import KEPT_WIDE, LoadedModel
from gptmoe.model.initialize import initialize
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT
from gptmoe.text import Tokenizer
from tests.bench.side_by_side import Comparison, compare, table, write_json

LAYERS, D_MODEL, HEADS, CONTEXT, VOCABULARY, EXPERTS = 12, 768, 12, 1024, 50257, 8
PROMPT, NEW = 20, 128
GOAL = 1.5
CLOSE = 2e-2
THREADS = 2


class Letters:
    """A tokenizer in name: every token is one letter."""

    kind, digest = "letters", ""
    vocab_size = VOCABULARY
    end_id = sep_id = VOCABULARY - 1

    def token_bytes(self, token_id: int) -> bytes:
        return b"abcdefghijklmnopqrstuvwxyz"[token_id % 26 :][:1]

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        raise NotImplementedError

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        raise NotImplementedError

    def characters_per_token(self) -> list[int]:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def make_gpt2() -> Any:
    """Theirs, with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=D_MODEL,
        n_layer=LAYERS,
        n_head=HEADS,
    )
    gpt2: Any = GPT2LMHeadModel(config)
    return gpt2.eval()


def loaded(spec: ModelSpec, weights: dict[str, Tensor], dtype: torch.dtype) -> LoadedModel:
    """Ours with these weights, as `gptmoe.load` would make it."""
    with torch.device("meta"):
        network = GPT(spec, compute_dtype=dtype)
    wide = {name: any(part in name for part in KEPT_WIDE) for name in weights}
    kept = {n: w.to(torch.float32 if wide[n] else dtype).contiguous() for n, w in weights.items()}
    network.load_state_dict(kept, assign=True)
    network.requires_grad_(False)
    assert pack(network), "this machine has no packed products"
    tokenizer: Tokenizer = Letters()
    return LoadedModel(network.eval(), tokenizer, {}, Path())


def our_tokens(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Continue all prompts greedily."""
    sampling = SamplingParams(temperature=0, max_new_tokens=NEW, ignore_end=True)
    tokens: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    for index, prompt in enumerate(prompts):
        engine.add(Request(str(index), tuple(prompt), sampling))
    while engine.has_work:
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
    return list(tokens.values())


def their_tokens(gpt2: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same by transformers."""
    tokens_BT = torch.tensor(prompts)
    out_BT = gpt2.generate(
        tokens_BT,
        attention_mask=torch.ones_like(tokens_BT),
        do_sample=False,
        use_cache=True,
        min_new_tokens=NEW,
        max_new_tokens=NEW,
        pad_token_id=VOCABULARY - 1,
    )
    return out_BT[:, tokens_BT.shape[1] :].tolist()


def make_prompts(count: int) -> list[list[int]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY - 1, (count, PROMPT), generator=generator).tolist()


def check_same(gpt2: Any, make: Callable[[torch.dtype], LoadedModel]) -> str:
    """Same greedy tokens in fp32, close logits in bf16; says how close. `gpt2` becomes bf16."""
    prompts = make_prompts(1)
    tokens = their_tokens(gpt2, prompts)
    assert our_tokens(make(torch.float32).engine(), prompts) == tokens, "greedy tokens differ"
    text_BT = torch.tensor([prompts[0] + tokens[0]])
    with torch.inference_mode():
        exact_BTV = gpt2(text_BT).logits
        theirs_BTV = gpt2.to(torch.bfloat16)(text_BT).logits.float()
    ours_BTV = make(torch.bfloat16).logits(text_BT).float()
    largest = float(exact_BTV.abs().max())
    between, ours, theirs = (
        float((a - b).abs().max())
        for a, b in ((ours_BTV, theirs_BTV), (ours_BTV, exact_BTV), (theirs_BTV, exact_BTV))
    )
    assert between <= CLOSE * largest, f"bf16 logits differ by {between}, the largest is {largest}"
    return (
        f"same {NEW} greedy tokens in fp32; bf16 logits differ by at most {between:.4f}, "
        f"{between / largest:.4f} of the largest (from fp32: ours {ours:.4f}, "
        f"transformers {theirs:.4f})"
    )


def mixture() -> LoadedModel:
    """Ours of the same shape with experts on every second layer; a token uses as many weights."""
    spec = ModelSpec(
        num_layers=LAYERS,
        d_model=D_MODEL,
        num_heads=HEADS,
        d_ff=4 * D_MODEL,
        vocab_size=VOCABULARY,
        max_seq_len=CONTEXT,
        num_experts=(EXPERTS,) * (LAYERS // 2),
        init_std=0.02,
    )
    network = GPT(spec)
    initialize(network, seed=0)
    return loaded(spec, network.state_dict(), torch.bfloat16)


def main() -> None:
    """Check, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--json", type=Path, help="write all rounds to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    gpt2 = make_gpt2()
    with tempfile.TemporaryDirectory() as folder:
        gpt2.save_pretrained(folder)
        spec, weights = read_gpt2(Path(folder))
    print(check_same(gpt2, lambda dtype: loaded(spec, weights, dtype)))
    dense, experts = loaded(spec, weights, torch.bfloat16).engine(), mixture().engine()

    def measure(title: str, batch: int, engine: Engine, goal: float | None = None) -> Comparison:
        prompts = make_prompts(batch)
        return compare(
            f"{title}, batch {batch}",
            ours=("ours", lambda: our_tokens(engine, prompts)),
            peer=("transformers GPT-2", lambda: their_tokens(gpt2, prompts)),
            goal=goal,
            rounds=arguments.rounds,
            warmups=1,
        )

    comparisons = [
        measure("dense", 1, dense, GOAL),
        measure("dense", 8, dense),
        measure(f"{EXPERTS} experts on every second layer", 1, experts),
        measure(f"{EXPERTS} experts on every second layer", 8, experts),
    ]
    print(table(comparisons))
    if arguments.json:
        write_json(arguments.json, comparisons)


if __name__ == "__main__":
    main()
