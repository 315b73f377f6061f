"""Small models with experts whose greedy texts differ from prompt to prompt."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gptmoe.checkpoint import Checkpoint, open_checkpoint, save, whole
from gptmoe.config import to_dict
from gptmoe.model.initialize import initialize
from gptmoe.model.moe import MoE
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.model.transformer import GPT
from gptmoe.text import Tokenizer, load_tokenizer

CORPUS = Path(__file__).parents[1] / "configs" / "corpus"


def write(
    run_dir: Path,
    *,
    seed: int = 3,
    step: int = 7,
    num_layers: int = 4,
    d_model: int = 96,
    router: RouterSpec | None = None,
    residual_moe: bool = False,
) -> Path:
    """An untrained model's checkpoint in a run's folder."""
    words = tokenizer()
    spec = ModelSpec(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=4,
        d_ff=2 * d_model,
        vocab_size=words.vocab_size + 3,
        max_seq_len=320,
        num_experts=(8,) * (num_layers // 2),
        init_std=0.25,
        router=router or RouterSpec(),
        residual_moe=residual_moe,
    )
    network = GPT(spec)
    initialize(network, seed=seed)
    draw_biases(network)
    settle(network)
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    store(folder, spec, network.state_dict(), copy_files=words.save)
    return folder


def store(
    folder: Path,
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    copy_files: Callable[[Path], None] | None = None,
) -> Checkpoint:
    """A checkpoint in a folder `step-N` with these weights, all or not."""
    save(
        folder,
        rank=0,
        world=1,
        barrier=lambda: None,
        groups={"weights": [whole(name, tensor.detach()) for name, tensor in tensors.items()]},
        config={"model": to_dict(spec)},
        progress={"step": int(folder.name.removeprefix("step-")), "samples": 0, "tokens": 0},
        copy_files=copy_files,
    )
    return open_checkpoint(folder)


@torch.no_grad()
def settle(network: GPT, steps: int = 3) -> None:
    """Let the routers learn from a few steps, so that their state is not that of the beginning."""
    spec, was_training = network.spec, network.training
    if not dict(network.named_buffers()):
        return
    generator = torch.Generator().manual_seed(11)
    shape = (2 * spec.router.group_sequences, min(32, spec.max_seq_len))
    network.train()
    for _ in range(steps):
        routings = network(torch.randint(spec.vocab_size, shape, generator=generator)).routings
        for layer, routing in zip(spec.moe_layers, routings, strict=True):
            moe = network.get_submodule(f"layers.{layer}.ffn")
            assert isinstance(moe, MoE)
            moe.router.update(routing.statistics)
    network.train(was_training)


@torch.no_grad()
def draw_biases(network: GPT, std: float = 0.1) -> None:
    """They begin at zero: what leaves one out would be right."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, std, generator=generator)


def tokenizer() -> Tokenizer:
    """The bundled one, which these models speak with."""
    return load_tokenizer(CORPUS)
