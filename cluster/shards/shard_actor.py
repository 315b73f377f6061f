"""The actor that owns a shard: commands come as Ray calls, steps by the data plane.

Two threads: Ray's, which obeys commands and so can leave the groups while the other, which runs
steps, waits in one of them.
"""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from cluster import wire
from cluster.messages import (
    Command,
    Drain,
    Failure,
    Join,
    Keep,
    Load,
    Message,
    Plan,
    Ready,
    Refresh,
    Refusal,
    Step,
)
from cluster.reporter import Channel, Reporter
from gptmoe import config as configs
from gptmoe.checkpoint import Checkpoint, open_checkpoint
from gptmoe.config import Uri
from gptmoe.errors import CheckpointError, ClusterError, GptMoeError
from gptmoe.loaded import named_dtype
from gptmoe.memory import give_back
from gptmoe.model.spec import ModelSpec
from gptmoe.remote import fetch
from gptmoe.shard.shard import Shard
from gptmoe.stored import spec_of
from gptmoe.threads import in_brief_thread

from . import links, member
from .pulse import BEAT_EVERY_S, Pulse
from .roles import part_of
from .routes import route_of
from .step_loop import run_steps

log = logging.getLogger(__name__)

MEET_WITHIN_S = 20.0
STOP_WITHIN_S = 12.0
"""A thread in a group ends when its peers have left, at the latest after the group's timeout."""


class ShardActor:
    """One rank. Invariant: `_state` changes only under `_lock`, and only when a command is done."""

    def __init__(
        self,
        channel: Callable[[], Channel] | None = None,
        cache_dir: str = "~/.cache/gptmoe",
        device: str = "cpu",
    ) -> None:
        """`channel` leads to the coordinator that shards register with; without, they do not.
        `cache_dir` is for checkpoints that are URIs."""
        self._cache_dir = Path(cache_dir).expanduser()
        self._device = torch.device(device)
        self._channel = channel
        self._pulse: Pulse | None = None
        self._state = member.State()
        self._lock = threading.Lock()
        self._busy = threading.Lock()  # one command at a time
        self._shard: Shard | None = None
        self._line: links.Links | None = None
        self._thread: threading.Thread | None = None
        self._read_bytes = self._total_bytes = 0

    def handle(self, data: bytes) -> bytes:
        """Answer one control message: Ready, Failure (it was tried), Refusal (nothing changed)."""
        try:
            message = wire.decode(data)
            if not isinstance(message, member.COMMANDS):
                raise ClusterError(f"a shard does not take {type(message).__name__} messages")
            answer = self._obey(message)
        except ClusterError as error:
            answer = Refusal(epoch=self._state.epoch, reason=str(error))
        return wire.encode(answer)

    def live(self) -> None:
        """Never returns: whoever calls it hears at once when this process dies."""
        threading.Event().wait()

    def counters(self) -> tuple[int, dict[str, float]]:
        """Steps so far, and numbers for people: what a heartbeat says."""
        counters: dict[str, float] = {"weights_bytes": float(self._read_bytes)}
        if self._total_bytes:
            counters["loaded"] = self._read_bytes / self._total_bytes
        shard = self._shard
        if shard is not None:
            for layer, load in shard.load_of.items():
                for expert in shard.part.experts_in(layer):
                    counters[f"rows/{layer}/{expert}"] = float(load[expert])
        return self._state.steps, counters

    def _obey(self, command: Command) -> Message:
        if isinstance(command, Plan) and command.epoch > self._state.epoch:
            links.leave(self._line)  # at once: another command may wait for peers that are gone
        with self._busy:
            verdict = member.decide(self._state, command)
            if verdict.answer is not None:
                return verdict.answer
            began_s = time.perf_counter()
            try:
                self._carry_out(command)
            except GptMoeError as error:
                return Failure(epoch=command.epoch, reason=str(error))
            ready = Ready(
                epoch=command.epoch,
                sequence=command.sequence,
                weights_bytes=self._shard.num_bytes if self._shard else 0,
                seconds=time.perf_counter() - began_s,
            )
            with self._lock:
                self._state = member.commit(self._state, command, ready)
            return ready

    def _carry_out(self, command: Command) -> None:
        match command:
            case Plan():
                self._stop_steps()
                if not member.same_weights(self._state.plan, command):
                    self._shard = None
                if self._channel is not None:
                    self._register(command, self._channel())
            case Load():
                in_brief_thread(self._load)  # steps have a thread of their own
            case Join():
                self._join(command)
            case Refresh():
                assert self._shard is not None
                newer = partial(self._read, self._shard, command.checkpoint, command.version)
                in_brief_thread(newer)
            case Keep():
                assert self._shard is not None
                self._shard.keep(command.versions)
            case Drain():
                self._stop_steps()

    def _register(self, plan: Plan, channel: Channel) -> None:
        if self._pulse is not None:
            self._pulse.stop()
        reporter = Reporter(
            channel,
            plan.group,
            worker=f"shard-{plan.rank}",
            rank=plan.rank,
            shard=plan.shards[plan.rank],
            digest=plan.config_digest,
            every_s=BEAT_EVERY_S,
        )
        self._pulse = Pulse(reporter, self.counters)

    def _load(self) -> None:
        plan = self._state.plan
        assert plan is not None
        if self._shard is None:
            parts = tuple(map(part_of, plan.shards))
            spec = spec_of(self._open(plan.checkpoint))
            dtype = named_dtype(plan.dtype)
            self._shard = Shard(spec, parts, plan.rank, plan.slots, dtype, self._device)
        if not self._shard.has(plan.version):
            self._read(self._shard, plan.checkpoint, plan.version)
        self._shard.keep((plan.version,))
        give_back()

    def _read(self, shard: Shard, path: str, version: int) -> None:
        plan = self._state.plan
        assert plan is not None
        checkpoint = self._open(path)
        digest = model_digest(spec_of(checkpoint))
        if digest != plan.config_digest:
            raise CheckpointError(
                f"{path} holds a model of another config (digest {digest}) than the plan's "
                f"(digest {plan.config_digest}); serve it as another deployment"
            )

        def progress(done: int, total: int) -> None:
            self._read_bytes, self._total_bytes = done, total

        torch.set_num_threads(plan.threads)
        shard.load(checkpoint, version, progress)

    def _open(self, path: str) -> Checkpoint:
        """A checkpoint on this node; its replica has verified it, or its fetching has."""
        folder = fetch(Uri(path), self._cache_dir) if "://" in path else Path(path)
        return open_checkpoint(folder, verify=False)

    def _join(self, command: Join) -> None:
        plan, shard = self._state.plan, self._shard
        assert plan is not None
        assert shard is not None
        groups, line = links.meet(
            command.host,
            command.port,
            shard.parts,
            plan.rank,
            command.timeout_s,
            within_s=MEET_WITHIN_S,
        )
        shard.connect(groups.rows, groups.slices)
        self._line = line
        self._thread = threading.Thread(
            target=self._run_steps, args=(shard, line, plan), name="steps", daemon=True
        )
        self._thread.start()

    def _run_steps(self, shard: Shard, line: links.Links, plan: Plan) -> None:
        torch.set_num_threads(plan.threads)  # of this thread
        try:
            run_steps(shard, line, route_of(shard.parts, plan.rank), self._accept)
        except ClusterError as error:
            log.info("steps end rank=%s epoch=%s reason=%s", plan.rank, plan.epoch, error)
        except Exception as error:
            if links.is_loss(error):
                log.info("steps end rank=%s epoch=%s: a peer is lost", plan.rank, plan.epoch)
            else:
                log.exception("steps fail rank=%s epoch=%s", plan.rank, plan.epoch)
                links.leave(line)  # the others must not wait for this rank

    def _accept(self, step: Step) -> bool:
        with self._lock:
            self._state, run = member.take(self._state, step)
        return run

    def _stop_steps(self) -> None:
        links.leave(self._line)
        self._line = None
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(STOP_WITHIN_S)
            if thread.is_alive():
                raise ClusterError("this shard still waits in a group of an older epoch; end it")
        if self._shard is not None:
            self._shard.disconnect()


def model_digest(spec: ModelSpec) -> str:
    """Names a model's config: shards of one plan must have the same."""
    return configs.digest(configs.to_dict(spec))
