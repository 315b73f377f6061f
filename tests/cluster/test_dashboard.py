"""A cluster from afar, played by a server that breaks off. The real one: tests/ray."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from cluster import dashboard
from cluster.dashboard import Dashboard
from gptmoe.errors import ClusterError

LOG = "step 1\nstep 2\n春风\nstep 3\n"


@dataclass
class Head:
    """One job; each connection to its log is told so many characters and then breaks off."""

    breaks: list[int] = field(default_factory=list)
    statuses: list[str] = field(default_factory=lambda: ["SUCCEEDED"])
    """The next answers; the last one stays."""
    failure: tuple[int, str] | None = None

    async def version(self, request: web.Request) -> web.Response:
        facts = {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}
        return web.json_response(facts)

    async def job(self, request: web.Request) -> web.Response:
        status = self.statuses[0] if len(self.statuses) == 1 else self.statuses.pop(0)
        if self.failure or status == "away":
            code, text = self.failure or (500, "the head is away")
            return web.Response(status=code, text=text)
        facts = {"type": "SUBMISSION", "submission_id": "a", "entrypoint": "train"}
        return web.json_response(facts | {"status": status})

    async def jobs(self, request: web.Request) -> web.Response:
        return web.json_response([])

    async def log(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        first, rest = LOG[:9], LOG[9:]
        if not self.breaks:
            await socket.send_str(first)
            await socket.send_str(rest)
            return socket
        await socket.send_str(LOG[: self.breaks.pop(0)])
        assert request.transport
        request.transport.abort()
        return socket

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/api/version", self.version)
        app.router.add_get("/api/jobs/", self.jobs)
        app.router.add_get("/api/jobs/a", self.job)
        app.router.add_get("/api/jobs/a/logs/tail", self.log)
        return app


@pytest.fixture
def head() -> Head:
    return Head()


@pytest.fixture
def cluster(head: Head, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # the dashboard writes it
    monkeypatch.setattr(logging.getLogger("ray"), "handlers", [])  # it hushes them, pytest's too
    monkeypatch.setattr(dashboard, "_POLL_S", 0.01)
    monkeypatch.setattr(dashboard, "_AWAY_S", 0.1)
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(head.application())
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield Dashboard("http://{}:{}".format(*runner.addresses[0][:2]))
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_log_that_breaks_off_is_read_on_until_the_job_has_ended(
    head: Head, cluster: Dashboard
) -> None:
    head.breaks = [4, 2, 12]
    head.statuses = ["RUNNING", "RUNNING", "away", "RUNNING", "RUNNING", "SUCCEEDED"]
    assert "".join(cluster.follow("a")) == LOG


def test_the_log_of_a_job_that_has_ended_is_read_once(head: Head, cluster: Dashboard) -> None:
    assert list(cluster.follow("a")) == [LOG[:9], LOG[9:]]


def test_a_cluster_that_stays_away_is_an_error(head: Head, cluster: Dashboard) -> None:
    head.breaks, head.statuses = [4], ["RUNNING", "away"]
    pieces = cluster.follow("a")
    assert next(pieces) == LOG[:4]
    with pytest.raises(ClusterError, match="the head is away"):
        next(pieces)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ((404, "Job a does not exist"), "has no job a; its jobs: none$"),
        ((500, "no space for _ray_pkg_4040404a.zip"), "Request failed .* 500: no space for _ray_p"),
    ],
)
def test_only_what_is_not_found_is_not_found(
    head: Head, cluster: Dashboard, failure: tuple[int, str], expected: str
) -> None:
    head.failure = failure
    with pytest.raises(ClusterError, match=expected):
        cluster.job("a")
