"""Who may ask: bearer tokens in a file, one a line.

    # the team's
    mF_9.B5f-4.1JqM
    # may drain, refresh and scale as well
    tGzv3JOkF0XG5Qx2TlKW operator

The file is read again when it changes, so tokens are exchanged without a restart: write the new one
beside the old, hand it out, take the old one away.
"""

import hashlib
import hmac
import logging
import stat
from dataclasses import dataclass, field
from pathlib import Path

from gptmoe.errors import ConfigError, PermissionDenied, Unauthenticated

log = logging.getLogger(__name__)

OPERATOR = "operator"
"""Stands behind the token of a key that may change the application for all."""

_SCHEME = "bearer "


@dataclass(frozen=True, slots=True)
class Key:
    """One line of a file."""

    token: str = field(repr=False)
    operator: bool


@dataclass(frozen=True, slots=True)
class _Known:
    """A key without its token."""

    digest: bytes
    operator: bool


@dataclass(frozen=True, slots=True)
class _State:
    """What tells one version of a file from the next."""

    inode: int
    size: int
    written_ns: int
    changed_ns: int
    """Also by who may read it."""


class Keys:
    """The tokens of a file. They are kept as digests: a token stands in no dump of memory."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError unless the file holds tokens."""
        self._path = path
        self._seen = _state(path)
        try:
            self._known = _known(path)
        except OSError as error:
            raise ConfigError(_unreadable(path, error)) from None

    def check(self, authorization: str | None, operation: str = "") -> None:
        """Raise Unauthenticated unless `authorization` is "Bearer " and a token of the file.

        `operation` names what only an operator may do: PermissionDenied for another key. Takes as
        long for a wrong token as for a right one.
        """
        self._read_again_if_changed()
        if not authorization:
            raise Unauthenticated(
                "a key is wanted and none came; send the header authorization: Bearer TOKEN"
            )
        if not authorization.lower().startswith(_SCHEME):
            raise Unauthenticated(
                "the authorization header must be Bearer and a token; found another scheme"
            )
        found = _digest(authorization[len(_SCHEME) :].strip())
        # All of them, always: how long it takes must not say which one was close.
        equal = [hmac.compare_digest(found, key.digest) for key in self._known]
        if not sum(equal):
            raise Unauthenticated("the key is not one of this server's; ask its operator for one")
        operator = sum(key.operator and same for key, same in zip(self._known, equal, strict=True))
        if operation and not operator:
            raise PermissionDenied(
                f"{operation} wants an operator's key, and this one may only generate and look; "
                f"show one with the word {OPERATOR} behind it in the server's keys file"
            )

    def _read_again_if_changed(self) -> None:
        """A change for the worse is reported once, and the last good tokens hold."""
        state = _state(self._path)
        if state == self._seen:
            return
        self._seen = state
        try:
            self._known = _known(self._path)
        except (OSError, ConfigError) as error:
            log.warning("keys stay as they were file=%s reason=%s", self._path, error)
        else:
            log.info("keys read again file=%s tokens=%d", self._path, len(self._known))


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys in a file; # begins a line that is none.

    Warns if others than its owner may read it. Raises OSError, and ConfigError if it holds no
    key or a line that cannot be one.
    """
    if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning("keys can be read by other users file=%s; chmod 600 makes them yours", path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"the keys file {path} is not UTF-8 text") from None
    keys = []
    for number, line in enumerate(lines, start=1):
        token, *scope = line.split() or ["#"]
        if token.startswith("#"):
            continue
        if not (token.isascii() and token.isprintable()) or scope not in ([], [OPERATOR]):
            raise ConfigError(
                f"line {number} of the keys file {path} is no token: it must be one word of "
                f"visible ASCII characters, and behind it {OPERATOR} or nothing"
            )
        keys.append(Key(token, operator=bool(scope)))
    if not keys:
        raise ConfigError(f"the keys file {path} holds no token; write one a line")
    return tuple(keys)


def first_token(path: Path) -> str:
    """A token that opens, for our own calls. Raises ConfigError as Keys."""
    try:
        return read_keys(path)[0].token
    except OSError as error:
        raise ConfigError(_unreadable(path, error)) from None


def _known(path: Path) -> tuple[_Known, ...]:
    return tuple(_Known(_digest(key.token), key.operator) for key in read_keys(path))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _state(path: Path) -> _State | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return _State(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _unreadable(path: Path, error: OSError) -> str:
    return (
        f"the keys file {path} cannot be read: {error.strerror}; name a file with one token a line"
    )
