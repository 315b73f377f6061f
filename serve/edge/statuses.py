"""Errors as the edge says them: a code, a sentence, and google.rpc's details for programs."""

from datetime import timedelta
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from gptmoe.errors import GptMoeError, RequestError
from serve.refusals import code_of, retry_after_s, retry_metadata, sentence


def status_of(error: GptMoeError, request_id: str = "") -> Any:
    """The grpc.Status of an error (https://google.aip.dev/193), for `abort_with_status`.

    BadRequest names the field, RetryInfo says when to come again (the metadata too, for
    clients that know no details), RequestInfo which request it was.
    """
    status = status_pb2.Status(
        code=code_of(error).value[0],
        message=sentence(error),
        details=[_packed(detail) for detail in _details(error, request_id)],
    )
    told = rpc_status.to_status(status)
    return told._replace(trailing_metadata=(*told.trailing_metadata, *retry_metadata(error)))


def broken(request_id: str) -> Any:
    """The status for our own bugs, which the log explains under the request's id."""
    return rpc_status.to_status(
        status_pb2.Status(
            code=grpc.StatusCode.INTERNAL.value[0],
            message="the server failed on this request; its log says why",
            details=[_packed(error_details_pb2.RequestInfo(request_id=request_id))],
        )
    )


def _details(error: GptMoeError, request_id: str) -> list[Any]:
    details: list[Any] = []
    if isinstance(error, RequestError) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=sentence(error)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    after_s = retry_after_s(error)
    if after_s is not None:
        delay = error_details_pb2.RetryInfo()
        delay.retry_delay.FromTimedelta(timedelta(seconds=after_s))
        details.append(delay)
    if request_id:
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
    return details


def _packed(detail: Any) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed
