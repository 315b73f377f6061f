"""Corpora: text prepared once into memory-mapped token ids, read as batches by sample index.

folder = Path("runs/poems/data")
prepare([Path("poems.tsv")], tokenizer, folder, kind="finetune", validation_fraction=0.02)
samples = open_samples(folder, "train", seq_len=128, seed=0)
batch = samples.batch(first=0, count=8)
"""

from .manifest import Counts, Manifest, Split, is_prepared, verify
from .prepare import Progress, prepare
from .reading import SUFFIXES, Example, Kind, find_files, read_examples
from .samples import Batch, LineSamples, Samples, TokenSamples, open_samples

__all__ = [
    "SUFFIXES",
    "Batch",
    "Counts",
    "Example",
    "Kind",
    "LineSamples",
    "Manifest",
    "Progress",
    "Samples",
    "Split",
    "TokenSamples",
    "find_files",
    "is_prepared",
    "open_samples",
    "prepare",
    "read_examples",
    "verify",
]
