"""Certificates for tests, made by the openssl command."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True, slots=True)
class Certificate:
    """Two files in PEM."""

    cert: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Authority:
    """Who signs certificates."""

    folder: Path
    name: str

    @property
    def own(self) -> Certificate:
        """What its clients trust."""
        return Certificate(self.folder / f"{self.name}.pem", self.folder / f"{self.name}.key")

    def issue(self, name: str) -> Certificate:
        """A certificate for 127.0.0.1 and localhost."""
        made = Certificate(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        asked, names = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        names.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        _openssl(
            "req", "-new", *_NEW_KEY, "-keyout", made.key, "-out", asked, "-subj", f"/CN={name}"
        )
        signer = ("-CA", self.own.cert, "-CAkey", self.own.key, "-set_serial", "7", "-days", "2")
        _openssl("x509", "-req", "-in", asked, *signer, "-extfile", names, "-out", made.cert)
        return made


def authority(folder: Path, name: str) -> Authority:
    """A new one."""
    made = Authority(folder, name)
    out = ("-keyout", made.own.key, "-out", made.own.cert)
    _openssl("req", "-x509", *_NEW_KEY, *out, "-days", "2", "-subj", f"/CN={name}")
    return made


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
