"""The shape that all decode: 12 layers x 768 like GPT-2's smallest. Standard library only."""

LAYERS, D_MODEL, HEADS, D_FF = 12, 768, 12, 3072
CONTEXT, VOCABULARY = 1024, 32_000
PROMPT, NEW = 20, 128
"""Tokens of a prompt and of its continuation; the first of these comes with the prompt."""
STEPS = NEW - 1


def prompts(count: int) -> list[list[int]]:
    """Any tokens, the same for everybody."""
    return [
        [(7919 * (20 * row + place) + 13) % VOCABULARY for place in range(PROMPT)]
        for row in range(count)
    ]
