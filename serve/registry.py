"""Which replica runs which request: a pure account of claims, by request id and replica.

A claim lasts until its replica releases it, or is silent for SILENT_S (a dead replica's requests
are dead too), or another replica goes on with the same request. Ray is in registry_actor.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .names import ALONE, Ticket

SILENT_S = 15.0
"""A replica that was not heard of for longer is taken for dead."""


@dataclass(slots=True)
class _Replica:
    heard_s: float
    greeted: bool = False
    aborts: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Claim:
    replica: str
    ticket: Ticket
    aborted: bool = False


class Registry:
    """Claims of all replicas of one application. Not thread safe; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._claims: dict[str, _Claim] = {}
        self._replicas: dict[str, _Replica] = {}

    def greet(self, replica: str, running: Mapping[str, Ticket]) -> None:
        """A replica introduces itself with what it runs; another's claim stays the other's."""
        self._heard(replica).greeted = True
        for request_id, ticket in running.items():
            self.claim(request_id, replica, ticket)

    def knows(self, replica: str) -> bool:
        """Hear of a replica. False: it has to greet, as this registry or its claims were lost."""
        return self._heard(replica).greeted

    def claim(self, request_id: str, replica: str, ticket: Ticket = ALONE) -> bool:
        """Whether the request is this replica's to run: False if another one of that id runs.

        One that goes on here is taken over, with an abort that its last replica may have missed.
        """
        self._heard(replica)
        held = self._claims.get(request_id)
        if held is not None and not ticket.follows(held.ticket):
            return False
        self._claims[request_id] = _Claim(replica, ticket)
        if held is not None and held.aborted:
            self.abort(request_id)
        return True

    def release(self, request_id: str, replica: str, ticket: Ticket = ALONE) -> None:
        """The replica runs it no longer; no effect on another's claim or a later one of its own."""
        self._heard(replica)
        held = self._claims.get(request_id)
        if held is not None and (held.replica, held.ticket) == (replica, ticket):
            del self._claims[request_id]

    def abort(self, request_id: str) -> str | None:
        """The replica that runs it, which finds the id in its `take_aborts`; None if none does."""
        self._forget_silent()
        held = self._claims.get(request_id)
        if held is None:
            return None
        held.aborted = True
        self._replicas[held.replica].aborts.append(request_id)
        return held.replica

    def has_aborts(self, replica: str) -> bool:
        """Whether there is something for it to take."""
        return replica in self._replicas and bool(self._replicas[replica].aborts)

    def take_aborts(self, replica: str) -> tuple[str, ...]:
        """What this replica has to abort, each once."""
        heard = self._heard(replica)
        taken, heard.aborts = tuple(heard.aborts), []
        return taken

    def forget(self, replica: str) -> None:
        """Drop a replica and all of its claims."""
        self._replicas.pop(replica, None)
        self._claims = {key: it for key, it in self._claims.items() if it.replica != replica}

    @property
    def alone(self) -> bool:
        """True if no replica is left."""
        self._forget_silent()
        return not self._replicas

    @property
    def num_claims(self) -> int:
        """Requests that run."""
        return len(self._claims)

    def _heard(self, replica: str) -> _Replica:
        self._forget_silent()  # also this one: others may have its requests by now
        found = self._replicas.setdefault(replica, _Replica(self._clock()))
        found.heard_s = self._clock()
        return found

    def _forget_silent(self) -> None:
        oldest_s = self._clock() - SILENT_S
        for name in [name for name, it in self._replicas.items() if it.heard_s < oldest_s]:
            self.forget(name)
