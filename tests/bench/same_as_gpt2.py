"""That what is timed computes the right thing: GPT-2 of transformers with the same weights."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gptmoe.checkpoint import read_gpt2
from tests.bench import decoding
from tests.bench.peers import shape

CLOSE = 2e-2


def check_same() -> str:
    """The same greedy tokens in fp32, and in bf16 logits within 0.02 of the largest; says how near.

    transformers' own eager and SDPA attention differ by 0.012 of it.
    """
    gpt2 = _gpt2()
    with tempfile.TemporaryDirectory() as folder:
        gpt2.save_pretrained(folder)
        spec, weights = read_gpt2(Path(folder))
    prompts = shape.prompts(1)
    theirs = _continued(gpt2, prompts)
    ours = decoding.tokens(decoding.loaded(spec, weights, torch.float32).engine(), prompts)
    assert ours == theirs, "greedy tokens differ"
    text_BT = torch.tensor([prompts[0] + theirs[0]])
    with torch.inference_mode():
        exact_BTV = gpt2(text_BT).logits
        theirs_BTV = gpt2.to(torch.bfloat16)(text_BT).logits.float()
    ours_BTV = decoding.loaded(spec, weights, torch.bfloat16).logits(text_BT).float()
    largest = float(exact_BTV.abs().max())
    apart = float((ours_BTV - theirs_BTV).abs().max()) / largest
    assert apart <= CLOSE, f"bf16 logits differ by {apart} of the largest"
    return (
        f"checked against transformers' GPT-2 of the same weights: same {shape.NEW} greedy tokens "
        f"in fp32; bf16 logits differ by at most {apart:.4f} of the largest"
    )


def _gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=shape.VOCABULARY,
        n_positions=shape.CONTEXT,
        n_embd=shape.D_MODEL,
        n_layer=shape.LAYERS,
        n_head=shape.HEADS,
    )
    model: Any = GPT2LMHeadModel(config)
    return model.eval()


def _continued(gpt2: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    tokens_BT = torch.tensor(prompts)
    out_BT = gpt2.generate(
        tokens_BT,
        attention_mask=torch.ones_like(tokens_BT),
        do_sample=False,
        use_cache=True,
        min_new_tokens=shape.NEW,
        max_new_tokens=shape.NEW,
        pad_token_id=shape.VOCABULARY - 1,
        eos_token_id=shape.VOCABULARY - 1,
    )
    return out_BT[:, tokens_BT.shape[1] :].tolist()
