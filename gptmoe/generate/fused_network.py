"""All layers of a step of few rows as one call of kernels: between them no Python runs, and no
threads are woken. See fused.py, whose layers it strings together.

Letters: B batch, T tokens, R rows (of all sequences), D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from gptmoe.model.dropout import Drop
from gptmoe.model.layers import Attend, LayerNorm
from gptmoe.model.routing import Groups
from gptmoe.model.transformer import GPT, Block, Output
from gptmoe.model.turns import Pausing

from .fused import FusedBlock, LayerProgram, layer_program, parts, routed_part
from .kernels.library import kernels
from .kernels.plain import LANES
from .kernels.program import Program
from .kernels.row_attention import RowAttend
from .kernels.row_router import use_row_routers
from .kernels.rows import use_row_norms
from .kernels.tasks import Norm
from .packed_weight import entering


def fuse(network: GPT) -> None:
    """Have the layers of a packed or quantized network be calls of kernels, in place, where they
    can; all together one, if all can. In float32 only routers can."""
    spec, compiled = network.spec, kernels()
    if compiled is None:
        return
    use_row_routers(network, compiled)
    if network.compute_dtype != torch.bfloat16 or not use_row_norms(network, spec.d_model):
        return
    if spec.d_model % LANES or spec.d_ff % LANES:
        return
    for block in network.layers:
        if type(block) is not Block or block.attention.num_heads < spec.num_heads:
            continue  # of another stage, or sliced
        layers = parts(block)
        weights = [weight for layer in layers if (weight := entering(layer.weight)) is not None]
        if len(weights) == len(layers):
            block.__class__ = FusedBlock
            assert isinstance(block, FusedBlock)
            block.most_rows = min(weight.most_rows for weight in weights)
            block.routed = routed_part(block.ffn)
    network.__class__ = FusedGPT


@dataclass(frozen=True, slots=True)
class NetworkProgram:
    """Consecutive layers over a number of rows, the last norm included if it follows them."""

    program: Program
    layers: Sequence[LayerProgram]
    last: Norm
    """Writes what comes out: its `out` with a norm, else its `sum`."""

    def tell(self, x_BTD: Tensor, out_BTD: Tensor) -> None:
        """Where the rows of a step come from and go to."""
        first = self.layers[0]
        first.first.x = first.second.x = x_BTD.data_ptr()
        if self.last.weight:
            self.last.out = out_BTD.data_ptr()
        else:
            self.last.sum = out_BTD.data_ptr()


class FusedGPT(GPT):
    """A GPT for inference; see the module."""

    def through(
        self, layers: range, x_BTD: Tensor, groups: Groups, attend: Attend, drop: Drop
    ) -> Pausing[Output]:
        """See GPT.through."""
        blocks = list(self.layers)[layers.start : layers.stop]
        if isinstance(attend, RowAttend) and _are_one_call(blocks, x_BTD, groups, attend, drop):
            return Output(self._run(x_BTD.contiguous(), attend, blocks), ())
        return (yield from super().through(layers, x_BTD, groups, attend, drop))

    def _run(self, x_BTD: Tensor, attend: RowAttend, blocks: Sequence[FusedBlock]) -> Tensor:
        programs = attend.cache.workspace.programs.setdefault(self, {})
        key = attend.rows, blocks[0].layer, len(blocks)
        if key not in programs:
            ends = blocks[-1].layer + 1 == self.spec.num_layers
            programs[key] = _network_program(blocks, self.norm if ends else None, attend)
        found: NetworkProgram = programs[key]
        out_BTD = torch.empty_like(x_BTD)
        found.tell(x_BTD, out_BTD)
        for block, layer in zip(blocks, found.layers, strict=True):
            attend.tell(layer.attention, block.layer)
        found.program.run()
        for block, layer in zip(blocks, found.layers, strict=True):
            block.count(layer)
        return out_BTD


def _are_one_call(
    blocks: Sequence[nn.Module], x_BTD: Tensor, groups: Groups, attend: Attend, drop: Drop
) -> TypeGuard[Sequence[FusedBlock]]:
    return all(
        isinstance(block, FusedBlock) and block.is_one_call(x_BTD, groups, attend, drop)
        for block in blocks
    )


def _network_program(
    blocks: Sequence[FusedBlock], norm: LayerNorm | None, attend: RowAttend
) -> NetworkProgram:
    """The layers' programs one behind the other; x lies between where it is added to."""
    program = Program(attend.compiled, attend.cache.workspace)
    layers = [layer_program(block, attend.rows, attend, whole=True) for block in blocks]
    for layer in layers:
        program.extend(layer.program)
        assert layer.last is not None
        layer.last.sum = layer.last.x
        last = layer.last
    if norm is not None:
        last.weight, last.bias = norm.weight.data_ptr(), norm.bias.data_ptr()
    return NetworkProgram(program, layers, last)
