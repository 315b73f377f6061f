"""Modules that cost seconds to import, fetched when a command needs them.

`gptmoe --help`, `gptmoe models` and a mistyped option answer in a fraction of a second because
nothing here imports torch, ray, pyarrow or grpc before a command has checked its arguments. All
imports that wait are in this file, by name, so that everyone can see which they are.
"""

import importlib
from typing import Any


def gptmoe_loaded() -> Any:
    """gptmoe.loaded: a checkpoint ready to answer (torch)."""
    return importlib.import_module("gptmoe.loaded")


def gptmoe_stored() -> Any:
    """gptmoe.stored: a checkpoint's spec and network (torch)."""
    return importlib.import_module("gptmoe.stored")


def gptmoe_evaluate() -> Any:
    """gptmoe.evaluate: validation loss (torch)."""
    return importlib.import_module("gptmoe.evaluate")


def gptmoe_calibrate() -> Any:
    """gptmoe.calibrate: thresholds from data (torch)."""
    return importlib.import_module("gptmoe.calibrate")


def gptmoe_checkpoint() -> Any:
    """gptmoe.checkpoint: import of foreign checkpoints (torch)."""
    return importlib.import_module("gptmoe.checkpoint")


def gptmoe_data() -> Any:
    """gptmoe.data: corpora (numpy, pyarrow)."""
    return importlib.import_module("gptmoe.data")


def gptmoe_text() -> Any:
    """gptmoe.text: tokenizers (tokenizers, jieba)."""
    return importlib.import_module("gptmoe.text")


def remote() -> Any:
    """cluster.remote: a server from afar (grpc)."""
    return importlib.import_module("cluster.remote")


def dashboard() -> Any:
    """cluster.dashboard: a cluster from afar (ray)."""
    return importlib.import_module("cluster.dashboard")


def jobs() -> Any:
    """cluster.jobs: commands as Ray jobs (ray)."""
    return importlib.import_module("cluster.jobs")


def status() -> Any:
    """cluster.status: who owns what (ray)."""
    return importlib.import_module("cluster.status")


def drawing() -> Any:
    """cluster.drawing: status for people (ray, by status)."""
    return importlib.import_module("cluster.drawing")
