"""Batches by global sample index: what they hold, and that every reader sees the same."""

import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.data import (
    Batch,
    LineSamples,
    Manifest,
    Samples,
    Split,
    TokenSamples,
    open_samples,
    prepare,
)
from gptmoe.errors import ConfigError, DataError

Make = Callable[..., Path]
FIELDS = ("tokens_BT", "labels_BT", "weight_BT", "valid_BT")


def joined(parts: list[Batch]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS}


def pairs(*rows: tuple[str, str]) -> str:
    return "".join(json.dumps({"src_txt": s, "tgt_txt": t}) + "\n" for s, t in rows)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """A pretraining and a finetuning folder of 97 lines."""
    root = tmp_path_factory.mktemp("samples")
    source = root / "a.tsv"
    source.write_text("".join(f"第{i}首：{'雨' * (i % 7)}\n" for i in range(97)), "utf-8")
    for kind in ("pretrain", "finetune"):
        prepare([source], tokenizer, root / kind, kind=kind, validation_fraction=0.2)
    return {kind: root / kind for kind in ("pretrain", "finetune")}


def test_a_window_is_labelled_with_the_next_tokens(make: Make) -> None:
    folder = make("a.txt", "abcdefghij", kind="pretrain")  # 11 tokens with the end
    samples = open_samples(folder, "train", 3, 0)
    assert isinstance(samples, TokenSamples)
    assert samples.num_samples == 3
    batch = samples.batch(0, 3)
    assert batch.tokens_BT.dtype == batch.labels_BT.dtype == np.int64
    assert batch.weight_BT.all()
    assert batch.valid_BT.all()
    windows = {
        bytes([*tokens, labels[-1]]).decode()
        for tokens, labels in zip(batch.tokens_BT.tolist(), batch.labels_BT.tolist(), strict=True)
    }
    assert windows == {"abcd", "defg", "ghij"}
    assert np.array_equal(batch.tokens_BT[:, 1:], batch.labels_BT[:, :-1])


@given(seq_len=st.integers(1, 300))
def test_validation_labels_every_token_but_the_first_once(
    folders: dict[str, Path], seq_len: int
) -> None:
    folder = folders["pretrain"]
    samples = open_samples(folder, "validation", seq_len, 0)
    batch = samples.batch(0, samples.num_samples)
    stored = Manifest.load(folder).tokens(folder, "validation")
    assert np.array_equal(batch.labels_BT[batch.weight_BT], stored[1:])
    assert np.array_equal(batch.tokens_BT[batch.valid_BT], stored[:-1])
    assert not batch.tokens_BT[~batch.valid_BT].any()
    assert not batch.labels_BT[~batch.valid_BT].any()


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_every_sample_comes_once_an_epoch(folders: dict[str, Path], kind: str) -> None:
    samples = open_samples(folders[kind], "train", 16, seed=5)
    n = samples.num_samples
    epochs = [samples.batch(epoch * n, n) for epoch in range(3)]
    for epoch in epochs:
        rows = Counter(row.tobytes() for row in epoch.labels_BT)
        assert rows == Counter(row.tobytes() for row in epochs[0].labels_BT)
    assert not np.array_equal(epochs[0].labels_BT, epochs[1].labels_BT)
    other = open_samples(folders[kind], "train", 16, seed=6).batch(0, n)
    assert not np.array_equal(epochs[0].labels_BT, other.labels_BT)


@given(
    data=st.data(),
    kind=st.sampled_from(["pretrain", "finetune"]),
    split=st.sampled_from(["train", "validation"]),
)
def test_slices_of_any_ranks_join_to_the_batch(
    folders: dict[str, Path], data: st.DataObject, kind: str, split: Split
) -> None:
    def fresh() -> Samples:
        return open_samples(folders[kind], split, 16, seed=1)

    first = data.draw(st.integers(0, 3 * fresh().num_samples))
    counts = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    starts = [first + sum(counts[:rank]) for rank in range(len(counts))]
    whole = joined([fresh().batch(first, sum(counts))])
    parts = joined([fresh().batch(s, c) for s, c in zip(starts, counts, strict=True)])
    for name in FIELDS:
        assert np.array_equal(whole[name], parts[name])
        assert whole[name].shape == (sum(counts), 16)


def test_another_process_draws_the_same(folders: dict[str, Path]) -> None:
    folder = folders["finetune"]
    program = (
        "import sys; from pathlib import Path; from gptmoe.data import open_samples; "
        "print(open_samples(Path(sys.argv[1]), 'train', 16, 3).batch(70, 30).labels_BT.tolist())"
    )
    found = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True)
    here = open_samples(folder, "train", 16, 3).batch(70, 30).labels_BT.tolist()
    assert json.loads(found.stdout) == here


def test_validation_comes_in_order_and_starts_again(folders: dict[str, Path]) -> None:
    samples = open_samples(folders["finetune"], "validation", 16, seed=1)
    n = samples.num_samples
    twice = samples.batch(0, 2 * n).labels_BT
    assert np.array_equal(twice[:n], twice[n:])
    reseeded = open_samples(folders["finetune"], "validation", 16, seed=2)
    assert np.array_equal(reseeded.batch(0, n).labels_BT, twice[:n])


def test_shuffled_validation_is_the_same_samples_by_seed(folders: dict[str, Path]) -> None:
    folder = folders["pretrain"]
    plain = open_samples(folder, "validation", 4, 0)
    count = plain.num_samples
    shuffled, other = (
        open_samples(folder, "validation", 4, seed, shuffled=True).batch(0, count).labels_BT
        for seed in (1, 2)
    )
    in_order = plain.batch(0, count).labels_BT
    assert sorted(shuffled.tolist()) == sorted(in_order.tolist())
    assert shuffled.tolist() != in_order.tolist()
    assert shuffled.tolist() != other.tolist()


def test_a_line_bears_loss_on_text_and_separator(make: Make) -> None:
    folder = make("a.tsv", "abc", kind="finetune")
    batch = open_samples(folder, "train", 5, 0).batch(0, 1)
    assert batch.tokens_BT.tolist() == [[*b"abc", 0, 0]]
    assert batch.labels_BT.tolist() == [[*b"bc", 257, 0, 0]]
    assert batch.valid_BT.tolist() == [[True, True, True, False, False]]
    assert np.array_equal(batch.weight_BT, batch.valid_BT)


def test_a_pair_bears_loss_on_target_and_separator(make: Make) -> None:
    folder = make("a.jsonl", pairs(("abc", "de")), kind="finetune")
    batch = open_samples(folder, "train", 7, 0).batch(0, 1)
    assert batch.tokens_BT.tolist() == [[*b"abcde", 0, 0]]
    assert batch.labels_BT.tolist() == [[*b"bcde", 257, 0, 0]]
    assert batch.labels_BT[batch.weight_BT].tolist() == [*b"de", 257]
    assert batch.valid_BT.sum() == 5


def test_long_rows_lose_their_end(make: Make) -> None:
    folder = make("a.tsv", "abcdef", kind="finetune")
    batch = open_samples(folder, "train", 3, 0).batch(0, 1)
    assert batch.tokens_BT.tolist() == [[*b"abc"]]
    assert batch.labels_BT.tolist() == [[*b"bcd"]]


def test_rows_that_would_lose_their_target_are_left_out(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [("abcd", "ef"), ("abc", "de"), ("x" * 9, "y"), ("a", "b")]
    folder = make("a.jsonl", pairs(*rows), kind="finetune")
    samples = open_samples(folder, "train", 3, 0)
    assert isinstance(samples, LineSamples)
    assert (samples.num_samples, samples.num_dropped) == (2, 2)
    assert "2 of 4 rows of the train split" in caplog.text
    batch = samples.batch(0, 2)
    assert batch.weight_BT.any(axis=1).all()
    assert sorted(batch.labels_BT[batch.weight_BT].tolist()) == [*b"bd", 257]


def test_rows_that_all_lose_their_target_are_refused(make: Make) -> None:
    folder = make("a.jsonl", pairs(("abcd", "ef"), ("abcde", "f")), kind="finetune")
    message = r"all 2 rows of the train split .*at data\.seq_len=3; set it to 4 or more"
    with pytest.raises(DataError, match=message):
        open_samples(folder, "train", 3, 0)
    assert open_samples(folder, "train", 4, 0).num_samples == 1


def test_too_few_tokens_for_one_sample_are_refused(make: Make) -> None:
    folder = make("a.tsv", "abc", kind="pretrain")
    message = r"holds 4 tokens and one sample needs 5; .* set data\.seq_len to 3 or less"
    with pytest.raises(DataError, match=message):
        open_samples(folder, "train", 4, 0)
    assert open_samples(folder, "train", 3, 0).num_samples == 1


def test_an_empty_split_and_wrong_numbers_are_refused(make: Make) -> None:
    folder = make("a.tsv", "abc", kind="pretrain")
    with pytest.raises(DataError, match=r"validation split of .* is empty; .*validation_fraction"):
        open_samples(folder, "validation", 2, 0)
    with pytest.raises(ConfigError, match=r"data\.seq_len=0 must be at least 1"):
        open_samples(folder, "train", 0, 0)
    with pytest.raises(ConfigError, match=r"run\.seed=-1 must not be negative"):
        open_samples(folder, "train", 2, -1)


def test_another_tokenizer_is_refused(make: Make, tokenizer: Any) -> None:
    folder = make("a.tsv", "abc", kind="pretrain")
    assert open_samples(folder, "train", 2, 0, expect_tokenizer=tokenizer.digest)
    with pytest.raises(DataError, match=rf"tokenizer {tokenizer.digest}, the model uses 012345"):
        open_samples(folder, "train", 2, 0, expect_tokenizer="012345")


def test_a_huge_corpus_costs_little_memory(make: Make) -> None:
    folder = make("a.tsv", "abc", kind="pretrain")
    num_bytes = 2**35
    with (folder / "train-tokens.bin").open("r+b") as file:
        file.truncate(num_bytes)  # a hole on the disk
    path = folder / "manifest.json"
    raw = json.loads(path.read_text("utf-8"))
    raw["files"][0]["num_bytes"] = num_bytes
    path.write_text(json.dumps(raw), "utf-8")
    tracemalloc.start()
    samples = open_samples(folder, "train", 2**16, 0)
    samples.batch(0, 2)
    assert samples.num_samples == 2**18 - 1
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()
