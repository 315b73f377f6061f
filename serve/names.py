"""What a Service needs to know of requests elsewhere, and where there is no elsewhere."""

from dataclasses import dataclass
from typing import Protocol

from gptmoe.errors import NotFound


@dataclass(frozen=True, slots=True)
class Ticket:
    """Whose a request is, where one asks several replicas for it in turn, as the edge does.

    It tells a request that goes on elsewhere from another one of the same id.
    """

    holder: str = ""
    """Drawn anew for each call, and the id of one that has no other; empty: nobody asks in turn."""
    turn: int = 0
    """How many replicas were asked before."""

    @property
    def goes_on(self) -> bool:
        """Whether another replica had the request: it is not a new one."""
        return self.turn > 0

    def follows(self, other: "Ticket") -> bool:
        """Whether the request went from the other's replica to this one's, and not back since."""
        return bool(self.holder) and self.holder == other.holder and self.turn > other.turn


ALONE = Ticket()
"""Of a request that one replica has, and no other will."""


class Names(Protocol):
    """Which replica runs which request: see registry_actor.Claims."""

    async def claim(self, request_id: str, ticket: Ticket) -> None:
        """Take an id that the caller chose; raises AlreadyRunning if another request has it."""
        ...

    def note(self, request_id: str, ticket: Ticket) -> None:
        """Say that a request of a fresh id runs here."""
        ...

    async def release(self, request_id: str, ticket: Ticket) -> None:
        """Free an id, and return when any replica can take it."""
        ...

    def let_go(self, request_id: str, ticket: Ticket) -> None:
        """The same without waiting."""
        ...

    async def abort(self, request_id: str) -> None:
        """End a request that runs elsewhere; raises NotFound or Unavailable."""
        ...


class Alone:
    """Names where this process is the only one: its engine knows what runs."""

    async def claim(self, request_id: str, ticket: Ticket) -> None:
        """See Names.claim; the engine refuses an id that runs."""

    def note(self, request_id: str, ticket: Ticket) -> None:
        """See Names.note."""

    async def release(self, request_id: str, ticket: Ticket) -> None:
        """See Names.release."""

    def let_go(self, request_id: str, ticket: Ticket) -> None:
        """See Names.let_go."""

    async def abort(self, request_id: str) -> None:
        """See Names.abort."""
        raise NotFound(f"no request {request_id!r} is running; it may have ended")
