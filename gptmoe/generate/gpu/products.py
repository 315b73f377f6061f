"""Products and norms of a network on a GPU: what is computed by kernels of ours, and where.

Experts: a step of few rows asks the GPU, not the CPU, which rows each expert has, so it can be
captured and the CPU never waits. Norms: one kernel instead of three. With `invariant` every product
runs in tiles of one size, so that a row's bits do not depend on the other rows (cuBLAS chooses its
kernel, and so the order of its sums, by the number of rows).

Letters: T tokens, R rows, D model width, E experts, I inputs, O outputs.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
from torch import Tensor, nn

from gptmoe.errors import ConfigError
from gptmoe.model.experts import Experts
from gptmoe.model.layers import LayerNorm, Linear, ServedWeight, linear
from gptmoe.model.moe import MoE
from gptmoe.model.residual_moe import Mix
from gptmoe.model.routing import LinearRouter, Routing
from gptmoe.model.token_choice import TokenChoiceRouter
from gptmoe.model.transformer import GPT
from gptmoe.model.turns import Pausing

from . import kernels

TILE_ROWS = 16
"""The fewest that a GPU multiplies at once."""
TILE_OUTPUTS = 16
"""Few, so that a narrow weight still occupies all of a GPU."""
TILE_INPUTS = 256
MOST_ROWS = 64
"""With more rows, experts are faster by torch's grouped kernel, which wants their numbers."""


def prepare(network: GPT, *, invariant: bool = False) -> None:
    """Have a network on a GPU compute so, in place. It cannot be trained then.

    Raises ConfigError for a router whose experts choose, if it is to be invariant.
    """
    for module in list(network.modules()):
        if type(module) is LayerNorm:
            module.__class__ = OneNorm
        elif type(module) in (MoE, RoutedMoE) and isinstance(module.router, TokenChoiceRouter):
            module.__class__ = RoutedMoE
            assert isinstance(module, RoutedMoE)
            module.begin(invariant)
        elif invariant and isinstance(module, MoE):
            raise ConfigError(
                "invariant=true is for routers that send each token to as many experts; experts of "
                "this model choose their tokens (router.kind=expert_choice): use invariant=false"
            )
        if invariant and isinstance(module, (Linear, LinearRouter, Mix)):
            module.weight = TiledWeight(module.weight.detach(), requires_grad=False)
    if invariant:
        table = network.embed.tokens.weight.detach()
        network.head = partial(linear, weight=TiledWeight(table, requires_grad=False))
    network.fixed_rows = False


def can_be_captured(network: GPT) -> bool:
    """Whether a decoding step never waits to hear how many rows there are."""
    moe_layers = [module for module in network.modules() if isinstance(module, MoE)]
    return all(isinstance(moe, RoutedMoE) and moe.residual is None for moe in moe_layers)


class OneNorm(LayerNorm):
    """A LayerNorm for inference, by one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        x = x.contiguous()
        y = torch.empty_like(x)
        lanes = triton.next_power_of_2(width)
        kernels.norm[(x.numel() // width,)](x, self.weight, self.bias, y, width, LANES=lanes)
        return y


class TiledWeight(ServedWeight):
    """A weight [O, I] whose products give a row the same bits in any batch."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See ServedWeight.product."""
        return self._run(x, bias, gelu=False)

    def activated(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See ServedWeight.activated."""
        return self._run(x, bias, gelu=True)

    def _run(self, x: Tensor, bias: Tensor | None, *, gelu: bool) -> Tensor:
        outputs, inputs = self.shape
        x_RI = x.reshape(-1, inputs).contiguous()
        y_RO = x.new_empty(len(x_RI), outputs)
        grid = (triton.cdiv(len(x_RI), TILE_ROWS), triton.cdiv(outputs, TILE_OUTPUTS))
        kernels.product[grid](
            x_RI,
            self.data.to(x.dtype),
            y_RO if bias is None else bias,  # not read
            y_RO,
            len(x_RI),
            inputs,
            outputs,
            M=TILE_ROWS,
            N=TILE_OUTPUTS,
            I=TILE_INPUTS,
            BIASED=bias is not None,
            GELU=gelu,
        )
        return y_RO.view(*x.shape[:-1], outputs)


class RoutedMoE(MoE):
    """A layer of experts for inference whose rows are counted and found on the GPU.

    For routers in which each token has the same number of experts.
    """

    rows_E: Tensor
    """Rows that each expert has answered here, int64."""
    live_T: Tensor | None
    """1 for tokens of a step that count, 0 for padding; None: all count."""
    _invariant: bool

    def begin(self, invariant: bool) -> None:
        """No rows are answered yet."""
        device = self.experts.up_weight.device
        self.rows_E = torch.zeros(self.experts.count, dtype=torch.int64, device=device)
        self.live_T = None
        self._invariant = invariant

    def count_rows(self) -> Callable[[], list[int]]:
        """See MoE.count_rows. Reading waits for the device."""
        return self.rows_E.tolist

    def answer(self, h_TD: Tensor, routing: Routing) -> Pausing[Tensor]:
        """See MoE.answer."""
        expert_R, tokens = routing.expert_R, len(h_TD)
        choices = len(expert_R) // tokens
        live_R = torch.ones_like(expert_R) if self.live_T is None else self.live_T.repeat(choices)
        self.rows_E.index_add_(0, expert_R, live_R)
        captured = self.live_T is not None  # then nobody may wait for the device
        if len(expert_R) > MOST_ROWS and not (self._invariant or captured):
            return (yield from super().answer(h_TD, routing))
        answer_RD = few_rows(self.experts, h_TD, expert_R)
        weighted_RD = (answer_RD * routing.weight_R.unsqueeze(-1)).to(h_TD.dtype)
        return weighted_RD.view(choices, tokens, -1).sum(0)


def few_rows(experts: Experts, h_TD: Tensor, expert_R: Tensor) -> Tensor:
    """What expert e of row r makes of token r modulo T, [R, D]."""
    hidden_RF = _expert_product(h_TD, experts.up_weight, experts.up_bias, expert_R, gelu=True)
    return _expert_product(hidden_RF, experts.down_weight, experts.down_bias, expert_R)


def _expert_product(
    x: Tensor, weight_EOI: Tensor, bias_EO: Tensor, expert_R: Tensor, *, gelu: bool = False
) -> Tensor:
    _, outputs, inputs = weight_EOI.shape
    rows = len(expert_R)
    x = x.contiguous()
    y_RO = x.new_empty(rows, outputs)
    kernels.expert_product[(rows, triton.cdiv(outputs, TILE_OUTPUTS))](
        x,
        weight_EOI.to(x.dtype),
        bias_EO,
        y_RO,
        expert_R,
        rows,
        len(x),
        inputs,
        outputs,
        ROWS=max(MOST_ROWS, triton.next_power_of_2(rows)),
        M=TILE_ROWS,
        N=TILE_OUTPUTS,
        I=TILE_INPUTS,
        GELU=gelu,
    )
    return y_RO


def routed(network: nn.Module) -> list[RoutedMoE]:
    """The layers of a network that count so."""
    return [module for module in network.modules() if isinstance(module, RoutedMoE)]
