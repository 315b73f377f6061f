"""The methods of our gRPC services, as data. Names only: no messages are made here."""

from dataclasses import dataclass
from typing import Any

from google.protobuf.message_factory import GetMessageClass

from protos import control_pb2, generation_pb2  # noqa: TID251  names and methods, no messages

GENERATION = "gptmoe.v1.Generation"
CONTROL = "gptmoe.v1.ClusterControl"
_LOOKS = ("GetTopology", "WatchTopology")
"""What changes nothing, of ClusterControl."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One gRPC method."""

    service: str
    name: str
    streaming: bool
    """Whether it answers with a stream."""
    answer: Any
    """The class of what it answers with."""

    @property
    def operates(self) -> bool:
        """Whether it changes the application for all: an operator's."""
        return self.service == CONTROL and self.name not in _LOOKS

    @property
    def path(self) -> str:
        """As gRPC addresses it."""
        return f"/{self.service}/{self.name}"


def _read() -> tuple[Method, ...]:
    services = (
        file.DESCRIPTOR.services_by_name[name.rpartition(".")[2]]
        for file, name in ((generation_pb2, GENERATION), (control_pb2, CONTROL))
    )
    return tuple(
        Method(
            service=service.full_name,
            name=method.name,
            streaming=method.server_streaming,
            answer=GetMessageClass(method.output_type),
        )
        for service in services
        for method in service.methods
    )


METHODS = _read()
"""Of Generation and ClusterControl; no two share a name, by which Ray Serve goes."""
