"""A shard's side of the data plane: receive a step, run it, send on what came out."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from cluster.messages import Message, Step, StepDone
from gptmoe.errors import ClusterError
from gptmoe.shard.shard import Shard

from .routes import Route


class Line(Protocol):
    """What the loop needs of Links."""

    def send(self, message: Message, to: int) -> None: ...
    def receive(self, source: int) -> Message: ...
    def send_tensor(self, tensor: Tensor, to: int) -> None: ...
    def receive_tensor(self, into: Tensor, source: int) -> Tensor: ...


def run_steps(shard: Shard, line: Line, route: Route, accept: Callable[[Step], bool]) -> None:
    """Run steps until a peer is lost or `accept` raises: ClusterError, always.

    `accept` says whether a step is to be run (False: it was seen before).
    """
    while True:
        step = line.receive(route.source)
        if not isinstance(step, Step):
            raise ClusterError(f"a shard takes steps here, found a {type(step).__name__}")
        if accept(step):
            _run(shard, line, route, step)


def _run(shard: Shard, line: Line, route: Route, step: Step) -> None:
    experts_only = shard.part.experts_only
    if not step.most_rows:  # a sign of life: through all stages, and back
        if shard.is_last or experts_only:
            line.send(StepDone(epoch=step.epoch, sequence=step.sequence), route.target)
        else:
            line.send(step, route.target)
        return
    x_TD = None
    if step.token_ids and not shard.is_first and not experts_only:
        shape = len(step.token_ids), shard.spec.d_model
        x_TD = torch.empty(shape, dtype=shard.dtype, device=shard.device)
        line.receive_tensor(x_TD, route.source)
    out, spent = shard.run(step, x_TD)
    if experts_only:
        return
    compute_s = step.compute_s + spent.compute_s
    exchange_s = step.exchange_s + spent.exchange_s
    if shard.is_last:
        out = out.cpu()
        done = StepDone(
            epoch=step.epoch,
            sequence=step.sequence,
            rows=len(out) if step.token_ids else 0,
            compute_s=compute_s,
            exchange_s=exchange_s,
        )
        line.send(done, route.target)
    else:
        line.send(replace(step, compute_s=compute_s, exchange_s=exchange_s), route.target)
    if step.token_ids and len(out):
        line.send_tensor(out, route.target)
