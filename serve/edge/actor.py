"""The edge as Ray actors: one on every node, without a CPU of its own."""

import asyncio
import logging
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import ray
import ray.serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import env
from gptmoe.errors import ClusterError, GptMoeError
from serve import access_log
from serve.access_log import AccessLog
from serve.config import ServeConfig
from serve.keys import Keys

from .backend import Replicas
from .health import look
from .server import EdgeServer

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 5.0
_START_S = 60.0
_STOP_S = 2.0
_POLL_S = 0.2


class Edge:
    """One node's edge. The server has an event loop and a thread of its own: it listens again by
    itself when Ray restarts the actor."""

    def __init__(self, config: ServeConfig) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="edge", daemon=True).start()
        self._stall_s = config.edge.stall_s
        self._error: GptMoeError | None = None
        try:
            self._run(self._start(config))
        except GptMoeError as error:  # a constructor's error would arrive as a dead actor
            self._error = error
            log.error("the edge cannot start reason=%s", error)

    async def _start(self, config: ServeConfig) -> None:
        self._backend = Replicas(ray.serve.get_app_handle(config.name))
        keys = Keys(config.auth.keys) if config.auth.keys else None
        sleeps = config.replicas.min == 0
        access_log.to_stdout()
        log = AccessLog(config.log, config.name)
        self._server = EdgeServer(self._backend, config.edge, keys, sleeps=sleeps, log=log)
        await self._server.start()

    def check(self) -> None:
        """Raises ConfigError if it cannot listen."""
        if self._error:
            raise self._error

    def serving(self) -> bool:
        """Whether it answers, and a replica does. Raises ConfigError if it cannot listen."""
        self.check()
        return bool(self._run(look(self._backend, stall_s=self._stall_s, sleeps=False)))

    def stop(self, grace_s: float) -> None:
        """Take no new calls; comes back when running ones have ended, or after `grace_s`."""
        if not self._error:
            self._run(self._server.stop(grace_s))

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class Edges:
    """The edges of an application, from `start` to `stop`; nodes that come later get one too."""

    def __init__(self, config: ServeConfig) -> None:
        """`config.edge.port` is a port, not 0: a restarted edge listens at the same one."""
        self._config = config
        self._actors: dict[str, Any] = {}
        self._stopping = threading.Event()
        self._following = threading.Thread(target=self._follow, name="edges", daemon=True)

    def start(self) -> None:
        """Start one on each node, and come back when this one's answers.

        Raises ConfigError if it cannot listen, ClusterError if it does not start in time.
        """
        self._keep_up()
        for actor in self._actors.values():
            self._await(actor)
        self._following.start()

    def begin(self) -> None:
        """Start one on each node, and do not wait for any."""
        self._keep_up()
        self._following.start()

    def check(self, within_s: float = _START_S) -> None:
        """Raises ConfigError if one cannot listen. One that is silent comes back by itself."""
        calls = [actor.check.remote() for actor in list(self._actors.values())]
        try:
            ray.get(calls, timeout=within_s)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, GptMoeError) else error from None
        except (ray.exceptions.RayError, TimeoutError) as error:
            log.warning("an edge does not answer reason=%s", error)

    def stop(self, grace_s: float) -> None:
        """Stop them all at once; running calls get `grace_s`."""
        self._stopping.set()
        if self._following.is_alive():
            self._following.join(_STOP_S)  # or a node that comes now would keep its edge
        calls = [actor.stop.remote(grace_s) for actor in self._actors.values()]
        with suppress(ray.exceptions.RayError):
            ray.get(calls, timeout=grace_s + _STOP_S)
        for actor in self._actors.values():
            ray.kill(actor)

    def _await(self, actor: Any) -> None:
        async def serving() -> None:
            while not await actor.serving.remote():
                await asyncio.sleep(_POLL_S)

        try:
            asyncio.run(asyncio.wait_for(serving(), _START_S))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, GptMoeError) else error from None
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise ClusterError(
                f"the edge on port {self._config.edge.port} does not answer: {error}"
            ) from error

    def _follow(self) -> None:
        while not self._stopping.wait(_LOOK_EVERY_S):
            try:
                self._keep_up()
            except ray.exceptions.RayError as error:
                log.warning("nodes cannot be listed reason=%s", error)

    def _keep_up(self) -> None:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for node in self._actors.keys() - alive:
            del self._actors[node]
        for node in alive - self._actors.keys():
            self._actors[node] = _on_node(node, self._config)


def _on_node(node: str, config: ServeConfig) -> Any:
    actor_class: Any = ray.remote(Edge)
    options = actor_class.options(
        name=f"{config.name}:Edge:{config.edge.port}:{node[:8]}",
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=4,
        runtime_env={"env_vars": env.edge_environment()},
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )
    return options.remote(config)
