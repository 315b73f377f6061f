"""The GPT decoder: learned positions, pre-LayerNorm, tied embeddings, FFN or experts per layer.

Letters: B batch, T tokens, D model width, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Attend, Attention, Embedding, FeedForward, LayerNorm, attend_causally, linear
from .moe import MoE
from .routing import Groups, Routing
from .spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Output:
    """The final hidden states, and what each MoE layer's router decided, in layer order."""

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
        self.dropout = spec.dropout
        self.norm_attention = LayerNorm(spec.d_model)
        self.attention = Attention(spec.d_model, spec.num_heads)
        self.norm_ffn = LayerNorm(spec.d_model)
        experts = spec.experts_in_layer(layer)
        self.ffn = MoE(spec, experts) if experts else FeedForward(spec.d_model, spec.d_ff)

    def forward(
        self, x_BTD: Tensor, groups: Groups, attend: Attend
    ) -> tuple[Tensor, Routing | None]:
        x_BTD = x_BTD + self._drop(self.attention(self.norm_attention(x_BTD), self.layer, attend))
        h_BTD = self.norm_ffn(x_BTD)
        routing = None
        if isinstance(self.ffn, MoE):
            out_TD, routing = self.ffn(h_BTD.flatten(0, 1), groups)
            out_BTD = out_TD.view_as(h_BTD)
        else:
            out_BTD = self.ffn(h_BTD)
        return x_BTD + self._drop(out_BTD), routing

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout) if self.training and self.dropout else x_BTD


class GPT(nn.Module):
    """The model core of training and serving. It knows no ranks: those are applied from outside.

    Parameter names are the checkpoint's logical names. `compute_dtype` may be narrower than the
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
        self.packed_head: Tensor | None = None  # see gptmoe/generate/packed.py

    def forward(
        self,
        token_BT: Tensor,
        position_BT: Tensor | None = None,
        valid_BT: Tensor | None = None,
        attend: Attend = attend_causally,
    ) -> Output:
        """Hidden states after the last norm, [B, T, D].

        `valid_BT` is False on padding, which is then not routed. In training, B must be a multiple
        of `spec.router.group_sequences` when there are experts.
        """
        if position_BT is None:
            position_BT = torch.arange(token_BT.shape[1], device=token_BT.device).expand_as(
                token_BT
            )
        groups = self._groups(token_BT, valid_BT)
        x_BTD = self.embed(token_BT, position_BT, self.compute_dtype)
        x_BTD = F.dropout(x_BTD, self.spec.dropout, self.training)
        routings = []
        for block in self.layers:
            x_BTD, routing = block(x_BTD, groups, attend)
            if routing is not None:
                routings.append(routing)
        return Output(self.norm(x_BTD), tuple(routings))

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Scores over the vocabulary, [B, T, V], with the tied token table."""
        table_VD = self.embed.tokens.weight if self.packed_head is None else self.packed_head
        return linear(hidden_BTD, table_VD)

    def _groups(self, token_BT: Tensor, valid_BT: Tensor | None) -> Groups:
        """In training groups of `group_sequences` sequences, else one: nothing is dropped."""
        sequences = self.spec.router.group_sequences if self.training else len(token_BT)
        if self.spec.num_experts and len(token_BT) % sequences:
            raise ValueError(
                f"a microbatch of {len(token_BT)} sequences is not whole groups of {sequences}"
            )
        valid_T = None if valid_BT is None else valid_BT.flatten()
        return Groups(sequences * token_BT.shape[1], valid_T)
