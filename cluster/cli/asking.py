"""gptmoe score, tokenize, abort: what a server answers beside text."""

from dataclasses import asdict
from typing import Annotated

import typer

from . import lazy
from .access import Ca, Cert, TokenFile, access_of
from .output import Json, examples, print_facts

app = typer.Typer(rich_markup_mode=None)

Target = Annotated[str, typer.Option(metavar="HOST:PORT", help="Ask this gRPC server.")]
Name = Annotated[str, typer.Option(help="The application, where Ray Serve runs several.")]


@app.command(
    epilog=examples(
        "gptmoe score 春风 --continuation 又绿 --continuation 吹 --target 127.0.0.1:9000"
    )
)
def score(
    prompt: Annotated[str, typer.Argument(help="The text before.")],
    continuation: Annotated[list[str], typer.Option(help="What may follow. Repeat for more.")],
    target: Target,
    name: Name = "",
    ca: Ca = "",
    cert: Cert = None,
    token_file: TokenFile = None,
    json: Json = False,
) -> None:
    """Say how likely continuations of a prompt are, the likeliest first.

    A continuation is tokenized apart from the prompt.
    """
    with lazy.remote().operating(target, name, access_of(ca, cert, token_file)) as client:
        scores = client.score(prompt, continuation)
    pairs = sorted(zip(continuation, scores, strict=True), key=lambda pair: -pair[1].logprob)
    facts = [{"continuation": text} | asdict(scored) for text, scored in pairs]
    lines = [f"{scored.logprob:10.3f}  {text}" for text, scored in pairs]
    print_facts(facts, "\n".join(lines), as_json=json)


@app.command(epilog=examples("gptmoe tokenize 春风又绿江南岸 --target 127.0.0.1:9000"))
def tokenize(
    text: Annotated[str, typer.Argument(help="The text.")],
    target: Target,
    name: Name = "",
    ca: Ca = "",
    cert: Cert = None,
    token_file: TokenFile = None,
    json: Json = False,
) -> None:
    """Show a text's tokens as the served model reads them."""
    with lazy.remote().operating(target, name, access_of(ca, cert, token_file)) as client:
        tokens = client.tokenize(text)
    words = "  ".join(
        f"{token}:{says}" for token, says in zip(tokens.token_ids, tokens.texts, strict=True)
    )
    print_facts(asdict(tokens), words, as_json=json)


@app.command(epilog=examples("gptmoe abort 7b1f --target 127.0.0.1:9000"))
def abort(
    request_id: Annotated[str, typer.Argument(help="As the answer's header says it.")],
    target: Target,
    name: Name = "",
    ca: Ca = "",
    cert: Cert = None,
    token_file: TokenFile = None,
) -> None:
    """End a running request, on whatever replica; its caller gets what was generated so far."""
    with lazy.remote().operating(target, name, access_of(ca, cert, token_file)) as client:
        client.abort(request_id)
