"""Dynamic loss scale for float16 products: pure state, saved with the run.

Small gradients would be flushed to zero, so the loss is multiplied by a power of two before the
backward pass, and the gradients divided by it after (Micikevicius et al. 2018, arXiv 1710.03740,
section 3.2). A step whose gradients overflow is left out and the scale halved; after enough clean
steps it is doubled.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScale:
    """The scale of the next step."""

    value: float = 2.0**16
    clean_steps: int = 0
    """Steps without an overflow since the scale last changed."""
    grow_after: int = 1000

    def after(self, *, overflow: bool) -> "LossScale":
        """The state behind a step."""
        if overflow:
            return replace(self, value=max(self.value / 2, 1.0), clean_steps=0)
        if self.clean_steps + 1 < self.grow_after:
            return replace(self, clean_steps=self.clean_steps + 1)
        return replace(self, value=min(self.value * 2, 2.0**24), clean_steps=0)
