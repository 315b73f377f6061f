"""The coordinator as a Ray actor, and how the processes of a run reach it.

The process that starts a run holds it alive (`coordinating`); the workers find it by the run's name
and register there (`join`).
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import ray.actor
import ray.exceptions
import ray.util
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gptmoe.errors import ClusterError

from . import topology_file, wire
from .coordinator import Coordinator
from .messages import Failure, Message, Shard, Topology, TopologyRequest
from .reporter import Reporter

log = logging.getLogger(__name__)

NAMESPACE = "gptmoe"
PREFIX = "gptmoe-coordinator:"
_WRITE_EVERY_S = 2.0
_ANSWER_WITHIN_S = 30.0


class CoordinatorActor:
    """One run's Coordinator behind `handle(bytes) -> bytes`, with its topology kept on disk."""

    def __init__(
        self, run: str, folder: str | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._coordinator = Coordinator(run, clock)
        self._folder = Path(folder) if folder else None
        self._write_at_s = 0.0
        self._written: tuple[str, ...] = ()

    def handle(self, data: bytes) -> bytes:
        """Answer one control message; write topology.json if it changed much, else every 2 s."""
        answer = self._coordinator.handle_bytes(data)
        changed = self._facts() != self._written
        if changed or self._clock() >= self._write_at_s:
            self.flush()
        return answer

    def flush(self) -> None:
        """Write topology.json now."""
        self._write_at_s = self._clock() + _WRITE_EVERY_S
        self._written = self._facts()
        if self._folder is not None:
            topology_file.write(self._folder, self._coordinator.topology())

    def _facts(self) -> tuple[str, ...]:
        topology = self._coordinator.topology()
        owners = (f"{owner.worker} silent={owner.is_silent}" for owner in topology.owners)
        failures = (failure.reason for failure in topology.failures)
        return (str(topology.epoch), *owners, *failures)


class ActorChannel:
    """A `reporter.Channel` to a coordinator actor."""

    def __init__(self, actor: ray.actor.ActorHandle[Any]) -> None:
        self._actor = actor
        self._answer: Any = None

    def ask(self, message: Message) -> Message:
        """Send, wait, and return the answer; raises ClusterError if none comes."""
        return self._receive(self._actor.handle.remote(wire.encode(message)))

    def post(self, message: Message) -> None:
        """Send without waiting."""
        self._answer = self._actor.handle.remote(wire.encode(message))

    def poll(self) -> Message | None:
        """The answer to the last posted message, or None while it is under way."""
        ready, _ = ray.wait([self._answer], timeout=0)
        return self._receive(self._answer) if ready else None

    def _receive(self, answer: Any) -> Message:
        try:
            return wire.decode(ray.get(answer, timeout=_ANSWER_WITHIN_S))
        except ray.exceptions.RayError as error:
            raise ClusterError(f"the coordinator does not answer: {error}") from error


@contextmanager
def coordinating(run: str, folder: str | Path | None) -> Iterator[ActorChannel]:
    """Run the coordinator of `run` until the end of the block.

    `folder` receives topology.json, unless it is a URI. Raises ClusterError if the run has one.
    """
    path = None if folder is None or "://" in str(folder) else str(Path(folder).absolute())
    here = ray.get_runtime_context().get_node_id()
    options = {
        "name": PREFIX + run,
        "namespace": NAMESPACE,
        "num_cpus": 0,
        # Beside the process that holds it: it must not go down with a worker's node.
        "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False),
    }
    try:
        actor: Any = ray.remote(CoordinatorActor).options(**options).remote(run, path)
    except ValueError:
        raise ClusterError(
            f"run {run} is under way on this cluster; stop it first, or choose another run.dir"
        ) from None
    try:
        yield ActorChannel(actor)
    finally:
        _stop(actor)


def join(
    run: str, group: str, *, worker: str, rank: int, shard: Shard, digest: str = ""
) -> Reporter:
    """Register this worker with the coordinator of `run`; `group` names this start of its workers.

    Rank 0 draws a new `group`, the others learn it from rank 0. Raises ClusterError if the run has
    no coordinator or it refuses.
    """
    return Reporter(channel(run), group, worker=worker, rank=rank, shard=shard, digest=digest)


def channel(run: str) -> ActorChannel:
    """A channel to the coordinator of `run`; raises ClusterError if there is none."""
    try:
        return ActorChannel(ray.get_actor(PREFIX + run, namespace=NAMESPACE))
    except ValueError:
        raise ClusterError(
            f"run {run} has no coordinator on this cluster; it may have ended"
        ) from None


def report_failure(run: str, reason: str, *, goes_on: bool = False) -> None:
    """Tell the coordinator of `run`, if it is there, what failed: its workers are about to start
    again, or go on."""
    try:
        line = channel(run)
        topology = line.ask(TopologyRequest())
        if isinstance(topology, Topology):
            line.ask(Failure(epoch=topology.epoch, reason=reason, goes_on=goes_on))
    except ClusterError as error:
        log.warning("failure not told to the coordinator run=%s error=%s", run, error)


def runs() -> list[str]:
    """The runs that have a coordinator on this cluster."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    return sorted(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))


def topologies(prefix: str, within_s: float = 5.0) -> tuple[Topology, ...]:
    """Of the runs whose name begins so; those that end meanwhile, or do not answer, are missing."""
    calls: list[Any] = []
    for run in runs():
        with suppress(ValueError):  # it has ended since
            if run.startswith(prefix):
                actor = ray.get_actor(PREFIX + run, namespace=NAMESPACE)
                calls.append(actor.handle.remote(wire.encode(TopologyRequest())))
    if not calls:
        return ()
    done, _ = ray.wait(calls, num_returns=len(calls), timeout=within_s)
    found = []
    for call in calls:
        with suppress(ray.exceptions.RayError, ClusterError):
            if call in done and isinstance(answer := wire.decode(ray.get(call)), Topology):
                found.append(answer)
    return tuple(found)


def _stop(actor: ray.actor.ActorHandle[Any]) -> None:
    try:
        ray.get(actor.flush.remote(), timeout=_ANSWER_WITHIN_S)
    except ray.exceptions.RayError as error:
        log.warning("coordinator lost before its last write error=%s", error)
    ray.kill(actor)
