"""The mixture-of-experts layer: route, dispatch, compute, combine.

Letters: B sequences, T tokens, D model width, R rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .dispatch import CountedDispatcher, Dispatcher, LocalDispatcher
from .experts import Experts
from .layers import FeedForward
from .residual import ExpertResidual
from .residual_moe import Mix
from .routers import make_router
from .routing import Groups, Router, Routing
from .spec import ModelSpec
from .turns import Pausing, straight


class MoE(nn.Module):
    """A feed-forward layer of experts. Where they live is known to the dispatcher alone."""

    router: Router
    dispatcher: Dispatcher

    def __init__(self, spec: ModelSpec, num_experts: int) -> None:
        super().__init__()
        self.router = make_router(spec, num_experts)
        self.experts = Experts(num_experts, spec.d_model, spec.d_ff)
        depth = spec.router.residual_layers
        self.residual = ExpertResidual(depth, spec.d_model, spec.d_ff) if depth else None
        self.shared = FeedForward(spec.d_model, spec.d_ff) if spec.residual_moe else None
        self.mix = Mix(spec.d_model) if spec.residual_moe else None
        self.dispatcher = LocalDispatcher()

    def forward(self, h_BTD: Tensor, groups: Groups) -> tuple[Tensor, Routing]:
        """`steps` without a pause."""
        return straight(self.steps(h_BTD, groups))

    def steps(self, h_BTD: Tensor, groups: Groups) -> Pausing[tuple[Tensor, Routing]]:
        """Return the layer's output, shaped as h, and the routing.

        Without shared layers the output is zero for tokens that no expert took. Tokens are numbered
        through the batch; h may have any leading dimensions.
        """
        out_BTD, routing = yield from self.ask(h_BTD, groups)
        return self.share(h_BTD, out_BTD, routing), routing

    def ask(self, h_BTD: Tensor, groups: Groups) -> Pausing[tuple[Tensor, Routing]]:
        """The experts' answers, shaped as h, and the routing."""
        h_TD = h_BTD.flatten(0, -2)
        routing = self.router.route(h_TD, groups)
        out_TD = yield from self.answer(h_TD, routing)
        return out_TD.view_as(h_BTD), routing

    def answer(self, h_TD: Tensor, routing: Routing) -> Pausing[Tensor]:
        """The weighted sum of the answers of each token's experts, [T, D]."""
        sent = yield from self.dispatcher.dispatch(h_TD, routing)
        rows_RD = self.experts(sent.rows_RD, sent.rows_per_expert)
        return (yield from self.dispatcher.combine(rows_RD, sent))

    def count_rows(self) -> Callable[[], list[int]]:
        """From now on count the rows that each expert here answers; what is returned reads them."""
        load = [0] * self.experts.count
        self.dispatcher = CountedDispatcher(self.dispatcher, load, range(len(load)))
        return load.copy

    def share(self, h_BTD: Tensor, out_BTD: Tensor, routing: Routing | None) -> Tensor:
        """Apply the layers that all tokens go through to the experts' answers.

        An Expert Residual reads the routing, and nothing else does.
        """
        if self.residual is not None:
            assert routing is not None
            assert routing.preference_T is not None
            taken_T = torch.zeros_like(routing.preference_T, dtype=torch.bool)
            taken_T[routing.token_R] = True
            own_BT, taken_BT = (self.own(x_T, h_BTD) for x_T in (routing.preference_T, taken_T))
            out_BTD = self.residual(h_BTD, out_BTD, own_BT, taken_BT)
        if self.mix is not None and self.shared is not None:
            out_BTD = self.mix(h_BTD, out_BTD, self.shared(h_BTD))
        return out_BTD

    def own(self, x_T: Tensor, h_BTD: Tensor) -> Tensor:
        """One number a routed token, shaped as the tokens of h."""
        return x_T.view(h_BTD.shape[:-1])
