"""placeholder"""
from gptmoe.parallel.updater import PlainUpdater as ZeroUpdater
