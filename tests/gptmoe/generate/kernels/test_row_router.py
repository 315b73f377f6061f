"""Routers that choose by a kernel: as the plain ones do, each row by itself."""

import pytest
import torch
from torch import Tensor

from gptmoe.generate.kernels.library import kernels
from gptmoe.generate.kernels.row_router import RowRouter, use_row_routers
from gptmoe.generate.packed import pack_router
from gptmoe.model.loss_free import LossFreeRouter
from gptmoe.model.routers import ROUTERS
from gptmoe.model.routing import Groups, LinearRouter
from gptmoe.model.spec import RouterKind, RouterSpec
from gptmoe.model.token_choice import Choices, TokenChoiceRouter

from .callers import check_callers_and_threads

pytestmark = pytest.mark.skipif(kernels() is None, reason="no C compiler (cc) is installed")
KINDS: tuple[RouterKind, ...] = ("switch", "top2", "s_base", "loss_free")
each_kind = pytest.mark.parametrize("kind", KINDS)
D_MODEL = 64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(kind: RouterKind, experts: int) -> TokenChoiceRouter:
    router = ROUTERS[kind](D_MODEL, experts, RouterSpec(kind=kind))
    assert isinstance(router, TokenChoiceRouter)
    router.weight.data = random(experts, D_MODEL, seed=1) / 4
    if isinstance(router, LossFreeRouter):
        router.bias += random(experts, seed=2) / 8
    return router.requires_grad_(False).eval()


def served(kind: RouterKind, experts: int) -> RowRouter:
    compiled, router = kernels(), plain(kind, experts)
    assert compiled is not None
    pack_router(router)
    use_row_routers(router, compiled)
    assert isinstance(router, RowRouter)
    return router


def choices(router: TokenChoiceRouter, logits_TE: Tensor) -> Choices:
    return router.choose(logits_TE, Groups(len(logits_TE)))


@each_kind
@pytest.mark.parametrize("experts", [2, 3, 8, 17, 64, 200])
def test_choices_are_those_of_the_plain_router(kind: RouterKind, experts: int) -> None:
    logits_TE = random(300, experts, seed=3) * 3
    wanted = choices(plain(kind, experts), logits_TE)
    found = choices(served(kind, experts), logits_TE)
    assert torch.equal(found.expert_KT, wanted.expert_KT)
    assert torch.allclose(found.weight_KT, wanted.weight_KT, rtol=1e-6, atol=0)
    assert torch.equal(found.probability_TE, wanted.probability_TE)


@each_kind
def test_routings_are_those_of_the_plain_router(kind: RouterKind) -> None:
    h_TD = random(200, D_MODEL, seed=3).bfloat16()
    wanted, found = (make(kind, 9).route(h_TD, Groups(200)) for make in (plain, served))
    assert torch.equal(found.token_R, wanted.token_R)
    assert torch.equal(found.expert_R, wanted.expert_R)
    assert torch.allclose(found.weight_R, wanted.weight_R, rtol=1e-5, atol=0)
    assert torch.equal(found.statistics.load_E, wanted.statistics.load_E)


@each_kind
@pytest.mark.parametrize("experts", [2, 9, 64])
def test_of_equal_experts_the_first_are_chosen(kind: RouterKind, experts: int) -> None:
    router = served(kind, experts)
    if kind == "loss_free":
        router.bias.zero_()
    found = choices(router, torch.zeros(3, experts))
    assert found.expert_KT.tolist() == [[0] * 3, [1] * 3][: len(found.expert_KT)]
    last_TE = torch.zeros(1, experts)
    last_TE[0, -1] = 2.0
    expert_KT = choices(router, last_TE).expert_KT
    assert expert_KT.flatten().tolist() == [experts - 1, 0][: len(expert_KT)]


@each_kind
@pytest.mark.parametrize("place", [0, 5, 19])
def test_what_is_not_a_number_is_not_hidden(kind: RouterKind, place: int) -> None:
    logits_TE = random(4, 20)
    logits_TE[2, place] = torch.nan
    found = choices(served(kind, 20), logits_TE)
    assert found.weight_KT[:, 2].isnan().any()
    assert found.weight_KT[:, [0, 1, 3]].isfinite().all()
    assert ((found.expert_KT >= 0) & (found.expert_KT < 20)).all()


@each_kind
def test_far_logits_weigh_as_they_should(kind: RouterKind) -> None:
    logits_TE = torch.tensor([[90.0, -90.0, 0.0], [-3e4, -3e4 - 1, -4e4], [1e-8, 0.0, 0.0]])
    wanted, found = (choices(make(kind, 3), logits_TE) for make in (plain, served))
    assert torch.equal(found.expert_KT[:, :2], wanted.expert_KT[:, :2])
    assert torch.allclose(found.weight_KT[:, :2], wanted.weight_KT[:, :2], rtol=1e-6, atol=1e-30)


@each_kind
def test_rows_callers_and_threads_change_no_bit(kind: RouterKind) -> None:
    router, logits_TE = served(kind, 24), random(200, 24, seed=3)

    def weights(some_TE: Tensor) -> Tensor:
        return choices(router, some_TE).weight_KT.t().contiguous()

    expected_TK = weights(logits_TE)
    for rows in (1, 2, 7, 64):
        assert torch.equal(weights(logits_TE[-rows:]), expected_TK[-rows:])
    assert torch.equal(weights(logits_TE.repeat(1, 2)[:, :24]), expected_TK)
    check_callers_and_threads(weights, logits_TE, expected_TK)


def test_others_stay_as_they_are() -> None:
    compiled = kernels()
    assert compiled is not None
    for router in (plain("switch", 4), ROUTERS["expert_choice"](64, 4, RouterSpec())):
        kind = type(router)
        use_row_routers(router, compiled)  # not packed, or experts choose
        assert type(router) is kind
        assert issubclass(kind, LinearRouter)
