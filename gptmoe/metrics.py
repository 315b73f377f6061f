"""The catalogue of what a training run measures, and metrics.jsonl, which holds it. No torch.

    recorder = JsonlRecorder(run_dir / "metrics.jsonl")
    recorder.record(20, loss=3.21, tokens_per_s=1850.0, expert_load=[130, 126])
    read(run_dir / "metrics.jsonl")[-1]["loss"]

One JSON object a line, one line a step; a validation adds a line of its own with the same step.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self

from gptmoe.errors import DataError
from gptmoe.lines import LineFile

log = logging.getLogger(__name__)

Value = float | Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Metric:
    """What a number in metrics.jsonl is."""

    name: str
    unit: str
    """"" for a ratio or a loss."""
    meaning: str


_ALL = (
    Metric("step", "steps", "optimizer steps done, counted from 1 for the first"),
    Metric("tokens", "tokens", "training tokens seen since the first step"),
    Metric("samples", "samples", "training samples seen since the first step: the data cursor"),
    Metric("epoch", "epochs", "passes over the training data begun, the first is 0"),
    Metric("loss", "", "what the step minimised: lm_loss and the routers' losses"),
    Metric("lm_loss", "", "mean cross-entropy of the predicted tokens, in nats"),
    Metric("aux_loss", "", "the share of the load-balancing loss in loss"),
    Metric("z_loss", "", "the share of the router z-loss in loss"),
    Metric("margin_loss", "", "the share of expert choice's L-Softmax loss in loss"),
    Metric("grad_norm", "", "L2 norm of the whole gradient before clipping"),
    Metric("loss_scale", "", "float16: what the loss of the step was multiplied by"),
    Metric("overflow", "", "1 on a step that was left out since its scaled gradients overflowed"),
    Metric("learning_rate", "", "the rate this step was taken with"),
    Metric("step_s", "s", "wall time of the step"),
    Metric("data_wait_s", "s", "part of step_s spent waiting for data"),
    Metric("tokens_per_s", "tokens/s", "training tokens of the step over step_s, all workers"),
    Metric("memory_peak_bytes", "bytes", "largest resident memory of the recording worker so far"),
    Metric("val_loss", "", "mean cross-entropy per token of the validation data, in nats"),
    Metric("val_perplexity", "", "exp(val_loss), padding not counted"),
    Metric("bits_per_char", "bits", "validation cross-entropy per character of text"),
    Metric("expert_load", "tokens", "tokens that chose each expert, summed over equal MoE layers"),
    Metric("load_max_over_mean", "", "busiest expert over mean, worst MoE layer; 1 is even"),
    Metric("dropped_ratio", "", "share of the choices that found their expert full"),
    Metric("unrouted_ratio", "", "share of the tokens that no expert took"),
    Metric("dead_experts", "experts", "experts that no token of the step chose, all layers"),
    Metric("router_entropy", "nats", "mean entropy of the router's distribution over experts"),
    Metric("all_to_all_share", "", "share of step_s that ranks spent exchanging rows, in the mean"),
    Metric("moe_layers", "", "the layers that the metrics by layer below are of, in this order"),
    Metric("layer_expert_load", "tokens", "by layer, tokens that chose each expert"),
    Metric("layer_load_max_over_mean", "", "by layer, busiest expert over mean; 1 is even"),
    Metric("layer_dropped_ratio", "", "by layer, share of choices that found their expert full"),
    Metric("layer_unrouted_ratio", "", "by layer, share of the tokens that no expert took"),
    Metric("layer_dead_experts", "experts", "by layer, experts that no token of the step chose"),
    Metric("layer_router_entropy", "nats", "by layer, mean entropy of the router's distribution"),
)
CATALOGUE: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _ALL})


class Recorder(Protocol):
    """Takes the numbers of a step; it observes and never steers."""

    def record(self, step: int, **values: Value) -> None: ...

    def close(self) -> None: ...


class JsonlRecorder:
    """Appends to a metrics.jsonl; see LineFile for a disk without room."""

    def __init__(self, path: Path, warn: Callable[[str], None] = log.warning) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = LineFile(path, warn)

    def record(self, step: int, **values: Value) -> None:
        """Append one line. Raises ValueError for a name that the catalogue does not hold."""
        for name in values:
            if name not in CATALOGUE:
                raise ValueError(_undeclared(name))
        self._file.append(json.dumps({"step": step} | values))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl; none if it does not exist yet.

    A half-written last line, left by a killed run or being written now, is passed over. Raises
    DataError for any other line that is not a record.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise DataError(
                f"{path}, line {number} is not a JSON object with a step; remove this line"
            )
    return records


def cut_after(path: Path, step: int) -> None:
    """Drop the records after `step`, and a half-written last line, in one rename.

    A run that goes on from a checkpoint calls this, so that no step is recorded twice.
    """
    if not path.exists():
        return
    kept = [record for record in read(path) if record["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _undeclared(name: str) -> str:
    near = get_close_matches(name, CATALOGUE, n=1)
    hint = f"did you mean {near[0]}?" if near else "declare it in gptmoe/metrics.py"
    return f"metric {name!r} is not in the catalogue; {hint}"
