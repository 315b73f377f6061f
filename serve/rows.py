"""How many rows each expert of a replica's own model has answered, whatever weights it had."""

from collections.abc import Callable, Mapping, Sequence, Set
from threading import Lock

from gptmoe.model.moe import MoE
from gptmoe.model.spec import ModelSpec
from gptmoe.model.transformer import GPT

Counts = Mapping[int, Callable[[], list[int]]]
"""By layer; reading one may wait for a GPU."""


class AnsweredRows:
    """The sum over versions of the weights; what is known of one that is gone is read once more."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._gone = {layer: [0] * spec.experts_in_layer(layer) for layer in spec.moe_layers}
        self._counts: dict[int, Counts] = {}
        self._lock = Lock()

    def count(self, version: int, network: GPT) -> None:
        """Have its rows counted from now on. Before it is captured: a graph counts, or does not."""
        found = {}
        for layer in self._spec.moe_layers:
            moe = network.get_submodule(f"layers.{layer}.ffn")
            assert isinstance(moe, MoE)
            found[layer] = moe.count_rows()
        with self._lock:
            self._counts[version] = found

    def read(self, held: Set[int]) -> Mapping[int, Sequence[int]]:
        """By layer. Of versions older than all in `held` no more is expected."""
        with self._lock:
            for version in [version for version in self._counts if version < min(held)]:
                self._gone = _plus(self._gone, self._counts.pop(version))
            total = self._gone
            for counts in self._counts.values():
                total = _plus(total, counts)
            return total


def _plus(rows: Mapping[int, list[int]], counts: Counts) -> dict[int, list[int]]:
    return {
        layer: [sum(pair) for pair in zip(before, counts[layer](), strict=True)]
        for layer, before in rows.items()
    }
