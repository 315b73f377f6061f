"""gptmoe serve, scale, drain, refresh: Ray Serve."""

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from cluster.child import Child
from cluster.resolve import resolve, split_words
from gptmoe.errors import ConfigError

from . import lazy
from .access import Ca, Cert, TokenFile, access_of
from .output import Json, examples, print_facts
from .training import run_job

app = typer.Typer(rich_markup_mode=None)

_USUAL_NAME = "gptmoe"

Checkpoint = Annotated[  # no Path: it would take a slash of s3:// away
    str, typer.Option(metavar="DIR|URI", help="A checkpoint, or the folder of a run.")
]
Words = Annotated[
    list[str] | None, typer.Argument(metavar="[CONFIG] [KEY=VALUE]", help="As grpc_port=0.")
]
ServedAt = Annotated[
    str, typer.Option(metavar="HOST:PORT", help="The gRPC address of a served model.")
]
Name = Annotated[
    str, typer.Option(help="The application (name in its config), where several are served.")
]
Within = Annotated[float, typer.Option(help="Wait so long for the replicas.")]


@app.command(
    epilog=examples(
        "gptmoe serve --checkpoint runs/tiny",
        "gptmoe serve --checkpoint runs/tiny configs/serve/local.toml grpc_port=0 http_port=0",
        "gptmoe serve --checkpoint runs/tiny --layout pp=2,ep=2",
        "gptmoe serve --checkpoint runs/tiny --keys keys.txt --edge-only "
        "edge.tls_cert=cert.pem edge.tls_key=key.pem",
        "gptmoe serve --checkpoint /shared/runs/a --address http://head:8265",
        "gptmoe serve --checkpoint s3://bucket/runs/a --address http://head:8265",
    )
)
def serve(
    words: Words = None,
    checkpoint: Checkpoint = "",
    layout: Annotated[
        str,
        typer.Option(
            metavar="pp=2,ep=2",
            help="Share each replica's model between actors: dp, tp, ep, pp, expert_ranks.",
        ),
    ] = "",
    address: Annotated[
        str, typer.Option(help="Serve as a job on this Ray cluster; else on this machine.")
    ] = "",
    edge_only: Annotated[
        bool,
        typer.Option(
            "--edge-only", help="gRPC only at the edge (edge.port, else 9443), which speaks TLS."
        ),
    ] = False,
    keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Only callers with a token of this file.")
    ] = None,
    json: Json = False,
) -> None:
    """Serve a checkpoint over gRPC and HTTP until Ctrl-C."""
    edge = edge_words(edge_only, keys)
    file, overrides = split_words([*words_of(words, checkpoint), *layout_words(layout), *edge])
    if address:
        job = lazy.jobs().make_job("serve", file, overrides)
        raise typer.Exit(run_job(lazy.dashboard().Dashboard(address), job))
    resolve("serve", file, overrides)
    flags = ["--json"] if json else []
    child = Child(["serve", *([str(file)] if file else []), *overrides, *flags])
    with child.attached():
        raise typer.Exit(child.wait())


@app.command(
    epilog=examples(
        "gptmoe scale 3",
        "gptmoe scale 3 --name gptmoe --address http://head:8265",
        "gptmoe scale 3 --target 127.0.0.1:9000",
    )
)
def scale(
    replicas: Annotated[int, typer.Argument(min=1, help="How many copies of the model.")],
    name: Name = "",
    address: Annotated[
        str, typer.Option(help="The dashboard of the Ray cluster, as http://HEAD:8265.")
    ] = "",
    target: ServedAt = "",
    ca: Ca = "",
    cert: Cert = None,
    token_file: TokenFile = None,
    timeout_s: Within = 60.0,
    json: Json = False,
) -> None:
    """Set the number of replicas of a served model.

    Comes back when they run. A model that scales itself (replicas.min below replicas.max) refuses.
    """
    if target:
        if address:
            raise ConfigError("scale takes one of --address and --target")
        with lazy.remote().operating(target, name, access_of(ca, cert, token_file)) as client:
            client.scale(replicas, within_s=timeout_s)
    else:
        name = name or _USUAL_NAME
        lazy.dashboard().Dashboard(address).scale(name, replicas, wait_s=timeout_s)
    facts = {"name": name, "replicas": replicas}
    print_facts(facts, f"{name or target}: {replicas} replicas run", as_json=json)


@app.command(
    epilog=examples(
        "gptmoe drain --target 127.0.0.1:9000", "gptmoe drain --target 127.0.0.1:9000 --resume"
    )
)
def drain(
    target: ServedAt,
    name: Name = "",
    resume: Annotated[bool, typer.Option("--resume", help="Take requests again.")] = False,
    ca: Ca = "",
    cert: Cert = None,
    token_file: TokenFile = None,
    timeout_s: Within = 60.0,
    json: Json = False,
) -> None:
    """Have a served model take no new requests; running ones finish.

    Comes back when all replicas refuse.
    """
    with lazy.remote().operating(target, name, access_of(ca, cert, token_file)) as client:
        client.drain(resume=resume, within_s=timeout_s)
    text = "takes requests again" if resume else "takes no new requests"
    print_facts({"target": target, "draining": not resume}, f"{target} {text}", as_json=json)


@app.command(
    epilog=examples(
        "gptmoe refresh --checkpoint runs/tiny --target 127.0.0.1:9000",
        "gptmoe refresh --checkpoint s3://bucket/runs/a --target head:9000 --restart",
    )
)
def refresh(
    target: ServedAt,
    checkpoint: Checkpoint,
    name: Name = "",
    restart: Annotated[
        bool,
        typer.Option(
            "--restart", help="Running texts begin again; else they end with the old weights."
        ),
    ] = False,
    ca: Ca = "",
    cert: Cert = None,
    token_file: TokenFile = None,
    timeout_s: Within = 300.0,
    json: Json = False,
) -> None:
    """Serve other weights of the same model, without a pause.

    Comes back when all replicas have them.
    """
    meant = checkpoint if "://" in checkpoint else str(Path(checkpoint).absolute())
    with lazy.remote().operating(target, name, access_of(ca, cert, token_file)) as client:
        version = client.refresh(meant, restart=restart, within_s=timeout_s)
    facts = {"target": target, "checkpoint": meant, "version": version}
    print_facts(facts, f"{target} serves {meant} as version {version}", as_json=json)


def words_of(words: list[str] | None, checkpoint: str) -> list[str]:
    """The words of a command line with --checkpoint as an override."""
    chosen = jsonlib.dumps(checkpoint, ensure_ascii=False)
    return [*(words or []), *([f"checkpoint={chosen}"] if checkpoint else [])]


def edge_words(edge_only: bool, keys: Path | None) -> list[str]:
    """--edge-only and --keys as overrides of a serve config."""
    only = ["edge.only=true"] if edge_only else []
    if keys is None:
        return only
    return [*only, f"auth.keys={jsonlib.dumps(str(keys.absolute()), ensure_ascii=False)}"]


def layout_words(layout: str) -> list[str]:
    """`pp=2,ep=2` as overrides of a serve config."""
    words = [word.strip() for word in layout.split(",") if word.strip()]
    for word in words:
        if "=" not in word:
            raise ConfigError(f"--layout {layout}: {word!r} is not of the form pp=2")
    return [f"parallel.{word}" for word in words]
