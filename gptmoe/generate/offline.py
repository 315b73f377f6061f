"""Many prompts at hand at once, as of a file: the order in which they are cheapest. No torch.

Sequences that run together read as many keys as the longest of them, and the last ones to finish
run alone. So prompts of like length and with as many new tokens go together, the longest first:
buckets by input and output length, as in EnergonAI's batching for OPT, but without its barrier
between two batches, since a sequence that ends makes room for the next.
"""

from collections.abc import Iterable, Sequence

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


def run(engine: Engine, requests: Sequence[Request]) -> dict[str, list[Delta]]:
    """All that is said of each request, by its id. The engine's queue must hold them all.

    Raises what ends one of them early.
    """
    said: dict[str, list[Delta]] = {request.request_id: [] for request in requests}
    for request in in_buckets(requests):
        engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            if delta.error:
                raise delta.error
            said[delta.request_id].append(delta)
    return said
