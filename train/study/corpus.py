"""What all arms of a study read, made once: a tokenizer, and the corpus as its tokens."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gptmoe import data
from gptmoe.config import to_dict
from gptmoe.data import Progress, find_files, read_examples
from gptmoe.errors import ConfigError, DataError
from gptmoe.text import load_tokenizer, train_jiebabpe
from train.state import replace_json

from .config import CorpusConfig, StudyConfig
from .plan import PREPARED, TOKENIZER

log = logging.getLogger(__name__)

MANY_PASSES = 4.0
"""Beyond so many passes over the training data a model learns it by heart."""


def prepare(config: StudyConfig, progress: Callable[[Progress], None] | None = None) -> int:
    """Make tokenizer/ and data/ in the study's folder, if they are not there; the vocabulary size.

    Raises DataError for bad input, ConfigError if the study began with another corpus.
    """
    folder, corpus = config.study.dir, config.data
    files, held_out = find_files(corpus.inputs), find_files(corpus.validation or corpus.inputs)
    folder.mkdir(parents=True, exist_ok=True)
    _check_same(folder / "corpus.json", corpus, files)
    tokenizer_folder = folder / TOKENIZER
    if not (tokenizer_folder / "tokenizer.json").is_file():
        if corpus.tokenizer is not None:
            load_tokenizer(corpus.tokenizer).save(tokenizer_folder)
        else:
            log.info("learns a tokenizer of %d tokens", corpus.vocab_size)
            texts = evenly(files, corpus.tokenizer_characters)
            train_jiebabpe(texts, corpus.vocab_size, None).save(tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    data.prepare(
        files,
        tokenizer,
        folder / PREPARED,
        kind="pretrain",
        validation_fraction=0.0 if corpus.validation else corpus.validation_fraction,
        validation=held_out if corpus.validation else (),
        workers=corpus.workers,
        progress=progress,
    )
    return tokenizer.vocab_size


def evenly(files: Sequence[Path], characters: int) -> Iterator[str]:
    """Documents of all files, every one or every k-th, so that they have about `characters`.

    Reads the files twice: their size on disk says little about their text.
    """
    total = sum(len(example.text) for example in read_examples(files, "pretrain", {}))
    every = max(1, math.floor(total / characters))
    for number, example in enumerate(read_examples(files, "pretrain", {})):
        if number % every == 0:
            yield example.text


def passes(config: StudyConfig) -> float:
    """How often each training sample is seen by an arm, in the mean; the corpus is prepared."""
    folder, seq_len = config.study.dir / PREPARED, config.data.seq_len
    samples = data.open_samples(folder, "train", seq_len, 0).num_samples
    assert config.train.max_steps is not None
    assert config.train.batch_tokens is not None
    return config.train.max_steps * config.train.batch_tokens / (samples * seq_len)


def _check_same(path: Path, corpus: CorpusConfig, files: Sequence[Path]) -> None:
    """Remember what the study reads; refuse to go on with something else."""
    plain = to_dict(corpus) | {"inputs": [str(file.absolute()) for file in files]}
    plain = {key: value for key, value in plain.items() if key != "workers"}
    if not path.exists():
        replace_json(path, plain)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove the study's folder") from None
    changed = [key for key in plain if before.get(key) != plain[key]]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"the study in {path.parent} began with data.{key}={before.get(key)}, now it is "
            f"{plain[key]}; restore it, or choose another study.dir"
        )
