"""Published training runs as data: what ran, on what, how fast, and where that is said.

Speeds come as the source gives them and are turned into seconds a step here, once: TFLOP/s by the
source's own formula, which counts recompute (hardware FLOPs), or a share of the peak of the model's
FLOPs (MFU), or sequences or tokens a second.

What a source leaves open is written with the run. Models of another kind are mapped to a GPT of the
same products: a gated feed-forward layer to one 1.5 times as wide without a gate, grouped keys and
values to a narrower feed-forward layer.
"""

from dataclasses import dataclass, replace

from cluster.planner.devices import Cluster, machine
from cluster.planner.job import Choice, Job, Recompute
from gptmoe.model.presets import preset
from gptmoe.model.spec import ModelSpec, RouterSpec, expand_experts
from gptmoe.parallel.layout import Layout
from gptmoe.parallel.schedules import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run and its measured time."""

    name: str
    source: str
    job: Job
    choice: Choice
    cluster: Cluster
    step_s: float
    """Measured."""


def gpt(layers: int, d_model: int, heads: int, **changes: int | float) -> ModelSpec:
    """As in the papers of Megatron: vocabulary 51,200, sequences of 2,048, dropout 0.1."""
    parts = {"d_ff": 4 * d_model, "dropout": 0.1} | changes
    return ModelSpec(num_layers=layers, d_model=d_model, num_heads=heads, **parts)  # type: ignore[arg-type]


def job(spec: ModelSpec, batch: int, seq_len: int = 2048, *, fused: bool = False) -> Job:
    return Job(spec=spec, batch_sequences=batch, seq_len=seq_len, fused_attention=fused)


def choice(
    layout: tuple[int, int, int],
    microbatch: int,
    recompute: Recompute,
    *,
    zero: int = 0,
    chunks: int = 1,
    ep: int = 1,
) -> Choice:
    """`layout` is (dp, tp, pp)."""
    dp, tp, pp = layout
    schedule: Kind = "interleaved" if chunks > 1 else "1f1b"
    return Choice(
        layout=Layout(dp=dp, tp=tp, pp=pp, ep=ep, chunks=chunks),
        microbatch_size=microbatch,
        recompute=recompute,
        zero=zero,
        schedule=schedule,
    )


def hardware_flops(job: Job) -> float:
    """Of a step with full recompute: arXiv 2104.04473, equation 3."""
    spec, tokens = job.spec, job.batch_tokens
    width, layers = spec.d_model, spec.num_layers
    heads_and_head = job.seq_len / (6 * width) + spec.vocab_size / (16 * layers * width)
    return 96 * tokens * layers * width**2 * (1 + heads_and_head)


def model_flops(job: Job) -> float:
    """Of a step without recompute: arXiv 2205.05198, appendix A."""
    spec, tokens = job.spec, job.batch_tokens
    width, layers = spec.d_model, spec.num_layers
    heads_and_head = job.seq_len / (6 * width) + spec.vocab_size / (12 * layers * width)
    return 72 * tokens * layers * width**2 * (1 + heads_and_head)


def narayanan() -> list[Run]:
    """Weak scaling from 1.7B to 1T parameters, table 1. Open: microbatch and schedule; taken as
    1F1B, and microbatches of 4 sequences without a pipeline, 1 with one."""
    rows = (  # heads, width, layers, tp, pp, GPUs, batch, TFLOP/s a GPU
        (24, 2304, 24, 1, 1, 32, 512, 137),
        (32, 3072, 30, 2, 1, 64, 512, 138),
        (32, 4096, 36, 4, 1, 128, 512, 142),
        (48, 6144, 40, 8, 1, 256, 1024, 135),
        (64, 8192, 48, 8, 2, 512, 1536, 138),
        (80, 10240, 60, 8, 4, 1024, 1792, 140),
        (96, 12288, 80, 8, 8, 1536, 2304, 148),
        (128, 16384, 96, 8, 16, 1920, 2160, 155),
        (128, 20480, 105, 8, 35, 2520, 2520, 163),
        (160, 25600, 128, 8, 64, 3072, 3072, 163),
    )
    runs = []
    for heads, width, layers, tp, pp, gpus, batch, tflops in rows:
        this = job(gpt(layers, width, heads), batch)
        parameters_b = 12 * layers * width**2 / 1e9
        runs.append(
            Run(
                name=f"{parameters_b:.3g}B on {gpus}",
                source="arXiv 2104.04473 table 1",
                job=this,
                choice=choice((gpus // (tp * pp), tp, pp), 4 if pp == 1 else 1, "full"),
                cluster=machine("a100-80gb").cluster(gpus),
                step_s=hardware_flops(this) / (gpus * tflops * 1e12),
            )
        )
    return runs


def korthikanti() -> list[Run]:
    """Full recompute against selective recompute with sequence parallelism, table 5."""
    rows = (  # name, heads, width, layers, pp, chunks, batch, microbatch, seconds full, selective
        ("22B", 64, 6144, 48, 1, 1, 4, 4, 1.42, 1.10),
        ("175B", 96, 12288, 96, 8, 3, 64, 1, 18.13, 13.75),
        ("530B", 128, 20480, 105, 35, 3, 280, 1, 49.05, 37.83),
        ("1T", 160, 25600, 128, 64, 1, 512, 1, 94.42, 71.49),
    )
    runs = []
    for name, heads, width, layers, pp, chunks, batch, size, full_s, selective_s in rows:
        kinds: tuple[tuple[Recompute, float], ...] = (("full", full_s), ("sel", selective_s))
        for recompute, step_s in kinds:
            runs.append(
                Run(
                    name=f"{name} on {8 * pp}, recompute {recompute}",
                    source="arXiv 2205.05198 table 5",
                    job=job(gpt(layers, width, heads), batch),
                    choice=choice((1, 8, pp), size, recompute, chunks=chunks),
                    cluster=machine("a100-80gb").cluster(8 * pp),
                    step_s=step_s,
                )
            )
    return runs


def korthikanti_with_data() -> list[Run]:
    """530B on 2,240 GPUs: 42.1 % MFU with full recompute, 54.2 % with selective (abstract)."""
    this = job(gpt(105, 20480, 128), 2240)
    kinds: tuple[tuple[Recompute, float], ...] = (("full", 0.421), ("sel", 0.542))
    return [
        Run(
            name=f"530B on 2240, recompute {recompute}",
            source="arXiv 2205.05198 abstract",
            job=this,
            choice=choice((8, 8, 35), 1, recompute, chunks=3),
            cluster=machine("a100-80gb").cluster(2240),
            step_s=model_flops(this) / (2240 * 312e12 * utilization),
        )
        for recompute, utilization in kinds
    ]


def smith() -> list[Run]:
    """MT-NLG 530B: 1F1B by DeepSpeed, batch 1,920 (section 2.4). Open: recompute, taken as full."""
    this = job(gpt(105, 20480, 128), 1920)
    return [
        Run(
            name=f"530B on {8 * servers}",
            source="arXiv 2201.11990 section 2.4",
            job=this,
            choice=choice((servers // 35, 8, 35), 1, "full"),
            cluster=machine("a100-80gb").cluster(8 * servers),
            step_s=step_s,
        )
        for servers, step_s in ((280, 60.1), (350, 50.2), (420, 44.4))
    ]


def bloom() -> list[Run]:
    """BLOOM 176B: dp 8, tp 4, pp 12, microbatch 2, ZeRO 1; about 150 TFLOP/s a GPU. Four links of
    100 Gb/s a node."""
    this = job(gpt(70, 14336, 112, vocab_size=250_880), 2048)
    return [
        Run(
            name="176B on 384",
            source="arXiv 2211.05100 section 3.4",
            job=this,
            choice=choice((8, 4, 12), 2, "full", zero=1),
            cluster=replace(machine("a100-80gb").cluster(384), network_bytes_per_s=6.25e9),
            step_s=hardware_flops(this) / (384 * 150e12),
        )
    ]


def glm() -> list[Run]:
    """GLM-130B: MFU 32.5 % on 96 nodes of A100-40GB, batch 4,224, gated feed-forward layer of
    32,768. Open: microbatch, taken as 1."""
    this = job(gpt(70, 12288, 96, vocab_size=150_528), 4224)
    return [
        Run(
            name="130B on 768",
            source="arXiv 2210.02414 section 2.3",
            job=this,
            choice=choice((24, 4, 8), 1, "full", zero=1),
            cluster=machine("a100-40gb").cluster(768),
            step_s=model_flops(this) / (768 * 312e12 * 0.325),
        )
    ]


def llama() -> list[Run]:
    """Llama 3.1 8B by torchtitan: FSDP alone, 8,192 tokens a GPU, selective recompute, no compiler.
    Grouped keys and values and the gate mapped to d_ff 18,432, the head's own table left out."""
    spec = gpt(32, 4096, 32, d_ff=18432, vocab_size=128_256, max_seq_len=8192, dropout=0.0)
    return [
        Run(
            name=f"8B on {gpus} H100",
            source="torchtitan benchmarks, Llama 3.1 8B",
            job=job(spec, gpus, 8192, fused=True),
            choice=choice((gpus, 1, 1), 1, "sel", zero=3),
            cluster=machine("h100-80gb").cluster(gpus),
            step_s=8192 / rate,
        )
        for gpus, rate in ((8, 5762), (128, 5605))
    ]


def rajbhandari() -> list[Run]:
    """DeepSpeed-MoE on 128 A100 of 40 GB: a dense model against the mixture of equal quality.
    Open: recompute (taken as full) and microbatch (4)."""
    dense = preset("6.7B").spec
    base = preset("1.3B").spec
    router = RouterSpec(group_sequences=4)
    experts = expand_experts(128, base.num_layers, 2)
    mixture = replace(base, num_experts=experts, router=router, dropout=0.1)
    cluster = machine("a100-40gb").cluster(128)
    return [
        Run(
            name="6.7B dense on 128",
            source="arXiv 2201.05596 table 3",
            job=job(replace(dense, dropout=0.1), 1024),
            choice=choice((16, 8, 1), 4, "full"),
            cluster=cluster,
            step_s=1024 / 70,
        ),
        Run(
            name="1.3B+MoE-128 on 128",
            source="arXiv 2201.05596 table 3",
            job=job(mixture, 512),
            choice=choice((128, 1, 1), 4, "full", ep=128),
            cluster=cluster,
            step_s=512 / 372,
        ),
    ]


def published_runs() -> list[Run]:
    """All of them, by source."""
    sources = (
        narayanan, korthikanti, korthikanti_with_data, smith, bloom, glm, llama, rajbhandari,
    )  # fmt: skip
    return [run for source in sources for run in source()]
