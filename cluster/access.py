"""How to reach a gRPC server that is not open to everybody. Plain data."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a caller shows and trusts; nothing of it where a server is open."""

    tls: bool = False
    """Encrypt, and trust the authorities that the system does."""
    ca: Path | None = None
    """Encrypt, and trust the authorities in this file (PEM) instead."""
    cert: Path | None = None
    """Our own certificate (PEM), where the server wants one (mTLS)."""
    key: Path | None = None
    """Its private key; absent: it is in the same file."""
    token: str = field(default="", repr=False)
    """The bearer token, where the server wants one."""
    server_name: str = ""
    """The name in the server's certificate, if it is not the one that is called."""

    @property
    def encrypted(self) -> bool:
        """Whether TLS is spoken."""
        return self.tls or self.ca is not None or self.cert is not None


OPEN = Access()
"""To a server without TLS and keys."""
