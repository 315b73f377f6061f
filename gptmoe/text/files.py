"""Finds out what kind of tokenizer a file or folder holds, and loads it.

A `tokenizer.json` has no room for a name of its own, so its rules tell: jiebabpe's words come cut
by jieba and are not cut again, GPT-2's are cut by a pattern in the file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptmoe.errors import DataError

from .bytelevel import ByteLevelTokenizer, Merges, check_vocabulary
from .gpt2bpe import FILE_PAIRS, Gpt2Bpe
from .jiebabpe import TOKENIZER_FILE, JiebaBpe
from .protocol import SEP, Tokenizer

_WANTED = f"{TOKENIZER_FILE}, or {' or '.join(' with '.join(pair) for pair in FILE_PAIRS)}"


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a `tokenizer.json`, or a folder with one or with GPT-2's two files.

    Raises DataError if nothing is there, or if what is there is not a tokenizer of these kinds.
    """
    path = Path(path)
    if path.is_file():
        return _load_tokenizer_file(path)
    if not path.is_dir():
        raise DataError(f"tokenizer {path} does not exist; give a folder with {_WANTED}")
    for vocab_name, merges_name in FILE_PAIRS:
        if (path / vocab_name).is_file() and (path / merges_name).is_file():
            return _load_gpt2_files(path / vocab_name, path / merges_name)
    if (path / TOKENIZER_FILE).is_file():
        return _load_tokenizer_file(path / TOKENIZER_FILE)
    raise DataError(f"folder {path} holds no tokenizer; it needs {_WANTED}")


def _load_gpt2_files(vocab_path: Path, merges_path: Path) -> Gpt2Bpe:
    vocab = _read_json(vocab_path)
    if not isinstance(vocab, dict):
        raise DataError(f"{vocab_path} must map each token to its id; take GPT-2's own file")
    merges = []
    for number, line in enumerate(_read_text(merges_path).splitlines(), start=1):
        if line and not (number == 1 and line.startswith("#version")):
            left, _, right = line.partition(" ")
            if not right or " " in right:
                raise DataError(f"{merges_path} line {number} must be two tokens, found {line!r}")
            merges.append((left, right))
    check_vocabulary(vocab_path, vocab, merges, Gpt2Bpe.named())
    return Gpt2Bpe(vocab, merges)


def _load_tokenizer_file(path: Path) -> ByteLevelTokenizer:
    content = _read_json(path)
    try:
        vocab, merges = _vocabulary(content)
        found = _rules(content)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(f"{path} holds no byte-pair vocabulary; a tokenizer is {_WANTED}") from None
    cut_by_pattern = found["pre_tokenizer"].get("use_regex", False)
    kind = Gpt2Bpe if cut_by_pattern and SEP not in vocab else JiebaBpe
    check_vocabulary(path, vocab, merges, kind.named())
    tokenizer = kind(vocab, merges)
    wanted = _rules(json.loads(tokenizer.to_json()))
    if differing := [part for part in wanted if wanted[part] != found[part]]:
        raise DataError(
            f"{path} is not {kind.kind}: its {', '.join(differing)} would give a text other ids;"
            " train one: gptmoe tokenizer train"
        )
    return tokenizer


def _vocabulary(content: Any) -> tuple[dict[str, int], Merges]:
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    model = content["model"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return model["vocab"] | added, [(str(left), str(right)) for left, right in pairs]


def _rules(content: Any) -> dict[str, Any]:
    """What besides vocabulary and merges decides the ids of a text. A flag not set is False."""
    pre_tokenizer = dict(content.get("pre_tokenizer") or {})
    if pre_tokenizer.get("type") == "ByteLevel":
        pre_tokenizer.setdefault("use_regex", True)  # older files leave it out
    flags = ("single_word", "lstrip", "rstrip")
    added = content["added_tokens"]
    return {
        "added_tokens": {token["content"]: [f for f in flags if token.get(f)] for token in added},
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": _set(pre_tokenizer, but=["trim_offsets"]),
        "model": _set(content["model"], but=["vocab", "merges"]),
    }


def _set(options: Mapping[str, Any], but: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value and name not in but}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}; a tokenizer is {_WANTED}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; a tokenizer is {_WANTED}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from None
