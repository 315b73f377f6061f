"""The registry's actor in this process, behind something like a Ray actor's handle."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import ray.exceptions

from serve.registry_actor import RegistryActor


class Handle:
    """A Ray actor's handle, of a registry in this process. `dead` as Ray says it."""

    def __init__(self, actor: RegistryActor) -> None:
        self._actor = actor
        self.dead = False
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return Method(self, name, getattr(self._actor, name))


class Method:
    """`handle.method`, of which `remote` is called."""

    def __init__(self, handle: Handle, name: str, method: Callable[..., Awaitable[Any]]) -> None:
        self._handle, self._name, self._method = handle, name, method

    def remote(self, *given: Any) -> Awaitable[Any]:
        self._handle.calls.append(self._name)
        return asyncio.ensure_future(self._answer(given))

    async def _answer(self, given: tuple[Any, ...]) -> Any:
        if self._handle.dead:
            raise ray.exceptions.ActorDiedError
        call = asyncio.ensure_future(self._method(*given))
        while not call.done():
            await asyncio.wait((call,), timeout=0.01)
            if self._handle.dead:
                call.cancel()
                raise ray.exceptions.ActorDiedError
        return call.result()


async def until(condition: Callable[[], object]) -> None:
    """Wait for what another task does."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)
