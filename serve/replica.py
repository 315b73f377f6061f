"""The deployment's class: one replica owns one loaded model and the thread of its engine.

Plain Python: app.py makes it a Ray Serve deployment.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from fastapi import FastAPI

from gptmoe.config import Location, location
from gptmoe.errors import GptMoeError
from gptmoe.generate.engine import Engine
from gptmoe.generate.request import SamplingParams, make_request
from gptmoe.model.counts import parameters
from gptmoe.model.spec import ModelSpec

from . import routes
from .bridge import EngineThread
from .config import ServeConfig
from .core import opened
from .rpc import Servicer
from .service import ModelCard, Service

log = logging.getLogger(__name__)

REFRESH_WITHIN_S = 60.0
"""The engine's thread is between two steps long before."""


class Generator(Servicer):
    """One replica: gRPC by its methods (Servicer), HTTP by the application it builds."""

    def __init__(self, config: ServeConfig, num_cpus: float) -> None:
        torch.set_num_threads(config.threads)
        with ExitStack() as stack:
            self._core = stack.enter_context(opened(config, num_cpus))
            engine = self._core.engine
            encode = engine.tokenizer.encode
            _warm_up(engine, encode, self._core.spec.max_seq_len)
            self._bridge = EngineThread(engine)
            self._stack = stack.pop_all()
        self.service = Service(self._bridge, encode, _card(self._core.spec, config))
        self._stall_s = config.health.stall_s
        self._version = 0

    async def reconfigure(self, wish: Mapping[str, Any]) -> None:
        """What Ray Serve calls with the application's user_config: weights to move to.

        A replica that cannot goes on with those that it has, and says why in its log.
        """
        version = int(wish.get("version", 0))
        if version > self._version:
            try:
                await asyncio.to_thread(
                    self._refresh, location(wish["checkpoint"]), version, bool(wish.get("restart"))
                )
            except GptMoeError as error:
                log.warning("weights stay version=%s reason=%s", self._version, error)

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
            self._stack.close()

    def _refresh(self, checkpoint: Location, version: int, restart: bool) -> None:
        self._core.prepare(checkpoint, version)
        engine = self._core.engine
        done = self._bridge.between_steps(lambda: engine.refresh(version, restart=restart))
        done.result(REFRESH_WITHIN_S)
        self._version = version


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
