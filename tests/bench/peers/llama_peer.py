"""llama.cpp (by llama-cpp-python) with a GPT-2 of random bf16 weights that we write as GGUF."""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import shape
from lines import answer_lines

MOST = 8
"""Sequences at once."""


def write(path: Path) -> None:
    """The model file. Matrices in bf16, vectors and positions in float32, as its converter does."""
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_context_length(shape.CONTEXT)
    writer.add_embedding_length(shape.D_MODEL)
    writer.add_feed_forward_length(shape.D_FF)
    writer.add_block_count(shape.LAYERS)
    writer.add_head_count(shape.HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(shape.VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    generator = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int, *, wide: bool = False) -> None:
        values = generator.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
        if wide:
            writer.add_tensor(name, values)
            return
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def vector(name: str, size: int, value: float) -> None:
        writer.add_tensor(name, np.full(size, value, dtype=np.float32))

    width, inner = shape.D_MODEL, shape.D_FF
    matrix("token_embd.weight", shape.VOCABULARY, width)
    matrix("position_embd.weight", shape.CONTEXT, width, wide=True)
    matrices = {
        "attn_qkv": (3 * width, width),
        "attn_output": (width, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    for layer in range(shape.LAYERS):
        for name, (rows, columns) in matrices.items():
            matrix(f"blk.{layer}.{name}.weight", rows, columns)
            vector(f"blk.{layer}.{name}.bias", rows, 0.0)
        for name in ("attn_norm", "ffn_norm"):
            vector(f"blk.{layer}.{name}.weight", width, 1.0)
            vector(f"blk.{layer}.{name}.bias", width, 0.0)
    vector("output_norm.weight", width, 1.0)
    vector("output_norm.bias", width, 0.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Decoder:
    """One loaded model; every turn begins with an empty cache."""

    def __init__(self, path: Path, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit("llama.cpp cannot load the file that was written for it")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = 256 * MOST, 512, MOST
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("llama.cpp cannot make a context for its model")

    def act(self, batch: int) -> dict[str, float]:
        """Seconds of one decoding step, greedy."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        prompts = shape.prompts(batch)
        tokens = self._decode(
            [
                (token, place, row)
                for row, prompt in enumerate(prompts)
                for place, token in enumerate(prompt)
            ]
        )
        began_s = time.perf_counter()
        for step in range(shape.STEPS):
            place = shape.PROMPT + step
            tokens = self._decode([(token, place, row) for row, token in enumerate(tokens)])
        return {"step_s": (time.perf_counter() - began_s) / shape.STEPS}

    def _decode(self, entries: list[tuple[int, int, int]]) -> list[int]:
        """The likeliest token behind the last entry of each sequence."""
        batch = llama_cpp.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        last = {row: index for index, (_, _, row) in enumerate(entries)}
        for index, (token, place, row) in enumerate(entries):
            batch.token[index], batch.pos[index] = token, place
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
            batch.logits[index] = last[row] == index
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise SystemExit(f"llama_decode returned {status}")
        return [self._likeliest(index) for index in last.values()]

    def _likeliest(self, index: int) -> int:
        logits: Any = llama_cpp.llama_get_logits_ith(self.context, index)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(shape.VOCABULARY,))))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gpt2.gguf"
        write(file)
        decoder = Decoder(file, int(sys.argv[1]))
        answer_lines({"version": llama_cpp.__version__}, decoder.act)
