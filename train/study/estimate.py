"""How long the runs of a study will take: from what was measured before, else by a rough rate."""

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from gptmoe import metrics
from train.config import TrainConfig

from .config import StudyConfig
from .order import read_done
from .plan import ArmRun, Sized, arm_runs, speed_runs

_EFFICIENCY = 0.28
"""Share of a plain matrix product's rate that training reaches, about, with narrow models."""
_PROBE_S = 0.3
_ROWS = 2048


def seconds(config: StudyConfig, models: tuple[Sized, ...]) -> dict[str, float]:
    """Estimated seconds of one run of each variant, validations counted, by variant."""
    known, found = _measured(config, models), {}
    rate = flops_per_s(config) if len(known) < len(models) else 0.0
    for it in models:
        run = next(run for run in arm_runs(config, models) if run.variant == it.variant)
        name = it.variant.name
        per_token_s = 1 / known[name] if name in known else 3 * it.flops.total / rate
        found[name] = per_token_s * equivalent_tokens(run.config, config.study.final_samples)
    return found


def equivalent_tokens(config: TrainConfig, final_samples: int) -> float:
    """Tokens of a run, each validated one counted as a third of a trained one."""
    steps, every = config.train.max_steps or 0, config.train.validate_every_steps
    validations = steps // every if every else 0
    validated = validations * config.train.validation_samples + 3 * final_samples
    return steps * config.batch_tokens + validated * config.data.seq_len / 3


def flops_per_s(config: StudyConfig) -> float:
    """What training is likely to reach on this machine, from products of the model's width."""
    torch.set_num_threads(min(config.study.threads, os.cpu_count() or 1))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width, dtype = config.model.d_model or 1, getattr(torch, config.train.dtype)
    x_TD = torch.randn(_ROWS, width, device=device, dtype=dtype)
    weight_DF = torch.randn(width, 4 * width, device=device, dtype=dtype)
    fastest_s, end_s = math.inf, time.perf_counter() + _PROBE_S
    while time.perf_counter() < end_s:
        began_s = time.perf_counter()
        float((x_TD @ weight_DF)[0, 0])  # waits for the device
        fastest_s = min(fastest_s, time.perf_counter() - began_s)
    return _EFFICIENCY * 2 * _ROWS * 4 * width**2 / fastest_s


def _measured(config: StudyConfig, models: tuple[Sized, ...]) -> Mapping[str, float]:
    """Tokens/s of the variants that have run in the study's folder, whole or in part."""
    found: dict[str, float] = {}
    for measured in speed_runs(config, models):
        if (done := read_done(measured.folder)) is not None:
            found.setdefault(measured.name.partition(",")[0], float(done["tokens_per_s"]))
    for run in arm_runs(config, models):
        found |= _of_run(run, run.folder / "metrics.jsonl")
    return found


def _of_run(run: ArmRun, path: Path) -> dict[str, float]:
    speeds = [r["tokens_per_s"] for r in metrics.read(path) if "tokens_per_s" in r]
    return {run.variant.name: sorted(speeds)[len(speeds) // 2]} if speeds else {}
