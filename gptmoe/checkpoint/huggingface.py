"""Importing a Hugging Face GPT-2 folder: config.json, safetensors weights and the tokenizer."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gptmoe.config import to_dict
from gptmoe.errors import CheckpointError
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT
from gptmoe.text import load_tokenizer

from .boxes import whole
from .files import reason
from .write import save

SIZES = {
    "num_layers": "n_layer",
    "d_model": "n_embd",
    "num_heads": "n_head",
    "vocab_size": "vocab_size",
    "max_seq_len": "n_positions",
}
"""Fields of ModelSpec, and their keys."""

REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""What their other keys must say for the computation to be ours; GPT-2's default comes first."""

TOP = {"embed.tokens": "wte", "embed.positions": "wpe", "norm": "ln_f"}
IN_LAYER = {
    "norm_attention": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "norm_ffn": "ln_2",
    "ffn.up": "mlp.c_fc",
    "ffn.down": "mlp.c_proj",
}
"""Our modules and theirs. The weights of theirs named c_* are stored [in, out]."""

IGNORED = (".attn.bias", ".attn.masked_bias")
"""Causal masks, which old versions of transformers stored with the weights."""


def import_gpt2(folder: Path, output: Path) -> None:
    """Turn a Hugging Face GPT-2 folder into the new checkpoint `output`.

    Raises CheckpointError or DataError, before anything is written, if they do not fit together.
    """
    if output.exists():
        raise CheckpointError(f"{output} exists already; name a new folder for the checkpoint")
    spec, tensors = read_gpt2(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > spec.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, the model only "
            f"{spec.vocab_size}; copy the tokenizer that the model was trained with"
        )
    save(
        output,
        rank=0,
        world=1,
        barrier=lambda: None,
        groups={"weights": [whole(name, tensor) for name, tensor in tensors.items()]},
        config={"model": to_dict(spec), "imported_from": str(folder)},
        progress={"step": 0, "samples": 0, "tokens": 0},
        copy_files=tokenizer.save,
    )


def read_gpt2(folder: Path) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The model of a Hugging Face GPT-2 folder, and its weights by our names.

    Raises CheckpointError with everything that does not match, in one message.
    """
    spec = _read_spec(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(spec).state_dict().items()}
    theirs = _read_weights(folder)
    head, table = theirs.pop("lm_head.weight", None), theirs.get("wte.weight")
    tensors, missing, misshapen = {}, [], []
    for ours, shape in shapes.items():
        name = their_name(ours)
        if name not in theirs:
            missing.append(name)
            continue
        tensor = theirs.pop(name)
        tensors[ours] = tensor.t() if ".c_" in name and tensor.dim() == 2 else tensor
        if tensors[ours].shape != shape:
            wanted = shape[::-1] if tensors[ours] is not tensor else shape
            misshapen.append(f"{name} is {list(tensor.shape)}, not {list(wanted)}")
    untied = head is not None and (table is None or not torch.equal(head, table))
    problems = {
        "missing": missing,
        "not known": sorted(theirs),
        "of the wrong shape": misshapen,
        "not tied to wte.weight": ["lm_head.weight"] if untied else [],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
        raise CheckpointError(f"the weights in {folder} are not its config's GPT-2: {listed}")
    return spec, tensors


def their_name(ours: str) -> str:
    """Hugging Face's name for our parameter, without the prefix of a model with a head."""
    module, _, kind = ours.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    _, layer, inner = module.split(".", 2)
    return f"h.{layer}.{IN_LAYER[inner]}.{kind}"


def _read_spec(folder: Path) -> ModelSpec:
    path = folder / "config.json"
    config = _read_json(path)
    if config.get("model_type") != "gpt2":
        raise CheckpointError(
            f"{path} is of a model of type {config.get('model_type')}; only gpt2 can be imported"
        )
    problems = [f"{key} is missing" for key in SIZES.values() if key not in config]
    problems += [
        f"{key} is {config[key]}, not {' or '.join(map(str, accepted))}"
        for key, accepted in REQUIRED.items()
        if config.get(key, accepted[0]) not in accepted
    ]
    if problems:
        raise CheckpointError(f"{path} is of a model that is not ours: {'; '.join(problems)}")
    sizes = {ours: config[theirs] for ours, theirs in SIZES.items()}
    d_ff = config.get("n_inner") or 4 * config["n_embd"]
    return ModelSpec(**sizes, d_ff=d_ff, init_std=config.get("initializer_range", 0.02))


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Their tensors, memory-mapped, without the prefix that a model with a head gives them."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {reason(error)}; copy it again"
            ) from None
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(IGNORED)}
    return {name.removeprefix("transformer."): tensor for name, tensor in kept.items()}


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names: dict[str, str] = _read_json(index).get("weight_map", {})
        return [folder / name for name in sorted(set(names.values()))]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if pickles := sorted(folder.glob("*.bin")):
        raise CheckpointError(
            f"{pickles[0]} is a pickle, which could run any code; convert it to model.safetensors"
        )
    raise CheckpointError(f"{folder} holds no model.safetensors; copy the weights into it")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {reason(error)}; name a Hugging Face GPT-2 folder"
        ) from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; copy it again")
    return value


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
