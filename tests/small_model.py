"""Small models with experts whose greedy texts differ from prompt to prompt."""

from pathlib import Path

from gptmoe.checkpoint import save, whole
from gptmoe.config import to_dict
from gptmoe.model.initialize import initialize
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT
from gptmoe.text import Tokenizer, load_tokenizer

CORPUS = Path(__file__).parents[1] / "configs" / "corpus"


def write(
    run_dir: Path, *, seed: int = 3, step: int = 7, num_layers: int = 4, d_model: int = 96
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
    )
    network = GPT(spec)
    initialize(network, seed=seed)
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    save(
        folder,
        rank=0,
        world=1,
        barrier=lambda: None,
        groups={"weights": [whole(n, p.detach()) for n, p in network.named_parameters()]},
        config={"model": to_dict(spec)},
        progress={"step": step, "samples": 0, "tokens": 0},
        copy_files=words.save,
    )
    return folder


def tokenizer() -> Tokenizer:
    """The bundled one, which these models speak with."""
    return load_tokenizer(CORPUS)
