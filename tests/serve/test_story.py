"""Streams that go on elsewhere, in every way they can be cut; requests that get a field more."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptmoe.errors import Unavailable
from protos import generation_pb2 as messages
from serve.edge import wire
from serve.edge.story import Story
from tests.fake_replicas import POEM, Poet

TOKENS = list(POEM.encode())


def chunks(poet: Poet, **fields: Any) -> list[bytes]:
    request = messages.GenerateRequest(logprobs=True, **fields)
    return [chunk.SerializeToString() for chunk in poet._chunks(request)]


@given(
    lives=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 40), st.booleans()), max_size=6),
    counts_all=st.booleans(),
)
def test_however_it_is_cut_the_caller_hears_one_story(
    lives: list[tuple[int, int, bool]], counts_all: bool
) -> None:
    """Each replica has its own size of chunks and its own end; the last one finishes."""
    story = Story(clock=lambda: 5.0)
    heard: list[messages.GenerateChunk] = []
    resumed: list[int] = []
    for tokens_a_chunk, dies_after, finish_apart in [*lives, (3, 1000, True)]:
        poet = Poet(tokens_a_chunk=tokens_a_chunk, finish_apart=finish_apart, counts_all=counts_all)
        for chunk in chunks(poet, resume_token_ids=resumed)[:dies_after]:
            told = story.tell(chunk)
            if told is not None:
                heard.append(messages.GenerateChunk.FromString(told))
        if story.finished:
            break
        resumed = story.resume()
    assert "".join(chunk.text for chunk in heard) == POEM
    assert [token for chunk in heard for token in chunk.token_ids] == TOKENS
    assert len([v for chunk in heard for v in chunk.logprobs]) == len(TOKENS)
    assert [chunk.HasField("header") for chunk in heard] == [True] + [False] * (len(heard) - 1)
    assert [chunk.HasField("finish") for chunk in heard] == [False] * (len(heard) - 1) + [True]
    assert heard[-1].finish.completion_tokens == len(TOKENS)


def test_a_story_that_is_not_resumed_keeps_its_bytes() -> None:
    story = Story()
    unknown = b"\xfa\x3f\x03abc"  # a field of some later version
    for chunk in chunks(Poet()):
        assert story.tell(chunk + unknown) == chunk + unknown
    assert story.finished


@pytest.mark.parametrize("poem", ["床后明月光", "床前"])
def test_another_story_is_refused(poem: str) -> None:
    story = Story()
    for chunk in chunks(Poet(tokens_a_chunk=9))[:2]:
        story.tell(chunk)
    story.resume()

    def go_on() -> None:
        for chunk in chunks(Poet(poem=poem, tokens_a_chunk=3)):
            story.tell(chunk)

    with pytest.raises(Unavailable, match="their weights have changed"):
        go_on()


def test_an_abort_ends_a_story_before_all_of_it_was_repeated() -> None:
    story = Story()
    heard = [story.tell(chunk) for chunk in chunks(Poet(tokens_a_chunk=9))[:3]]
    assert len(story.resume()) == 9
    (header, again, *_) = chunks(Poet(tokens_a_chunk=4), resume_token_ids=TOKENS[:9])
    finish = messages.StreamFinish(reason=messages.FINISH_REASON_ABORT, completion_tokens=4)
    end = messages.GenerateChunk(finish=finish).SerializeToString()
    assert [story.tell(header), story.tell(again)] == [None, None], "nothing that is new"
    last = messages.GenerateChunk.FromString(story.tell(end) or b"")
    assert last.finish.reason == messages.FINISH_REASON_ABORT
    assert last.finish.completion_tokens == 18, "all that was heard"
    assert len(heard) == 3
    assert not last.token_ids


def test_fields_are_added_behind_what_came() -> None:
    request = messages.GenerateRequest(prompt="静夜", deadline_ms=5000, request_id="mine")
    data = request.SerializeToString()
    for remaining_s, deadline_ms in ((None, 5000), (9.0, 5000), (1.5, 1500), (0.0, 1)):
        asked = wire.read("Generate", data, remaining_s, "drawn")
        assert asked.data.startswith(data)
        assert messages.GenerateRequest.FromString(asked.data).deadline_ms == deadline_ms
        assert (asked.request_id, asked.holder) == ("mine", "drawn")
    assert wire.read("Generate", data, 9.0, "drawn").deadline_s == 5.0
    assert wire.read("Generate", data, 1.5, "drawn").deadline_s == 1.5
    assert wire.read("Generate", request_without_deadline(), 2.0, "drawn").deadline_s == 2.0
    assert wire.read("Generate", request_without_deadline(), None, "drawn").deadline_s is None
    assert wire.read("Generate", request_without_deadline(), None, "drawn").request_id == "drawn"
    resumed = wire.resuming(
        messages.GenerateRequest(resume_token_ids=[1, 2]).SerializeToString(), [3, 4]
    )
    assert list(messages.GenerateRequest.FromString(resumed).resume_token_ids) == [1, 2, 3, 4]


def request_without_deadline() -> bytes:
    return messages.GenerateRequest(prompt="静夜").SerializeToString()


def test_a_deadline_that_is_wrong_is_left_for_the_replica_to_refuse() -> None:
    data = messages.GenerateRequest(deadline_ms=-5, request_id="a").SerializeToString()
    assert wire.read("Generate", data, 3.0, "drawn").data == data


def test_scores_have_deadlines_and_other_requests_pass() -> None:
    data = messages.ScoreRequest(prompt="静", continuations=["夜"]).SerializeToString()
    asked = wire.read("Score", data, 2.0, "drawn")
    assert messages.ScoreRequest.FromString(asked.data).deadline_ms == 2000
    assert not asked.resumable
    for method in ("Abort", "GetModel", "Scale"):
        asked = wire.read(method, b"\xff", 2.0, "drawn")
        assert asked == wire.Asked(data=b"\xff", holder="drawn", request_id="drawn", deadline_s=2.0)


@given(st.binary(max_size=50))
def test_no_bytes_are_too_strange_to_read(data: bytes) -> None:
    for method in ("Generate", "GenerateStream", "Score"):
        assert wire.read(method, data, 1.0, "drawn").data.startswith(data)
