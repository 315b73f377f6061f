"""python -m serve --checkpoint DIR [CONFIG.toml] [key=value ...]: serve until Ctrl-C."""

from cluster import env

env.prepare()  # before Ray is imported, which reads its environment then

import sys  # noqa: E402

from .command import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
