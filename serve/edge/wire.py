"""Requests and chunks as bytes: as little is read of them, and as little changed, as can be.

Bytes of protobuf messages of one type can be joined: of a field that comes twice the last value
counts, and repeated fields are strung together. So a deadline is lowered, and tokens to resume from
are added, behind a request that stays as it came.
"""

from dataclasses import dataclass, replace
from typing import Any

from google.protobuf.message import DecodeError

from gptmoe.generate.request import MAX_ID_CHARACTERS
from protos import generation_pb2 as messages

_KINDS: dict[str, Any] = {
    "Generate": messages.GenerateRequest,
    "GenerateStream": messages.GenerateRequest,
    "Score": messages.ScoreRequest,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as it goes on to a replica."""

    data: bytes
    holder: str
    """Drawn for this call: see serve/names.py, Ticket."""
    request_id: str
    """That its caller gave it, else its holder's: so it is named from the start. It is cut if it is
    too long: what goes behind an answer has little room."""
    deadline_s: float | None = None
    """Seconds from now after which nobody wants the answer."""
    resumable: bool = False
    """Whether another replica can go on where one stopped: one answer, and no beams."""


def read(method: str, data: bytes, remaining_s: float | None, holder: str) -> Asked:
    """What the edge must know of a request, and the request with a deadline.

    `remaining_s` is what the call's own deadline leaves. Bytes that cannot be read go on as they
    are: the replica says what is wrong with them.
    """
    as_it_is = Asked(data=data, holder=holder, request_id=holder, deadline_s=remaining_s)
    kind = _KINDS.get(method)
    if kind is None:
        return as_it_is
    try:
        message = kind.FromString(data)
    except DecodeError:
        return as_it_is
    wanted_s = message.deadline_ms / 1000 if message.deadline_ms > 0 else None
    deadline_s = min((s for s in (wanted_s, remaining_s) if s is not None), default=None)
    if deadline_s is not None and deadline_s != wanted_s and message.deadline_ms >= 0:
        data += kind(deadline_ms=max(1, int(deadline_s * 1000))).SerializeToString()
    if isinstance(message, messages.ScoreRequest):
        return replace(as_it_is, data=data, deadline_s=deadline_s)
    return Asked(
        data=data,
        holder=holder,
        request_id=message.request_id[:MAX_ID_CHARACTERS] or holder,
        deadline_s=deadline_s,
        resumable=message.n <= 1 and message.num_beams <= 1,
    )


def resuming(data: bytes, token_ids: list[int]) -> bytes:
    """A request for text that goes on behind these tokens, and behind those it resumed itself."""
    return data + messages.GenerateRequest(resume_token_ids=token_ids).SerializeToString()
