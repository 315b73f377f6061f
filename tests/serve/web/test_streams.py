"""Deltas gathered, and several calls heard at once."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from gptmoe.generate.delta import Delta
from serve.service import Call, Service
from serve.web.streams import gather, together
from tests.serve.web.talker import Talker

CALLS = [Call(prompt="春", request_id=name) for name in "ab"]


@given(st.lists(st.tuples(st.integers(0, 3), st.text(max_size=3)), min_size=1))
def test_each_answer_is_its_deltas_in_order(parts: list[tuple[int, str]]) -> None:
    deltas = [Delta(request_id="a", index=index, text=text) for index, text in parts]
    answers = gather(deltas)
    assert [answer.index for answer in answers] == sorted({index for index, _ in parts})
    for answer in answers:
        assert answer.text == "".join(text for index, text in parts if index == answer.index)


def test_calls_are_heard_in_turn(talk: Service, talker: Talker) -> None:
    async def places() -> list[int]:
        return [place async for place, _ in together(talk, CALLS)]

    heard = asyncio.run(places())
    assert heard[:6] == [0, 1] * 3
    assert not talker.running


def test_who_stops_listening_ends_all_calls(talk: Service, talker: Talker) -> None:
    async def leave() -> int:
        stream = together(talk, CALLS)
        await anext(stream)
        running = len(talker.running)
        await stream.aclose()
        return running

    assert asyncio.run(leave()) == 2
    assert not talker.running
