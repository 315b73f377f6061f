"""A checkpoint small enough to serve in seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gptmoe.checkpoint import save, whole
from gptmoe.config import to_dict
from gptmoe.model.initialize import initialize
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT
from gptmoe.text import train_jiebabpe


def save_model(run: Path, step: int = 1, *, seed: int = 1, d_model: int = 32) -> Path:
    """A checkpoint of a run: an untrained model of 200,000 parameters.

    Its greedy text does not end by itself.
    """
    spec = ModelSpec(
        num_layers=2,
        d_model=d_model,
        num_heads=2,
        d_ff=128,
        vocab_size=512,
        max_seq_len=4096,
        num_experts=(4,),
        init_std=0.1,
    )
    network = GPT(spec)
    initialize(network, seed=seed)
    tokenizer = train_jiebabpe(["春风又绿江南岸，明月何时照我还。"] * 4, vocab_size=280)
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    pieces = [whole(name, parameter.detach()) for name, parameter in network.named_parameters()]
    save(
        folder,
        rank=0,
        world=1,
        barrier=lambda: None,
        groups={"weights": pieces},
        config={"model": to_dict(spec)},
        progress={"step": step},
        copy_files=tokenizer.save,
    )
    return folder


@pytest.fixture(name="save_model", scope="session")
def _save_model() -> Callable[..., Path]:
    return save_model


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that serves in seconds."""
    return save_model(tmp_path_factory.mktemp("run"))
