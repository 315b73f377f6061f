"""What a plan runs on: devices, nodes and links, as plain numbers. Known devices by name.

All rates are those of the data sheets, in one direction; what of them is reached in practice is
said once, in assumptions.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Literal

from gptmoe.errors import ConfigError

Dtype = Literal["float32", "bfloat16"]

TERA, GIGA, GIBI = 1e12, 1e9, 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or the cores of one rank on a CPU."""

    name: str
    memory_bytes: float
    bfloat16_flops_per_s: float
    float32_flops_per_s: float
    memory_bytes_per_s: float
    fused_attention: bool = True
    """Attention never writes its scores to memory (FlashAttention, arXiv 2205.14135)."""
    runtime_bytes: float = 1.5e9
    """Taken by drivers, kernels and communication libraries besides all tensors."""
    kernel_bytes: float = 0.0
    """Of these, what is taken only with the first step: code and scratch of products."""
    kernel_s: float = 5e-6
    """Time to start one kernel: a lower bound for each operation, however small."""

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "bfloat16_flops_per_s", "memory_bytes_per_s"):
            _positive(f"device.{name}", getattr(self, name))

    def flops_per_s(self, dtype: Dtype) -> float:
        """Peak rate of matrix products."""
        return self.bfloat16_flops_per_s if dtype == "bfloat16" else self.float32_flops_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal devices in equal nodes, with two kinds of links."""

    num_devices: int
    device: Device
    devices_per_node: int
    link_bytes_per_s: float
    """Between two devices of a node, for each device, one direction."""
    network_bytes_per_s: float
    """Between nodes, for each device, one direction: a node's network cards over its devices."""
    latency_s: float = 1e-5
    """Of one message."""

    def __post_init__(self) -> None:
        _positive("cluster.num_devices", self.num_devices)
        _positive("cluster.devices_per_node", self.devices_per_node)
        _positive("cluster.link_bytes_per_s", self.link_bytes_per_s)
        _positive("cluster.network_bytes_per_s", self.network_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A device with the node it usually comes in."""

    device: Device
    devices_per_node: int
    link_bytes_per_s: float
    network_bytes_per_s: float
    latency_s: float = 1e-5

    def cluster(self, num_devices: int) -> Cluster:
        """So many of these devices."""
        return Cluster(
            num_devices=num_devices,
            device=self.device,
            devices_per_node=self.devices_per_node,
            link_bytes_per_s=self.link_bytes_per_s,
            network_bytes_per_s=self.network_bytes_per_s,
            latency_s=self.latency_s,
        )


def machine(name: str) -> Machine:
    """The machine whose device is called `name`. Raises ConfigError with the nearest names."""
    if name not in MACHINES:
        near = get_close_matches(name, MACHINES, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(MACHINES)};"
        raise ConfigError(
            f"--device {name} is not known; {hint} any other is described by "
            "--device-memory-gb, --device-tflops, --link-gb-s and --network-gb-s"
        )
    return MACHINES[name]


def _positive(name: str, value: float) -> None:
    if not value > 0:  # written so that NaN fails
        raise ConfigError(f"{name}={value:g} must be above 0")


def _machine(
    name: str,
    *,
    memory_gib: float,
    tflops: tuple[float, float],
    memory_gb_s: float,
    link_gb_s: float,
    network_gb_s: float,
    devices_per_node: int = 8,
) -> Machine:
    """One row of the table; `tflops` of bfloat16 and float32 products, both without sparsity."""
    device = Device(
        name=name,
        memory_bytes=memory_gib * GIBI,
        bfloat16_flops_per_s=tflops[0] * TERA,
        float32_flops_per_s=tflops[1] * TERA,
        memory_bytes_per_s=memory_gb_s * GIGA,
    )
    return Machine(
        device=device,
        devices_per_node=devices_per_node,
        link_bytes_per_s=link_gb_s * GIGA,
        network_bytes_per_s=network_gb_s * GIGA,
    )


# Vendors' data sheets; memory is what a process sees. 910b: no public data sheet, as reported.
_ROWS = (
    _machine(
        "a100-40gb",
        memory_gib=39.4,
        tflops=(312, 19.5),
        memory_gb_s=1555,
        link_gb_s=300,
        network_gb_s=25,
    ),
    _machine(
        "a100-80gb",
        memory_gib=79.2,
        tflops=(312, 19.5),
        memory_gb_s=2039,
        link_gb_s=300,
        network_gb_s=25,
    ),
    _machine(
        "h100-80gb",
        memory_gib=79.2,
        tflops=(989, 67),
        memory_gb_s=3350,
        link_gb_s=450,
        network_gb_s=50,
    ),
    _machine(
        "h800-80gb",
        memory_gib=79.2,
        tflops=(989, 67),
        memory_gb_s=3350,
        link_gb_s=200,
        network_gb_s=50,
    ),
    _machine(
        "h200-141gb",
        memory_gib=139.8,
        tflops=(989, 67),
        memory_gb_s=4800,
        link_gb_s=450,
        network_gb_s=50,
    ),
    _machine(
        "910b-64gb",
        memory_gib=60.9,
        tflops=(376, 94),
        memory_gb_s=1600,
        link_gb_s=196,
        network_gb_s=25,
    ),
    _machine(
        "rtx4090-24gb",
        memory_gib=23.5,
        tflops=(165, 82),
        memory_gb_s=1008,
        link_gb_s=20,
        network_gb_s=3,
    ),
)

CPU = Machine(  # a rank with one core of a server with AVX512-BF16, over gloo, as measured by
    # tests/bench/bench_planner_here.py
    device=Device(
        name="cpu",
        memory_bytes=8 * GIBI,
        bfloat16_flops_per_s=0.26 * TERA,
        float32_flops_per_s=0.09 * TERA,
        memory_bytes_per_s=15 * GIGA,
        fused_attention=False,
        runtime_bytes=0.5e9,
        kernel_bytes=0.125e9,
    ),
    devices_per_node=64,
    link_bytes_per_s=0.6 * GIGA,
    network_bytes_per_s=0.3 * GIGA,
    latency_s=1.6e-3,
)

MACHINES: Mapping[str, Machine] = MappingProxyType({row.device.name: row for row in (*_ROWS, CPU)})
"""Every known device."""
