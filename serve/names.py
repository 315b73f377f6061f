"""What a Service needs to know of requests elsewhere, and where there is no elsewhere."""

from typing import Protocol

from gptmoe.errors import NotFound


class Names(Protocol):
    """Which replica runs which request: see registry_actor.Claims."""

    async def claim(self, request_id: str) -> None:
        """Take an id that the caller chose; raises AlreadyRunning."""
        ...

    def note(self, request_id: str) -> None:
        """Say that a request of a fresh id runs here."""
        ...

    async def release(self, request_id: str) -> None:
        """Free an id, and return when any replica can take it."""
        ...

    def let_go(self, request_id: str) -> None:
        """The same without waiting."""
        ...

    async def abort(self, request_id: str) -> None:
        """End a request that runs elsewhere; raises NotFound or Unavailable."""
        ...


class Alone:
    """Names where this process is the only one: its engine knows what runs."""

    async def claim(self, request_id: str) -> None:
        """See Names.claim; the engine refuses an id that runs."""

    def note(self, request_id: str) -> None:
        """See Names.note."""

    async def release(self, request_id: str) -> None:
        """See Names.release."""

    def let_go(self, request_id: str) -> None:
        """See Names.let_go."""

    async def abort(self, request_id: str) -> None:
        """See Names.abort."""
        raise NotFound(f"no request {request_id!r} is running; it may have ended")
