"""The deployment's class: one replica owns one loaded model and the thread of its engine.

Plain Python: app.py makes it a Ray Serve deployment.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray.serve
import torch
from fastapi import FastAPI

import gptmoe
from cluster import coordinator_actor
from cluster.shards.group import ShardGroup
from cluster.shards.muster import GroupJob
from cluster.shards.shard_actor import model_digest
from cluster.shards.supervisor import Limits
from gptmoe.checkpoint import open_checkpoint
from gptmoe.config import Uri
from gptmoe.generate.engine import Engine
from gptmoe.generate.request import SamplingParams, make_request
from gptmoe.loaded import spec_of
from gptmoe.model.counts import parameters
from gptmoe.model.spec import ModelSpec
from gptmoe.remote import fetch
from gptmoe.shard.parts import layout_of
from gptmoe.text import load_tokenizer

from . import routes
from .bridge import EngineThread
from .checkpoints import Interchangeable
from .config import ServeConfig
from .control import ControlServicer
from .controller import Controlled, Settings
from .operations import Operations
from .rpc import Servicer
from .service import ModelCard, Service


class Generator(Servicer, ControlServicer):
    """One replica: gRPC by its methods (Servicer, ControlServicer), HTTP by what it builds."""

    def __init__(self, config: ServeConfig, num_cpus: float) -> None:
        torch.set_num_threads(config.threads)
        self._stack = ExitStack()
        if config.parallel.world == 1:
            model = gptmoe.load(local_checkpoint(config), dtype=config.dtype)
            engine, spec = model.engine(config.engine), model.spec
        else:
            engine, spec = self._stack.enter_context(sharded(config, num_cpus))
        encode = engine.tokenizer.encode
        try:
            _warm_up(engine, encode, spec.max_seq_len)
        except BaseException:
            self._stack.close()
            raise
        self.service = Service(EngineThread(engine), encode, _card(spec, config))
        self._stall_s = config.health.stall_s
        self.operations = _operations(config, spec, engine.tokenizer.digest)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve calls for the HTTP application."""
        return routes.build(self.service, self._stall_s)

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """What Ray Serve calls at the start, and whenever an operator told all replicas something.

        It never raises: Ray Serve would replace the replica.
        """
        self.settings = Settings(**user_config)
        self.service.draining = self.settings.draining

    def check_health(self) -> None:
        """What Ray Serve calls every few seconds; raises if the replica must be replaced."""
        self.service.check(self._stall_s)

    def __del__(self) -> None:
        """What Ray Serve calls at the end, once running requests had their time to finish."""
        if hasattr(self, "service"):  # else the constructor failed
            self.service.stop()
            self._stack.close()


@contextmanager
def sharded(config: ServeConfig, num_cpus: float) -> Iterator[tuple[Engine, ModelSpec]]:
    """An engine whose model lies on actors of its own; they end with the block.

    Raises LayoutError, CheckpointError, or ClusterError if there is no room for them.
    """
    checkpoint = open_checkpoint(local_checkpoint(config))
    spec, tokenizer = spec_of(checkpoint), load_tokenizer(checkpoint.path)
    parts = config.parallel.parts(spec)
    job = GroupJob(
        run=f"{config.name}#{uuid.uuid4().hex[:8]}",
        parts=parts,
        checkpoint=str(config.checkpoint),
        cache_dir=str(config.cache_dir),
        config_digest=model_digest(spec),
        dtype=config.dtype,
        vocab_size=spec.vocab_size,
        slots=-(-config.engine.max_batch_size // layout_of(parts).dp),
        num_cpus=num_cpus,
        threads=config.threads,
        start_s=config.health.start_s,
        group_timeout_s=config.shards.group_timeout_s,
        limits=Limits(silent_s=config.shards.silent_s, wait_s=config.shards.wait_s),
    )
    with ShardGroup(job) as group:
        yield Engine(group, tokenizer, spec.max_seq_len, config.engine), spec


def _operations(config: ServeConfig, spec: ModelSpec, tokenizer_digest: str) -> Operations:
    alike = Interchangeable(spec, tokenizer_digest, config.cache_dir.expanduser())
    return Operations(
        Controlled(config.name),
        me=ray.serve.get_replica_context().replica_id.unique_id,
        check=alike.check,
        topologies=coordinator_actor.topologies,
    )


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
