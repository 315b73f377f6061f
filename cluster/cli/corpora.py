"""gptmoe tokenizer train, gptmoe data prepare: what comes before training."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import Progress

from cluster.patience import within
from gptmoe.errors import ConfigError

from . import lazy
from .output import Json, bar, examples, print_facts

tokenizer_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)
data_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

Inputs = Annotated[
    list[Path],
    typer.Option("--input", help="A file, folder or glob (.txt .tsv .jsonl .parquet)."),
]
More = Annotated[list[Path] | None, typer.Argument(metavar="[FILE]", help="More inputs.")]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="OURS=THEIRS", help="Rename a column: src_txt=text1."),
]
Kind = Literal["pretrain", "finetune"]


@tokenizer_app.callback()
def tokenizer() -> None:
    """Learn a tokenizer."""


@data_app.callback()
def data() -> None:
    """Prepare a corpus."""


@tokenizer_app.command(
    epilog=examples(
        "gptmoe tokenizer train --input poems.tsv --vocab-size 4096 --output tokenizers/poems"
    )
)
def train(
    inputs: Inputs,
    vocab_size: Annotated[int, typer.Option(help="Tokens, special ones included.")],
    output: Annotated[Path, typer.Option(help="Folder for tokenizer.json.")],
    more: More = None,
    columns: Columns = None,
    json: Json = False,
) -> None:
    """Learn a Chinese tokenizer from a corpus.

    jieba cuts words, byte pairs are merged within them. Any text comes back without loss.
    """
    reading, text = lazy.gptmoe_data(), lazy.gptmoe_text()
    files = reading.find_files([*inputs, *(more or [])])
    with bar("reading") as progress:
        examples_read = reading.read_examples(files, "pretrain", rename(columns))
        texts = counted(examples_read, progress, len(files))
        learned = within(None, lambda: text.train_jiebabpe(texts, vocab_size, None))
    learned.save(output)
    facts = {"output": str(output), "vocab_size": learned.vocab_size, "digest": learned.digest}
    print_facts(facts, f"{output}: {learned.vocab_size} tokens", as_json=json)


@data_app.command(
    epilog=examples(
        "gptmoe data prepare --input corpus/ --tokenizer tokenizers/poems --output data/poems",
        "gptmoe data prepare --kind finetune --input qa.jsonl --column src_txt=question "
        "--column tgt_txt=answer --tokenizer tokenizers/poems --output data/qa",
    )
)
def prepare(
    inputs: Inputs,
    tokenizer: Annotated[
        Path, typer.Option(help="A tokenizer.json, or a folder with a tokenizer.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the prepared corpus.")],
    more: More = None,
    kind: Annotated[
        Kind, typer.Option(help="Packed documents, or one example a row.")
    ] = "pretrain",
    columns: Columns = None,
    validation: Annotated[
        list[Path] | None, typer.Option("--validation", help="Files kept for validation.")
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(help="Without --validation: share of the documents kept for it.")
    ] = 0.02,
    sep_text: Annotated[str, typer.Option(help="Text that stands for <sep>, as [SEP].")] = "",
    workers: Annotated[int, typer.Option(help="Processes that tokenize.")] = 2,
    json: Json = False,
) -> None:
    """Tokenize a corpus into a folder that training reads.

    Training does this by itself for raw files; a large corpus is better prepared once.
    """
    with bar("tokenizing") as progress:

        def show(done: Any) -> None:
            progress.update(
                progress.task_ids[0], completed=done.fraction, numbers=f"{done.tokens:,} tokens"
            )

        manifest = lazy.gptmoe_data().prepare(
            [*inputs, *(more or [])],
            lazy.gptmoe_text().load_tokenizer(tokenizer),
            output,
            kind=kind,
            columns=rename(columns),
            validation_fraction=validation_fraction,
            validation=validation or [],
            sep_text=sep_text,
            workers=workers,
            progress=show,
        )
    splits = {
        name: {"documents": counts.documents, "tokens": counts.tokens}
        for name, counts in manifest.splits.items()
    }
    lines = [f"{output}: {kind} data"] + [
        f"  {name}: {it['documents']:,} documents, {it['tokens']:,} tokens"
        for name, it in splits.items()
    ]
    print_facts({"output": str(output), "kind": kind, **splits}, "\n".join(lines), as_json=json)


def rename(columns: Sequence[str] | None) -> dict[str, str]:
    """`src_txt=text1` words as a mapping. Raises ConfigError for a word of another form."""
    pairs = {}
    for word in columns or []:
        ours, equals, theirs = word.partition("=")
        if not (ours and equals and theirs):
            raise ConfigError(f"--column {word} is not of the form OURS=THEIRS, as src_txt=text1")
        pairs[ours] = theirs
    return pairs


def counted(read: Iterator[Any], progress: Progress, num_files: int) -> Iterator[str]:
    """The texts of examples, drawn as they are read."""
    for number, example in enumerate(read, start=1):
        if number % 1000 == 0:
            done = (example.file + example.done) / num_files
            progress.update(progress.task_ids[0], completed=done, numbers=f"{number:,} documents")
        yield example.text
