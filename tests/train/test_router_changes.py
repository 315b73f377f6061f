"""A router that is not that of the checkpoint: what may change, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest

import gptmoe
from gptmoe.checkpoint import checkpoint_name, latest, save, whole
from gptmoe.errors import ConfigError
from gptmoe.model.spec import RouterSpec
from gptmoe.text import load_tokenizer
from tests.train.conftest import Configure
from tests.train.test_config import STORED
from tests.train.test_plan import finetuning
from train.model_config import ModelConfig
from train.plan import make_plan


def test_a_run_of_before_other_routers_goes_on(configure: Configure, trained: Path) -> None:
    """Its config names fewer options; those that it lacks are as they were then."""
    folder = latest(trained)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = ("kind", "capacity_factor", "min_capacity", "aux_loss_coef", "z_loss_coef")
    router = {name: stored["model"]["router"][name] for name in (*known, "group_sequences")}
    del stored["model"]["residual_moe"]
    old = trained / "checkpoints" / checkpoint_name(3)
    network = gptmoe.load(folder, packed=False).network
    save(
        old,
        rank=0,
        world=1,
        barrier=lambda: None,
        groups={"weights": [whole(n, p.detach()) for n, p in network.named_parameters()]},
        config={**stored, "model": {**stored["model"], "router": router}},
        progress={"step": 3, "samples": 48},
        copy_files=load_tokenizer(folder).save,
    )
    assert make_plan("pretrain", configure()).resume_from == old


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("router.kind=loss_free", "router.kind=loss_free is not that of model.checkpoint, switch"),
        (
            "router.kind=1",
            "router.kind=s_base is not that of model.checkpoint, switch",
        ),
    ],
)
def test_another_router_than_the_checkpoint_s_is_refused(
    configure: Configure, trained: Path, pairs: Path, tmp_path: Path, override: str, message: str
) -> None:
    config = configure(f"run.dir={tmp_path / 'tuned'}", f"data.path={pairs}", override)
    with pytest.raises(ConfigError, match=message) as caught:
        make_plan("finetune", finetuning(config, trained))
    assert str(caught.value).endswith("use router.kind=switch, or start without model.checkpoint")


def test_layers_behind_the_experts_are_those_of_the_checkpoint() -> None:
    learned = RouterSpec(kind="expert_choice", residual_depth=2)
    stored = dataclasses.replace(STORED, router=learned)
    other = dataclasses.replace(learned, margin_coef=0.0)
    assert ModelConfig().refine(stored, other).router == other
    shallow = dataclasses.replace(learned, residual_depth=1)
    with pytest.raises(ConfigError, match=r"^router.residual_depth=1 is not that of .*, 2, whose"):
        ModelConfig().refine(stored, shallow)


def test_a_dense_checkpoint_has_no_router_to_keep() -> None:
    dense, router = dataclasses.replace(STORED, num_experts=()), RouterSpec(kind="s_base")
    assert ModelConfig().refine(dense, router).router == router
