"""The GPT decoder: learned positions, pre-LayerNorm, tied embeddings, FFN or experts per layer.

Letters: B batch, T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .dropout import EMBEDDINGS, Drop, keep_all
from .jitter import Jitter
from .layers import Attend, Attention, Embedding, FeedForward, LayerNorm, attend_causally, linear
from .loss import token_losses, weighted_sum
from .moe import MoE
from .routing import Groups, Routing
from .spec import ModelSpec
from .turns import Pausing, straight


@dataclass(frozen=True, slots=True)
class Output:
    """The hidden states after the layers that ran, after the last one with the last norm applied;
    and what their routers decided, in layer order; those of layers that ran as one call of kernels,
    as decoding's do, tell nothing."""

    hidden_BTD: Tensor
    routings: tuple[Routing, ...]


class Embeddings(nn.Module):
    """Token table (also the head) and position table."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.tokens = Embedding(spec.vocab_size, spec.d_model)
        self.positions = Embedding(spec.max_seq_len, spec.d_model)

    def forward(self, token_BT: Tensor, position_BT: Tensor, dtype: torch.dtype) -> Tensor:
        # Cast before the sum: tables kept in a narrow type for serving then give training's bits.
        return self.tokens(token_BT).to(dtype) + self.positions(position_BT).to(dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), where ffn is dense or a mixture of experts."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm_attention = LayerNorm(spec.d_model)
        self.attention = Attention(spec.d_model, spec.num_heads)
        self.norm_ffn = LayerNorm(spec.d_model)
        experts = spec.experts_in_layer(layer)
        self.ffn = MoE(spec, experts) if experts else FeedForward(spec.d_model, spec.d_ff)

    def forward(
        self, x_BTD: Tensor, groups: Groups, attend: Attend, drop: Drop
    ) -> tuple[Tensor, Routing | None]:
        return straight(self.steps(x_BTD, groups, attend, drop))

    def steps(
        self, x_BTD: Tensor, groups: Groups, attend: Attend, drop: Drop
    ) -> Pausing[tuple[Tensor, Routing | None]]:
        """The layer; it pauses while rows travel to experts and back."""
        x_BTD, h_BTD = self.attended(x_BTD, attend, drop)
        routing = None
        if isinstance(self.ffn, MoE):
            out_BTD, routing = yield from self.ffn.steps(h_BTD, groups.in_layer(self.layer))
        else:
            out_BTD = self.ffn(h_BTD)
        return x_BTD + drop(out_BTD, self.layer, "ffn"), routing

    def attended(self, x_BTD: Tensor, attend: Attend, drop: Drop) -> tuple[Tensor, Tensor]:
        """x + attention(norm(x)), and its norm: the half of the layer before its ffn."""
        attended_BTD = self.attention(self.norm_attention(x_BTD), self.layer, attend)
        x_BTD = x_BTD + drop(attended_BTD, self.layer, "attention")
        return x_BTD, self.norm_ffn(x_BTD)


class GPT(nn.Module):
    """The model core of training and serving. It knows no ranks: those are applied from outside.

    Names of parameters, and of buffers, which are the routers' state, are the checkpoint's logical
    names. `compute_dtype` may be narrower than the
    parameters' (float32 weights with bfloat16 products). A new instance is uninitialised: see
    `initialize`.
    """

    def __init__(self, spec: ModelSpec, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = spec
        self.compute_dtype = compute_dtype
        self.embed = Embeddings(spec)
        self.layers = nn.ModuleList(Block(spec, layer) for layer in range(spec.num_layers))
        self.norm = LayerNorm(spec.d_model)
        self.head: Callable[[Tensor], Tensor] | None = None
        """The output head in another form than the token table (gptmoe/generate/packed.py)."""
        self.fixed_rows = True
        """Whether products need a fixed multiple of rows to give a row the same bits always."""

    def forward(self, *arguments: Any, **named: Any) -> Output:
        """`steps` without a pause."""
        return straight(self.steps(*arguments, **named))

    def steps(
        self,
        token_BT: Tensor,
        position_BT: Tensor | None = None,
        valid_BT: Tensor | None = None,
        attend: Attend = attend_causally,
        drop: Drop = keep_all,
        *,
        jitter: Jitter | None = None,
        layers: range | None = None,
        x_BTD: Tensor | None = None,
    ) -> Pausing[Output]:
        """Hidden states [B, T, D] after `layers` (default: all of them).

        `valid_BT` is False on padding, which is then not routed. In training, B must be a multiple
        of `spec.router.group_sequences` when there are experts; `jitter` is the noise of their
        routers. A pipeline stage names its layers; unless they begin with layer 0, `x_BTD` are the
        hidden states before them.
        It pauses whenever rows travel to experts and back; see turns.py.
        """
        layers = layers or range(self.spec.num_layers)
        groups = self._groups(token_BT, valid_BT, jitter)
        if x_BTD is None:
            x_BTD = self._begin(token_BT, position_BT, drop)
        return (yield from self.through(layers, x_BTD, groups, attend, drop))

    def through(
        self, layers: range, x_BTD: Tensor, groups: Groups, attend: Attend, drop: Drop
    ) -> Pausing[Output]:
        """The part of `steps` behind the embeddings."""
        routings = []
        for layer in layers:
            block = self.layers[layer]
            assert isinstance(block, Block)
            x_BTD, routing = yield from block.steps(x_BTD, groups, attend, drop)
            if routing is not None:
                routings.append(routing)
        if layers.stop == self.spec.num_layers:
            x_BTD = self.norm(x_BTD)
        return Output(x_BTD, tuple(routings))

    def _begin(self, token_BT: Tensor, position_BT: Tensor | None, drop: Drop) -> Tensor:
        if position_BT is None:
            position_BT = torch.arange(token_BT.shape[1], device=token_BT.device).expand_as(
                token_BT
            )
        return drop(self.embed(token_BT, position_BT, self.compute_dtype), EMBEDDINGS, "sum")

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Scores over the vocabulary, [B, T, V], with the tied token table."""
        if self.head is not None:
            return self.head(hidden_BTD)
        return linear(hidden_BTD, self.embed.tokens.weight)

    def loss_sum(self, hidden_BTD: Tensor, label_BT: Tensor, weight_BT: Tensor) -> Tensor:
        """Sum in nats of the losses of labels with weight True: a scalar."""
        return weighted_sum(self.label_losses(hidden_BTD, label_BT), weight_BT)

    def label_losses(self, hidden_BTD: Tensor, label_BT: Tensor) -> Tensor:
        """Negative log-likelihood of each label in nats, [B * T]."""
        return token_losses(self.logits(hidden_BTD).flatten(0, 1), label_BT.flatten())

    def _groups(self, token_BT: Tensor, valid_BT: Tensor | None, jitter: Jitter | None) -> Groups:
        """In training groups of `group_sequences` sequences, else one: nothing is dropped."""
        sequences = self.spec.router.group_sequences if self.training else len(token_BT)
        if self.spec.num_experts and len(token_BT) % sequences:
            raise ValueError(
                f"a microbatch of {len(token_BT)} sequences is not whole groups of {sequences}"
            )
        valid_T = None if valid_BT is None else valid_BT.flatten()
        return Groups(sequences * token_BT.shape[1], valid_T, jitter)
