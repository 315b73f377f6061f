"""What each pipeline stage holds: layers, and parameters by how they are spread over ranks."""

from dataclasses import dataclass
from functools import lru_cache

from gptmoe.model.spec import ModelSpec
from gptmoe.parallel.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The part of a model that a pipeline stage holds."""

    index: int
    dense_layers: int
    experts: tuple[int, ...]
    """How many experts each of its other layers holds."""
    first: bool
    """Holds the embeddings."""
    last: bool
    """Holds the last norm and the output head, which is the token table."""
    sliced: int
    """Parameters that tensor parallelism cuts."""
    whole: int
    """Parameters that every tensor rank holds: norms, some biases, routers, positions."""
    expert: int
    """Parameters of experts, spread over ep ranks."""
    largest_layer: tuple[int, int]
    """Of the largest layer: parameters outside experts, parameters of experts."""

    @property
    def layers(self) -> int:
        return self.dense_layers + len(self.experts)


def stages(spec: ModelSpec, pp: int, chunks: int = 1) -> tuple[Stage, ...]:
    """All stages in order. Layers are cut as evenly as whole layers allow.

    With chunks, stage s holds the parts s, s + pp, s + 2 pp, ... of pp x chunks.
    """
    parts = Layout(pp=pp, chunks=chunks).layer_chunks(spec.num_layers)
    found = []
    for index in range(pp):
        own = tuple(layer for part in parts[index::pp] for layer in part)
        found.append(_stage(spec, index, own, index == pp - 1))
    return tuple(found)


@lru_cache(maxsize=4096)
def unlike_stages(spec: ModelSpec, pp: int, chunks: int = 1) -> tuple[Stage, ...]:
    """Stages that differ; of equal ones the first, which holds most microbatches in flight."""
    seen: dict[tuple[object, ...], Stage] = {}
    for stage in stages(spec, pp, chunks):
        key = (stage.dense_layers, stage.experts, stage.first, stage.last)
        seen.setdefault(key, stage)
    return tuple(seen.values())


def _stage(spec: ModelSpec, index: int, layers: tuple[int, ...], last: bool) -> Stage:
    d_model, d_ff, first = spec.d_model, spec.d_ff, index == 0
    counts = [spec.experts_in_layer(layer) for layer in layers]
    experts = tuple(count for count in counts if count)
    dense = len(layers) - len(experts)
    # qkv, out and up are cut with their weights; the biases of out and down are added once, whole.
    attention_sliced = 4 * d_model * d_model + 3 * d_model
    ffn_sliced = 2 * d_model * d_ff + d_ff
    one_expert = ffn_sliced + d_model
    shared_sliced = spec.shared_layers * ffn_sliced
    shared_whole = spec.router.residual_layers * 3 * d_model  # norms and the biases of down
    if spec.residual_moe:
        shared_whole += d_model + 2 * d_model + 2  # the bias of down, and the mix
    sliced = len(layers) * attention_sliced + dense * ffn_sliced + len(experts) * shared_sliced
    whole = len(layers) * (4 + 1) * d_model + dense * d_model + sum(experts) * d_model
    whole += len(experts) * shared_whole
    if first:
        sliced += spec.vocab_size * d_model
        whole += spec.max_seq_len * d_model
    if last:
        sliced += 0 if first else spec.vocab_size * d_model
        whole += 2 * d_model
    return Stage(
        index=index,
        dense_layers=dense,
        experts=experts,
        first=first,
        last=last,
        sliced=sliced,
        whole=whole,
        expert=sum(experts) * one_expert,
        largest_layer=(
            attention_sliced + max(ffn_sliced if dense else 0, shared_sliced if experts else 0),
            max(experts, default=0) * one_expert,
        ),
    )
