"""Whether an engine takes a request: does it fit at all, has the queue room. No torch."""

from gptmoe.errors import Overloaded, RequestError

from .request import Request
from .scheduler import EngineConfig
from .slots import blocks_of


def lanes_of(request: Request) -> int:
    """Sequences that run for a request at once."""
    params = request.sampling
    return 1 if request.score_only else max(params.n, params.num_beams)


def longest(request: Request, max_seq_len: int) -> int:
    """Tokens that one of its sequences may come to have."""
    new = 0 if request.score_only else request.sampling.max_new_tokens
    return min(max_seq_len, len(request.prompt_ids) + max(new, 1))


def cost(request: Request, max_seq_len: int) -> int:
    """Tokens to compute at most, for all its sequences."""
    prompt = len(request.prompt_ids)
    return prompt + lanes_of(request) * (longest(request, max_seq_len) - prompt)


def check_fits(request: Request, max_seq_len: int, most_lanes: int, blocks: int) -> None:
    """Raise RequestError for a prompt beyond the context, or more answers than fit at once.

    `most_lanes` sequences may run for one request; the cache has that many `blocks`.
    """
    prompt = len(request.prompt_ids) + len(request.resume_ids)
    limit = max_seq_len if request.score_only else max_seq_len - 1
    if not 0 < prompt <= limit:
        raise RequestError(f"prompt must be 1 to {limit} tokens; found {prompt}", "prompt")
    name = "num_beams" if request.sampling.num_beams > 1 else "n"
    lanes, room = lanes_of(request), blocks // blocks_of(longest(request, max_seq_len))
    if lanes > min(most_lanes, room):
        raise RequestError(
            f"{name} must be at most {min(most_lanes, room)}, which have room at once here; "
            f"found {lanes}",
            name,
        )


def check_queue(
    config: EngineConfig, *, waiting: int, free: int, tokens: int, retry_after_s: float
) -> None:
    """Raise Overloaded if one more request finds the queue full.

    `tokens` are those that waiting requests may still compute, the new one included. A request that
    would wait alone is taken whatever its size.
    """
    full = waiting >= config.max_queue + free
    if full or (waiting and tokens > config.max_queue_tokens):
        bound = f"{config.max_queue} requests" if full else f"{config.max_queue_tokens} tokens"
        raise Overloaded(
            f"the queue of {bound} is full; try again in about {retry_after_s:.1f} s", retry_after_s
        )
