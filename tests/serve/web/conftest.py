"""The HTTP application in front of an engine that counts, or of one that talks."""

from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI

from serve.service import ModelCard, Service
from serve.web.app import build
from tests.characters import Characters
from tests.serve.web.browser import Browser
from tests.serve.web.talker import Talker, served

CARD = ModelCard(
    name="poems",
    parameters=1000,
    active_parameters=400,
    max_seq_len=64,
    vocab_size=0x110000,
    dtype="float32",
    num_layers=2,
    d_model=8,
    num_heads=2,
    num_experts=(4,),
)

SAID = [ord(character) for character in "春眠不觉晓"]


@pytest.fixture
def browser(service: Service) -> Browser:
    """Of CountingEngine behind its thread."""
    return Browser(build(service, stall_s=60))


@pytest.fixture(scope="session")
def talk() -> Service:
    return Service(Talker(Characters(), SAID), Characters(), CARD)


@pytest.fixture(scope="session")
def talking_app(talk: Service) -> FastAPI:
    return build(talk, stall_s=60)


@pytest.fixture
def talker(talk: Service) -> Talker:
    talker = talk._engine
    talker.begin(SAID)
    return talker


@pytest.fixture
def talking(talking_app: FastAPI, talker: Talker) -> Browser:
    """Of Talker: several answers, log-probabilities, deadlines."""
    return Browser(talking_app)


@pytest.fixture
def client(talking_app: FastAPI, talker: Talker) -> Iterator[httpx.Client]:
    """Of Talker, behind a real server."""
    with served(talking_app) as client:
        yield client
