"""The deployment's class: one replica owns one loaded model and the thread of its engine.

Plain Python: app.py makes it a Ray Serve deployment.
"""

import asyncio
import logging
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import ray.serve
import torch
from fastapi import FastAPI

from cluster import coordinator_actor
from gptmoe.config import location
from gptmoe.errors import ClusterError, GptMoeError, Unavailable
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import make_request
from gptmoe.model.counts import parameters
from gptmoe.model.spec import ModelSpec
from gptmoe.threads import in_brief_thread

from . import access_log, registry_actor
from .access_log import AccessLog
from .bridge import EngineThread
from .checkpoints import Interchangeable
from .config import ServeConfig
from .control import ControlServicer
from .controller import Controlled, Settings
from .core import Core, opened
from .edge.inlet import Inlet, Progress
from .guard import guarded
from .keys import Keys
from .logged import LoggedService, logged
from .metrics import EngineMetrics, RaySink
from .operations import Operations
from .result_cache import ResultCache
from .rpc import Servicer
from .scaling import autoscaling_stats
from .service import ModelCard
from .short_log import shorten
from .web.app import build

log = logging.getLogger(__name__)

REFRESH_WITHIN_S = 60.0
"""The engine's thread is between two steps long before."""

TRY_AGAIN_S = 1.0
"""Between tries to refresh while a shard is away."""


@logged
@guarded
class Generator(Servicer, ControlServicer, Inlet):
    """One replica: gRPC by its methods (Servicer, ControlServicer), HTTP by what it builds.

    The edge calls the same methods by Inlet.
    """

    def __init__(self, config: ServeConfig, num_cpus: float, beside: object = None) -> None:
        """`beside` is a handle of what the application owns besides; see app.build."""
        torch.set_num_threads(config.threads)
        me = ray.serve.get_replica_context().replica_id.unique_id
        self.keys = Keys(config.auth.keys) if config.auth.keys else None
        with ExitStack() as stack:
            self._core = in_brief_thread(
                lambda: _warm(stack.enter_context(opened(config, num_cpus)))
            )
            engine, spec = self._core.engine, self._core.spec
            self._metrics = EngineMetrics(RaySink(config.name, me), since=engine.stats)
            cores = config.threads * config.parallel.world
            self._bridge = EngineThread(engine, self._metrics, cores)
            self._stack = stack.pop_all()
        access_log.to_stdout()
        shorten()
        self.access_log = AccessLog(config.log, config.name)
        connect = partial(registry_actor.connected, config.name)
        self._claims = registry_actor.Claims(me, connect, self._bridge.abort)
        most_bytes = int(config.cache.results_mb * 1e6)
        self.service = LoggedService(
            self._bridge,
            engine.tokenizer,
            _card(spec, config, engine.tokenizer.vocab_size),
            names=self._claims,
            results=ResultCache(most_bytes) if most_bytes else None,
        )
        self._stall_s = config.health.stall_s
        self._version = 0
        digest = engine.tokenizer.digest
        self._alike = Interchangeable(spec, digest, config.cache_dir.expanduser())
        self.operations = Operations(
            Controlled(config.name),
            me=me,
            check=self._alike.check,
            topologies=coordinator_actor.topologies,
            threads=config.threads,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve calls for the HTTP application."""
        return build(self.service, self._stall_s, keys=self.keys, log=self.access_log)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """What Ray Serve calls at the start, and whenever an operator told all replicas something.

        It never raises: Ray Serve would replace the replica. One that cannot take other weights
        goes on with those that it has, and says why in its log.
        """
        self._claims.start()
        settings = Settings(**user_config)
        self.service.draining = settings.draining
        while settings.version > self._version:
            try:
                await asyncio.to_thread(self._refresh, settings)
            except Unavailable as error:
                log.info("weights wait for a shard version=%s reason=%s", self._version, error)
                await asyncio.sleep(TRY_AGAIN_S)
            except (GptMoeError, OSError) as error:  # TimeoutError is an OSError
                log.warning("weights stay version=%s reason=%s", self._version, error)
                return

    async def edge_progress(self) -> Progress:
        """What the edge asks every second."""
        pending, silent_s = self._bridge.progress()
        return Progress(pending=pending, silent_s=silent_s, draining=self.service.draining)

    async def check_health(self) -> None:
        """What Ray Serve calls every few seconds; raises if the replica must be replaced.

        A good moment to give out the load of experts too: Ray exports metrics about as often.
        """
        self.service.check(self._stall_s)
        self._core.check()
        with suppress(ClusterError):  # the coordinator is slow; the next time will do
            self._metrics.experts(await asyncio.to_thread(self._core.expert_rows))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray Serve asks every few seconds where it sets the number of replicas."""
        return autoscaling_stats(self._metrics.stats)

    def __del__(self) -> None:
        """What Ray Serve calls at the end, once running requests had their time to finish."""
        if hasattr(self, "service"):  # else the constructor failed
            self.service.stop()
            self._stack.close()

    def _refresh(self, settings: Settings) -> None:
        engine, version = self._core.engine, settings.version
        checkpoint = location(self._alike.check(settings.checkpoint))
        in_brief_thread(lambda: self._core.prepare(checkpoint, version))
        done = self._bridge.between_steps(lambda: engine.refresh(version, restart=settings.restart))
        done.result(REFRESH_WITHIN_S)
        self._version = self.service.version = version


def _warm(core: Core) -> Core:
    """Generate one token: a replica that cannot is never asked, and first requests wait less."""
    engine, sampling = core.engine, SamplingParams(max_new_tokens=1)
    engine.add(make_request(engine.tokenizer, core.spec.max_seq_len, "warm-up", "春风", sampling))
    while engine.has_work:
        engine.step()
    return core


def _card(spec: ModelSpec, config: ServeConfig, vocab_size: int) -> ModelCard:
    """`vocab_size`: its tokenizer's. A model may have places for more, which nobody can ask for."""
    count = parameters(spec)
    return ModelCard(
        name=config.name,
        parameters=count.total,
        active_parameters=count.active,
        max_seq_len=spec.max_seq_len,
        vocab_size=vocab_size,
        dtype=config.dtype,
        num_layers=spec.num_layers,
        d_model=spec.d_model,
        num_heads=spec.num_heads,
        num_experts=spec.num_experts,
    )
