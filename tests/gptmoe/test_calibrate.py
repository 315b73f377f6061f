"""Thresholds from data for a checkpoint without them.

Letters: E experts.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import gptmoe
from gptmoe.calibrate import calibrate
from gptmoe.checkpoint import Checkpoint, open_checkpoint, save, whole
from gptmoe.data import Batch
from gptmoe.errors import CheckpointError, ConfigError, DataError
from gptmoe.evaluate import evaluate
from gptmoe.model.expert_choice import choose
from gptmoe.model.routing import Groups
from gptmoe.model.spec import RouterSpec
from tests import small_model

CHOOSING = RouterSpec(kind="expert_choice", group_sequences=2, capacity_factor=1.0)
LENGTH = 24


class Rows:
    """Random samples; some have padding."""

    def __init__(self, count: int) -> None:
        self.num_samples = count
        random = np.random.default_rng(0)
        self.tokens = random.integers(500, size=(count, LENGTH + 1))
        self.valid = np.arange(LENGTH) < random.integers(LENGTH // 2, LENGTH + 1, size=(count, 1))

    def batch(self, first: int, count: int) -> Batch:
        rows = slice(first, first + count)
        valid = self.valid[rows]
        return Batch(self.tokens[rows, :-1], self.tokens[rows, 1:], valid, valid)


def written(folder: Path, router: RouterSpec = CHOOSING) -> Checkpoint:
    return open_checkpoint(small_model.write(folder, num_layers=2, d_model=32, router=router))


def without_state(stored: Checkpoint, folder: Path) -> Checkpoint:
    """The same as somebody made it who knows of no thresholds; with an optimizer's state."""
    names = [name for name in stored.names() if ".router.threshold" not in name]
    save(
        folder,
        rank=0,
        world=1,
        barrier=lambda: None,
        groups={
            "weights": [whole(n, stored.read(n)) for n in names if ".router.updates" not in n],
            "optimizer": [whole("exp_avg/norm.bias", torch.arange(32.0))],
        },
        config=stored.config,
        progress=stored.progress,
        copy_files=small_model.tokenizer().save,
    )
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("bare")
    return without_state(written(folder / "run"), folder / "old")


def test_without_thresholds_the_error_names_the_command(bare: Checkpoint) -> None:
    with pytest.raises(CheckpointError) as caught:
        gptmoe.load(bare.path)
    assert str(caught.value) == (
        f"{bare.path} has no layers.1.ffn.router.threshold, without which a router of kind "
        f"expert_choice cannot choose; make them from data: gptmoe calibrate {bare.path} "
        "--data FILE --output FOLDER"
    )


def test_thresholds_that_never_moved_are_refused_too(tmp_path: Path) -> None:
    stored = written(tmp_path / "run")
    state = {"layers.1.ffn.router.updates": torch.tensor(0)}
    tensors = {name: stored.read(name) for name in stored.names()} | state
    save(
        tmp_path / "new",
        rank=0,
        world=1,
        barrier=lambda: None,
        groups={"weights": [whole(name, values) for name, values in tensors.items()]},
        config=stored.config,
        progress={},
        copy_files=small_model.tokenizer().save,
    )
    with pytest.raises(CheckpointError, match=r"updates is 0, .* gptmoe calibrate .*new --data"):
        gptmoe.load(tmp_path / "new")


def test_a_calibrated_checkpoint_is_complete_and_evaluates(
    bare: Checkpoint, tmp_path: Path
) -> None:
    shares: list[float] = []
    done = calibrate(bare, Rows(9), tmp_path / "new", groups=64, progress=shares.append)
    assert done.groups == 4
    assert shares == [0.25, 0.5, 0.75, 1.0]

    new = open_checkpoint(tmp_path / "new")
    assert new.config == bare.config
    assert new.progress == bare.progress
    assert set(new.names()) - set(bare.names()) == {
        "layers.1.ffn.router.threshold",
        "layers.1.ffn.router.updates",
    }
    assert all(torch.equal(new.read(name), bare.read(name)) for name in bare.names())
    assert new.read("exp_avg/norm.bias", group="optimizer").tolist() == list(range(32))
    assert int(new.read("layers.1.ffn.router.updates")) == bare.progress["step"]
    assert torch.equal(new.read("layers.1.ffn.router.threshold"), done.thresholds[1])

    model = gptmoe.load(tmp_path / "new")
    result = evaluate(model.network, Rows(9), [1] * model.spec.vocab_size, 4)
    assert 0 < result.loss < 20
    assert model.generate("春风", max_new_tokens=4, temperature=0)


def test_thresholds_are_the_mean_cut_offs_of_the_groups(bare: Checkpoint, tmp_path: Path) -> None:
    rows = Rows(6)
    done = calibrate(bare, rows, tmp_path / "new", groups=3)
    model = gptmoe.load(tmp_path / "new", dtype="float64", packed=False).network
    scores = []
    block = model.get_submodule("layers.1")
    block.norm_ffn.register_forward_hook(lambda module, given, out: scores.append(out))  # type: ignore[attr-defined]
    cutoffs = []
    for first in (0, 2, 4):
        batch = rows.batch(first, 2)
        valid = torch.from_numpy(batch.valid_BT)
        with torch.inference_mode():
            model(torch.from_numpy(batch.tokens_BT), valid_BT=valid)
        h_TD = scores.pop().flatten(0, 1)
        score_TE = (h_TD @ block.ffn.router.weight.t()).softmax(-1)  # type: ignore[union-attr,operator]
        cutoffs.append(choose(score_TE, Groups(2 * LENGTH, valid.flatten()), 1.0)[1][0])
    expected_E = torch.stack(cutoffs).mean(0).float()
    torch.testing.assert_close(done.thresholds[1], expected_E, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_calibrated(bare: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already; name a new folder"):
        calibrate(bare, Rows(4), bare.path)
    with pytest.raises(DataError, match=r"has 1 samples, a routing group has 2 .* give more data"):
        calibrate(bare, Rows(1), tmp_path / "new")
    switch = written(tmp_path / "switch", RouterSpec())
    with pytest.raises(ConfigError, match="has the router switch; only expert_choice has"):
        calibrate(switch, Rows(4), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_acausal_evaluation_is_another_number_and_leaves_no_trace(tmp_path: Path) -> None:
    network = gptmoe.load(written(tmp_path).path, packed=False).network
    rows, characters = Rows(8), [1] * network.spec.vocab_size
    causal = evaluate(network, rows, characters, 4)
    acausal = evaluate(network, rows, characters, 4, acausal=True)
    assert acausal.tokens == causal.tokens
    assert acausal.loss != causal.loss
    assert evaluate(network, rows, characters, 4) == causal
    assert evaluate(network, rows, characters, 8, acausal=True) == acausal
