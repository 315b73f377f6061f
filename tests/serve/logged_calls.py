"""A replica with its access log, as far as calls are concerned, and the lines that it writes."""

import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.operations import DrainRequest, DrainResponse
from serve import access_log
from serve.access_log import AccessLog, LogConfig
from serve.bridge import EngineThread
from serve.control import ControlServicer
from serve.edge.inlet import Inlet
from serve.guard import guarded
from serve.keys import Keys
from serve.logged import LoggedService, logged
from serve.rpc import Servicer
from tests.characters import Characters

from .conftest import CARD

FULL = {
    "transport": "grpc",
    "method": "Generate",
    "request_id": "r-1",
    "model": "poems",
    "status": "ok",
    "field": "",
    "finish_reason": "length",
    "prompt_tokens": 2,
    "cached_tokens": 1,
    "completion_tokens": 3,
    "queue_s": 0.25,
    "first_token_s": 0.5,
    "total_s": 3.0,
}


async def _drain(request: DrainRequest) -> DrainResponse:
    return DrainResponse()


@logged
@guarded
class Deployment(Servicer, ControlServicer, Inlet):
    """A replica, as far as its calls are concerned."""

    keys: Keys | None = None
    access_log: AccessLog
    operations = SimpleNamespace(drain=_drain)  # type: ignore[assignment]


def made(bridge: EngineThread, **settings: bool) -> Deployment:
    """One whose log has these settings."""
    deployment = Deployment()
    deployment.service = LoggedService(bridge, Characters(), CARD)
    deployment.access_log = AccessLog(LogConfig(**settings), CARD.name)
    return deployment


class Lines:
    """The lines of the access log."""

    def __init__(self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(access_log.log, "propagate", True)
        caplog.set_level(logging.INFO, "serve.access_log")
        self._caplog = caplog

    def __call__(self) -> list[Any]:
        """Those so far, parsed."""
        ours = [record for record in self._caplog.records if record.name == "serve.access_log"]
        return [json.loads(record.getMessage()) for record in ours]
