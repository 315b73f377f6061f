"""transformers in bf16 with random weights: `generate` of GPT-2 and Mixtral shapes.

Mixtral has an expert layer everywhere and three matrices an expert. To have the sizes of ours, an
expert's inner width is two thirds, and every layer between has one expert, which is a dense layer.
"""

import sys
import time
from functools import cache
from typing import Any

import shape
import torch
import transformers
from lines import answer_lines
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock


@cache
def model(experts: int) -> Any:
    """GPT-2 (0 experts) or Mixtral."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    made = _mixtral(experts) if experts else _gpt2()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return made.eval()


def _gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.VOCABULARY,
            n_positions=shape.CONTEXT,
            n_embd=shape.D_MODEL,
            n_layer=shape.LAYERS,
            n_head=shape.HEADS,
        )
    )


def _mixtral(experts: int) -> Any:
    def config(count: int) -> MixtralConfig:
        return MixtralConfig(
            vocab_size=shape.VOCABULARY,
            max_position_embeddings=shape.CONTEXT,
            hidden_size=shape.D_MODEL,
            num_hidden_layers=0,
            num_attention_heads=shape.HEADS,
            num_key_value_heads=shape.HEADS,
            intermediate_size=shape.D_FF * 2 // 3,
            num_local_experts=count,
            num_experts_per_tok=1,
            tie_word_embeddings=True,
        )

    many = config(experts)
    many.num_hidden_layers = shape.LAYERS
    one = config(1)
    one.num_hidden_layers = shape.LAYERS
    made = MixtralForCausalLM(one)
    many._experts_implementation = made.config._experts_implementation
    for layer in made.model.layers[1::2]:
        layer.mlp = MixtralSparseMoeBlock(many)
    return made


@torch.inference_mode()
def act(experts: int, batch: int) -> dict[str, float]:
    """Seconds of one decoding step: a long answer less a short one, by the steps between."""
    tokens_BT = torch.tensor(shape.prompts(batch))
    seconds = []
    for new in (1, shape.NEW):
        began_s = time.perf_counter()
        model(experts).generate(
            tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            do_sample=False,
            use_cache=True,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=shape.VOCABULARY - 1,
            eos_token_id=shape.VOCABULARY - 1,
        )
        seconds.append(time.perf_counter() - began_s)
    return {"step_s": (seconds[1] - seconds[0]) / shape.STEPS}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    answer_lines({"version": transformers.__version__}, act)
