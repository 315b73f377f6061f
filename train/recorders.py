"""Where a run's numbers go: metrics.jsonl always, TensorBoard, and Ray's metrics for Prometheus."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from ray.util.metrics import Gauge
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter

from gptmoe.metrics import CATALOGUE, JsonlRecorder, Recorder, Value, cut_after

log = logging.getLogger(__name__)

BY_LAYER = "layer_"
"""Begins the names of metrics that are lists by layer."""


def make_recorders(
    run_dir: Path, run_name: str, done: int, warn: Callable[[str], None] = log.warning
) -> list[Recorder]:
    """The recorders of rank 0; what was recorded after step `done` is cut off.

    `warn` hears of a disk without room: training goes on.
    """
    path = run_dir / "metrics.jsonl"
    cut_after(path, done)
    return [
        JsonlRecorder(path, warn),
        TensorBoardRecorder(run_dir / "tensorboard", done, warn),
        RayRecorder(run_name),
    ]


class TensorBoardRecorder:
    """Curves, one tag a metric; of a list one tag an entry, as expert_load/0."""

    def __init__(self, folder: Path, done: int, warn: Callable[[str], None] = log.warning) -> None:
        """Readers forget the points after step `done` that are there already."""
        self._warn = warn
        self._broken = False
        self._writer = FileWriter(str(folder))
        session = SessionLog(status=SessionLog.SessionStatus.Value("START"))
        self._writer.add_event(Event(session_log=session), step=done + 1)

    def record(self, step: int, **values: Value) -> None:
        """Add one point to each curve: all in one event, a tenth of the time of one for each.

        TensorBoard's writer does not survive an error: the curves end there, training goes on.
        """
        if self._broken:
            return
        summary = Summary()
        for name, labels, number in points(values):
            summary.value.add(tag="/".join([name, *labels.values()]), simple_value=number)
        try:
            self._writer.add_summary(summary, step)
            self._writer.flush()  # a killed run goes on after its checkpoint: no point is missing
        except OSError as error:
            self._broken = True
            self._warn(f"TensorBoard's curves end at step {step - 1}: {error.strerror}")

    def close(self) -> None:
        """Write what is left."""
        with suppress(OSError):
            self._writer.close()


class RayRecorder:
    """Gauges `gptmoe_train_NAME` with the run as a tag: Ray exports them to Prometheus.

    Metrics by layer have the layer as a further tag, loads the expert.
    """

    def __init__(self, run_name: str) -> None:
        self._tags = {"run": run_name}
        self._gauges = {
            name: Gauge(f"gptmoe_train_{name}", metric.meaning, ("run", *_labels(name)))
            for name, metric in CATALOGUE.items()
        }

    def record(self, step: int, **values: Value) -> None:
        """Set the gauges."""
        for name, labels, number in points({"step": step, **values}):
            self._gauges[name].set(float(number), tags=self._tags | labels)

    def close(self) -> None:
        """Nothing to write."""


def points(values: Mapping[str, Value]) -> Iterator[tuple[str, dict[str, str], float]]:
    """Each single number with the layer and expert that it is of, where it is of one."""
    for name, value in values.items():
        if name == "moe_layers":  # the labels of others
            continue
        labels = _labels(name)
        if not labels:
            yield name, {}, cast(float, value)
        elif labels == ("expert",):
            yield from ((name, {"expert": str(e)}, n) for e, n in enumerate(cast(Any, value)))
        else:
            for layer, item in zip(cast(Any, values["moe_layers"]), cast(Any, value), strict=True):
                if labels == ("layer",):
                    yield name, {"layer": str(layer)}, item
                else:
                    of = ({"layer": str(layer), "expert": str(e)} for e in range(len(item)))
                    yield from ((name, label, n) for label, n in zip(of, item, strict=True))


def _labels(name: str) -> tuple[str, ...]:
    loads = {"expert_load": ("expert",), f"{BY_LAYER}expert_load": ("layer", "expert")}
    return loads.get(name, ("layer",) if name.startswith(BY_LAYER) else ())
