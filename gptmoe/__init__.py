"""A Chinese GPT with mixtures of experts: one core for training and serving, in plain PyTorch.

    import gptmoe
    model = gptmoe.load("runs/tiny")
    print(model.generate("春风", max_new_tokens=32, temperature=0))

`load` and `LoadedModel` come with torch, which takes seconds to import, so they are fetched at
first use: presets, counts and configs stay light.
"""

import importlib
from typing import Any

__all__ = ["LoadedModel", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("gptmoe.loaded"), name)
    raise AttributeError(f"module 'gptmoe' has no attribute {name!r}")
