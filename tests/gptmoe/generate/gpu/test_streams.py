"""Who captures on which stream: torch's, of which there are few, are a stand-in's here."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptmoe.errors import ConfigError
from gptmoe.generate.gpu.streams import IN_TURN, own_stream

GPU = torch.device("cuda")


class Owner:
    """Somebody who captures."""


@pytest.fixture(autouse=True)
def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.cycle(range(-IN_TURN, 0))  # none is a real stream's

    def stream(_: Any) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=next(numbers))

    monkeypatch.setattr(torch.cuda, "Stream", stream)


def test_no_two_owners_share_a_stream() -> None:
    first = Owner()
    kept = own_stream(first, GPU).cuda_stream
    for _ in range(3 * IN_TURN):
        assert own_stream(Owner(), GPU).cuda_stream != kept


def test_more_owners_than_streams_are_told_so() -> None:
    owners = [Owner() for _ in range(IN_TURN)]
    assert len({own_stream(owner, GPU).cuda_stream for owner in owners}) == IN_TURN
    with pytest.raises(ConfigError, match="32 engines on cuda have captured decoding steps"):
        own_stream(Owner(), GPU)
    owners.pop()
    own_stream(Owner(), GPU)
