"""What an engine does, in numbers: read after any step. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Now, and since the start."""

    running: int = 0
    """Requests with a place in the batch."""
    waiting: int = 0
    """Requests without one."""
    running_tokens: int = 0
    """That the running requests may still compute: prompts left and new tokens at most."""
    waiting_tokens: int = 0
    """The same of the waiting ones."""
    kv_blocks: int = 0
    """Of the KV cache in all."""
    kv_used_blocks: int = 0
    """Held by running requests; what only the prefix cache holds counts as free."""
    steps: int = 0
    """Since the start, like all that follow."""
    prompt_tokens: int = 0
    """Computed, again after a preemption; not those found in the cache."""
    generated_tokens: int = 0
    prefix_queries: int = 0
    """Tokens of prompts looked up in the prefix cache."""
    prefix_hits: int = 0
    """Tokens of them that were found."""
    preemptions: int = 0
    refused: int = 0
    """Requests that a full queue refused."""
    tokens_per_s: float = 0.0
    """Generated and computed, smoothed over the last seconds of work."""

    @property
    def kv_use(self) -> float:
        """Part of the KV cache that running requests hold, 0 to 1."""
        return self.kv_used_blocks / self.kv_blocks if self.kv_blocks else 0.0
