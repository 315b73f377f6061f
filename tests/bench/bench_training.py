"""Speed of a training step: our MoE against transformers' Mixtral, and against our own dense model.

    python tests/bench/bench_training.py [--rounds 9] [--json FILE]

12 layers x 512, vocabulary 8,192, 8 experts top-1, 8 sequences of 512 tokens, fp32, fused AdamW,
two threads. Nothing is dropped on either side: an untrained router would fill few experts, and a
dropped token costs no work. Mixtral's experts have three matrices: its 1,365 columns are the work
of our 2,048. Its grouped kernel refuses 1,365 (rows must be multiples of 16 bytes) and gets 1,364.
"""

import argparse
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.model.transformer import Output
from gptmoe.parallel.apply import build
from gptmoe.parallel.mesh import single
from gptmoe.parallel.optimizer import OptimizerSpec
from gptmoe.parallel.updater import PlainUpdater
from tests.bench.side_by_side import Comparison, compare, table, write_json

LAYERS, D_MODEL, HEADS, VOCABULARY, EXPERTS = 12, 512, 8, 8192, 8
SEQUENCES, LENGTH = 8, 512
LEARNING_RATE = 1e-4
THREADS = 2


def our_step(num_experts: tuple[int, ...], interval: int) -> Callable[[], None]:
    """One optimizer step of ours: forward, loss, backward, clip, AdamW."""
    spec = ModelSpec(
        num_layers=LAYERS,
        d_model=D_MODEL,
        num_heads=HEADS,
        d_ff=4 * D_MODEL,
        vocab_size=VOCABULARY,
        max_seq_len=LENGTH,
        num_experts=num_experts,
        expert_interval=interval,
        router=RouterSpec(capacity_factor=math.inf),
        init_std=0.02,
    )
    model = build(spec, single(), torch.device("cpu"))
    updater = PlainUpdater(model, single(), OptimizerSpec())
    token_BS = make_tokens()
    token_BT, label_BT = token_BS[:, :-1], token_BS[:, 1:]
    weight_BT = torch.ones_like(label_BT, dtype=torch.bool)

    def step() -> None:
        output: Output = model(token_BT)
        loss = model.loss_sum(output.hidden_BTD, label_BT, weight_BT)
        loss = loss / label_BT.numel()
        for routing in output.routings:
            loss = loss + spec.router.aux_loss_coef * routing.losses["aux_loss"]
        torch.autograd.backward(loss)
        updater.step(LEARNING_RATE)

    return step


def mixtral_step(experts: str, intermediate_size: int) -> Callable[[], None]:
    """One optimizer step of transformers' Mixtral with one of its implementations of experts."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        intermediate_size=intermediate_size,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )
    torch.manual_seed(0)
    model: Any = MixtralForCausalLM(config)
    model.set_experts_implementation(experts)
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    token_BS = make_tokens()
    token_BT, label_BT = token_BS[:, :-1].contiguous(), token_BS[:, 1:].contiguous()

    def step() -> None:
        loss = model(token_BT, labels=label_BT, shift_labels=label_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_tokens() -> Tensor:
    """Random tokens, one more in a sequence than is trained on."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)


def against_mixtral(rounds: int) -> Comparison:
    """Experts on every layer, equal work."""
    return compare(
        "MoE on every layer against Mixtral",
        ours=("ours", our_step((EXPERTS,) * LAYERS, interval=1)),
        peer=("transformers' Mixtral, eager", mixtral_step("eager", 1365)),
        goal=1.2,
        rounds=rounds,
    )


def against_grouped_mixtral(rounds: int) -> Comparison:
    """The same against Mixtral's grouped kernel: no goal, for information."""
    return compare(
        "MoE on every layer against Mixtral with its grouped kernel",
        ours=("ours", our_step((EXPERTS,) * LAYERS, interval=1)),
        peer=("transformers' Mixtral, grouped_mm", mixtral_step("grouped_mm", 1364)),
        rounds=rounds,
    )


def against_dense(rounds: int) -> Comparison:
    """Experts on every second layer: the price of routing."""
    return compare(
        "MoE on every second layer against our dense model",
        ours=("ours, 8 experts", our_step((EXPERTS,) * (LAYERS // 2), interval=2)),
        peer=("ours, dense", our_step((), interval=2)),
        goal=0.9,
        rounds=rounds,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Speed of a training step, side by side.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write all rounds to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    comparisons = []
    for measure in (against_mixtral, against_grouped_mixtral, against_dense):
        comparisons.append(measure(arguments.rounds))
        print(table(comparisons[-1:], work=SEQUENCES * LENGTH, unit="tokens/s"), flush=True)
        gc.collect()  # the models of one comparison, before those of the next are made
    if arguments.json:
        write_json(arguments.json, comparisons)


if __name__ == "__main__":
    main()
