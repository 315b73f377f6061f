"""python -m cluster.cli: the `gptmoe` command where it is not installed."""

from .main import main

main()
