"""Our engine as a replica runs it, told what the peers of bench_poisson are told."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import shape
import torch
from lines import answer_lines
from poisson import schedule, waits

sys.path.insert(0, str(Path(__file__).parents[3]))  # a script's own folder is all that it has

from gptmoe.errors import Overloaded
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request
from gptmoe.generate.scheduler import EngineConfig
from serve.bridge import EngineThread
from tests.bench import decoding


class Served:
    """The engine in its thread."""

    def __init__(self, experts: int, together: int) -> None:
        everywhere = (experts,) * shape.LAYERS  # as Mixtral has them
        spec = replace(decoding.spec_with(0), num_experts=everywhere, expert_interval=1)
        model = decoding.loaded(spec, decoding.random_state(spec), torch.bfloat16)
        self._engine = EngineThread(model.engine(EngineConfig(max_batch_size=together)))

    async def stream(self, name: str, prompt: list[int], new: int) -> AsyncIterator[int]:
        """See poisson.Stream."""
        sampling = SamplingParams(temperature=0, max_new_tokens=new, ignore_end=True)
        with suppress(Overloaded):
            async for delta in self._engine.stream(Request(name, tuple(prompt), sampling)):
                yield len(delta.token_ids)

    def act(self, rate: float, seconds: float, seed: int) -> dict[str, Any]:
        """Waits of the requests of one schedule."""
        return asyncio.run(waits(self.stream, schedule(rate, seconds, seed)))


if __name__ == "__main__":
    torch.set_num_threads(2)
    answer_lines({}, Served(int(sys.argv[1]), int(sys.argv[2])).act)
