"""gRPC channels to a server, and the metadata of each call. Needs grpc only."""

from typing import Any

import grpc
import grpc.aio

from .access import Access


def channel(target: str, access: Access) -> Any:
    """A channel. Raises OSError if a file of `access` cannot be read."""
    if not access.encrypted:
        return grpc.insecure_channel(target)
    return grpc.secure_channel(target, _credentials(access), options=_options(access))


def aio_channel(target: str, access: Access) -> Any:
    """The same for asyncio."""
    if not access.encrypted:
        return grpc.aio.insecure_channel(target)
    return grpc.aio.secure_channel(target, _credentials(access), options=_options(access))


def metadata(application: str, access: Access) -> tuple[tuple[str, str], ...]:
    """What goes with each call: the application that is meant, and the key."""
    named = (("application", application),) if application else ()
    keyed = (("authorization", f"Bearer {access.token}"),) if access.token else ()
    return (*named, *keyed)


def _credentials(access: Access) -> Any:
    key = access.key or access.cert
    return grpc.ssl_channel_credentials(
        root_certificates=access.ca.read_bytes() if access.ca else None,
        private_key=key.read_bytes() if key else None,
        certificate_chain=access.cert.read_bytes() if access.cert else None,
    )


def _options(access: Access) -> list[tuple[str, str]]:
    return [("grpc.ssl_target_name_override", access.server_name)] if access.server_name else []
