"""A thread that says that its process is alive, whatever the others do."""

import logging
import threading
from collections.abc import Callable

from cluster.reporter import Reporter
from gptmoe.errors import ClusterError

log = logging.getLogger(__name__)

BEAT_EVERY_S = 0.5


class Pulse:
    """Heartbeats of one registered shard, until `stop` or the end of its epoch."""

    def __init__(
        self, reporter: Reporter, counters: Callable[[], tuple[int, dict[str, float]]]
    ) -> None:
        self._reporter, self._counters = reporter, counters
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def stop(self) -> None:
        """No more heartbeats."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_EVERY_S):
            step, counters = self._counters()
            try:
                self._reporter.heartbeat(step, counters)
            except ClusterError as error:
                log.info("no more heartbeats: %s", error)
                return
