"""Who runs what, across replicas: the account."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.names import ALONE, Ticket
from serve.registry import SILENT_S, Registry


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(clock: Clock) -> Registry:
    return Registry(clock)


def test_a_running_id_is_claimed_once(registry: Registry) -> None:
    assert registry.claim("mine", "a")
    assert not registry.claim("mine", "b")
    assert not registry.claim("mine", "a"), "not even where it runs"
    registry.release("mine", "b")
    assert not registry.claim("mine", "b"), "another's release frees nothing"
    registry.release("mine", "a")
    assert registry.claim("mine", "b")


def test_an_abort_reaches_the_replica_that_runs_it(registry: Registry) -> None:
    registry.claim("mine", "a")
    assert registry.abort("mine") == "a"
    assert registry.take_aborts("b") == ()
    assert registry.take_aborts("a") == ("mine",)
    assert registry.take_aborts("a") == (), "each once"
    assert registry.abort("other") is None


def test_a_silent_replica_is_dead_and_so_are_its_requests(registry: Registry, clock: Clock) -> None:
    registry.claim("mine", "a")
    registry.claim("other", "b")
    clock.now_s += SILENT_S
    assert registry.knows("b") is False, "it never greeted"
    clock.now_s += 0.1
    assert registry.abort("mine") is None
    assert registry.claim("mine", "b")
    assert not registry.claim("other", "a")


def test_a_replica_that_was_taken_for_dead_greets_anew(registry: Registry, clock: Clock) -> None:
    registry.greet("a", {"mine": ALONE, "other": ALONE})
    assert registry.knows("a")
    clock.now_s += SILENT_S + 1
    assert registry.claim("mine", "b")
    assert not registry.knows("a")
    registry.greet("a", {"mine": ALONE, "other": ALONE})
    assert registry.knows("a")
    assert (registry.abort("mine"), registry.abort("other")) == ("b", "a")


def test_the_registry_is_alone_without_replicas(registry: Registry, clock: Clock) -> None:
    assert registry.alone
    registry.greet("a", {})
    assert not registry.alone
    clock.now_s += SILENT_S + 1
    assert registry.alone
    registry.greet("a", {})
    registry.forget("a")
    assert registry.alone


FIRST, SECOND, THIRD = (Ticket("one call", turn) for turn in range(3))


def test_a_request_that_goes_on_elsewhere_is_taken_over(registry: Registry) -> None:
    assert registry.claim("mine", "a", FIRST)
    assert not registry.claim("mine", "b"), "another request of that id"
    assert not registry.claim("mine", "b", Ticket("another call", 1))
    assert registry.claim("mine", "b", SECOND)
    assert registry.abort("mine") == "b"


def test_no_end_of_the_first_replica_forgets_what_goes_on(registry: Registry, clock: Clock) -> None:
    registry.claim("mine", "a", FIRST)
    registry.claim("mine", "b", SECOND)
    registry.release("mine", "a", FIRST)
    assert registry.abort("mine") == "b"
    clock.now_s += SILENT_S
    registry.knows("b")
    clock.now_s += 1  # now "a" is dead
    assert registry.abort("mine") == "b"


def test_a_replica_that_was_frozen_takes_nothing_back(registry: Registry) -> None:
    registry.claim("mine", "a", FIRST)
    registry.claim("mine", "b", SECOND)
    registry.greet("a", {"mine": FIRST})
    assert not registry.claim("mine", "a", FIRST)
    assert registry.abort("mine") == "b"
    assert registry.claim("mine", "a", THIRD), "unless it is asked again"
    registry.release("mine", "a", FIRST)
    assert registry.abort("mine") == "a", "its own first end is not the end of it"


def test_an_abort_goes_along_with_its_request(registry: Registry) -> None:
    registry.claim("mine", "a", FIRST)
    registry.abort("mine")
    registry.take_aborts("a")  # and dies
    for replica, ticket in (("b", SECOND), ("c", THIRD)):
        assert not registry.has_aborts(replica)
        registry.claim("mine", replica, ticket)
        assert registry.has_aborts(replica)
        assert registry.take_aborts(replica) == ("mine",)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["claim", "release", "abort", "take", "forget", "wait"]),
        st.sampled_from("xyz"),
        st.sampled_from("abc"),
    ),
    max_size=40,
)


@given(STEPS)
def test_whatever_happens_an_id_has_one_owner(steps: list[tuple[str, str, str]]) -> None:
    clock = Clock()
    registry = Registry(clock)
    owners: dict[str, str] = {}
    heard_s: dict[str, float] = {}
    for step, request_id, replica in steps:
        for silent in [name for name, at_s in heard_s.items() if clock() - at_s > SILENT_S]:
            del heard_s[silent]
            owners = {key: owner for key, owner in owners.items() if owner != silent}
        if step == "wait":
            clock.now_s += SILENT_S / 2 + 1
            continue
        if step != "abort":
            heard_s[replica] = clock()
        if step == "claim":
            assert registry.claim(request_id, replica) == (request_id not in owners)
            owners.setdefault(request_id, replica)
        elif step == "release":
            registry.release(request_id, replica)
            if owners.get(request_id) == replica:
                del owners[request_id]
        elif step == "abort":
            assert registry.abort(request_id) == owners.get(request_id)
        elif step == "take":
            registry.take_aborts(replica)
        else:
            registry.forget(replica)
            del heard_s[replica]
            owners = {key: owner for key, owner in owners.items() if owner != replica}
    for request_id in "xyz":
        registry.abort(request_id)  # forgets the silent
    assert registry.num_claims <= len(owners)
