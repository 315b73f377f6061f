"""What a cluster has and what a run needs, in words. No Ray."""

from collections.abc import Mapping


def missing(needed: Mapping[str, float], available: Mapping[str, float]) -> str:
    """What is lacking (`2 of 4 CPU, 1 of 1 GPU`); empty if nothing is."""
    gaps = {name: amount - available.get(name, 0.0) for name, amount in needed.items()}
    return ", ".join(f"{gap:g} of {needed[name]:g} {name}" for name, gap in gaps.items() if gap > 0)
