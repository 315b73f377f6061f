"""`gpt2bpe`: GPT-2's English vocabulary, read from the files it was published in."""

import json
from pathlib import Path

from .bytelevel import ByteLevelTokenizer, write_file
from .protocol import END

VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
FILE_PAIRS = ((VOCAB_FILE, MERGES_FILE), ("encoder.json", "vocab.bpe"))
"""The same two files under Hugging Face's names and under OpenAI's."""

MERGES_HEADER = "#version: 0.2"


class Gpt2Bpe(ByteLevelTokenizer):
    """The English tokenizer. It has one special token, which also separates."""

    kind = "gpt2bpe"
    special = (END,)
    pattern = True
    separator = END

    def save(self, folder: Path) -> None:
        merges = [f"{left} {right}" for left, right in self._merges]
        write_file(Path(folder) / MERGES_FILE, "\n".join([MERGES_HEADER, *merges, ""]))
        write_file(Path(folder) / VOCAB_FILE, json.dumps(self._vocab, ensure_ascii=False))

    def _encode_plain(self, text: str) -> list[int]:
        return self._bpe.encode(text, add_special_tokens=False).ids
