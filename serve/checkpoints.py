"""Which checkpoint is meant, and whether it can take the place of another."""

from dataclasses import dataclass
from pathlib import Path

from gptmoe.checkpoint import latest_uri, open_checkpoint
from gptmoe.config import Location, Uri
from gptmoe.errors import CheckpointError, DataError, RequestError
from gptmoe.model.spec import ModelSpec
from gptmoe.remote import fetch
from gptmoe.stored import spec_of
from gptmoe.text import load_tokenizer

from .refusals import NotWithThis


def pinned(location: Location) -> Location:
    """The checkpoint that all replicas serve, also those that start later.

    Raises CheckpointError if there is none, DataError if a URI cannot be reached.
    """
    if isinstance(location, Uri):
        return latest_uri(location)
    return open_checkpoint(location, verify=False).path.resolve()  # a replica verifies all of it


@dataclass(frozen=True, slots=True)
class Interchangeable:
    """What weights must have in common to be served one after the other."""

    spec: ModelSpec
    tokenizer_digest: str
    cache_dir: Path

    def check(self, wanted: str) -> str:
        """The checkpoint that is meant, fetched to this node if it is a URI.

        Raises RequestError if there is none or it is damaged, NotWithThis if its model differs.
        """
        location = Uri(wanted) if "://" in wanted else Path(wanted)
        if not wanted or (isinstance(location, Path) and not location.is_absolute()):
            raise RequestError(
                f"checkpoint must be an absolute path or a URI; found {wanted!r}", "checkpoint"
            )
        try:
            location = pinned(location)
            folder = fetch(location, self.cache_dir) if isinstance(location, Uri) else location
            checkpoint = open_checkpoint(folder)
            spec, tokenizer = spec_of(checkpoint), load_tokenizer(folder)
        except (CheckpointError, DataError, OSError) as error:
            raise RequestError(str(error), "checkpoint") from None
        if spec != self.spec or tokenizer.digest != self.tokenizer_digest:
            what = "model of another config" if spec != self.spec else "model of another tokenizer"
            raise NotWithThis(
                f"{location} holds a {what} than the one that is served; serve it as another "
                "application"
            )
        return str(location)
