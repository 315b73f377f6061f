"""Layers whose steps of few rows are one call of kernels: between products Python took a third of
a decoding step. The bits are those of the same kernels called one by one.

Letters: B batch, T tokens, R rows (of all sequences), D model width, F feed-forward width.
"""

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from gptmoe.model.dispatch import is_local
from gptmoe.model.dropout import Drop, keep_all
from gptmoe.model.layers import Attend, FeedForward
from gptmoe.model.moe import MoE
from gptmoe.model.routing import Groups, Routing
from gptmoe.model.transformer import Block
from gptmoe.model.turns import Pausing

from .fused_experts import EnteringExperts
from .kernels.program import Program
from .kernels.row_attention import RowAttend
from .kernels.row_router import RowRouter
from .kernels.rows import norm_task
from .kernels.tasks import Attention, Gelu, Norm
from .kernels.workspace import Workspace
from .packed_weight import entering
from .routed_experts import RoutedExperts


@dataclass(frozen=True, slots=True)
class LayerProgram:
    """A layer over a number of rows, or its part before what a program cannot hold. Norms are told
    where the rows come from and go to in each step, attention where its cache is."""

    program: Program
    first: Norm
    attention: Attention
    second: Norm
    last: Norm | None = None
    """None if something comes behind the program."""
    experts: RoutedExperts | None = None
    """If they are in it."""
    between: tuple[Tensor, Tensor, Tensor] | None = None
    """What comes behind the experts is told, [R, D]: x and attention, their norm, the answers."""


class FusedBlock(Block):
    """A Block for inference; see the module."""

    most_rows: int
    routed: tuple[RowRouter, EnteringExperts] | None
    """Of a layer with experts, if a program can hold them."""

    def steps(
        self, x_BTD: Tensor, groups: Groups, attend: Attend, drop: Drop
    ) -> Pausing[tuple[Tensor, Routing | None]]:
        """See Block.steps. Experts in a program leave no routing."""
        if self._is_small(attend, x_BTD, drop) and self._is_whole(_rows(x_BTD), groups):
            return self._whole(x_BTD.contiguous(), attend), None
        return (yield from super().steps(x_BTD, groups, attend, drop))

    def attended(self, x_BTD: Tensor, attend: Attend, drop: Drop) -> tuple[Tensor, Tensor]:
        """See Block.attended."""
        if not self._is_small(attend, x_BTD, drop):
            return super().attended(x_BTD, attend, drop)
        x_BTD = x_BTD.contiguous()
        sum_BTD, h_BTD = torch.empty_like(x_BTD), torch.empty_like(x_BTD)
        layer = self._begin(x_BTD, attend, whole=False)
        layer.second.sum, layer.second.out = sum_BTD.data_ptr(), h_BTD.data_ptr()
        layer.program.run()
        return sum_BTD, h_BTD

    def is_one_call(self, x_BTD: Tensor, groups: Groups, attend: Attend, drop: Drop) -> bool:
        """Whether the step is a program, and nothing is left to do behind it."""
        shared = isinstance(self.ffn, MoE) and self.ffn.shared is not None
        small = self._is_small(attend, x_BTD, drop)
        return small and self._is_whole(_rows(x_BTD), groups) and not shared

    def count(self, layer: LayerProgram) -> None:
        """Count the rows of experts, once the program has run."""
        if layer.experts is not None:
            assert isinstance(self.ffn, MoE)
            assert is_local(self.ffn.dispatcher)
            self.ffn.dispatcher.count(layer.experts.rows())

    def _is_small(self, attend: Attend, x_BTD: Tensor, drop: Drop) -> TypeGuard[RowAttend]:
        """Whether the step is a program, at least up to the experts."""
        return (
            isinstance(attend, RowAttend)
            and attend.rows == _rows(x_BTD) <= self.most_rows
            and drop is keep_all
        )

    def _is_whole(self, rows: int, groups: Groups) -> bool:
        """Whether the program holds the ffn, too."""
        if not isinstance(self.ffn, MoE):
            return True
        if self.routed is None or rows > self.routed[1].most_rows:
            return False
        return groups.valid_T is None and is_local(self.ffn.dispatcher)

    def _whole(self, x_BTD: Tensor, attend: RowAttend) -> Tensor:
        layer, out_BTD = self._begin(x_BTD, attend, whole=True), torch.empty_like(x_BTD)
        if layer.last is not None:
            layer.last.sum = out_BTD.data_ptr()
        layer.program.run()
        self.count(layer)
        if layer.between is None:
            return out_BTD
        assert isinstance(self.ffn, MoE)
        sum_BTD, h_BTD, answer_BTD = (rows_RD.view_as(x_BTD) for rows_RD in layer.between)
        return sum_BTD + self.ffn.share(h_BTD, answer_BTD, None)

    def _begin(self, x_BTD: Tensor, attend: RowAttend, *, whole: bool) -> LayerProgram:
        """The program for these rows, of this step."""
        programs = attend.cache.workspace.programs.setdefault(self, {})
        key = _rows(x_BTD), whole
        if key not in programs:
            programs[key] = layer_program(self, key[0], attend, whole)
        found: LayerProgram = programs[key]
        found.first.x = found.second.x = x_BTD.data_ptr()
        attend.tell(found.attention, self.layer)
        return found


def layer_program(block: FusedBlock, rows: int, attend: RowAttend, whole: bool) -> LayerProgram:
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
    if not whole:
        return LayerProgram(program, first, attending, second)
    experts = None
    if isinstance(block.ffn, FeedForward):
        f_RF = lend("f", rows, len(block.ffn.up.bias))
        _enter(program, block.ffn.up, h_RD, f_RF)
        program.add("gelu", Gelu(x=f_RF.data_ptr(), count=f_RF.numel()))
        _enter(program, block.ffn.down, f_RF, y_RD)
    else:
        experts = _shared_by_programs(block, workspace)
        experts.enter(program, h_RD, y_RD)
        if block.ffn.shared is not None:
            between = x_RD, h_RD, y_RD
            return LayerProgram(program, first, attending, second, None, experts, between)
    last = Norm(x=x_RD.data_ptr(), added=y_RD.data_ptr(), rows=rows, width=d_model)
    program.add("norm", last)
    return LayerProgram(program, first, attending, second, last, experts)


def _shared_by_programs(block: FusedBlock, workspace: Workspace) -> RoutedExperts:
    if block not in workspace.experts:
        assert block.routed is not None
        workspace.experts[block] = RoutedExperts(*block.routed, workspace)
    found: RoutedExperts = workspace.experts[block]
    return found


def routed_part(ffn: nn.Module) -> tuple[RowRouter, EnteringExperts] | None:
    """The router and the experts of a layer, if both can be part of a program and nothing that
    comes behind them wants to know the routing."""
    if type(ffn) is not MoE or ffn.residual is not None or not isinstance(ffn.router, RowRouter):
        return None
    experts = getattr(ffn.experts, "entering", None)
    return (ffn.router, experts) if isinstance(experts, EnteringExperts) else None


def _rows(x_BTD: Tensor) -> int:
    return x_BTD.shape[0] * x_BTD.shape[1]


def parts(block: Block) -> list[nn.Module]:
    """What has the products of a layer that its program would hold in any case."""
    found: list[nn.Module] = [block.attention.qkv, block.attention.out]
    if isinstance(block.ffn, FeedForward):
        found += [block.ffn.up, block.ffn.down]
    return found


def _enter(program: Program, layer: nn.Module, x_RI: Tensor, out_RO: Tensor) -> None:
    weight = entering(layer.weight)
    assert weight is not None
    assert isinstance(layer.bias, Tensor)
    program.add_product(weight, x_RI, out_RO, layer.bias)
