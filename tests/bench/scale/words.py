"""A language model that can be checked by hand: the next token is a function of all before it."""

import random

from gptmoe.generate.params import SamplingParams
from gptmoe.generate.request import Request

VOCAB = 256
FIRST_WORD = 2
"""Tokens below this end a text."""
PROMPT, NEW = (256, 768), (16, 32)
"""Tokens of a request, from and to."""


def next_hash(before: int, token: int) -> int:
    """What a rank keeps of the tokens so far."""
    return (before * 1_000_003 + token + 1) % (2**61 - 1)


def next_token(history: int) -> int:
    """The model."""
    return FIRST_WORD + history % (VOCAB - FIRST_WORD)


class Words:
    """A tokenizer whose tokens are letters: the engine needs one."""

    vocab_size, end_id, sep_id = VOCAB, 0, 1

    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer."""
        return bytes([97 + token_id % 26])


def requests_of(seed: int, count: int) -> list[Request]:
    """Requests that enter together."""
    dice = random.Random(seed)
    found = []
    for index in range(count):
        prompt = tuple(dice.choices(range(FIRST_WORD, VOCAB), k=dice.randint(*PROMPT)))
        sampling = SamplingParams(temperature=0, max_new_tokens=dice.randint(*NEW))
        found.append(Request(f"{seed}-{index}", prompt, sampling))
    return found


def expected(request: Request) -> list[int]:
    """What the model says, by its definition."""
    history, text = 0, []
    for token in request.prompt_ids:
        history = next_hash(history, token)
    for _ in range(request.sampling.max_new_tokens):
        text.append(next_token(history))
        history = next_hash(history, text[-1])
    return text
