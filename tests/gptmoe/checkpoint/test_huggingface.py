"""Importing GPT-2 from a Hugging Face folder: the same logits, or a message on what differs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from gptmoe.checkpoint import import_gpt2, open_checkpoint, read_gpt2
from gptmoe.config import build
from gptmoe.errors import CheckpointError, DataError
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT
from gptmoe.text import load_tokenizer

TEXT = "the moon over the river, the river under the moon"


@pytest.fixture
def network() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    end = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=300, n_positions=32, n_embd=24, n_layer=2, n_head=3, **end)
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():  # biases and norms too: at first they are 0 and 1
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def folder(network: GPT2LMHeadModel, tmp_path: Path) -> Path:
    """A folder as the Hub has them: weights, config, vocab.json and merges.txt."""
    network.save_pretrained(tmp_path / "hub")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=280, special_tokens=["<|endoftext|>"])
    tokenizer.save_model(str(tmp_path / "hub"))
    return tmp_path / "hub"


def logits(checkpoint: Path, token_ids: torch.Tensor) -> torch.Tensor:
    saved = open_checkpoint(checkpoint)
    model = GPT(build(ModelSpec, saved.config["model"])).eval()
    model.load_state_dict({name: saved.read(name) for name in saved.names()})
    with torch.no_grad():
        return model.logits(model(token_ids).hidden_BTD)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = {
        name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    change(weights)
    save_file(weights, folder / "model.safetensors")


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@torch.no_grad()
def test_the_imported_model_has_its_logits(folder: Path, network: GPT2LMHeadModel) -> None:
    output = folder.parent / "imported"
    import_gpt2(folder, output)
    token_ids = torch.randint(0, 300, (2, 32))
    torch.testing.assert_close(logits(output, token_ids), network(token_ids).logits)
    assert open_checkpoint(output).progress == {"step": 0, "samples": 0, "tokens": 0}
    ids = GPT2Tokenizer.from_pretrained(folder).encode(TEXT)
    assert load_tokenizer(output).encode(TEXT) == ids


def test_shards_and_a_model_without_a_head_are_the_same(
    folder: Path, network: GPT2LMHeadModel, tmp_path: Path
) -> None:
    network.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    network.transformer.save_pretrained(tmp_path / "bare")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    spec, tensors = read_gpt2(folder)
    for other in ("shards", "bare"):
        other_spec, other_tensors = read_gpt2(tmp_path / other)
        assert other_spec == spec
        assert tensors.keys() == other_tensors.keys()
        assert all(tensor.equal(other_tensors[name]) for name, tensor in tensors.items())


def test_a_tokenizer_json_alone_is_enough(folder: Path) -> None:
    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    tokenizer.save_pretrained(folder)
    assert not (folder / "vocab.json").exists()
    import_gpt2(folder, folder.parent / "imported")
    assert load_tokenizer(folder.parent / "imported").encode(TEXT) == tokenizer.encode(TEXT)


def test_old_masks_and_a_tied_head_are_no_problem(folder: Path) -> None:
    def add(weights: dict[str, torch.Tensor]) -> None:
        weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
        weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()

    _, before = read_gpt2(folder)
    change_weights(folder, add)
    _, tensors = read_gpt2(folder)
    assert tensors.keys() == before.keys()


def test_all_that_does_not_match_is_in_one_message(folder: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["transformer.h.0.attn.rotary.weight"] = torch.ones(2)
        weights["transformer.h.1.mlp.c_fc.weight"] = torch.ones(24, 95)
        weights["lm_head.weight"] = torch.ones(300, 24)
        del weights["transformer.ln_f.bias"]

    change_weights(folder, spoil)
    with pytest.raises(CheckpointError) as error:
        import_gpt2(folder, folder.parent / "imported")
    assert str(error.value) == (
        f"the weights in {folder} are not its config's GPT-2: missing: ln_f.bias; "
        "not known: h.0.attn.rotary.weight; "
        "of the wrong shape: h.1.mlp.c_fc.weight is [24, 95], not [24, 96]; "
        "not tied to wte.weight: lm_head.weight"
    )
    assert not (folder.parent / "imported").exists()


def test_a_long_list_is_cut(folder: Path) -> None:
    change_config(folder, n_layer=3)
    wanted = r"missing: h.2.ln_1.weight, .*, h.2.ln_2.bias and 4 more$"
    with pytest.raises(CheckpointError, match=wanted):
        read_gpt2(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "is of a model of type llama; only gpt2 can be imported"),
        (
            {"activation_function": "relu", "tie_word_embeddings": False},
            "activation_function is relu, not gelu_new or gelu_pytorch_tanh; "
            "tie_word_embeddings is False, not True",
        ),
    ],
)
def test_another_model_is_refused(folder: Path, values: dict[str, object], message: str) -> None:
    change_config(folder, **values)
    with pytest.raises(CheckpointError, match=message):
        read_gpt2(folder)


def test_a_config_without_a_size_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2", "n_layer": 2, "n_embd": 24}')
    with pytest.raises(
        CheckpointError, match="n_head is missing; vocab_size is missing; n_positions"
    ):
        read_gpt2(folder)


def test_a_pickle_is_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model.bin is a pickle, which could run any"
    ):
        read_gpt2(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds no model.safetensors; copy the weights into it"
    ):
        read_gpt2(folder)


def test_damaged_files_are_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/config.json cannot be read: No such file"):
        read_gpt2(folder / "nowhere")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(
        CheckpointError, match=r"model.safetensors cannot be read: .*; copy it again"
    ):
        read_gpt2(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"index.json is not a JSON object; copy it again"):
        read_gpt2(folder)
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "gone.safetensors"}}'
    )
    with pytest.raises(
        CheckpointError, match=r"gone.safetensors cannot be read: .*; copy it again"
    ):
        read_gpt2(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not a JSON object; copy it again"):
        read_gpt2(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "merges.txt").unlink()
    with pytest.raises(
        DataError, match=r"holds no tokenizer; it needs .*vocab.json with merges.txt"
    ):
        import_gpt2(folder, folder.parent / "imported")
    assert not (folder.parent / "imported").exists()


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    vocab = json.loads((folder / "vocab.json").read_text())
    more = {f"extra{i}": len(vocab) + i for i in range(50)}
    (folder / "vocab.json").write_text(json.dumps(vocab | more))
    with pytest.raises(
        CheckpointError, match=r"tokens, the model only 300; copy the tokenizer that"
    ):
        import_gpt2(folder, folder.parent / "imported")


def test_an_existing_output_is_refused(folder: Path) -> None:
    with pytest.raises(
        CheckpointError, match="exists already; name a new folder for the checkpoint"
    ):
        import_gpt2(folder, folder)
