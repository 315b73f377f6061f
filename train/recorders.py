"""Where a run's numbers go: metrics.jsonl always, TensorBoard, and Ray's metrics for Prometheus."""

from pathlib import Path

from ray.util.metrics import Gauge
from torch.utils.tensorboard import SummaryWriter

from gptmoe.metrics import CATALOGUE, JsonlRecorder, Recorder, Value, cut_after


def make_recorders(run_dir: Path, run_name: str, done: int) -> list[Recorder]:
    """The recorders of rank 0; what was recorded after step `done` is cut off."""
    path = run_dir / "metrics.jsonl"
    cut_after(path, done)
    return [
        JsonlRecorder(path),
        TensorBoardRecorder(run_dir / "tensorboard", done),
        RayRecorder(run_name),
    ]


class TensorBoardRecorder:
    """Curves, one tag a metric; of a list one tag an entry, as expert_load/0."""

    def __init__(self, folder: Path, done: int) -> None:
        """Readers forget the points after step `done` that are there already."""
        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def record(self, step: int, **values: Value) -> None:
        """Add one point to each curve."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
            else:
                for index, item in enumerate(value):
                    self._writer.add_scalar(f"{name}/{index}", item, step)
        self._writer.flush()  # a killed run goes on after its checkpoint: no point may be missing

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class RayRecorder:
    """Gauges `gptmoe_train_NAME` with the run as a tag: Ray exports them to Prometheus."""

    def __init__(self, run_name: str) -> None:
        self._tags = {"run": run_name}
        self._gauges = {
            name: Gauge(f"gptmoe_train_{name}", description=metric.meaning, tag_keys=("run",))
            for name, metric in CATALOGUE.items()
        }

    def record(self, step: int, **values: Value) -> None:
        """Set the gauges; lists are left to the files."""
        for name, value in {"step": step, **values}.items():
            if isinstance(value, int | float):
                self._gauges[name].set(float(value), tags=self._tags)

    def close(self) -> None:
        """Nothing to write."""
