"""A checkpoint in one process, `gptmoe.load(folder)`: the core that trained it and serves it."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from gptmoe.checkpoint import open_checkpoint
from gptmoe.errors import CheckpointError, ConfigError, RequestError
from gptmoe.generate import gpu, offline
from gptmoe.generate.engine import Engine
from gptmoe.generate.executor import LocalExecutor, MakeExecutor
from gptmoe.generate.gpu.memory import full
from gptmoe.generate.packed import pack
from gptmoe.generate.params import SamplingParams, as_params
from gptmoe.generate.plan import Span
from gptmoe.generate.quantized import Weights, quantize
from gptmoe.generate.request import Request, make_request
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.generate.slots import blocks_of
from gptmoe.memory import available_bytes
from gptmoe.model.layers import ServedWeight
from gptmoe.model.transformer import GPT
from gptmoe.stored import kept_dtype, mapped_expert_bytes, may_copy, read_network, spec_of
from gptmoe.text import Tokenizer, load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
BATCH = 16
"""Texts that `LoadedModel.generate` continues at once."""
LOGITS_TOKENS = 1024
"""`LoadedModel.logits` runs about as many tokens at once."""


def load(
    path: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    verify: bool = True,
    packed: bool = True,
    weights: str = "",
    invariant: bool = False,
) -> "LoadedModel":
    """Open a checkpoint (or the newest of a run folder) for generation and evaluation.

    `dtype` is float32, bfloat16 or float64. `packed` rearranges the weights for the CPU's kernels,
    where it can (generate/packed.py); experts that are large beside the free memory stay
    memory-mapped if they are stored in this dtype (`may_copy`). `weights` int8 or int4 rounds them
    (generate/quantized.py). On a GPU a text's bits depend on no other text if `invariant`, at a
    cost; on a CPU always. `verify=False` checks the sizes of files, not their checksums:
    `gptmoe verify` does that apart. Raises CheckpointError naming a missing or corrupt part,
    ConfigError for a type that cannot be had here, or a GPU that is too small.
    """
    checkpoint = open_checkpoint(Path(path), verify=verify)
    spec = spec_of(checkpoint)
    tokenizer = load_tokenizer(checkpoint.path)
    if tokenizer.vocab_size > spec.vocab_size:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} tokens, but the model "
            f"only {spec.vocab_size}; they do not belong together"
        )
    wanted, place = named_dtype(dtype), named_device(device)
    with full(f"the weights in {checkpoint.path}", place):
        network = read_network(checkpoint, spec, wanted, place, as_stored=bool(weights))
    if weights:
        quantize(network, named_weights(weights))
        _narrow(network)
    elif on_gpu(place, wanted):
        executors = gpu.executors(network, invariant=invariant)
        return LoadedModel(network, tokenizer, checkpoint.config, checkpoint.path, executors)
    elif packed:
        mapped = mapped_expert_bytes(checkpoint, wanted)
        pack(network, experts=may_copy(mapped, available_bytes()))
    return LoadedModel(network, tokenizer, checkpoint.config, checkpoint.path)


def named_dtype(name: str) -> torch.dtype:
    """float32, bfloat16 or float64 by name."""
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} is not known; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def named_weights(name: str) -> Weights:
    """int8 or int4 by name."""
    known: dict[str, Weights] = {"int8": "int8", "int4": "int4"}
    if name not in known:
        raise ConfigError(f"weights={name!r} is not known; use {' or '.join(known)}, or leave it")
    return known[name]


def named_device(name: str) -> torch.device:
    """cpu, or cuda:NUMBER (cuda = cuda:0) where there is one."""
    count = torch.cuda.device_count()
    known = {"cpu": "cpu", **({"cuda": "cuda:0"} if count else {})}
    known |= {f"cuda:{index}": f"cuda:{index}" for index in range(count)}
    if name not in known:
        raise ConfigError(f"device={name!r} is not here; use one of {', '.join(known)}")
    return torch.device(known[name])


def on_gpu(place: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels for GPUs are used; float64 is the reference, without them."""
    return place.type == "cuda" and dtype != torch.float64


def _narrow(network: GPT) -> None:
    """Bring what was left as it is stored to the type in which it is kept."""
    for name, parameter in network.named_parameters():
        if not isinstance(parameter, ServedWeight):
            parameter.data = parameter.data.to(kept_dtype(name, network.compute_dtype))


class LoadedModel:
    """A model ready to answer. `spec`, `tokenizer`, `network`, `config` and `path` are public."""

    def __init__(
        self,
        network: GPT,
        tokenizer: Tokenizer,
        config: Mapping[str, Any],
        path: Path,
        make_executor: MakeExecutor = LocalExecutor,
    ) -> None:
        self.network = network
        self.spec = network.spec
        self.tokenizer = tokenizer
        self.config = config
        self.path = path
        self._make_executor = make_executor

    @torch.inference_mode()
    def logits(self, token_ids_BT: Sequence[Sequence[int]] | Tensor) -> Tensor:
        """Scores of the next token after each position, [B, T, V]: generation's path, same bits
        (on a GPU if `invariant`).

        Raises RequestError for rows of different lengths, a row that is empty or longer than the
        context, or ids outside the vocabulary.
        """
        given = token_ids_BT.tolist() if isinstance(token_ids_BT, Tensor) else token_ids_BT
        try:
            rows = [list(map(int, row)) for row in given]
        except (TypeError, ValueError):
            raise RequestError("token_ids must be rows of token ids", "token_ids") from None
        self._check_rows(rows)
        length = len(rows[0])
        at_once = max(1, LOGITS_TOKENS // length)
        slots = min(at_once, len(rows))
        executor = self._make_executor(self.network, slots, slots * blocks_of(length))
        parts = []
        for first in range(0, len(rows), at_once):
            some = {str(slot): row for slot, row in enumerate(rows[first : first + at_once])}
            spans = [Span(name, int(name), 0, length, outputs=1) for name in some]
            hidden_TD = executor.hidden(spans, 0, some)
            parts.append(executor.logits(hidden_TD).unflatten(0, (len(some), length)))
        return torch.cat(parts)

    def _check_rows(self, rows: Sequence[Sequence[int]]) -> None:
        lengths = sorted({len(row) for row in rows}) or [0]
        if len(lengths) > 1:
            raise RequestError(
                f"token_ids must have rows of one length; found {lengths[0]} and {lengths[-1]}",
                "token_ids",
            )
        if not 0 < lengths[0] <= self.spec.max_seq_len:
            raise RequestError(
                f"token_ids must have 1 to {self.spec.max_seq_len} tokens a row; "
                f"found {lengths[0]}",
                "token_ids",
            )
        wrong = [token for row in rows for token in row if not 0 <= token < self.spec.vocab_size]
        if wrong:
            raise RequestError(
                f"token_ids must be 0 to {self.spec.vocab_size - 1}; found {wrong[0]}", "token_ids"
            )

    def engine(self, config: EngineConfig | None = None) -> Engine:
        """A fresh engine with its own KV cache."""
        config = config or EngineConfig()
        limit = self.spec.max_seq_len
        executor = self._make_executor(self.network, config.max_batch_size, config.blocks(limit))
        return Engine(executor, self.tokenizer, limit, config)

    @overload
    def generate(self, text: str, **sampling: Any) -> str: ...
    @overload
    def generate(self, text: Sequence[str], **sampling: Any) -> list[str]: ...
    def generate(self, text: str | Sequence[str], **sampling: Any) -> str | list[str]:
        """Continue one text or each of several (batched); returns the continuations only.

        Keywords are SamplingParams'; of n answers the first is returned.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        done = dict(self.generate_each(prompts, [as_params(sampling)] * len(prompts)))
        return done[0] if isinstance(text, str) else [done[index] for index in range(len(prompts))]

    def generate_each(
        self, texts: Sequence[str], sampling: Sequence[SamplingParams]
    ) -> Iterator[tuple[int, str]]:
        """Continue each text as its parameters say: its index and continuation, as each is done.

        All go through one engine, ordered by length (generate/offline.py); of n answers the first
        is returned. Raises RequestError at once for a text or parameter that is refused.
        """
        requests = []
        for index, (text, params) in enumerate(zip(texts, sampling, strict=True)):
            try:
                requests.append(self._request(str(index), text, replace(params, n=1)))
            except RequestError as error:
                place = f"text {index + 1} of {len(texts)}: " if len(texts) > 1 else ""
                raise RequestError(f"{place}{error}", error.field) from None
        slots = max([BATCH, *(params.num_beams for params in sampling)])
        engine = self.engine(
            EngineConfig(max_batch_size=slots, max_queue=slots, max_queue_tokens=sys.maxsize)
        )
        return (
            (int(name), "".join(delta.text for delta in deltas))
            for name, deltas in offline.run(engine, requests)
        )

    def stream(self, text: str, **sampling: Any) -> Iterator[str]:
        """Continue a text, piece by piece, in whole characters. Keywords as in `generate`."""
        params = as_params(sampling)
        engine = self.engine(EngineConfig(max_batch_size=max(BATCH, params.num_beams)))
        engine.add(self._request("0", text, replace(params, n=1)))  # here: errors do not wait

        def pieces() -> Iterator[str]:
            while engine.has_work:
                for delta in engine.step():
                    if delta.error:
                        raise delta.error
                    if delta.text:
                        yield delta.text

        return pieces()

    def _request(self, request_id: str, prompt: str, params: SamplingParams) -> Request:
        return make_request(self.tokenizer, self.spec.max_seq_len, request_id, prompt, params)
