"""The data plane of one epoch: control messages as headers, tensors behind them, between ranks.

Headers travel by sockets (sockets.py), tensors by torch.distributed, among the ranks of the shards
and as the last one the engine's. Both live as long as their epoch. Sends never wait; receives do,
up to the group's timeout.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster import wire
from cluster.messages import Message
from gptmoe.errors import ClusterError
from gptmoe.shard.parts import Part, stage_ranks

from .routes import neighbours
from .sockets import Sockets, connect


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of one rank; None where it would be alone."""

    everyone: Any
    """All shards and the engine."""
    rows: Any = None
    """Of its stage, those with experts alone included."""
    slices: Any = None
    """Of the slices of the same layers and samples."""


def meet(
    host: str, port: int, parts: Sequence[Part], rank: int, timeout_s: float, *, within_s: float
) -> tuple[Groups, "Links"]:
    """Join the others at a store; rank len(parts) is the engine's, which runs the store there.

    Collective: all shards and the engine call it. Raises ClusterError if they do not meet in time.
    """
    world = len(parts) + 1
    timeout = timedelta(seconds=timeout_s)
    line: Links | None = None
    hook = sys.excepthook  # torch puts one more in front of it in each epoch
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, world, is_master=False, timeout=timedelta(seconds=within_s)
        )
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        groups = groups_of(parts, rank, timeout)
        ways = neighbours(parts, rank)
        sockets = connect(store, rank, host, ways, timeout_s=timeout_s, within_s=within_s)
        line = Links(groups.everyone, sockets)
        dist.barrier()
    except (RuntimeError, ValueError, OSError) as error:
        leave(line)
        raise ClusterError(
            f"rank {rank} did not meet the others at {host}:{port}: {error}"
        ) from None
    finally:
        sys.excepthook = hook
    return groups, line


def groups_of(parts: Sequence[Part], rank: int, timeout: timedelta) -> Groups:
    """Make the groups within the default group. Collective, as `meet`."""
    rows = _my_group(stage_ranks(parts), rank, timeout)
    return Groups(dist.group.WORLD, rows, _my_group(_slice_ranks(parts), rank, timeout))


def leave(line: "Links | None" = None) -> None:
    """Close the line and destroy all groups of this process, if there are any.

    Who waits for a message fails at once, here and at the other end; a call that waits in a group
    fails once its peers have left too.
    """
    if line is not None:
        line.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_loss(error: Exception) -> bool:
    """Whether a collective or message failed because a peer is gone or too late."""
    return isinstance(error, (RuntimeError, ValueError)) and any(
        word in str(error) for word in ("gloo", "NCCL", "process group", "ProcessGroup")
    )


class Links:
    """Messages and tensors to and from the ranks of one epoch. One thread uses it."""

    def __init__(self, group: Any, sockets: Sockets) -> None:
        self._group = group  # named at each call: the default one may be another epoch's by then
        self._sockets = sockets
        self._sent: list[tuple[Any, Tensor]] = []
        self._encoded: tuple[Message | None, bytes] = None, b""

    def send(self, message: Message, to: int) -> None:
        """Send a control message; the same one to the next rank costs no encoding."""
        if message is not self._encoded[0]:
            self._encoded = message, wire.encode(message)
        self._sockets.send(self._encoded[1], to)

    def receive(self, source: int) -> Message:
        """Wait for a control message. Raises ClusterError for a lost peer or malformed bytes."""
        return wire.decode(self._sockets.receive(source))

    def close(self) -> None:
        """No more messages: who waits for one fails at once. Any thread may call it."""
        self._sockets.close()

    def send_tensor(self, tensor: Tensor, to: int) -> None:
        """Start sending a tensor, which must not change until it has left."""
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        tensor = tensor.contiguous()
        self._sent.append((self._talk(dist.isend, tensor, to), tensor))

    def receive_tensor(self, into: Tensor, source: int) -> Tensor:
        """Wait for a tensor of this shape and type."""
        self._talk(dist.recv, into, source)
        return into

    def wait(self) -> None:
        """Until all that was sent has left: what is dropped before may never leave."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _talk(self, call: Any, tensor: Tensor, peer: int) -> Any:
        try:
            return call(tensor, peer, group=self._group)
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("] ")[2].partition(".")[0] or str(error)
            raise ClusterError(f"rank {peer} is lost: {reason}") from None


def _slice_ranks(parts: Sequence[Part]) -> list[list[int]]:
    groups: dict[tuple[int, int], list[int]] = {}
    for rank, part in enumerate(parts):
        if not part.experts_only:
            groups.setdefault((part.stage, part.data), []).append(rank)
    return list(groups.values())


def _my_group(groups: Sequence[list[int]], rank: int, timeout: timedelta) -> Any:
    mine = None
    for ranks in groups:
        if len(ranks) > 1:
            group = dist.new_group(ranks, timeout=timeout)
            if rank in ranks:
                mine = group
    return mine
