"""A Service with a real engine on a small model, without Ray."""

from collections.abc import Iterator
from contextlib import contextmanager

import gptmoe
from gptmoe.generate.engine import Engine
from serve.bridge import EngineThread
from serve.service import ModelCard, Service


@contextmanager
def served(model: gptmoe.LoadedModel, engine: Engine) -> Iterator[Service]:
    """The service of a model's engine, with the engine's thread until the end of the block."""
    bridge = EngineThread(engine)
    spec = model.spec
    card = ModelCard(
        name="poems",
        parameters=1,
        active_parameters=1,
        max_seq_len=spec.max_seq_len,
        vocab_size=spec.vocab_size,
        dtype="float32",
        num_layers=spec.num_layers,
        d_model=spec.d_model,
        num_heads=spec.num_heads,
        num_experts=spec.num_experts,
    )
    try:
        yield Service(bridge, model.tokenizer, card)
    finally:
        bridge.stop()
