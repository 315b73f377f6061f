"""Ray Serve's own log of what failed: where a request was refused, a sentence and no traceback.

Ray Serve writes some sixty lines in the replica and thirty in the proxy for each error that a
method raises, as if it were a bug. Under overload that filled the log, and took a share of the
cores. Light: the proxy of every node imports it.
"""

import logging

from ray.serve.exceptions import gRPCStatusError

from gptmoe.errors import GptMoeError

LOGGER = "ray.serve"


class Short(logging.Filter):
    """Replaces the traceback of a refusal by its sentence."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets every record pass."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, gRPCStatusError):
            error = error.original_exception
        if isinstance(error, GptMoeError):
            record.msg, record.args = f"{record.getMessage()} {type(error).__name__}: {error}", ()
            record.exc_info = record.exc_text = None
        return True


def shorten() -> None:
    """For this process, from now on."""
    logger = logging.getLogger(LOGGER)
    if not any(isinstance(found, Short) for found in logger.filters):
        logger.addFilter(Short())
