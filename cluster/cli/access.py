"""Options for a server with TLS or keys."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.access import Access
from gptmoe.errors import ConfigError

SYSTEM = "system"

Ca = Annotated[
    str,
    typer.Option(
        metavar="FILE|system", help="Speak TLS, and trust this authority (PEM), or the system's."
    ),
]
Cert = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Our certificate and its key (PEM), where one is wanted."),
]
TokenFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A file with the key that the server wants.")
]


def access_of(ca: str, cert: Path | None, token_file: Path | None) -> Access:
    """What the options say. Raises ConfigError for files that cannot be read."""
    authority = Path(ca) if ca not in ("", SYSTEM) else None
    for option, file in (("--ca", authority), ("--cert", cert), ("--token-file", token_file)):
        if file is not None and not file.is_file():
            raise ConfigError(f"{option} {file} is not a file; name one that is")
    token = _token(token_file) if token_file else ""
    return Access(tls=ca == SYSTEM, ca=authority, cert=cert, token=token)


def _token(file: Path) -> str:
    """The first word of a line that is no comment: a server's own keys file will do."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(
            f"--token-file {file} is not text in UTF-8; write the token into a line of its own"
        ) from None
    for line in text.splitlines():
        token, *_ = line.split() or ["#"]
        if not token.startswith("#"):
            return token
    raise ConfigError(f"--token-file {file} holds no token; write it into a line")
