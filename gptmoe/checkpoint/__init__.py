"""One checkpoint for training and serving: written by any layout, read by any other."""

from .boxes import Box, Piece, cut, flat_range, whole
from .folders import checkpoint_name, latest, prune
from .huggingface import import_gpt2, read_gpt2
from .read import Checkpoint, newest_valid, open_checkpoint
from .remote import fetch_checkpoint, latest_uri
from .write import save

__all__ = [
    "Box",
    "Checkpoint",
    "Piece",
    "checkpoint_name",
    "cut",
    "fetch_checkpoint",
    "flat_range",
    "import_gpt2",
    "latest",
    "latest_uri",
    "newest_valid",
    "open_checkpoint",
    "prune",
    "read_gpt2",
    "save",
    "whole",
]
