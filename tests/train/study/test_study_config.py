"""What a study asks for, who trains what, and which configs are refused."""

from pathlib import Path

import pytest

from gptmoe.config import load, to_dict
from gptmoe.errors import ConfigError
from tests.train.study.conftest import TINY, Configure
from train.study.config import StudyConfig
from train.study.order import Order, read_order
from train.study.plan import arm_runs, sized, speed_runs


def test_arms_of_a_seed_differ_in_nothing_but_what_they_are(configure: Configure) -> None:
    config = configure("study.seeds=[3,5]", 'study.arms=["switch","dense","dense_2x"]')
    runs = arm_runs(config, sized(config, 3072))
    assert [run.name for run in runs] == [
        f"{arm}, seed {seed}" for seed in (3, 5) for arm in ("dense", "dense_2x", "switch-4")
    ]
    dense, twice, switch = (to_dict(run.config) for run in runs[:3])
    for other in (twice, switch):
        differing = {key for key in dense if dense[key] != other[key]}
        assert differing <= {"run", "model", "router"}
        assert other["run"]["seed"] == 3
    assert (twice["model"]["num_layers"], twice["model"]["num_experts"]) == (4, 0)
    assert (switch["model"]["num_layers"], switch["model"]["num_experts"]) == (2, 4)
    assert switch["router"]["kind"] == "switch"


def test_each_number_of_experts_is_a_variant(configure: Configure) -> None:
    config = configure("study.experts=[4,2]", 'study.arms=["dense","s_base"]')
    names = [it.variant.name for it in sized(config, 3072)]
    assert names == ["dense", "s_base-4", "s_base-2"]


def test_an_override_holds_for_its_arm_alone(configure: Configure) -> None:
    config = configure('overrides.s_base=["schedule.learning_rate=1e-3","router.z_loss_coef=0.1"]')
    rates = {run.variant.arm: run.config for run in arm_runs(config, sized(config, 3072))}
    assert rates["s_base"].schedule.learning_rate == 1e-3
    assert rates["s_base"].router.z_loss_coef == 0.1
    assert rates["switch"].schedule.learning_rate == 3e-3
    assert rates["expert_choice"].router.threshold_warmup == 4


def test_s_base_is_timed_with_few_and_many_iterations(configure: Configure) -> None:
    config = configure("study.speed_steps=3", "study.speed_rounds=2")
    runs = speed_runs(config, sized(config, 3072))
    names = [run.name for run in runs if run.round == 1]
    assert names == [
        "dense", "switch-4", "s_base-4, 8 iterations", "s_base-4, 50 iterations",
        "expert_choice-4",
    ]  # fmt: skip
    assert len(runs) == 2 * len(names)
    assert {run.config.router.sinkhorn_iterations for run in runs} == {8, 50}
    assert {run.config.train.max_steps for run in runs} == {3}
    assert len({run.folder for run in runs}) == len(runs)


def test_an_order_travels_by_file_and_its_digest_names_what_is_done(
    configure: Configure, tmp_path: Path
) -> None:
    config = configure()
    run = arm_runs(config, sized(config, 3072))[0]
    order = Order(kind="train", config=run.config, threads=1, final_samples=4)
    assert read_order(order.write()) == order
    elsewhere = configure(f"study.dir={tmp_path / 'other'}", "train.max_steps=6")
    moved = arm_runs(elsewhere, sized(elsewhere, 3072))[0].config
    same = Order(kind="train", config=moved, threads=2, final_samples=4, until_s=1.0)
    assert same.digest == order.digest
    longer = configure("train.max_steps=8")
    changed = arm_runs(longer, sized(longer, 3072))[0].config
    assert Order(kind="train", config=changed, threads=1, final_samples=4).digest != order.digest


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('study.arms=["dense","swich"]',
         r"study.arms names 'swich', which is no arm; did you mean switch\? known arms: dense, "),
        ('study.arms=["switch"]', r"study.arms=\['switch'\] lacks dense, whose cost the others"),
        ('study.arms=["dense","dense"]', r"names an arm twice; once is enough"),
        ("study.seeds=[]", r"study.seeds=\[\] must name each number once"),
        ("study.experts=[8,8]", r"study.experts=\[8, 8\] must name each number once"),
        ("study.experts=[1]", r"study.experts=\[1\] must be numbers of at least 2"),
        ("study.parallel=0", "study.parallel=0 must be at least 1"),
        ("study.smooth=2", "study.smooth=2 must be odd: as many before as after"),
        ("data.inputs=[]", "data.inputs is empty; name at least one file, folder or glob"),
        ("data.tokenizer_characters=0", "data.tokenizer_characters=0 must be at least 1"),
        ("model.num_experts=4", "leave out model.preset, .* study.experts says how many experts"),
        ("overrides.sbase=[]", r"overrides names 'sbase', which is no arm; did you mean s_base\?"),
    ],
)  # fmt: skip
def test_what_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(StudyConfig, TINY, [override])


def test_a_study_needs_its_number_of_steps(tmp_path: Path) -> None:
    file = tmp_path / "endless.toml"
    text = TINY.read_text(encoding="utf-8").replace("max_steps = 6", "epochs = 1.0")
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"needs train.max_steps: its arms take equally many"):
        load(StudyConfig, file)


@pytest.mark.parametrize("line", ["train.max_steps=9", "data.seq_len=8", 'router.kind="switch"'])
def test_arms_share_what_makes_them_comparable(configure: Configure, line: str) -> None:
    config = configure(f"overrides.s_base=['{line}']")
    with pytest.raises(ConfigError, match=r"overrides.s_base holds .* share everything else"):
        sized(config, 3072)


def test_inputs_start_at_the_configs_folder() -> None:
    config = load(StudyConfig, TINY)
    assert config.data.inputs == (TINY.parent / "../corpus/poems.tsv",)
