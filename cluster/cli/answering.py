"""gptmoe generate, evaluate, calibrate, import: what a checkpoint can do."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cluster import prompts
from cluster.access import Access
from gptmoe.errors import ClusterError, ConfigError, GptMoeError
from gptmoe.generate.params import SamplingParams, check_text

from . import lazy
from .access import Ca, Cert, TokenFile, access_of
from .output import Json, bar, examples, print_facts
from .sampling import with_sampling

app = typer.Typer(rich_markup_mode=None)

Checkpoint = Annotated[Path, typer.Option(metavar="DIR", help="A checkpoint, or a run's folder.")]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Compute in this type.")]
Weights = Annotated[
    Literal["", "int8", "int4"], typer.Option(help="Hold the weights of products in so many bits.")
]


@app.command(
    epilog=examples(
        "gptmoe generate 春风 --checkpoint runs/tiny --max-new-tokens 48 --top-k 5",
        "gptmoe generate 春风 --target 127.0.0.1:9000 --stream",
        "gptmoe generate 春风 --target head:9443 --ca ca.pem --token-file keys.txt",
        "gptmoe generate --checkpoint runs/tiny --input in.json --output out.json --task poetry",
    )
)
@with_sampling
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Answer here, with this checkpoint or run.")
    ] = None,
    target: Annotated[str, typer.Option(metavar="HOST:PORT", help="Ask this gRPC server.")] = "",
    ca: Ca = "",
    cert: Cert = None,
    token_file: TokenFile = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help='Prompts as JSON: [{"id": 1, "txt": "..."}], each with "max_new_tokens" or not.',
        ),
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", help="Answers as JSON; else to stdout.")
    ] = None,
    task: Annotated[str, typer.Option(help="Answers are called output_TASK.")] = "text",
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    dtype: Dtype = "float32",
    json: Json = False,
    *,
    sampling: SamplingParams,
) -> None:
    """Continue a prompt, or every prompt of a JSON file."""
    if (prompt is None) == (input_file is None):
        raise ConfigError("generate wants a PROMPT or --input FILE.json; give one of the two")
    if stream and (json or input_file):
        raise ConfigError("--stream prints plain text of one prompt; leave out --json and --input")
    if output_file and not input_file:
        raise ConfigError(
            "--output holds answers to --input FILE.json; leave it out, or use > FILE"
        )
    if target and dtype != "float32":
        raise ConfigError("--dtype is for --checkpoint; a server has its own, dtype=bfloat16")
    if prompt is not None:
        check_text(prompt)
    items = prompts.read(input_file) if input_file else []
    if output_file:
        prompts.check_writable(output_file)
    access = access_of(ca, cert, token_file)
    with _answerer(checkpoint, target, access, dtype, sampling) as answerer:
        if prompt is None:
            found = _answer_all(answerer, items)
            if all(isinstance(answer, GptMoeError) for answer in found):
                _check_all_answered(found)  # an older --output is better than nothing
            prompts.write(prompts.answers(items, found, task), output_file)
            _check_all_answered(found)
        elif stream:
            _print_stream(prompt, answerer.stream(prompt))
        else:
            ((_, text),) = answerer.generate([prompts.Item(0, prompt)])
            if isinstance(text, GptMoeError):
                raise text
            print_facts({"prompt": prompt, "text": text}, prompt + text, as_json=json)


@app.command(epilog=examples("gptmoe evaluate --checkpoint runs/tiny --data poems.tsv --json"))
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[Path, typer.Option(help="A prepared folder, or a file, folder or glob.")],
    kind: Annotated[
        Literal["pretrain", "finetune"], typer.Option(help="How raw files are read.")
    ] = "pretrain",
    split: Annotated[
        Literal["train", "validation"], typer.Option(help="Which part of a prepared folder.")
    ] = "validation",
    seq_len: Annotated[
        int, typer.Option(help="Tokens of one sample; 0: as in training, else the longest.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 8,
    dtype: Dtype = "float32",
    weights: Weights = "",
    json: Json = False,
) -> None:
    """Measure a checkpoint on a text.

    Loss (nats per token), perplexity, and bits per character, which compares across tokenizers.
    """
    model = lazy.gptmoe_loaded().load(checkpoint, dtype, weights=weights)
    length = _readable(seq_len, model.config, model.spec)
    with _prepared(data, model.tokenizer, kind) as folder, bar("evaluating") as progress:
        samples = lazy.gptmoe_data().open_samples(
            folder,
            "validation" if folder != data else split,
            length,
            0,
            expect_tokenizer=model.tokenizer.digest,
        )

        def show(done: int) -> None:
            progress.update(progress.task_ids[0], completed=done / samples.num_samples)

        result = lazy.gptmoe_evaluate().evaluate(
            model.network,
            samples,
            model.tokenizer.characters_per_token(),
            batch_size,
            progress=show,
        )
    facts = {
        "checkpoint": str(model.path),
        "data": str(data),
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_char": result.bits_per_char,
        "tokens": result.tokens,
        "characters": result.characters,
    }
    text = (
        f"loss {result.loss:.4f}  perplexity {result.perplexity:.2f}  "
        f"{result.bits_per_char:.4f} bits per character  ({result.tokens:,} tokens)"
    )
    print_facts(facts, text, as_json=json)


@app.command(
    epilog=examples(
        "gptmoe calibrate runs/ec --data runs/ec/data --output checkpoints/ec",
        "gptmoe calibrate checkpoints/old --data poems.tsv --output checkpoints/new --groups 16",
    )
)
def calibrate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder, or a run's.")],
    data: Annotated[Path, typer.Option(help="A prepared folder, or a file, folder or glob.")],
    output: Annotated[Path, typer.Option(help="Folder for the new checkpoint.")],
    kind: Annotated[
        Literal["pretrain", "finetune"], typer.Option(help="How raw files are read.")
    ] = "pretrain",
    split: Annotated[
        Literal["train", "validation"], typer.Option(help="Which part of a prepared folder.")
    ] = "train",
    seq_len: Annotated[int, typer.Option(help="Tokens of one sample; 0: as in training.")] = 0,
    groups: Annotated[int, typer.Option(min=1, help="Routing groups to look at, at most.")] = 64,
    json: Json = False,
) -> None:
    """Give a checkpoint of experts that choose (router.kind=expert_choice) its thresholds anew.

    Training learns them as it goes. Without, the checkpoint can be neither evaluated nor served:
    this makes them from data, and writes a new checkpoint with them.
    """
    stored = lazy.gptmoe_checkpoint().open_checkpoint(checkpoint)
    tokenizer = lazy.gptmoe_text().load_tokenizer(stored.path)
    length = _readable(seq_len, stored.config, lazy.gptmoe_stored().spec_of(stored))
    with _prepared(data, tokenizer, kind) as folder, bar("calibrating") as progress:
        samples = lazy.gptmoe_data().open_samples(
            folder,
            "validation" if folder != data else split,
            length,
            0,
            expect_tokenizer=tokenizer.digest,
        )
        done = lazy.gptmoe_calibrate().calibrate(
            stored,
            samples,
            output,
            groups=groups,
            progress=lambda share: progress.update(progress.task_ids[0], completed=share),
        )
    thresholds = {str(layer): t.tolist() for layer, t in done.thresholds.items()}
    facts = {"checkpoint": str(output), "groups": done.groups, "thresholds": thresholds}
    text = f"{output}: thresholds of {len(thresholds)} layers from {done.groups} routing groups"
    print_facts(facts, text, as_json=json)


@app.command("import", epilog=examples("gptmoe import ~/models/gpt2 --output checkpoints/gpt2"))
def import_(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face GPT-2 folder.")],
    output: Annotated[Path, typer.Option(help="Folder for the new checkpoint.")],
    json: Json = False,
) -> None:
    """Turn a Hugging Face GPT-2 folder into a checkpoint."""
    lazy.gptmoe_checkpoint().import_gpt2(folder, output)
    print_facts({"checkpoint": str(output)}, f"{output}: imported from {folder}", as_json=json)


@contextmanager
def _answerer(
    checkpoint: Path | None, target: str, access: Access, dtype: str, sampling: SamplingParams
) -> Iterator[prompts.Answerer]:
    if bool(checkpoint) == bool(target):
        raise ConfigError("generate wants --checkpoint DIR or --target HOST:PORT; give one")
    if checkpoint:
        model = lazy.gptmoe_loaded().load(checkpoint, dtype)
        yield prompts.Local(model, sampling)
        return
    with closing(lazy.remote().Remote(target, sampling, access)) as remote:
        yield remote


def _answer_all(answerer: prompts.Answerer, items: list[prompts.Item]) -> list[prompts.Answer]:
    found: list[prompts.Answer] = [""] * len(items)
    with bar("generating") as progress:
        for done, (index, answer) in enumerate(answerer.generate(items), start=1):
            found[index] = answer
            progress.update(progress.task_ids[0], completed=done / len(items))
    return found


def _check_all_answered(found: list[prompts.Answer]) -> None:
    """Raises ClusterError that names the first prompt without an answer."""
    lacking = [(n, it) for n, it in enumerate(found, start=1) if isinstance(it, GptMoeError)]
    if lacking:
        number, error = lacking[0]
        raise ClusterError(
            f"{len(lacking)} of {len(found)} prompts have no answer, and where there is a row it "
            f"says why; the first is item {number}: {error}"
        )


def _print_stream(prompt: str, pieces: Iterator[str]) -> None:
    for index, piece in enumerate(pieces):
        typer.echo(piece if index else prompt + piece, nl=False)
    typer.echo()


@contextmanager
def _prepared(data: Path, tokenizer: Any, kind: str) -> Iterator[Path]:
    """The folder that `data` is, or one made of it for now: all of it in the validation split."""
    corpora = lazy.gptmoe_data()
    if corpora.is_prepared(data):
        yield data
        return
    files = corpora.find_files([data])
    with tempfile.TemporaryDirectory() as scratch:
        unused = Path(scratch) / f"train-{files[0].name}"  # a corpus must have a training split
        unused.symlink_to(files[0].resolve())
        corpora.prepare([unused], tokenizer, Path(scratch) / "data", kind=kind, validation=files)
        yield Path(scratch) / "data"


def _readable(seq_len: int, config: Mapping[str, Any], spec: Any) -> int:
    """The length of samples that is meant by --seq-len; ConfigError if the model cannot read it."""
    if not 0 <= seq_len <= spec.max_seq_len:
        raise ConfigError(
            f"--seq-len {seq_len} is not what this model reads, 1 to {spec.max_seq_len} tokens; "
            "name such a number, or 0 for the length of training"
        )
    trained = config.get("train", {}).get("data", {}).get("seq_len")
    return int(seq_len or trained or spec.max_seq_len)
