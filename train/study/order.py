"""What a process of a study is told, as a file in the folder that it works in; and how it ended."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptmoe import config as configs
from gptmoe.errors import DataError
from train.config import TrainConfig
from train.state import replace_json

ORDER, DONE = "order.json", "done.json"
PAUSED = 75
"""Exit code of a process, or of a study, that stopped in time and goes on when started again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Train an arm to its end, or measure its speed."""

    kind: Literal["train", "speed"]
    config: TrainConfig
    threads: int
    final_samples: int = 0
    """Of the last evaluation; 0 = all."""
    until_s: float = 0.0
    """Seconds since 1970 at which it pauses; 0 = never."""

    @property
    def folder(self) -> Path:
        """Where it works."""
        return self.config.run.dir

    @property
    def digest(self) -> str:
        """Names what is done, wherever and by how many threads."""
        plain = configs.to_dict(self)
        run = {key: value for key, value in plain["config"]["run"].items() if key != "dir"}
        data = {key: value for key, value in plain["config"]["data"].items() if key == "seq_len"}
        config = plain["config"] | {"run": run, "data": data}
        return configs.digest({"kind": self.kind, "final": self.final_samples, "config": config})

    def write(self) -> Path:
        """Put it into its folder, for a process to read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_json(self.folder / ORDER, configs.to_dict(self))
        return self.folder / ORDER


def read_order(path: Path) -> Order:
    """The order that `write` wrote."""
    return configs.build(Order, json.loads(path.read_text(encoding="utf-8")))


def write_done(order: Order, result: dict[str, Any]) -> None:
    """Say that the order is carried out, and with what result."""
    replace_json(order.folder / DONE, {"digest": order.digest, **result})


def read_done(folder: Path) -> dict[str, Any] | None:
    """The result in a folder; None while there is none. Raises DataError for a damaged file."""
    path = folder / DONE
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); remove it, and the arm is judged anew"
        ) from None
    return found


def is_done(order: Order) -> bool:
    """Whether it was carried out before. Raises DataError if something else was, in its folder."""
    found = read_done(order.folder)
    if found is not None and found.get("digest") != order.digest:
        raise DataError(
            f"{order.folder} holds a finished run with other settings; restore them, remove that "
            "folder to train it again, or choose another study.dir"
        )
    return found is not None
