"""What every router keeps, whatever it does: causality, independence, one update, no state written.

Letters: B sequences, T tokens.
"""

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor

from gptmoe.config import build, to_dict
from gptmoe.errors import ConfigError
from gptmoe.model.initialize import initialize
from gptmoe.model.jitter import Jitter
from gptmoe.model.moe import MoE
from gptmoe.model.routers import ROUTERS, make_router
from gptmoe.model.routing import Groups, LinearRouter, Statistics
from gptmoe.model.spec import KINDS, ROUTER_CODES, ModelSpec, RouterKind, RouterSpec
from gptmoe.model.transformer import GPT
from gptmoe.parallel.recompute import Recompute, recompute
from tests.small_model import settle

VOCAB, LENGTH = 101, 16
SPEC = ModelSpec(
    num_layers=4,
    d_model=32,
    num_heads=4,
    d_ff=64,
    vocab_size=VOCAB,
    max_seq_len=24,
    num_experts=(4, 6),
    init_std=0.2,
    router=RouterSpec(group_sequences=2, capacity_factor=1.0, min_capacity=0, z_loss_coef=1e-3),
)
each_kind = pytest.mark.parametrize("kind", ROUTERS)


def spec_of(kind: RouterKind, **changes: object) -> ModelSpec:
    router = dataclasses.replace(SPEC.router, kind=kind, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(SPEC, router=router)


def make_model(kind: RouterKind, **changes: object) -> GPT:
    """In float64, its routers with a state that is not that of the beginning."""
    model = GPT(spec_of(kind, **changes), torch.float64).double()
    initialize(model, seed=0)
    settle(model)
    return model


def make_tokens(batch: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: GPT, token_BT: Tensor, valid_BT: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model.logits(model(token_BT, valid_BT=valid_BT).hidden_BTD)


def routers_of(model: GPT) -> list[LinearRouter]:
    ffns = [model.get_submodule(f"layers.{layer}.ffn") for layer in model.spec.moe_layers]
    routers = [ffn.router for ffn in ffns if isinstance(ffn, MoE)]
    assert all(isinstance(router, LinearRouter) for router in routers)
    return [router for router in routers if isinstance(router, LinearRouter)]


@each_kind
@pytest.mark.parametrize("edited", [1, 7, 15])
def test_later_tokens_change_no_earlier_logit(kind: RouterKind, edited: int) -> None:
    model = make_model(kind).eval()
    token_BT = make_tokens(3)
    other_BT = token_BT.clone()
    other_BT[:, edited:] = (other_BT[:, edited:] + 1) % VOCAB
    before, after = logits_of(model, token_BT), logits_of(model, other_BT)
    torch.testing.assert_close(before[:, :edited], after[:, :edited], rtol=1e-12, atol=1e-12)
    assert ((before - after)[:, edited].abs().amax(-1) > 1e-3).all()


@each_kind
def test_neighbours_and_padding_change_no_logit(kind: RouterKind) -> None:
    model = make_model(kind).eval()
    token_BT = make_tokens(5)
    together = logits_of(model, token_BT)
    for row in range(5):
        alone = logits_of(model, token_BT[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-12, atol=1e-12)
    padded_BT = torch.cat([token_BT, make_tokens(5, 4, seed=1)], dim=1)
    valid_BT = torch.arange(LENGTH + 4).expand(5, -1) < LENGTH
    padded = logits_of(model, padded_BT, valid_BT)[:, :LENGTH]
    torch.testing.assert_close(padded, together, rtol=1e-12, atol=1e-12)


@each_kind
def test_nothing_is_dropped_at_evaluation(kind: RouterKind) -> None:
    model = make_model(kind, capacity_factor=0.3).eval()
    with torch.no_grad():
        routings = model(make_tokens(4)).routings
    assert [int(routing.statistics.dropped) for routing in routings] == [0, 0]
    assert all(routing.losses == {} for routing in routings)


@each_kind
def test_routing_writes_no_state(kind: RouterKind) -> None:
    model = make_model(kind)
    before = copy.deepcopy(model.state_dict())
    for mode in (True, False):
        output = model.train(mode)(make_tokens(4))
        output.hidden_BTD.sum().backward()
        assert [int(r.statistics.tokens) for r in output.routings] == [4 * LENGTH] * 2
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@each_kind
@pytest.mark.parametrize("microbatch", [2, 4])
@pytest.mark.parametrize("what", ["none", "full"])
def test_microbatches_and_recompute_teach_the_router_the_same(
    kind: RouterKind, microbatch: int, what: Recompute
) -> None:
    expected = one_step(make_model(kind), 8)
    model = make_model(kind)
    recompute(model, what)
    found = one_step(model, microbatch)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def one_step(model: GPT, microbatch: int) -> dict[str, Tensor]:
    """Gradients of a step of 8 sequences, and the state that the routers learn from it."""
    statistics = [Statistics.zero(count) for count in model.spec.num_experts]
    for tokens in make_tokens(8).split(microbatch):
        output = model.train()(tokens)
        total = output.hidden_BTD.square().sum()
        for routing in output.routings:
            total = total + sum(routing.losses.values())
        total.backward()
        counted = [routing.statistics for routing in output.routings]
        statistics = [a + b for a, b in zip(statistics, counted, strict=True)]
    for router, seen in zip(routers_of(model), statistics, strict=True):
        router.update(seen)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads | dict(model.named_buffers())


@each_kind
def test_statistics_count_each_token_and_row(kind: RouterKind) -> None:
    model = make_model(kind, capacity_factor=0.5)
    valid_BT = torch.arange(LENGTH).expand(4, -1) < 11
    with torch.no_grad():
        routings = model(make_tokens(4), valid_BT=valid_BT).routings
    for routing in routings:
        seen = routing.statistics
        taken = torch.zeros(4 * LENGTH, dtype=torch.bool)
        taken[routing.token_R] = True
        assert not taken[~valid_BT.flatten()].any()
        assert int(seen.tokens) == 44
        assert int(seen.unrouted) == 44 - int(taken.sum())
        assert int(seen.load_E.sum() - seen.dropped) == len(routing.token_R)
        assert 0 < float(seen.entropy) <= 44 * math.log(routing.num_experts)
        assert seen.cutoff_E.dtype == torch.float64


def test_every_kind_has_a_router() -> None:
    assert set(ROUTERS) == set(KINDS)


@each_kind
def test_an_untrained_router_has_zeros_for_state(kind: RouterKind) -> None:
    for _, buffer in make_router(spec_of(kind), 4).named_buffers():
        assert not buffer.any()


@each_kind
def test_half_precision_tokens_are_routed_in_float32(kind: RouterKind) -> None:
    router = make_router(spec_of(kind), 4)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    h_TD = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    routing = router.route(h_TD, Groups(16))
    wide = router.route(h_TD.float(), Groups(16))
    assert routing.weight_R.dtype == torch.float32
    assert torch.equal(routing.weight_R, wide.weight_R)
    assert {loss.dtype for loss in routing.losses.values()} == {torch.float32}


def jitter(step: int = 1, first_sample: int = 0) -> Jitter:
    return Jitter(seed=3, step=step, first_sample=first_sample, length=LENGTH)


@pytest.mark.parametrize("kind", ["switch", "top2"])
def test_jitter_is_the_samples_own(kind: RouterKind) -> None:
    model = make_model(kind, jitter=0.3)
    token_BT = make_tokens(4)

    def weights(tokens: Tensor, noise: Jitter | None) -> list[Tensor]:
        with torch.no_grad():
            routings = model(tokens, jitter=noise).routings
        return [routing.weight_R for routing in routings]

    whole = weights(token_BT, jitter())
    halves = [weights(token_BT[i : i + 2], jitter(first_sample=i)) for i in (0, 2)]
    for layer in (0, 1):
        both = torch.cat([half[layer] for half in halves])
        torch.testing.assert_close(both.sort().values, whole[layer].sort().values)
    assert not torch.equal(whole[0].sort().values, weights(token_BT, None)[0].sort().values)
    other = weights(token_BT, jitter(step=2))[0]
    assert other.shape != whole[0].shape or not torch.equal(other, whole[0])
    model.eval()
    assert torch.equal(logits_of(model, token_BT), logits_of(model, token_BT))
    assert torch.equal(weights(token_BT, jitter())[0], weights(token_BT, None)[0])


def test_noise_lies_in_its_range_and_differs_by_layer_and_channel() -> None:
    ones_TD = torch.ones(2 * LENGTH, 32, dtype=torch.float64)
    noise = jitter()(ones_TD, 0.1)
    assert float(noise.min()) >= 0.9
    assert float(noise.max()) < 1.1
    assert float(noise.std()) == pytest.approx(0.2 / math.sqrt(12), rel=0.1)
    assert len(noise.unique()) == noise.numel()
    groups = Groups(LENGTH, jitter=jitter()).in_layer(3)
    assert groups.jitter is not None
    assert not torch.equal(groups.jitter(ones_TD, 0.1), noise)
    assert Groups(LENGTH).in_layer(3) == Groups(LENGTH)


@pytest.mark.parametrize(("code", "name"), ROUTER_CODES.items())
def test_the_described_codes_are_other_names(code: int, name: str) -> None:
    assert build(RouterSpec, {"kind": code}) == RouterSpec(kind=name)  # type: ignore[arg-type]
    assert to_dict(build(RouterSpec, {"kind": code}))["kind"] == name


@pytest.mark.parametrize("kind", [3, True, "topk"])
def test_an_unknown_router_is_named_with_those_that_there_are(kind: object) -> None:
    names = ", ".join(map(repr, KINDS))
    with pytest.raises(ConfigError) as caught:
        build(RouterSpec, {"kind": kind}, "router.")
    assert str(caught.value) == f"router.kind={kind!r} is not known; use one of {names}"
    with pytest.raises(ConfigError, match=f"^router.kind={kind!r} is not known; use one of switch"):
        RouterSpec(kind=kind)  # type: ignore[arg-type]
