"""Pipeline parallelism, the model's side: a stage keeps its layers and nothing else."""

from typing import Any

from torch import nn

from gptmoe.model.transformer import GPT

from .mesh import Mesh


class Elsewhere(nn.Module):
    """Stands where a layer is that lives on another stage; it has no parameters."""

    def forward(self, *arguments: Any) -> Any:
        raise AssertionError("this layer lives on another pipeline stage")


def keep_stage(model: GPT, mesh: Mesh) -> None:
    """Drop what lives on other stages. The last one keeps the token table, which is the head."""
    layout, stage = mesh.layout, mesh.place.stage
    if layout.pp == 1:
        return
    mine = layout.layers_of(mesh.rank, model.spec.num_layers)
    for layer in range(model.spec.num_layers):
        if layer not in mine:
            model.layers[layer] = Elsewhere()
    is_last = stage == layout.pp - 1
    if stage > 0:
        model.embed.positions = Elsewhere()  # type: ignore[assignment]
    if stage > 0 and not is_last:
        model.embed.tokens = Elsewhere()  # type: ignore[assignment]
    if not is_last:
        model.norm = Elsewhere()  # type: ignore[assignment]
