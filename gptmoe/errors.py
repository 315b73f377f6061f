"""Every error that a user, a file or a network can cause.

GptMoeError
  ConfigError       a config file, key or value is wrong; names the key
  DataError         an input file is missing, empty or malformed; names the file and line
  LayoutError       a parallel layout does not divide or does not fit; gives both numbers
  CheckpointError   a checkpoint is missing, incomplete, corrupt or of another shape; names the part
  ClusterError      a Ray cluster is unreachable, too small or lost a part
    Unavailable     for now: `retry_after_s` says when to try again, if here at all
  RequestError      a generation request is invalid; `field` names what to change
  NotFound          no model or running request of that name
  AlreadyRunning    a request with that id runs
  Unauthenticated   a key is missing or wrong
  PermissionDenied  a key is good, and not for this
  DeadlineExceeded  what was asked for is not done in time
  Overloaded        a queue is full; `retry_after_s` says when to come back

A message is one sentence or two: what was wanted, what was found, what to do. Arguments are
positional because exceptions cross actors by pickle, which calls the class with `args`.
"""


class GptMoeError(Exception):
    """Base of all errors with a message for people; entry points print it without a traceback."""


class ConfigError(GptMoeError):
    """A config file, key or value is wrong."""


class DataError(GptMoeError):
    """An input file is missing, empty or malformed."""


class LayoutError(GptMoeError):
    """A parallel layout does not divide or does not fit."""


class CheckpointError(GptMoeError):
    """A checkpoint is missing, incomplete, corrupt or of another shape."""


class ClusterError(GptMoeError):
    """A Ray cluster is unreachable, too small or lost a part."""


class Unavailable(ClusterError):
    """A part is away and may come back; try again after `retry_after_s` seconds.

    None: nobody knows when, or whether at all; try elsewhere.
    """

    def __init__(self, message: str, retry_after_s: float | None = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class RequestError(GptMoeError):
    """A generation request is invalid; `field` names what to change."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message, field)
        self.message = message
        self.field = field

    def __str__(self) -> str:
        return self.message


class NotFound(GptMoeError):
    """No model, or no running request, has that name."""


class AlreadyRunning(GptMoeError):
    """A request with that id runs; wait for it or use another id."""


class Unauthenticated(GptMoeError):
    """A key is missing or wrong."""


class PermissionDenied(GptMoeError):
    """A key is good, and not for this."""


class DeadlineExceeded(GptMoeError):
    """What was asked for is not done in time."""


class Overloaded(GptMoeError):
    """A queue is full; come back after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message
