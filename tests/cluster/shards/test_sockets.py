"""Sockets between neighbours: what travels, what ends a call that waits, who is refused."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.shards.routes import Neighbours, neighbours
from cluster.shards.sockets import MOST_BYTES, Sockets, address_towards, connect
from gptmoe.errors import ClusterError
from gptmoe.model.spec import ModelSpec
from gptmoe.shard.parts import arrange

SPEC = ModelSpec(num_layers=4, d_model=8, num_heads=4, d_ff=8, num_experts=(4, 4))
HOST = "127.0.0.1"
SOON_S = 5.0
"""Far above what it takes, far below a timeout that did not end."""
TO_1, FROM_0 = Neighbours((), (1,)), Neighbours((0,), ())


@dataclass
class Store:
    """One that is shared by threads."""

    values: dict[str, str] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def get(self, key: str) -> bytes:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, SOON_S):
                raise RuntimeError(f"{key} is not in the store")
            return self.values[key].encode()

    def where(self, rank: int) -> tuple[tuple[str, int], bytes]:
        """A rank's address and nonce."""
        address, port, nonce = self.get(f"sockets/{rank}").decode().split()
        return (address, int(port)), bytes.fromhex(nonce)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(
    pool: ThreadPoolExecutor, store: Store, rank: int, ways: Neighbours, **limits: float
) -> "Future[Sockets]":
    limits = {"timeout_s": 30.0, "within_s": 30.0, **limits}
    return pool.submit(connect, store, rank, HOST, ways, **limits)


@pytest.fixture
def pair(pool: ThreadPoolExecutor, stack: ExitStack) -> tuple[Sockets, Sockets]:
    """Rank 0 tells rank 1."""
    store = Store()
    started = [start(pool, store, 0, TO_1), start(pool, store, 1, FROM_0)]
    first, second = (future.result(SOON_S) for future in started)
    stack.callback(first.close)
    stack.callback(second.close)
    return first, second


@pytest.mark.parametrize(
    "layout",
    [{}, {"pp": 4}, {"dp": 2, "tp": 2}, {"pp": 2, "expert_ranks": 1}],
    ids=str,
)
def test_neighbours_on_the_routes_of_a_layout_meet(
    pool: ThreadPoolExecutor, stack: ExitStack, layout: dict[str, Any]
) -> None:
    parts, store = arrange(SPEC, **layout), Store()
    ways = [neighbours(parts, rank) for rank in range(len(parts) + 1)]
    started = [start(pool, store, rank, way) for rank, way in enumerate(ways)]
    ranks = [future.result(SOON_S) for future in started]
    for sockets in ranks:
        stack.callback(sockets.close)
    for rank, way in enumerate(ways):
        for target in way.targets:
            ranks[rank].send(b"from %d to %d" % (rank, target), target)
    for rank, way in enumerate(ways):
        for source in way.sources:
            assert ranks[rank].receive(source) == b"from %d to %d" % (source, rank)


def test_the_engine_is_at_both_ends_of_a_route() -> None:
    parts = arrange(SPEC, pp=2, expert_ranks=1)
    assert neighbours(parts, 0) == Neighbours((4,), (1,))
    assert neighbours(parts, 1) == Neighbours((0,), (4,))
    assert neighbours(parts, 2) == Neighbours((4,), (4,))
    assert neighbours(parts, 4) == Neighbours((1, 2, 3), (0, 2, 3))


def test_messages_keep_their_borders_and_their_order(
    pool: ThreadPoolExecutor, pair: tuple[Sockets, Sockets]
) -> None:
    first, second = pair
    messages = [b"", b"a", b"bc" * 5, bytes(3 * 2**20), b"end", bytes(MOST_BYTES)]
    sent = pool.submit(lambda: [first.send(message, 1) for message in messages])
    assert [second.receive(0) for _ in messages] == messages
    sent.result(SOON_S)


def test_nothing_within_the_timeout_is_a_lost_rank(
    pool: ThreadPoolExecutor, stack: ExitStack
) -> None:
    store = Store()
    started = [start(pool, store, 0, TO_1), start(pool, store, 1, FROM_0, timeout_s=0.1)]
    first, second = (future.result(SOON_S) for future in started)
    stack.callback(first.close)
    stack.callback(second.close)
    began_s = time.monotonic()
    with pytest.raises(ClusterError, match=r"^rank 0 is lost: timed out$"):
        second.receive(0)
    assert 0.1 <= time.monotonic() - began_s < SOON_S


def waiting(pool: ThreadPoolExecutor, call: Callable[[], Any]) -> "Future[Any]":
    """A call that is under way, and waits."""
    future = pool.submit(call)
    time.sleep(0.1)
    assert not future.done()
    return future


def test_a_peer_that_closes_is_a_lost_rank_after_what_it_has_said(
    pool: ThreadPoolExecutor, pair: tuple[Sockets, Sockets]
) -> None:
    first, second = pair
    first.send(b"last words", 1)
    assert second.receive(0) == b"last words"
    call = waiting(pool, lambda: second.receive(0))
    first.close()
    with pytest.raises(ClusterError, match=r"^rank 0 is lost: it has closed the connection$"):
        call.result(SOON_S)
    second.close()
    with pytest.raises(ClusterError, match="rank 1 is lost: "):
        first.send(b"more", 1)


def test_closing_frees_a_call_that_waits_in_another_thread(
    pool: ThreadPoolExecutor, pair: tuple[Sockets, Sockets]
) -> None:
    _, second = pair
    call = waiting(pool, lambda: second.receive(0))
    second.close()
    with pytest.raises(ClusterError, match=r"^rank 0 is lost: it has closed the connection$"):
        call.result(SOON_S)
    with pytest.raises(ClusterError, match=r"rank 0 is lost: .*closed"):
        second.receive(0)
    second.close()  # once more changes nothing


def test_closing_frees_a_sender_whose_peer_reads_nothing(
    pool: ThreadPoolExecutor, pair: tuple[Sockets, Sockets]
) -> None:
    first, _ = pair
    call = waiting(pool, lambda: [first.send(bytes(2**20), 1) for _ in range(64)])
    first.close()
    with pytest.raises(ClusterError, match="rank 1 is lost: "):
        call.result(SOON_S)


def test_a_message_that_is_too_long_is_not_sent(pair: tuple[Sockets, Sockets]) -> None:
    with pytest.raises(ClusterError, match="of 16777217 bytes is too long, at most 16777216"):
        pair[0].send(bytes(MOST_BYTES + 1), 1)
    pair[0].send(b"short", 1)
    assert pair[1].receive(0) == b"short"


def test_a_message_that_says_to_be_longer_is_not_waited_for(
    pool: ThreadPoolExecutor, stack: ExitStack
) -> None:
    store = Store()
    second = start(pool, store, 1, FROM_0)
    where, nonce = store.where(1)
    with socket.create_connection(where) as first:
        first.sendall(nonce + (0).to_bytes(4, "little") + b"\xff\xff\xff\xff")
        stack.callback(second.result(SOON_S).close)
        with pytest.raises(ClusterError, match=r"rank 0 announces .* of 4294967295 bytes"):
            second.result().receive(0)


def strangers(nonce: bytes) -> dict[str, bytes]:
    """What those say who are not heard."""
    rank_0 = (0).to_bytes(4, "little")
    return {
        "another nonce": bytes(len(nonce)) + rank_0,
        "another rank": nonce + (7).to_bytes(4, "little"),
        "half a word": nonce[:9],
    }


def test_only_who_knows_the_nonce_is_heard(
    pool: ThreadPoolExecutor, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    store = Store()
    second = start(pool, store, 1, FROM_0)
    where, nonce = store.where(1)
    for said in strangers(nonce).values():
        with socket.create_connection(where) as stranger:
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(SOON_S)
            assert not _heard(stranger)
    silent = stack.enter_context(socket.create_connection(where))
    assert not second.done()
    first = start(pool, store, 0, TO_1).result(SOON_S)
    stack.callback(first.close)
    stack.callback(second.result(SOON_S).close)
    first.send(b"from a rank", 1)
    assert second.result().receive(0) == b"from a rank"
    silent.settimeout(SOON_S)
    assert not _heard(silent)
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 4
    assert all("a stranger at" in warning for warning in warnings)


def _heard(caller: socket.socket) -> bool:
    """Whether the other end keeps the connection."""
    try:
        return caller.recv(1) != b""
    except ConnectionError:
        return False


def test_a_second_caller_with_the_same_rank_is_a_stranger(
    pool: ThreadPoolExecutor, stack: ExitStack
) -> None:
    store = Store()
    second = start(pool, store, 1, Neighbours((0, 2), ()))
    where, nonce = store.where(1)
    callers = [stack.enter_context(socket.create_connection(where)) for _ in range(2)]
    for caller in callers:
        caller.sendall(nonce + (0).to_bytes(4, "little"))
    callers[1].settimeout(SOON_S)
    assert not _heard(callers[1])
    third = start(pool, store, 2, TO_1).result(SOON_S)
    stack.callback(third.close)
    stack.callback(second.result(SOON_S).close)
    third.send(b"from rank 2", 1)
    assert second.result().receive(2) == b"from rank 2"


def test_a_caller_may_say_who_it_is_in_pieces(pool: ThreadPoolExecutor, stack: ExitStack) -> None:
    store = Store()
    second = start(pool, store, 1, FROM_0)
    where, nonce = store.where(1)
    caller = stack.enter_context(socket.create_connection(where))
    said = nonce + (0).to_bytes(4, "little") + (2).to_bytes(4, "little") + b"ok"
    for piece in (said[:5], said[5:18], said[18:]):
        caller.sendall(piece)
        time.sleep(0.05)
    stack.callback(second.result(SOON_S).close)
    assert second.result().receive(0) == b"ok"


def test_a_rank_that_does_not_come_is_named(pool: ThreadPoolExecutor) -> None:
    second = start(pool, Store(), 1, Neighbours((0, 2), ()), within_s=0.2)
    with pytest.raises(TimeoutError, match="rank 0, 2 did not connect"):
        second.result(SOON_S)


def test_nobody_is_let_in_after_the_meeting(pool: ThreadPoolExecutor, stack: ExitStack) -> None:
    store = Store()
    started = [start(pool, store, 0, TO_1), start(pool, store, 1, FROM_0)]
    for future in started:
        stack.callback(future.result(SOON_S).close)
    where, _ = store.where(1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(where, timeout=SOON_S)


def test_a_rank_listens_only_where_it_reaches_the_store() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert address_towards("localhost") in ("127.0.0.1", "::1")
