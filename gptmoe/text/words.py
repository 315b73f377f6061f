"""Chinese text to words by jieba, always in the same way.

Nothing outside this file touches jieba, and it is imported when a text is cut: a model does without
it. The `jieba.Tokenizer` is our own, so that words added to
the shared one change nothing here, and filled from the dictionary in jieba's package: the cache
file that jieba keeps in the temporary folder saves no time, may be another user's or another
version's, and is announced on stderr.
"""

import re
import warnings
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

MAX_RUN = 1024
"""Characters without a space or mark before a cut is forced; jieba's time is quadratic in them."""

_LINE = re.compile(r"\n|[^\n]+")
_WORD_CHARACTER = r"[\u4E00-\u9FD5a-zA-Z0-9+#&._%\-]"  # what jieba looks for words in
_LONG_RUN = re.compile(rf"(?<!{_WORD_CHARACTER}){_WORD_CHARACTER}{{{MAX_RUN + 1},}}")


def cut_words(text: str) -> list[str]:
    """The words of `text`; joined they are `text`. A newline, a space or a mark is its own word."""
    cutter = _cutter()
    words: list[str] = []
    for line in _LINE.findall(text):
        for piece in _split_long_runs(line) if len(line) > MAX_RUN else [line]:
            words += cutter.lcut(piece)
    return words


def cutter_name() -> str:
    """What cuts, with its version: another one may cut in other places."""
    return f"jieba {_jieba().__version__}"


def _split_long_runs(line: str) -> Iterator[str]:
    start = 0
    for run in _LONG_RUN.finditer(line):
        for stop in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
            yield line[start:stop]
            start = stop
    yield line[start:]


@cache
def _jieba() -> ModuleType:
    with warnings.catch_warnings():  # its source and its use of pkg_resources, on some versions
        warnings.simplefilter("ignore")
        import jieba  # noqa: PLC0415
    return jieba


@cache
def _cutter() -> Any:
    """One for the process, never changed: it holds the dictionary, about 0.6 s and 100 MB."""
    cutter = _jieba().Tokenizer()
    cutter.FREQ, cutter.total = cutter.gen_pfdict(cutter.get_dict_file())
    cutter.initialized = True
    return cutter
