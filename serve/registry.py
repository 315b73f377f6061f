"""Which replica runs which request: a pure account of claims, by request id and replica.

A claim lasts until its replica releases it or is silent for SILENT_S: a dead replica's requests are
dead too. Ray is in registry_actor.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

SILENT_S = 15.0
"""A replica that was not heard of for longer is taken for dead."""


@dataclass(slots=True)
class _Replica:
    heard_s: float
    greeted: bool = False
    aborts: list[str] = field(default_factory=list)


class Registry:
    """Claims of all replicas of one application. Not thread safe; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._owners: dict[str, str] = {}
        self._replicas: dict[str, _Replica] = {}

    def greet(self, replica: str, running: Iterable[str]) -> None:
        """A replica introduces itself with what it runs; another's claim stays the other's."""
        self._heard(replica).greeted = True
        for request_id in running:
            self.claim(request_id, replica)

    def knows(self, replica: str) -> bool:
        """Hear of a replica. False: it has to greet, as this registry or its claims were lost."""
        return self._heard(replica).greeted

    def claim(self, request_id: str, replica: str) -> bool:
        """Whether the request is this replica's to run: False if it runs, anywhere."""
        self._heard(replica)
        if request_id in self._owners:
            return False
        self._owners[request_id] = replica
        return True

    def release(self, request_id: str, replica: str) -> None:
        """The replica runs it no longer; no effect on another's claim."""
        self._heard(replica)
        if self._owners.get(request_id) == replica:
            del self._owners[request_id]

    def abort(self, request_id: str) -> str | None:
        """The replica that runs it, which finds the id in its `take_aborts`; None if none does."""
        self._forget_silent()
        owner = self._owners.get(request_id)
        if owner is not None:
            self._replicas[owner].aborts.append(request_id)
        return owner

    def take_aborts(self, replica: str) -> tuple[str, ...]:
        """What this replica has to abort, each once."""
        heard = self._heard(replica)
        taken, heard.aborts = tuple(heard.aborts), []
        return taken

    def forget(self, replica: str) -> None:
        """Drop a replica and all of its claims."""
        self._replicas.pop(replica, None)
        self._owners = {key: owner for key, owner in self._owners.items() if owner != replica}

    @property
    def alone(self) -> bool:
        """True if no replica is left."""
        self._forget_silent()
        return not self._replicas

    @property
    def num_claims(self) -> int:
        """Requests that run."""
        return len(self._owners)

    def _heard(self, replica: str) -> _Replica:
        self._forget_silent()  # also this one: others may have its requests by now
        found = self._replicas.setdefault(replica, _Replica(self._clock()))
        found.heard_s = self._clock()
        return found

    def _forget_silent(self) -> None:
        oldest_s = self._clock() - SILENT_S
        for name in [name for name, it in self._replicas.items() if it.heard_s < oldest_s]:
            self.forget(name)
