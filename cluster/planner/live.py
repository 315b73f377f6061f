"""The devices of a running Ray cluster, from the resources that it declares. No Ray."""

from collections.abc import Mapping
from dataclasses import dataclass

from gptmoe.errors import ClusterError

_ACCELERATOR = "accelerator_type:"
_NODE = "node:"
_HEAD = "node:__internal_head__"

_NAMES = {
    "A100": "a100-80gb",
    "A100-40G": "a100-40gb",
    "A100-80G": "a100-80gb",
    "H100": "h100-80gb",
    "H800": "h800-80gb",
    "H200": "h200-141gb",
    "G4090": "rtx4090-24gb",
    "Ascend910B": "910b-64gb",
}
"""Ray's names for accelerators, and ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a cluster declares."""

    num_devices: int
    device: str | None
    """Our name, or None if Ray's is not known or missing."""
    devices_per_node: int
    memory_bytes: float | None
    """Of one rank, on a cluster without accelerators."""


def devices_of(resources: Mapping[str, float]) -> Found:
    """Count devices and nodes in Ray's total resources; CPUs count where nothing else is there.

    Raises ClusterError if there is nothing to compute on.
    """
    names = [name for name in resources if name.startswith(_NODE) and name != _HEAD]
    nodes = max(1, len(names))
    for kind in ("GPU", "NPU"):
        if count := int(resources.get(kind, 0)):
            types = [
                name.removeprefix(_ACCELERATOR)
                for name in resources
                if name.startswith(_ACCELERATOR)
            ]
            known = _NAMES.get(types[0]) if len(types) == 1 else None
            return Found(
                num_devices=count,
                device=known,
                devices_per_node=max(1, count // nodes),
                memory_bytes=None,
            )
    cores = int(resources.get("CPU", 0))
    if not cores:
        raise ClusterError(
            "the Ray cluster declares no GPU, NPU or CPU; add nodes, or describe the devices with "
            "--devices and --device"
        )
    memory_bytes = resources.get("memory", 0.0) / cores
    return Found(
        num_devices=cores,
        device="cpu",
        devices_per_node=max(1, cores // nodes),
        memory_bytes=memory_bytes or None,
    )
