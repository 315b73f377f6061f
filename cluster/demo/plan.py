"""What the demo will do, as the commands that a user would type. Pure: no torch, no Ray."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.env import ROOT

CONFIGS = ROOT / "configs" / "train"
BUNDLED = ROOT / "configs" / "corpus" / "poems.tsv"
CALIBRATION_STEPS = 12
FINETUNE_SHARE = 0.15
"""Of the minutes given, so much is for finetuning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPlan:
    """The demo's inputs and folders."""

    data: Path
    output: Path
    minutes: float | None
    """Minutes of training; None = the steps of the config."""
    overrides: tuple[str, ...] = ()

    @property
    def is_bundled(self) -> bool:
        """True for the poems that come with the project."""
        return self.data == BUNDLED

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer."""
        return self.output / "tokenizer"

    @property
    def pretrain_dir(self) -> Path:
        """The pretraining run."""
        return self.output / "pretrain"

    @property
    def finetune_dir(self) -> Path:
        """The finetuning run; its checkpoint is served."""
        return self.output / "finetune"

    def tokenizer_command(self) -> list[str]:
        """`gptmoe tokenizer train` for this corpus."""
        size = 3072 if self.is_bundled else 8192
        words = ["tokenizer", "train", "--input", str(self.data), "--vocab-size", str(size)]
        return [*words, "--output", str(self.tokenizer)]

    def pretrain_command(
        self, max_steps: int | None = None, horizon: int | None = None
    ) -> list[str]:
        """`gptmoe pretrain`; with numbers, for so many steps under a schedule of so many."""
        config = CONFIGS / ("demo.toml" if self.is_bundled else "poetry.toml")
        words = ["pretrain", str(config), f"data.path={self.data}"]
        words += [f"data.tokenizer={self.tokenizer}", f"run.dir={self.pretrain_dir}"]
        words += self.overrides
        if max_steps is not None:
            words.append(f"train.max_steps={max_steps}")
        return [*words, f"schedule.horizon_steps={horizon}"] if horizon is not None else words

    def finetune_command(self, max_steps: int | None = None) -> list[str]:
        """`gptmoe finetune` on the same lines, each of them an example that ends with <sep>."""
        words = ["finetune", str(CONFIGS / "finetune.toml"), f"data.path={self.data}"]
        words += [f"model.checkpoint={self.pretrain_dir}", f"run.dir={self.finetune_dir}"]
        words += [word for word in self.overrides if word.startswith(("parallel.", "train.dtype"))]
        if max_steps is not None:
            words.append(f"train.max_steps={max_steps}")
        return words

    def serve_command(self) -> list[str]:
        """`gptmoe serve` of the finetuned checkpoint on free ports, in the faster type."""
        words = ["serve", "--checkpoint", str(self.finetune_dir), "dtype=bfloat16"]
        return [*words, "grpc_port=0", "http_port=0"]


def typed(words: Sequence[str]) -> str:
    """The command as a user would type it."""
    return shlex.join(["gptmoe", *words])


def steps_for(minutes: float, step_s: float) -> int:
    """Optimizer steps that fit into so many minutes."""
    return max(CALIBRATION_STEPS, int(minutes * 60 / step_s))
