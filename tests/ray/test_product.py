"""What states the product: what Ray Train learned, Ray Serve says, with the core's numbers.

It types what a user types. Twelve steps on two workers that share the experts, one checkpoint, one
server; then each served token is compared with the model core's own forward pass.
"""

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gptmoe
from cluster.child import Child
from cluster.client import Client
from cluster.demo.run import await_endpoints
from gptmoe import metrics

ROOT = Path(__file__).parents[2]
PROMPTS = ("春风", "江上渔火", "明月照山河，一夜小楼听雨声。", "灯下读书" * 12)
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("product") / "run"
    words = ["pretrain", "configs/train/tiny.toml", "parallel.ep=2", "train.max_steps=12"]
    command = [sys.executable, "-m", "cluster.cli", *words, f"run.dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def target(run: Path) -> Iterator[str]:
    state_file, lines = run / "endpoints.json", list[str]()
    words = ["serve", "--checkpoint", str(run), "grpc_port=0", "http_port=0", "threads=1"]
    child = Child([*words, "--state-file", str(state_file)], on_line=lines.append)
    with child.attached():
        yield str(await_endpoints(state_file, child, lines)["grpc"])


def test_training_learned(run: Path) -> None:
    records = metrics.read(run / "metrics.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.3
    assert math.isfinite(records[-1]["bits_per_char"])


def test_the_served_text_and_numbers_are_the_cores(run: Path, target: str) -> None:
    torch.set_num_threads(1)  # as the server: the number of threads is part of a product's shape
    model, plain = gptmoe.load(run), gptmoe.load(run, packed=False)
    expected = model.generate(list(PROMPTS), max_new_tokens=NEW_TOKENS, temperature=0)
    with Client(target, timeout_s=120) as client:
        for prompt, text in zip(PROMPTS, expected, strict=True):
            chunks = list(
                client.stream(prompt, max_new_tokens=NEW_TOKENS, temperature=0.0, logprobs=True)
            )
            assert "".join(chunk.text for chunk in chunks) == text
            tokens = [token for chunk in chunks for token in chunk.token_ids]
            served = [value for chunk in chunks for value in chunk.logprobs]
            assert served == own_path(model, prompt, tokens)  # to the last bit
            assert served == pytest.approx(training_forward(plain, prompt, tokens), abs=1e-5)


def test_a_run_that_goes_on_refreshes_what_is_served(run: Path, target: str) -> None:
    """Last in this file: the weights are others afterwards.

    On these few poems validation improves until about step 20.
    """
    words = ["pretrain", "configs/train/tiny.toml", "parallel.ep=2", "train.max_steps=17"]
    words += [f"run.refresh={target}", f"run.dir={run}"]
    command = [sys.executable, "-m", "cluster.cli", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "THE DEPLOYMENT KEEPS ITS WEIGHTS" not in done.stderr
    (served,) = (run / "served").glob("step-*")
    assert served.name == "step-00000017"
    with Client(target, timeout_s=120) as client:
        answer = client.generate("春风", max_new_tokens=NEW_TOKENS, temperature=0.0)
        assert client.topology().checkpoint == str(served)
    assert answer.weights_version >= 1
    torch.set_num_threads(1)
    expected = gptmoe.load(served).generate("春风", max_new_tokens=NEW_TOKENS, temperature=0)
    assert answer.text == expected


def own_path(model: gptmoe.LoadedModel, prompt: str, tokens: list[int]) -> list[float]:
    """Log-probabilities of `tokens` after `prompt` from one pass over all, on generation's path."""
    prompt_ids = model.tokenizer.encode(prompt)
    logits_TV = model.logits([prompt_ids + tokens])[0, len(prompt_ids) - 1 : -1]
    return chosen(logits_TV[:, : model.tokenizer.vocab_size], tokens)


@torch.no_grad()
def training_forward(model: gptmoe.LoadedModel, prompt: str, tokens: list[int]) -> list[float]:
    """The same from the forward pass that training runs."""
    prompt_ids = model.tokenizer.encode(prompt)
    hidden_BTD = model.network(torch.tensor([prompt_ids + tokens])).hidden_BTD
    logits_TV = model.network.logits(hidden_BTD)[0, len(prompt_ids) - 1 : -1]
    assert logits_TV.argmax(-1).tolist() == tokens  # greedy
    return chosen(logits_TV, tokens)


def chosen(logits_TV: torch.Tensor, tokens: list[int]) -> list[float]:
    return [float(row.log_softmax(0)[token]) for row, token in zip(logits_TV, tokens, strict=True)]
