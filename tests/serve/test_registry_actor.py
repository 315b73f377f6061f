"""A replica's side of the registry, and the actor, without Ray."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import ray.exceptions

from gptmoe.errors import AlreadyRunning, NotFound, Unavailable
from serve import registry_actor
from serve.names import ALONE, Ticket
from serve.registry_actor import TELL_EVERY_S, Claims, RegistryActor

from .near_registry import Handle, until


class Cluster:
    """Three replicas and their registry, in one event loop."""

    def __init__(self) -> None:
        self.handle = Handle(RegistryActor())
        self.aborted: dict[str, list[str]] = {name: [] for name in "abc"}
        self.replicas = {name: self._replica(name) for name in "abc"}

    def _replica(self, name: str) -> Claims:
        async def abort(request_id: str) -> bool:
            self.aborted[name].append(request_id)
            return True

        return Claims(name, lambda: self.handle, abort)

    async def started(self) -> "Cluster":
        for replica in self.replicas.values():
            replica.start()
            replica.start()  # once is enough
        await self.calls("greet", 3)
        return self

    async def calls(self, name: str, count: int) -> None:
        """Wait until the registry was called so often."""
        await until(lambda: self.handle.calls.count(name) >= count)
        await asyncio.sleep(0.02)

    async def stopped(self) -> None:
        for replica in self.replicas.values():
            await replica.stop()


def on_cluster(scenario: Callable[[Cluster], Awaitable[None]]) -> None:
    async def run() -> None:
        cluster = await Cluster().started()
        try:
            async with asyncio.timeout(20):
                await scenario(cluster)
        finally:
            await cluster.stopped()

    asyncio.run(run())


def test_an_id_runs_on_one_of_three_replicas() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.replicas["a"].claim("mine")
        for name in "abc":
            with pytest.raises(AlreadyRunning, match="request_id 'mine' is running; wait for it"):
                await cluster.replicas[name].claim("mine")
        await cluster.replicas["a"].release("mine")
        await cluster.replicas["b"].claim("mine")

    on_cluster(scenario)


def test_an_abort_reaches_any_replica_from_any_other() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.replicas["a"].claim("mine")
        cluster.replicas["b"].note("fresh")
        await cluster.calls("note", 1)
        await cluster.replicas["c"].abort("mine")
        await cluster.replicas["c"].abort("fresh")
        await until(lambda: cluster.aborted == {"a": ["mine"], "b": ["fresh"], "c": []})
        cluster.replicas["b"].let_go("fresh")
        await cluster.calls("note", 2)
        with pytest.raises(NotFound, match="no request 'fresh' is running; it may have ended"):
            await cluster.replicas["a"].abort("fresh")

    on_cluster(scenario)


def test_what_begins_and_ends_at_once_is_not_told_and_an_abort_waits_for_what_will_be() -> None:
    async def scenario(cluster: Cluster) -> None:
        short, long = cluster.replicas["a"], cluster.replicas["b"]
        for number in range(9):
            short.note(str(number))
            short.let_go(str(number))
        long.note("fresh")
        assert "note" not in cluster.handle.calls
        await cluster.replicas["c"].abort("fresh")
        await until(lambda: cluster.aborted["b"] == ["fresh"])
        await asyncio.sleep(TELL_EVERY_S)
        assert cluster.handle.calls.count("note") == 1
        short.note("9")
        await cluster.calls("note", 2)
        short.let_go("9")
        await cluster.calls("note", 3)

    on_cluster(scenario)


def test_what_begins_and_ends_together_is_one_call() -> None:
    async def scenario(cluster: Cluster) -> None:
        for number in range(100):
            cluster.replicas["a"].note(str(number))
        for number in range(99):
            cluster.replicas["a"].let_go(str(number))
        await cluster.calls("note", 1)
        assert cluster.handle.calls.count("note") == 1
        await cluster.replicas["b"].abort("99")
        with pytest.raises(NotFound):
            await cluster.replicas["b"].abort("98")

    on_cluster(scenario)


def test_generation_goes_on_while_the_registry_is_away(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_actor, "CONNECT_AGAIN_S", 0.05)

    async def scenario(cluster: Cluster) -> None:
        a, b = cluster.replicas["a"], cluster.replicas["b"]
        await a.claim("old")
        dead, cluster.handle = cluster.handle, Handle(RegistryActor())
        dead.dead = True
        await a.claim("new")  # by the handle that is dead: it runs without a claim
        a.note("fresh")
        await cluster.calls("greet", 3)
        assert "no claim request_id=new" in caplog.text
        assert "the registry of requests is away" in caplog.text
        for request_id in ("old", "new", "fresh"):  # a new registry is told what runs
            with pytest.raises(AlreadyRunning):
                await b.claim(request_id)
        await b.abort("old")
        await until(lambda: cluster.aborted["a"] == ["old"])

    on_cluster(scenario)


def test_without_a_registry_an_abort_is_for_later() -> None:
    async def scenario() -> None:
        def nobody() -> Any:
            raise ray.exceptions.RaySystemError("no cluster")

        async def abort(request_id: str) -> bool:
            return False

        claims = Claims("a", nobody, abort)
        claims.start()
        await asyncio.sleep(0.05)
        await claims.claim("mine")
        with pytest.raises(AlreadyRunning):
            await claims.claim("mine")  # what this replica knows itself
        with pytest.raises(Unavailable, match="nobody knows for now which replica runs what"):
            await claims.abort("other")
        await claims.release("mine")
        await claims.claim("mine")
        await claims.stop()

    asyncio.run(scenario())


def test_a_registry_that_hangs_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_actor, "ANSWER_WITHIN_S", 0.05)
    monkeypatch.setattr(registry_actor._within, "__defaults__", (0.05,))

    class Hanging(RegistryActor):
        async def claim(self, request_id: str, replica: str, ticket: Ticket) -> bool:
            return bool(await asyncio.Event().wait())

        async def abort(self, request_id: str) -> bool:
            return bool(await asyncio.Event().wait())

    async def scenario() -> None:
        handle = Handle(Hanging())

        async def abort(request_id: str) -> bool:
            return False

        claims = Claims("a", lambda: handle, abort)
        claims.start()
        await until(lambda: "next_aborts" in handle.calls)
        await claims.claim("mine")
        with pytest.raises(Unavailable, match="the registry of requests is away"):
            await claims.abort("other")
        await claims.stop()

    asyncio.run(scenario())


def test_who_leaves_before_the_claim_came_keeps_none() -> None:
    async def scenario(cluster: Cluster) -> None:
        task = asyncio.create_task(cluster.replicas["a"].claim("mine"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await cluster.calls("note", 1)
        await cluster.replicas["b"].claim("mine")

    on_cluster(scenario)


def test_a_poll_without_news_ends_and_a_stranger_has_to_greet() -> None:
    async def scenario() -> None:
        actor = RegistryActor()
        assert await actor.next_aborts("a", 0.01) is None
        await actor.greet("a", {})
        assert await actor.next_aborts("a", 0.01) == ()

    asyncio.run(scenario())


def test_a_replica_that_has_just_started_waits_a_moment_for_the_registry() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.replicas["a"].claim("mine")

        def late() -> Handle:
            time.sleep(0.2)
            return cluster.handle

        async def abort(request_id: str) -> bool:
            raise AssertionError("it does not run here")

        young = Claims("young", late, abort)
        young.start()
        await young.abort("mine")
        await until(lambda: cluster.aborted["a"] == ["mine"])
        await young.stop()

    on_cluster(scenario)


HERE, THERE = Ticket("one call", 0), Ticket("one call", 1)


def test_what_goes_on_elsewhere_is_aborted_there() -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b, c = cluster.replicas.values()
        await a.claim("mine", HERE)
        a.note("fresh", HERE)
        await cluster.calls("note", 1)
        await a.stop()  # it is dead, and the registry does not know
        await b.claim("mine", THERE)
        b.note("fresh", THERE)
        await cluster.calls("note", 2)
        await c.abort("mine")
        await c.abort("fresh")
        await until(lambda: sorted(cluster.aborted["b"]) == ["fresh", "mine"])
        for other in (ALONE, Ticket("another call", 7)):
            with pytest.raises(AlreadyRunning):
                await c.claim("mine", other)

    on_cluster(scenario)


def test_an_abort_that_a_dead_replica_was_told_reaches_the_next_one() -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b, c = cluster.replicas.values()
        await a.claim("mine", HERE)
        a.note("fresh", HERE)
        await cluster.calls("note", 1)
        for request_id in ("mine", "fresh"):
            await c.abort(request_id)
        await until(lambda: sorted(cluster.aborted["a"]) == ["fresh", "mine"])
        await b.claim("mine", THERE)
        b.note("fresh", THERE)
        await until(lambda: sorted(cluster.aborted["b"]) == ["fresh", "mine"])

    on_cluster(scenario)


def test_an_abort_waits_for_a_request_that_the_engine_is_about_to_have() -> None:
    async def scenario(cluster: Cluster) -> None:
        tried: list[str] = []

        async def abort(request_id: str) -> bool:
            tried.append(request_id)
            return len(tried) == 3

        slow = Claims("slow", lambda: cluster.handle, abort)
        slow.start()
        await cluster.calls("greet", 4)
        await slow.claim("mine")
        await cluster.replicas["a"].abort("mine")
        await until(lambda: len(tried) == 3)
        await asyncio.sleep(0.1)
        assert tried == ["mine"] * 3
        await slow.stop()

    on_cluster(scenario)


def test_a_replica_that_is_asked_again_keeps_its_claim_though_its_first_end_comes_late() -> None:
    async def scenario(cluster: Cluster) -> None:
        a, b = cluster.replicas["a"], cluster.replicas["b"]
        await a.claim("mine", HERE)
        a.let_go("mine", HERE)  # told in the background
        await a.claim("mine", THERE)
        await cluster.calls("note", 1)
        with pytest.raises(AlreadyRunning):
            await b.claim("mine")

    on_cluster(scenario)


def test_what_still_runs_for_nobody_ends_where_its_request_goes_on() -> None:
    """The edge lost the replica, not the other way round, and asks it again."""

    async def scenario(cluster: Cluster) -> None:
        a = cluster.replicas["a"]
        await a.claim("mine", HERE)
        await a.claim("mine", THERE)
        assert cluster.aborted["a"] == ["mine"]
        a.let_go("mine", HERE)  # the end of the first one
        await cluster.replicas["b"].abort("mine")
        await until(lambda: cluster.aborted["a"] == ["mine"] * 2)
        with pytest.raises(AlreadyRunning):
            await a.claim("mine", HERE)

    on_cluster(scenario)
