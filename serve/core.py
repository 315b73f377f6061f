"""The model behind a replica's engine: in its own process, or on actors that hold its shards."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

import gptmoe
from cluster.planner.hot import rows_answered
from cluster.shards.group import ShardGroup
from cluster.shards.muster import GroupJob
from cluster.shards.shard_actor import model_digest
from cluster.shards.supervisor import Limits
from gptmoe.checkpoint import Checkpoint, open_checkpoint
from gptmoe.config import Location, Uri
from gptmoe.generate.engine import Engine
from gptmoe.generate.executor import WholeModel
from gptmoe.loaded import LoadedModel
from gptmoe.model.spec import ModelSpec
from gptmoe.remote import fetch
from gptmoe.shard.parts import layout_of
from gptmoe.stored import spec_of
from gptmoe.text import load_tokenizer

from .config import ServeConfig
from .rows import AnsweredRows


class Core(Protocol):
    """What a replica needs of either."""

    spec: ModelSpec
    engine: Engine

    def prepare(self, checkpoint: Location, version: int) -> None:
        """Read newer weights of the same config, beside those in use; the engine's steps go on.

        That they are of the same config has been checked (checkpoints.Interchangeable). Raises
        CheckpointError or ClusterError if they cannot be read.
        """
        ...

    def check(self) -> None:
        """Raise ClusterError if the replica must be replaced."""
        ...

    def expert_rows(self) -> Mapping[int, Sequence[int]]:
        """Rows that each expert answered since the start, by layer. May ask the shards: blocks."""
        ...


@contextmanager
def opened(config: ServeConfig, num_cpus: float) -> Iterator[Core]:
    """The core that the config's layout asks for; its actors, if any, end with the block."""
    if config.parallel.world == 1:
        yield LocalCore(config)
        return
    stored = open_checkpoint(on_this_node(config.checkpoint, config))
    with ShardGroup(job_of(config, stored, num_cpus)) as group:
        yield ShardedCore(config, stored, group)


class LocalCore:
    """The whole model in this process."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        model = self._load(config.checkpoint)
        self.spec = model.spec
        self._rows = AnsweredRows(self.spec)
        self._rows.count(0, model.network)
        self.engine = model.engine(config.engine)
        self._executor = cast(WholeModel, self.engine.executor)
        self._executor.warm_up()

    def prepare(self, checkpoint: Location, version: int) -> None:
        """See Core.prepare."""
        network = self._load(checkpoint).network
        self._rows.count(version, network)
        self._executor.add(version, network)

    def check(self) -> None:
        """See Core.check."""

    def expert_rows(self) -> Mapping[int, Sequence[int]]:
        """See Core.expert_rows."""
        return self._rows.read(self._executor.held())

    def _load(self, checkpoint: Location) -> LoadedModel:
        config = self._config
        folder = on_this_node(checkpoint, config)
        return gptmoe.load(
            folder,
            config.dtype,
            config.device,
            verify=config.verify,
            weights=config.weights,
            invariant=config.invariant,
        )


class ShardedCore:
    """The model on the actors of a group."""

    def __init__(self, config: ServeConfig, stored: Checkpoint, group: ShardGroup) -> None:
        self._group = group
        self.spec = spec_of(stored)
        tokenizer = load_tokenizer(stored.path)
        self.engine = Engine(group, tokenizer, self.spec.max_seq_len, config.engine)

    def prepare(self, checkpoint: Location, version: int) -> None:
        """See Core.prepare."""
        self._group.refresh(str(checkpoint), version)

    def check(self) -> None:
        """See Core.check."""
        self._group.check()

    def expert_rows(self) -> Mapping[int, Sequence[int]]:
        """See Core.expert_rows: the sums of what the shards' heartbeats say."""
        total = rows_answered([owner.counters for owner in self._group.topology().owners])
        return by_layer(total, self.spec)


def by_layer(rows: Mapping[tuple[int, int], float], spec: ModelSpec) -> Mapping[int, Sequence[int]]:
    """Rows by (layer, expert) as rows of all experts of each layer; 0 for those not named."""
    counts = {layer: spec.experts_in_layer(layer) for layer in spec.moe_layers}
    return {
        layer: tuple(int(rows.get((layer, expert), 0)) for expert in range(count))
        for layer, count in counts.items()
    }


def job_of(config: ServeConfig, stored: Checkpoint, num_cpus: float) -> GroupJob:
    """What a replica's group of shards is to serve. Raises LayoutError."""
    spec = spec_of(stored)
    parts = config.parallel.parts(spec)
    return GroupJob(
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


def on_this_node(checkpoint: Location, config: ServeConfig) -> Path:
    """The checkpoint on this node: one behind a URI is fetched, once for all replicas here."""
    if isinstance(checkpoint, Uri):
        return fetch(checkpoint, config.cache_dir.expanduser())
    return checkpoint
