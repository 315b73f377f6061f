"""Routers in the loop: what they learn, when, and the noise that they see."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from gptmoe import data
from gptmoe.model.spec import ModelSpec
from gptmoe.parallel.loss_scale import LossScale
from gptmoe.parallel.recompute import Recompute, recompute
from tests.train.test_loop import MIXTURE, Repeated, trainer
from train.loop import Scaler, Trainer

LEARNING = dataclasses.replace(
    MIXTURE, router=dataclasses.replace(MIXTURE.router, kind="loss_free", bias_rate=0.01)
)


def state(learner: Trainer) -> dict[str, torch.Tensor]:
    """What the routers have learned."""
    return {name: buffer.clone() for name, buffer in learner.model.named_buffers()}


@pytest.mark.parametrize("microbatch_size", [4, 16])
@pytest.mark.parametrize("what", ["none", "full"])
def test_a_router_s_state_moves_once_a_step(
    prepared: Path, microbatch_size: int, what: Recompute
) -> None:
    learner = trainer(prepared, LEARNING, microbatch_size=microbatch_size)
    recompute(learner.model, what)
    values = learner.step(1)
    load_E = torch.tensor(values["expert_load"]).double()
    assert len(set(load_E.tolist())) > 1
    (bias,) = state(learner).values()
    torch.testing.assert_close(bias, 0.01 * (load_E.mean() - load_E).sign())
    plain = trainer(prepared, LEARNING)
    plain.step(1)
    for step in (2, 3):
        assert learner.step(step)["loss"] == pytest.approx(plain.step(step)["loss"], rel=1e-9)


def test_a_step_that_is_left_out_teaches_the_router_nothing(prepared: Path) -> None:
    learner = trainer(prepared, LEARNING, dtype=torch.float32)
    learner = dataclasses.replace(learner, scaler=Scaler(LossScale(value=4.0)))
    handle = learner.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    assert learner.step(1)["overflow"] == 1.0
    handle.remove()
    assert not state(learner)["layers.1.ffn.router.bias"].any()
    learner.step(2)
    assert state(learner)["layers.1.ffn.router.bias"].any()


def test_jitter_is_the_same_in_every_microbatch_and_another_in_every_step(prepared: Path) -> None:
    shaking = dataclasses.replace(
        MIXTURE, router=dataclasses.replace(MIXTURE.router, jitter=0.2, capacity_factor=4.0)
    )

    whole, parts = (trainer(prepared, shaking, microbatch_size=size).step(1) for size in (16, 4))
    for name in ("lm_loss", "router_entropy", "grad_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-9), name

    def loss(spec: ModelSpec, step: int = 1) -> object:
        learner = trainer(prepared, spec)
        order = data.open_samples(prepared, "validation", 24, seed=0)
        return dataclasses.replace(learner, samples=Repeated(order)).step(step)["lm_loss"]

    assert len({loss(MIXTURE), loss(shaking), loss(shaking, step=2)}) == 3
    assert loss(shaking) == loss(shaking)
