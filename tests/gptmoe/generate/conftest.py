"""Small models with random weights that talk with the bundled tokenizer."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from gptmoe.generate.kernels.library import Kernels
from gptmoe.generate.kernels.tasks import Calls
from gptmoe.generate.packed import pack
from gptmoe.loaded import LoadedModel
from gptmoe.model.initialize import initialize
from gptmoe.model.spec import ModelSpec, RouterKind, RouterSpec
from gptmoe.model.transformer import GPT
from gptmoe.stored import KEPT_WIDE
from gptmoe.text import Tokenizer, load_tokenizer
from tests.small_model import draw_biases, settle

ROOT = Path(__file__).parents[3]
Make = Callable[..., LoadedModel]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(ROOT / "configs" / "corpus")


@pytest.fixture(scope="session")
def make_model(tokenizer: Tokenizer) -> Make:
    """A model by dtype, with experts or dense, packed or plain, and router; its texts differ."""

    @cache
    def make(
        dtype: torch.dtype,
        has_experts: bool,
        packed: bool,
        kind: RouterKind = "switch",
        residual_moe: bool = False,
    ) -> LoadedModel:
        spec = ModelSpec(
            num_layers=3,
            d_model=96,
            num_heads=3,
            d_ff=384,
            vocab_size=tokenizer.vocab_size + 64,
            max_seq_len=320,
            num_experts=(8,) if has_experts else (),
            init_std=0.25,
            router=RouterSpec(kind=kind),
            residual_moe=residual_moe,
        )
        network = GPT(spec, compute_dtype=dtype)
        initialize(network, seed=3)
        draw_biases(network)
        settle(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(False)
            if not any(part in name for part in KEPT_WIDE):
                parameter.data = parameter.data.to(dtype)
        if packed:
            pack(network)
        return LoadedModel(network.eval(), tokenizer, {}, Path())

    return make


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[Calls]:
    """Those that were run."""
    found, own = [], Kernels.run_program

    def run(self: Kernels, calls: Calls) -> None:
        found.append(calls)
        own(self, calls)

    monkeypatch.setattr(Kernels, "run_program", run)
    return found
