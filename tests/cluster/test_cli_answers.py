"""gptmoe generate, evaluate, calibrate and import on a real, tiny checkpoint, in this process."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import gptmoe
from gptmoe.checkpoint import open_checkpoint, save, whole
from gptmoe.config import to_dict
from gptmoe.model.initialize import initialize
from gptmoe.model.spec import ModelSpec, RouterSpec
from gptmoe.model.transformer import GPT
from gptmoe.text import train_jiebabpe
from tests import small_model

from .conftest import Run

POEM = "春风又绿江南岸，明月何时照我还。"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = ModelSpec(
        num_layers=2,
        d_model=32,
        num_heads=2,
        d_ff=128,
        vocab_size=512,
        max_seq_len=64,
        num_experts=(4,),
        init_std=0.1,
    )
    network = GPT(spec)
    initialize(network, seed=1)
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "step-00000001"
    folder.parent.mkdir()
    save(
        folder,
        rank=0,
        world=1,
        barrier=lambda: None,
        groups={"weights": [whole(name, it.detach()) for name, it in network.named_parameters()]},
        config={"model": to_dict(spec)},
        progress={"step": 1},
        copy_files=train_jiebabpe([POEM] * 4, vocab_size=280).save,
    )
    return folder


def test_a_prompt_is_continued(run: Run, checkpoint: Path) -> None:
    options = ["--checkpoint", str(checkpoint), "--max-new-tokens", "12", "--temperature", "0"]
    text = gptmoe.load(checkpoint).generate("春风", max_new_tokens=12, temperature=0)
    assert run("generate", "春风", *options) == (0, f"春风{text}\n", "")
    assert run("generate", "春风", *options, "--stream") == (0, f"春风{text}\n", "")
    code, out, _ = run("generate", "春风", *options, "--json")
    assert (code, json.loads(out)) == (0, {"prompt": "春风", "text": text})


def test_a_file_of_prompts_is_answered(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text('[{"id": 1, "txt": "春风"}, {"id": 2, "txt": "明月"}]')
    words = ["--checkpoint", str(checkpoint), "--max-new-tokens", "8", "--temperature", "0"]
    files = ["--input", str(tmp_path / "in.json"), "--output", str(tmp_path / "out.json")]
    assert run("generate", *words, *files, "--task", "poetry") == (0, "", "")
    rows = json.loads((tmp_path / "out.json").read_text())
    model = gptmoe.load(checkpoint)
    texts = model.generate(["春风", "明月"], max_new_tokens=8, temperature=0)
    assert rows == [
        {"id": 1, "prompt": "春风", "output_poetry": "春风" + texts[0]},
        {"id": 2, "prompt": "明月", "output_poetry": "明月" + texts[1]},
    ]


def test_a_long_file_is_answered_in_its_order(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    items: list[dict[str, Any]] = [
        {"id": index, "txt": "春风"[: 1 + index % 2], "max_new_tokens": 1 + index % 7}
        for index in range(70)
    ]
    items.append({"id": "last", "txt": "明月"})
    (tmp_path / "in.json").write_text(json.dumps(items))
    words = ["--checkpoint", str(checkpoint), "--max-new-tokens", "9", "--temperature", "0"]
    code, out, err = run("generate", *words, "--input", str(tmp_path / "in.json"))
    assert (code, err) == (0, "")
    model = gptmoe.load(checkpoint)
    for row, item in zip(json.loads(out), items, strict=True):
        most, prompt = item.get("max_new_tokens", 9), item["txt"]
        text = prompt + model.generate(prompt, max_new_tokens=most, temperature=0)
        assert row == {"id": item["id"], "prompt": prompt, "output_text": text}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("", "an empty text"), ("\udcff", "not valid Unicode"), ("长" * 99, "")],
)
def test_a_prompt_that_cannot_be_continued(
    run: Run, checkpoint: Path, prompt: str, expected: str
) -> None:
    code, out, err = run("generate", prompt, "--checkpoint", str(checkpoint))
    assert (code, out) == (2, "")
    assert err.startswith("error: prompt")
    assert expected in err


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "春", "--checkpoint", "nope"),
        ("evaluate", "--checkpoint", "nope", "--data", "x"),
        ("import", "nope", "--output", "new"),
    ],
)
def test_a_missing_folder_is_named(
    run: Run, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: nope")
    assert list(tmp_path.iterdir()) == []


def test_a_text_is_measured(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "poems.txt"
    data.write_text(f"{POEM}\n\n{POEM}\n")
    code, out, err = run("evaluate", "--checkpoint", str(checkpoint), "--data", str(data), "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    tokens = gptmoe.load(checkpoint).tokenizer.encode(POEM)
    assert facts["tokens"] == 2 * (len(tokens) + 1) - 1  # all but the very first token
    assert facts["bits_per_char"] > 0
    assert 4 < facts["loss"] < 8

    code, out, _ = run("evaluate", "--checkpoint", str(checkpoint), "--data", str(data))
    assert out.startswith(f"loss {facts['loss']:.4f}  perplexity")
    code, _, err = run("evaluate", "--checkpoint", str(checkpoint), "--data", str(tmp_path / "no"))
    assert (code, "does not exist" in err) == (2, True)


def test_rounded_weights_are_measured(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "poems.txt"
    data.write_text(f"{POEM}\n\n{POEM}\n")
    words = ("evaluate", "--checkpoint", str(checkpoint), "--data", str(data), "--json")
    losses = [
        json.loads(run(*words, "--weights", weights)[1])["loss"] for weights in ("", "int8", "int4")
    ]
    assert losses[0] != losses[1] != losses[2]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
    assert losses[2] == pytest.approx(losses[0], abs=0.5)


@pytest.mark.parametrize("seq_len", [-1, 65])
def test_samples_are_no_longer_than_the_model_reads(
    run: Run, checkpoint: Path, tmp_path: Path, seq_len: int
) -> None:
    data = tmp_path / "poems.txt"
    data.write_text(f"{POEM * 20}\n")
    words = (str(checkpoint), "--data", str(data), "--seq-len", str(seq_len))
    expected = (
        f"error: --seq-len {seq_len} is not what this model reads, 1 to 64 tokens; name such a "
        "number, or 0 for the length of training\n"
    )
    assert run("evaluate", "--checkpoint", *words) == (2, "", expected)
    assert run("calibrate", *words, "--output", str(tmp_path / "new")) == (2, "", expected)


def test_a_checkpoint_is_verified(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    code, out, _ = run("verify", str(checkpoint), "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["checkpoint"] == str(checkpoint)
    assert facts["tensors"] == len(list(GPT(gptmoe.load(checkpoint).spec).named_parameters()))
    assert facts["bytes"] == sum(
        path.stat().st_size for path in checkpoint.iterdir() if path.name != "manifest.json"
    )
    assert f"is intact: {facts['files']} files" in run("verify", str(checkpoint))[1]

    copy = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    damaged = next(copy.glob("weights-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    code, out, err = run("verify", str(copy))
    assert (code, out) == (2, "")
    assert f"error: {damaged.name} in {copy} is corrupt" in err


def test_rows_with_targets_are_measured_on_their_targets(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    data = tmp_path / "qa.jsonl"
    data.write_text('{"src_txt": "春风", "tgt_txt": "又绿"}\n' * 3)
    words = ["--checkpoint", str(checkpoint), "--data", str(data), "--kind", "finetune", "--json"]
    _, out, _ = run("evaluate", *words)
    target = gptmoe.load(checkpoint).tokenizer.encode("又绿")
    assert json.loads(out)["tokens"] == 3 * (len(target) + 1)


def test_calibrate_gives_thresholds_to_a_checkpoint_without(run: Run, tmp_path: Path) -> None:
    router = RouterSpec(kind="expert_choice", group_sequences=1)
    stored = open_checkpoint(
        small_model.write(tmp_path / "run", num_layers=2, d_model=32, router=router)
    )
    names = [name for name in stored.names() if ".router." not in name or "weight" in name]
    save(
        tmp_path / "bare",
        rank=0,
        world=1,
        barrier=lambda: None,
        groups={"weights": [whole(name, stored.read(name)) for name in names]},
        config=stored.config,
        progress={"step": 1},
        copy_files=small_model.tokenizer().save,
    )
    data, new = tmp_path / "poems.tsv", tmp_path / "new"
    data.write_text(f"{POEM}\n" * 40, encoding="utf-8")
    code, _, err = run("evaluate", "--checkpoint", str(tmp_path / "bare"), "--data", str(data))
    assert code == 2
    assert f"gptmoe calibrate {tmp_path / 'bare'} --data FILE --output FOLDER" in err

    words = (str(tmp_path / "bare"), "--data", str(data), "--output", str(new), "--seq-len", "16")
    code, out, _ = run("calibrate", *words, "--groups", "3", "--json")
    facts = json.loads(out)
    assert (code, facts["checkpoint"], facts["groups"]) == (0, str(new), 3)
    assert len(facts["thresholds"]["1"]) == 8
    code, out, _ = run("evaluate", "--checkpoint", str(new), "--data", str(data), "--json")
    assert (code, json.loads(out)["checkpoint"]) == (0, str(new))
    code, _, err = run("calibrate", *words)
    assert (code, err) == (
        2,
        f"error: {new} exists already; name a new folder for the checkpoint\n",
    )


def test_what_cannot_be_done_with_a_file_is_said_before_any_work(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    words = ("--checkpoint", str(checkpoint))
    (tmp_path / "in.json").write_text(json.dumps([{"id": n, "txt": "春" * n} for n in (1, 999)]))
    file = ("--input", str(tmp_path / "in.json"))
    for arguments, expected in (
        (("春风", *words, "--output", "out.txt"), "--output holds answers to --input FILE.json"),
        (("春风", "--target", "127.0.0.1:1", "--dtype", "bfloat16"), "--dtype is for --checkpoint"),
        ((*words, *file, "--output", str(tmp_path)), "cannot be written; name a file in a folder"),
        ((*words, *file), "text 2 of 2: prompt must be at most"),
        (("\udcff", "--target", "127.0.0.1:1"), "prompt is not valid Unicode text"),
    ):
        code, out, err = run("generate", *arguments)
        assert (code, out) == (2, ""), arguments
        assert expected in err


def test_a_server_that_is_away_leaves_older_answers_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text('[{"id": 1, "txt": "春风"}, {"id": 2, "txt": "明月"}]')
    (tmp_path / "out.json").write_text("older")
    words = ("--input", str(tmp_path / "in.json"), "--output", str(tmp_path / "out.json"))
    code, out, err = run("generate", *words, "--target", "127.0.0.1:1")
    assert (code, out) == (2, "")
    assert "2 of 2 prompts have no answer" in err
    assert "no server answers at 127.0.0.1:1" in err
    assert (tmp_path / "out.json").read_text() == "older"
