"""A server from afar: the gRPC client as a `prompts.Answerer`, and as an operator's hand."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, fields
from threading import Event
from typing import cast

from gptmoe.errors import ClusterError, GptMoeError, RequestError
from gptmoe.generate.params import SamplingParams

from .access import OPEN, Access
from .client import Client, GenerationError, Sampling
from .operations import Topologies
from .prompts import Answer, Item

_CALLS_AT_ONCE = 8
_AGAIN_S = 0.5
_FULL_S = 300.0
"""A queue that is full for longer has other callers who do not leave it."""
_SAYS_ITSELF = "takes no new requests"
"""In the answer of a server that is drained: it is there."""
_NO_REQUEST = "no request "


class Remote:
    """The server at `target`: RequestError for what it refuses, ClusterError if it is away."""

    def __init__(self, target: str, sampling: SamplingParams, access: Access = OPEN) -> None:
        self._target = target
        self._client = Client(target, access=access)
        self._sampling = sampling

    def generate(self, items: Sequence[Item]) -> Iterator[tuple[int, Answer]]:
        """Continue the prompts, some at a time, as the server batches them: index and answer.

        A full queue is come back to; what else a prompt is refused with is its answer.
        """
        left = Event()
        with ThreadPoolExecutor(_CALLS_AT_ONCE) as pool:
            calls = {
                pool.submit(self._generate, item, left): index for index, item in enumerate(items)
            }
            try:
                for call in as_completed(calls):
                    yield calls[call], call.result()
            finally:  # whoever leaves waits for those alone that the server computes
                left.set()
                pool.shutdown(cancel_futures=True)

    def stream(self, prompt: str) -> Iterator[str]:
        """Continue one prompt, piece by piece."""
        with _errors(self._target):
            for chunk in self._client.stream(prompt, **_asked(self._sampling)):
                yield chunk.text

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _generate(self, item: Item, left: Event) -> Answer:
        limit_s = time.monotonic() + _FULL_S
        while True:
            try:
                return self._client.generate(item.txt, **_asked(item.sampling(self._sampling))).text
            except GenerationError as error:
                over = error.code != "RESOURCE_EXHAUSTED" or time.monotonic() > limit_s
                if over or left.wait(max(error.retry_after_s or 0.0, _AGAIN_S)):
                    return _in_our_words(error, self._target)


def _asked(sampling: SamplingParams) -> Sampling:
    """What is not the default, and the seed: then the answer is not by chance."""
    given = asdict(sampling)
    changed = {it.name: given[it.name] for it in fields(sampling) if given[it.name] != it.default}
    changed["seed"] = sampling.seed
    if sampling.logit_bias:
        changed["logit_bias"] = dict(sampling.logit_bias)
    return cast(Sampling, changed)


@contextmanager
def operating(target: str, name: str = "", access: Access = OPEN) -> Iterator[Client]:
    """A client to operate the application at `target`; its errors are ours.

    `name` is the application's, where Ray Serve runs several.
    """
    with Client(target, application=name, access=access) as client, _errors(target):
        yield client


def watch(client: Client, every_s: float) -> Iterator[Topologies]:
    """The topology again and again; another replica is asked when the one that answers ends."""
    answered = False
    while True:
        try:
            for answer in client.watch_topology(every_s):
                answered = True
                yield answer
        except GenerationError as error:
            if not answered or error.code not in ("UNAVAILABLE", "INTERNAL"):
                raise
        answered = False
        time.sleep(_AGAIN_S)


@contextmanager
def _errors(target: str) -> Iterator[None]:
    try:
        yield
    except GenerationError as error:
        raise _in_our_words(error, target) from None


def _in_our_words(error: GenerationError, target: str) -> GptMoeError:
    if error.code == "INVALID_ARGUMENT":
        return RequestError(error.message)
    if error.code == "UNAUTHENTICATED":
        return ClusterError(f"{target}: {error.message}; --token-file names a file that holds it")
    if error.code == "PERMISSION_DENIED":
        return ClusterError(f"{target}: {error.message}")
    if error.code in ("FAILED_PRECONDITION", "DEADLINE_EXCEEDED", "ABORTED"):
        return ClusterError(error.message)
    if error.code == "NOT_FOUND" and _NO_REQUEST in error.message:
        return RequestError(error.message)
    if error.code == "NOT_FOUND":  # as Ray Serve says it
        return ClusterError(
            f"the server at {target} has no such application, or several of them: --name says "
            "which is meant"
        )
    if error.code == "UNAVAILABLE" and _SAYS_ITSELF in error.message:
        return ClusterError(error.message)
    if error.code == "UNAVAILABLE":
        return ClusterError(
            f"no server answers at {target} ({error.message}); is it running? One with TLS wants "
            "--ca and the authority of its certificate"
        )
    return ClusterError(f"the server at {target} failed: {error}")
