"""The mixture-of-experts layer: route, dispatch, compute, combine.

Letters: B sequences, T tokens, D model width, R rows.
"""

from torch import Tensor, nn

from .dispatch import Dispatcher, LocalDispatcher
from .experts import Experts
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
        self.dispatcher = LocalDispatcher()

    def forward(self, h_BTD: Tensor, groups: Groups) -> tuple[Tensor, Routing]:
        """`steps` without a pause."""
        return straight(self.steps(h_BTD, groups))

    def steps(self, h_BTD: Tensor, groups: Groups) -> Pausing[tuple[Tensor, Routing]]:
        """Return the experts' answers, shaped as h and zero for tokens that none took, and the
        routing. Tokens are numbered through the batch; h may have any leading dimensions."""
        h_TD = h_BTD.flatten(0, -2)
        routing = self.router.route(h_TD, groups)
        out_TD = yield from self.answer(h_TD, routing)
        return out_TD.view_as(h_BTD), routing

    def answer(self, h_TD: Tensor, routing: Routing) -> Pausing[Tensor]:
        """The weighted sum of the answers of each token's experts, [T, D]."""
        sent = yield from self.dispatcher.dispatch(h_TD, routing)
        rows_RD = self.experts(sent.rows_RD, sent.rows_per_expert)
        return (yield from self.dispatcher.combine(rows_RD, sent))
