"""Refusals in Ray Serve's log: one line each; bugs keep their traceback."""

import io
import logging
from collections.abc import Iterator

import grpc
import pytest
from ray.exceptions import RayTaskError
from ray.serve.exceptions import gRPCStatusError

from gptmoe.errors import Overloaded
from serve.short_log import LOGGER, Short, shorten

REFUSAL = Overloaded("the queue is full", 0.4)


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    logger, stream = logging.getLogger(LOGGER), io.StringIO()
    handler, before = logging.StreamHandler(stream), list(logger.filters)
    logger.addHandler(handler)
    shorten()
    shorten()
    assert sum(isinstance(found, Short) for found in logger.filters) == 1
    yield stream
    logger.removeHandler(handler)
    logger.filters = before


def log_of(error: Exception) -> None:
    try:
        raise error
    except Exception:
        logging.getLogger(LOGGER).exception("Request %s.", "failed")


@pytest.mark.parametrize(
    "error",
    [
        REFUSAL,
        gRPCStatusError(REFUSAL, grpc.StatusCode.RESOURCE_EXHAUSTED),
        RayTaskError(
            "stream", "Traceback", gRPCStatusError(REFUSAL, grpc.StatusCode.RESOURCE_EXHAUSTED)
        ).as_instanceof_cause(),
    ],
    ids=["in the replica", "with a status", "in the proxy"],
)
def test_a_refusal_is_one_line(written: io.StringIO, error: Exception) -> None:
    log_of(error)
    assert written.getvalue() == "Request failed. Overloaded: the queue is full\n"


def test_a_bug_keeps_its_traceback(written: io.StringIO) -> None:
    log_of(gRPCStatusError(ZeroDivisionError("a bug"), grpc.StatusCode.INTERNAL))
    assert "Traceback" in written.getvalue()
    log_of(ZeroDivisionError("a bug"))
    assert written.getvalue().count("Traceback") == 2
    logging.getLogger(LOGGER).error("%d %%", 7)
    assert written.getvalue().endswith("\n7 %\n")
