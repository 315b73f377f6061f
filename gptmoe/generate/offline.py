"""Many prompts at hand at once, as of a file: the order in which they are cheapest. No torch.

Sequences that run together read as many keys as the longest of them, and the last ones to finish
run alone. So prompts of like length and with as many new tokens go together, the longest first:
buckets by input and output length, as in EnergonAI's batching for OPT, but over all of a file and
without its barrier between two batches, since a sequence that ends makes room for the next.
"""

from collections import deque
from collections.abc import Iterable, Iterator

from .delta import Delta
from .engine import Engine
from .request import Request

SHORTEST = 32
"""Lengths below are one bucket; each further bucket is twice as long."""


def bucket(tokens: int) -> int:
    """The number of a length's bucket."""
    return max(0, (tokens - 1).bit_length() - (SHORTEST - 1).bit_length())


def in_buckets(requests: Iterable[Request]) -> list[Request]:
    """The same requests, those with most new tokens first, then the longest prompts first."""
    return sorted(
        requests,
        key=lambda request: (
            -bucket(request.sampling.max_new_tokens),
            -bucket(len(request.prompt_ids)),
        ),
    )


def run(engine: Engine, requests: Iterable[Request]) -> Iterator[tuple[str, list[Delta]]]:
    """Each request's id and all that is said of it, as soon as it has ended.

    They queue a batch at a time, since an engine looks at all that wait: its queue must have room
    for config.max_batch_size of them. Raises what ends one of them early.
    """
    coming = deque(in_buckets(requests))
    said = dict[str, list[Delta]]()
    unfinished = {r.request_id: 1 if r.score_only else r.sampling.n for r in coming}
    while coming or engine.has_work:
        while coming and engine.num_waiting < engine.config.max_batch_size:
            request = coming.popleft()
            said[request.request_id] = []
            engine.add(request)
        for delta in engine.step():
            if delta.error:
                raise delta.error
            said[delta.request_id].append(delta)
            unfinished[delta.request_id] -= bool(delta.finish_reason)
            if not unfinished[delta.request_id]:
                yield delta.request_id, said.pop(delta.request_id)
