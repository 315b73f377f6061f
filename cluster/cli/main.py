"""The console script `gptmoe`: all commands, and how their errors end."""

import contextlib
import logging
import os
import sys

import typer

from cluster import env
from cluster.patience import left_behind
from gptmoe.errors import GptMoeError

from . import (
    answering,
    asking,
    corpora,
    demo,
    models,
    operating,
    planning,
    serving,
    studying,
    training,
)
from .output import examples

BAD_INPUT = 2

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(
    epilog=examples(
        "gptmoe demo                                          the whole path, in minutes",
        "gptmoe pretrain configs/train/tiny.toml              train a tiny model",
        "gptmoe generate 春风 --checkpoint runs/tiny           ask it",
        "gptmoe serve --checkpoint runs/tiny                  serve it over gRPC and HTTP",
        "gptmoe COMMAND --help                                more of these",
    )
)
def gptmoe() -> None:
    """Train and serve a Chinese GPT with mixtures of experts, from a laptop to a Ray cluster."""
    logging.basicConfig(format="%(levelname)s %(message)s")


app.add_typer(models.app)
app.add_typer(corpora.tokenizer_app, name="tokenizer")
app.add_typer(corpora.data_app, name="data")
app.add_typer(studying.app, name="study")
for part in (training, planning, answering, asking, serving, operating, demo):
    app.add_typer(part.app)


def main() -> None:
    """The console script: a wrong input is one sentence on stderr and exit code 2."""
    env.prepare()
    try:
        app(prog_name="gptmoe")
    except GptMoeError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    finally:
        _leave_threads()


def _fail(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(BAD_INPUT)


def _leave_threads() -> None:
    """End at once if a thread is inside a foreign library: Python's own farewell would abort."""
    ended = sys.exception()
    if left_behind() and isinstance(ended, SystemExit):
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 0)
