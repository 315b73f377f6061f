"""The deployment's class: one replica owns one loaded model and the thread of its engine.

Plain Python: app.py makes it a Ray Serve deployment.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from fastapi import FastAPI

import gptmoe
from gptmoe.config import Uri
from gptmoe.generate.engine import Engine
from gptmoe.generate.request import SamplingParams, make_request
from gptmoe.model.counts import parameters
from gptmoe.model.spec import ModelSpec
from gptmoe.remote import fetch

from . import routes
from .bridge import EngineThread
from .config import ServeConfig
from .rpc import Servicer
from .service import ModelCard, Service


class Generator(Servicer):
    """One replica: gRPC by its methods (Servicer), HTTP by the application it builds."""

    def __init__(self, config: ServeConfig) -> None:
        torch.set_num_threads(config.threads)
        model = gptmoe.load(local_checkpoint(config), dtype=config.dtype)
        engine, encode = model.engine(config.engine), model.tokenizer.encode
        _warm_up(engine, encode, model.spec.max_seq_len)
        self.service = Service(EngineThread(engine), encode, _card(model.spec, config))
        self._stall_s = config.health.stall_s

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve calls for the HTTP application."""
        return routes.build(self.service, self._stall_s)

    def check_health(self) -> None:
        """What Ray Serve calls every few seconds; raises if the replica must be replaced."""
        self.service.check(self._stall_s)

    def __del__(self) -> None:
        """What Ray Serve calls at the end, once running requests had their time to finish."""
        if hasattr(self, "service"):  # else the constructor failed
            self.service.stop()


def local_checkpoint(config: ServeConfig) -> Path:
    """The checkpoint on this node: one behind a URI is fetched, once for all replicas here."""
    if isinstance(config.checkpoint, Uri):
        return fetch(config.checkpoint, config.cache_dir.expanduser())
    return config.checkpoint


def _warm_up(engine: Engine, encode: Callable[[str], Sequence[int]], max_seq_len: int) -> None:
    """Generate one token: a replica that cannot is never asked, and first requests wait less."""
    sampling = SamplingParams(max_new_tokens=1)
    engine.add(make_request(encode, max_seq_len, "warm-up", "春风", sampling))
    while engine.has_work:
        engine.step()


def _card(spec: ModelSpec, config: ServeConfig) -> ModelCard:
    count = parameters(spec)
    return ModelCard(
        name=config.name,
        parameters=count.total,
        active_parameters=count.active,
        max_seq_len=spec.max_seq_len,
        vocab_size=spec.vocab_size,
        dtype=config.dtype,
        num_layers=spec.num_layers,
        d_model=spec.d_model,
        num_heads=spec.num_heads,
        num_experts=spec.num_experts,
    )
