"""Layers whose steps of few rows are one call of kernels: between products Python took a third of
a decoding step. The bits are those of the same kernels called one by one.

Letters: B batch, T tokens, R rows (of all sequences), D model width, F feed-forward width.
"""

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from gptmoe.model.dropout import Drop, keep_all
from gptmoe.model.layers import Attend, FeedForward
from gptmoe.model.routing import Groups, Routing
from gptmoe.model.transformer import GPT, Block
from gptmoe.model.turns import Pausing

from .kernels.few_bits import FewBits
from .kernels.plain import LANES, PlainWeight
from .kernels.program import Enters, Program
from .kernels.row_attention import RowAttend
from .kernels.rows import norm_task, use_row_norms
from .kernels.tasks import Attention, Gelu, Norm
from .packed_weight import PackedWeight


def fuse(network: GPT) -> None:
    """Have the layers of a packed or quantized network do so, in place, where they can."""
    spec = network.spec
    if network.compute_dtype != torch.bfloat16 or not use_row_norms(network, spec.d_model):
        return
    if spec.d_model % LANES or spec.d_ff % LANES:
        return
    for block in network.layers:
        if type(block) is not Block or block.attention.num_heads < spec.num_heads:
            continue  # of another stage, or sliced
        products = _products(block)
        weights = [weight for layer in products if (weight := entering(layer.weight)) is not None]
        if len(weights) == len(products):
            block.__class__ = FusedBlock
            assert isinstance(block, FusedBlock)
            block.most_rows = min(weight.most_rows for weight in weights)


@dataclass(frozen=True, slots=True)
class LayerProgram:
    """A layer over a number of rows, or its half before the experts. Norms are told where the rows
    come from and go to in each step, attention where its cache is."""

    program: Program
    first: Norm
    attention: Attention
    second: Norm
    last: Norm | None
    """None if experts follow."""


class FusedBlock(Block):
    """A Block for inference; see the module."""

    most_rows: int

    def steps(
        self, x_BTD: Tensor, groups: Groups, attend: Attend, drop: Drop
    ) -> Pausing[tuple[Tensor, Routing | None]]:
        """See Block.steps."""
        if isinstance(self.ffn, FeedForward) and self._is_small(attend, x_BTD, drop):
            return self._whole(x_BTD.contiguous(), attend), None
        return (yield from super().steps(x_BTD, groups, attend, drop))

    def attended(self, x_BTD: Tensor, attend: Attend, drop: Drop) -> tuple[Tensor, Tensor]:
        """See Block.attended."""
        if not self._is_small(attend, x_BTD, drop):
            return super().attended(x_BTD, attend, drop)
        x_BTD = x_BTD.contiguous()
        sum_BTD, h_BTD = torch.empty_like(x_BTD), torch.empty_like(x_BTD)
        layer = self._begin(x_BTD, attend)
        layer.second.sum, layer.second.out = sum_BTD.data_ptr(), h_BTD.data_ptr()
        layer.program.run()
        return sum_BTD, h_BTD

    def _is_small(self, attend: Attend, x_BTD: Tensor, drop: Drop) -> TypeGuard[RowAttend]:
        """Whether the step is a program."""
        return (
            isinstance(attend, RowAttend)
            and attend.rows == x_BTD.shape[0] * x_BTD.shape[1] <= self.most_rows
            and drop is keep_all
        )

    def _whole(self, x_BTD: Tensor, attend: RowAttend) -> Tensor:
        out_BTD = torch.empty_like(x_BTD)
        layer = self._begin(x_BTD, attend)
        assert layer.last is not None
        layer.last.sum = out_BTD.data_ptr()
        layer.program.run()
        return out_BTD

    def _begin(self, x_BTD: Tensor, attend: RowAttend) -> LayerProgram:
        """The program for these rows, of this step."""
        programs = attend.cache.workspace.programs.setdefault(self, {})
        rows = x_BTD.shape[0] * x_BTD.shape[1]
        if rows not in programs:
            programs[rows] = layer_program(self, rows, attend)
        found: LayerProgram = programs[rows]
        found.first.x = found.second.x = x_BTD.data_ptr()
        attend.tell(found.attention, self.layer)
        return found


def layer_program(block: Block, rows: int, attend: RowAttend) -> LayerProgram:
    """Compose it; what it needs between its kernels lies in the cache's workspace."""
    attention, d_model = block.attention, len(block.norm_ffn.weight)
    workspace = attend.cache.workspace
    lend = workspace.lend
    x_RD, h_RD, a_RD, y_RD = (lend(name, rows, d_model) for name in "xhay")
    qkv_RX = lend("qkv", rows, 3 * d_model)
    program = Program(attend.compiled, workspace)
    first = norm_task(block.norm_attention, x_RD, h_RD)
    program.add("norm", first)
    _enter(program, attention.qkv, h_RD, qkv_RX)
    q_RHK, k_RHK, v_RHK = qkv_RX.view(rows, 3, attention.num_heads, -1).unbind(1)
    attending = attend.task(q_RHK, k_RHK, v_RHK, a_RD)
    program.add("store", attending)
    program.add("attend", attending)
    _enter(program, attention.out, a_RD, y_RD)
    second = norm_task(block.norm_ffn, x_RD, h_RD, added_RD=y_RD)
    second.sum = x_RD.data_ptr()
    program.add("norm", second)
    if not isinstance(block.ffn, FeedForward):
        return LayerProgram(program, first, attending, second, None)
    f_RF = lend("f", rows, len(block.ffn.up.bias))
    _enter(program, block.ffn.up, h_RD, f_RF)
    program.add("gelu", Gelu(x=f_RF.data_ptr(), count=f_RF.numel()))
    _enter(program, block.ffn.down, f_RF, y_RD)
    last = Norm(x=x_RD.data_ptr(), added=y_RD.data_ptr(), rows=rows, width=d_model)
    program.add("norm", last)
    return LayerProgram(program, first, attending, second, last)


def _products(block: Block) -> list[nn.Module]:
    """What has the products of a layer that its program would hold."""
    found: list[nn.Module] = [block.attention.qkv, block.attention.out]
    if isinstance(block.ffn, FeedForward):
        found += [block.ffn.up, block.ffn.down]
    return found


def entering(weight: object) -> Enters | None:
    """The same weight, if it can be part of a program."""
    if isinstance(weight, PackedWeight):
        return weight.few_rows
    return weight if isinstance(weight, PlainWeight | FewBits) else None


def _enter(program: Program, layer: nn.Module, x_RI: Tensor, out_RO: Tensor) -> None:
    weight = entering(layer.weight)
    assert weight is not None
    assert isinstance(layer.bias, Tensor)
    weight.enter(program, x_RI, out_RO, layer.bias)
