"""Control messages between neighbours on the route, over sockets of their own.

    sockets = connect(store, 0, "10.0.0.1", Neighbours((2,), (1,)), timeout_s=10, within_s=20)
    sockets.send(data, 1)
    data = sockets.receive(2)

A message by gloo wakes gloo's thread and then the one who waits; by a socket only the latter. A
socket carries messages one way: 4 bytes of length (little endian), then so many bytes.

Nobody else gets in: each rank listens while the others connect, on the address by which it reaches
the store and at a port of its choice, and a caller must say the nonce that the store has for it.
Store and nonces are new in each epoch, so a rank of a dead one is a stranger, too.
"""

import hmac
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import BinaryIO, Protocol

from gptmoe.errors import ClusterError

from .routes import Neighbours

log = logging.getLogger(__name__)

MOST_BYTES = 16 * 2**20
"""Of a message: a step of a million tokens is smaller."""
HELLO_WITHIN_S = 1.0
"""Who connects and says nothing keeps the others waiting for so long."""
_LENGTH = struct.Struct("<I")
_NONCE_BYTES = 16
_HELLO = struct.Struct(f"<{_NONCE_BYTES}sI")  # nonce, rank


class Store(Protocol):
    """What is needed of torch's stores."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


class Sockets:
    """Bytes to and from the neighbours of one rank. One thread uses it; any may close it."""

    def __init__(
        self, incoming: Mapping[int, socket.socket], outgoing: Mapping[int, socket.socket]
    ) -> None:
        """Takes the sockets over, by the rank at their other end."""
        self._sockets = [*incoming.values(), *outgoing.values()]
        self._from: dict[int, BinaryIO] = {
            rank: sock.makefile("rb") for rank, sock in incoming.items()
        }
        self._to = dict(outgoing)
        self._in_use = threading.Lock()

    def send(self, data: bytes, to: int) -> None:
        """Send a message; waits only if the other end has long stopped reading.

        Raises ClusterError if it is gone or the message too long.
        """
        if len(data) > MOST_BYTES:
            raise ClusterError(
                f"a control message of {len(data)} bytes is too long, at most {MOST_BYTES} travel; "
                "lower the token budget of a step"
            )
        try:
            with self._in_use:
                self._to[to].sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise ClusterError(f"rank {to} is lost: {_why(error)}") from None

    def receive(self, source: int) -> bytes:
        """Wait for a message, up to the timeout. Raises ClusterError if the other end is gone or
        too late, if its message is too long, or if this end was closed."""
        try:
            with self._in_use:
                length: int = _LENGTH.unpack(_read(self._from[source], _LENGTH.size))[0]
                if length <= MOST_BYTES:
                    return _read(self._from[source], length)
        except (OSError, ValueError) as error:  # ValueError: this end is closed
            raise ClusterError(f"rank {source} is lost: {_why(error)}") from None
        raise ClusterError(
            f"rank {source} announces a control message of {length} bytes, at most {MOST_BYTES} "
            "travel; run the same gptmoe on all nodes"
        )

    def close(self) -> None:
        """Close all sockets. A call that waits in another thread fails at once, at both ends."""
        for sock in self._sockets:
            with suppress(OSError):  # the other end may be gone
                sock.shutdown(socket.SHUT_RDWR)
        with self._in_use:  # nobody waits any more; a number that is closed could be used again
            for file in self._from.values():
                file.close()
            for sock in self._sockets:
                sock.close()


def connect(
    store: Store,
    rank: int,
    host: str,
    ways: Neighbours,
    *,
    timeout_s: float,
    within_s: float,
) -> Sockets:
    """Connect a rank with its neighbours. Collective: all of them call it.

    `host` is the store's; calls of the result wait `timeout_s` at most. Raises OSError, or what the
    store raises, if they do not all come `within_s`.
    """
    deadline_s = time.monotonic() + within_s
    incoming: dict[int, socket.socket] = {}
    outgoing: dict[int, socket.socket] = {}
    with ExitStack() as opened:
        address = address_towards(host)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, 0), family=family)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        with listener:
            port = listener.getsockname()[1]
            store.set(f"sockets/{rank}", f"{address} {port} {nonce.hex()}")
            for target in ways.targets:
                outgoing[target] = opened.enter_context(_call(store, rank, target, deadline_s))
            while missing := set(ways.sources) - set(incoming):
                caller, sock = _accept(listener, nonce, missing, deadline_s)
                if sock is not None:
                    incoming[caller] = opened.enter_context(sock)
        for sock in (*incoming.values(), *outgoing.values()):
            sock.settimeout(timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opened.pop_all()
    return Sockets(incoming, outgoing)


def address_towards(host: str) -> str:
    """The address of this machine that a packet to `host` has as its source. Sends nothing."""
    family, kind, _, _, where = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])


def _call(store: Store, rank: int, target: int, deadline_s: float) -> socket.socket:
    address, port, nonce = store.get(f"sockets/{target}").decode().split()
    sock = socket.create_connection((address, int(port)), timeout=_left_s(deadline_s))
    sock.sendall(_HELLO.pack(bytes.fromhex(nonce), rank))
    return sock


def _accept(
    listener: socket.socket, nonce: bytes, missing: set[int], deadline_s: float
) -> tuple[int, socket.socket | None]:
    """The next caller; no socket if it is a stranger, who is not heard."""
    listener.settimeout(_left_s(deadline_s))
    try:
        sock, where = listener.accept()
    except TimeoutError:
        late = ", ".join(map(str, sorted(missing)))
        raise TimeoutError(f"rank {late} did not connect") from None
    said = _hello(sock, min(deadline_s, time.monotonic() + HELLO_WITHIN_S))
    if len(said) == _HELLO.size:
        told, caller = _HELLO.unpack(said)
        if hmac.compare_digest(told, nonce) and caller in missing:
            return caller, sock
    sock.close()
    log.warning("a stranger at %s wanted to send control messages", where)
    return -1, None


def _hello(sock: socket.socket, deadline_s: float) -> bytes:
    """The first words of a caller, or what there is of them. Not a byte of what follows."""
    said = b""
    with suppress(OSError):
        while len(said) < _HELLO.size:
            sock.settimeout(_left_s(deadline_s))
            more = sock.recv(_HELLO.size - len(said))
            if not more:
                break
            said += more
    return said


def _left_s(deadline_s: float) -> float:
    return max(0.001, deadline_s - time.monotonic())


def _read(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise ConnectionError("it has closed the connection")
    return data


def _why(error: Exception) -> str:
    return "timed out" if isinstance(error, TimeoutError) else str(error)
