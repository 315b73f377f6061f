"""What a run reads, as paths of this machine: its inputs that are URIs are fetched once."""

from dataclasses import dataclass
from pathlib import Path

from gptmoe.checkpoint import fetch_checkpoint
from gptmoe.config import Location, Uri
from gptmoe.remote import fetch

from .config import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The inputs of a config, all of them paths."""

    data: Path
    validation: Path | None
    tokenizer: Path | None
    checkpoint: Path | None
    """A checkpoint's or a run's folder; None for a run that goes on."""


def gather(config: TrainConfig, folder: Path, *, begins: bool = True) -> Inputs:
    """Fetch what is a URI into `folder`; what is a path stays where it is, and is not looked at.

    Of a run behind a URI only the newest checkpoint is fetched. A run that has a checkpoint of its
    own (`begins` is False) needs none to begin from. Raises DataError or CheckpointError
    for what is not there, cannot be reached or cannot be copied.
    """

    def here(location: Location) -> Path:
        return fetch(location, folder) if isinstance(location, Uri) else location

    source, data = config.model.checkpoint if begins else None, config.data
    return Inputs(
        checkpoint=fetch_checkpoint(source, folder) if isinstance(source, Uri) else source,
        tokenizer=here(data.tokenizer) if data.tokenizer else None,
        data=here(data.path),
        validation=here(data.validation_path) if data.validation_path else None,
    )
