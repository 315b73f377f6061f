"""`jiebabpe`: jieba cuts the text into words, byte-pair merges stay inside a word.

One rule for training and encoding (`cut_words`), one file (`tokenizer.json` of Hugging Face): the
ids are those of `tokenizers.Tokenizer.from_file(path).encode(words, is_pretokenized=True)`.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from gptmoe.errors import ConfigError, DataError

from .bytelevel import BYTE_OF_CHARACTER, ByteLevelTokenizer, Merges, check_unicode, write_file
from .protocol import END, SEP
from .words import cut_words, cutter_name

TOKENIZER_FILE = "tokenizer.json"

NEWLINE = "\n"
"""A token under its own name, so that anyone can look it up; always a word alone: no merges."""

_SMALLEST = len(BYTE_OF_CHARACTER) + len((END, SEP, NEWLINE))
_CACHED_WORDS = 1 << 16
_CACHED_LENGTH = 16  # longer words are rare and would let the cache grow large

logger = logging.getLogger(__name__)


class JiebaBpe(ByteLevelTokenizer):
    """The Chinese tokenizer."""

    kind = "jiebabpe"
    special = (END, SEP)
    literal = (NEWLINE,)
    pattern = False
    separator = SEP

    def __init__(self, vocab: Mapping[str, int], merges: Merges) -> None:
        super().__init__(vocab, merges)
        self._encode_common_word = lru_cache(_CACHED_WORDS)(self._encode_word)

    def save(self, folder: Path) -> None:
        write_file(Path(folder) / TOKENIZER_FILE, self.to_json())

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in cut_words(text):
            common = len(word) <= _CACHED_LENGTH
            ids += self._encode_common_word(word) if common else self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        return self._bpe.encode(word, add_special_tokens=False).ids

    def _rules(self) -> str:
        return cutter_name()


def train_jiebabpe(
    texts: Iterable[str], vocab_size: int, progress: Callable[[int], None] | None = None
) -> JiebaBpe:
    """Learn a vocabulary of `vocab_size` tokens; the same texts give the same bytes in its file.

    A corpus too small to fill it gives a smaller one, with a warning. `progress` is called after
    each text with the number of texts read. Raises ConfigError if `vocab_size` leaves no room
    beside bytes and named tokens, DataError if the texts are all white space or are not Unicode.
    """
    if vocab_size <= _SMALLEST:
        raise ConfigError(
            f"vocab_size={vocab_size} must be over {_SMALLEST}: 256 bytes, {END}, {SEP} and newline"
            " come first; 51200 is usual for a large corpus, 4096 for a small one"
        )
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, SEP, NEWLINE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_words_by_text(texts, progress), trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = JiebaBpe(model["vocab"], [(left, right) for left, right in model["merges"]])
    if tokenizer.vocab_size < vocab_size:
        logger.warning(
            "the corpus fills %d of the %d tokens asked for; the vocabulary has %d",
            tokenizer.vocab_size,
            vocab_size,
            tokenizer.vocab_size,
        )
    return tokenizer


def _words_by_text(
    texts: Iterable[str], progress: Callable[[int], None] | None
) -> Iterator[list[str]]:
    empty = True
    for count, text in enumerate(texts, start=1):
        check_unicode(text)
        empty = empty and not text.strip()
        yield cut_words(text)
        if progress is not None:
            progress(count)
    if empty:
        raise DataError("the corpus holds no text; give a file with a line that is not blank")
