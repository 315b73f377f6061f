"""Files of text to a prepared folder: memory-mapped token ids with a manifest."""

import logging
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gptmoe.config import to_dict
from gptmoe.errors import ConfigError, DataError
from gptmoe.text import Tokenizer

from .encode import Document, Encoder
from .manifest import FORMAT_VERSION, Counts, FileRecord, Manifest, Recipe, is_prepared
from .pool import ordered_map
from .reading import Example, Kind, find_files, read_examples
from .shards import Divider, SplitWriter

logger = logging.getLogger(__name__)

CHUNK_CHARACTERS = 2**16  # what a tokenizing process gets at a time
CHUNK_EXAMPLES = 2**10


@dataclass(frozen=True, slots=True)
class Progress:
    """How far `prepare` is: the fraction of the input bytes, and what was written."""

    fraction: float
    documents: int
    tokens: int


def prepare(
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    output: Path,
    *,
    kind: Kind,
    columns: Mapping[str, str] | None = None,
    validation_fraction: float = 0.0,
    validation: Sequence[Path] = (),
    sep_text: str = "",
    workers: int = 1,
    progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Tokenize `inputs` (files, folders, globs) into the folder `output` and return its manifest.

    The validation split is `validation` if given, else about `validation_fraction` of the distinct
    documents, at least one, chosen by a hash of their content. `columns` renames, `sep_text`
    becomes <sep> within src_txt (finetuning). The bytes written do not depend on `workers`. The
    folder appears whole or not at all; one that was made from the same inputs in the same way is
    left as it is.

    Raises DataError for bad input or an `output` that holds anything else, ConfigError for bad
    options.
    """
    if not 0 <= validation_fraction < 1:
        raise ConfigError(
            f"data.validation_fraction={validation_fraction} must be at least 0 and below 1; "
            "0.02 keeps one document in fifty"
        )
    recipe = Recipe(
        kind=kind,
        tokenizer_kind=tokenizer.kind,
        tokenizer_digest=tokenizer.digest,
        columns=dict(columns or {}),
        sep_text=sep_text,
        validation_fraction=0.0 if validation else validation_fraction,
    )
    files = find_files(inputs)
    held_out = find_files(validation) if validation else []
    for path in set(files) & set(held_out):
        logger.warning("%s is training and validation data: its validation loss means little", path)
    output = output.resolve()
    if output.exists() and not _is_empty_folder(output):
        return _reuse(output, recipe, files, held_out)
    with _appearing(output) as folder:
        manifest = _write(
            folder, recipe, files, held_out, Encoder(tokenizer, kind, sep_text), workers, progress
        )
        manifest.save(folder)
    return manifest


def _write(
    folder: Path,
    recipe: Recipe,
    files: list[Path],
    held_out: list[Path],
    encoder: Encoder,
    workers: int,
    progress: Callable[[Progress], None] | None,
) -> Manifest:
    records = [FileRecord.of(path) for path in (*files, *held_out)]
    chunks = _Chunks(read_examples([*files, *held_out], recipe.kind, recipe.columns))
    has_targets = False
    with (
        closing(SplitWriter(folder, "train", recipe.kind)) as train,
        closing(SplitWriter(folder, "validation", recipe.kind)) as validation,
    ):
        divider = Divider(train, validation, recipe.validation_fraction)
        for documents in ordered_map(encoder, chunks, workers):
            for document in documents:
                if document.file < len(files):
                    divider.add(document)
                else:
                    validation.add(document)
            has_targets = documents[-1].loss_from > 0
            if progress:
                progress(_progress(records, documents[-1], train.counts, validation.counts))
        divider.finish()
        _check_train(train.counts, validation.counts, chunks.num_blank)
        return Manifest(
            format_version=FORMAT_VERSION,
            recipe=recipe,
            token_dtype=encoder.dtype.str,
            has_targets=has_targets,
            empty_rows=chunks.num_blank,
            splits={"train": train.counts, "validation": validation.counts},
            files=(*train.finish(), *validation.finish()),
            inputs=tuple(records[: len(files)]),
            validation_inputs=tuple(records[len(files) :]),
        )


class _Chunks:
    """Examples in groups of about one size, the work of a process; blank ones are only counted."""

    def __init__(self, examples: Iterable[Example]) -> None:
        self._examples = examples
        self.num_blank = 0

    def __iter__(self) -> Iterator[list[Example]]:
        chunk: list[Example] = []
        characters = 0
        for example in self._examples:
            texts = [text for text in (example.text, example.target) if text is not None]
            if not all(text.strip() for text in texts):
                self.num_blank += 1
                continue
            chunk.append(example)
            characters += sum(map(len, texts))
            if characters >= CHUNK_CHARACTERS or len(chunk) == CHUNK_EXAMPLES:
                yield chunk
                chunk, characters = [], 0
        if chunk:
            yield chunk


def _progress(
    records: list[FileRecord], last: Document, train: Counts, validation: Counts
) -> Progress:
    sizes = [record.num_bytes for record in records]
    done = sum(sizes[: last.file]) + last.done * sizes[last.file]
    return Progress(
        fraction=done / sum(sizes),
        documents=train.documents + validation.documents,
        tokens=train.tokens + validation.tokens,
    )


def _check_train(train: Counts, validation: Counts, num_blank: int) -> None:
    if train.documents:
        return
    if validation.documents:
        raise DataError(
            f"all {validation.documents} documents fell into the validation split; "
            "lower data.validation_fraction or give more documents"
        )
    raise DataError(f"the input holds no text: all its {num_blank} rows are blank")


def _reuse(output: Path, recipe: Recipe, files: list[Path], held_out: list[Path]) -> Manifest:
    """The manifest of what is there already, if it is what would be written."""
    if not is_prepared(output):
        raise DataError(
            f"{output} exists and holds something else; choose another folder for prepared data"
        )
    manifest = Manifest.load(output)
    then, now = to_dict(manifest.recipe), to_dict(recipe)
    changed = [f"{key} ({then[key]!r}, now {now[key]!r})" for key in now if then[key] != now[key]]
    if not _describe(manifest.inputs, files):
        changed.append("inputs")
    if not _describe(manifest.validation_inputs, held_out):
        changed.append("validation inputs")
    if changed:
        raise DataError(
            f"{output} was prepared with other {', '.join(changed)}; "
            "delete it or choose another folder"
        )
    logger.info("%s is up to date", output)
    return manifest


def _describe(records: Sequence[FileRecord], files: Sequence[Path]) -> bool:
    return len(records) == len(files) and all(
        record.describes(file) for record, file in zip(records, files, strict=True)
    )


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output`, renamed to it if the body succeeds, else removed."""
    folder = output.with_name(f".{output.name}.{secrets.token_hex(4)}.tmp")
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.rename(output)
    except OSError as error:
        raise DataError(
            f"{output} cannot be written ({error}); free space or choose another folder"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
