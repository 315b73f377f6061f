"""python -m serve --checkpoint DIR [CONFIG.toml] [key=value ...]: serve until Ctrl-C."""

from cluster import env

env.prepare()  # before Ray is imported, which reads its environment then

import signal  # noqa: E402
import sys  # noqa: E402

from cluster.child import end_with_parent  # noqa: E402

# Until `main` listens: libraries take seconds to import, and Ctrl-C may come.
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
end_with_parent()

from .command import main  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
