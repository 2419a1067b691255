"""The model, from arrays to arrays; datasets, tokenizers and training are elsewhere.

Letters in array shapes, here and everywhere:

| letter | meaning                              | letter | meaning                                |
|--------|--------------------------------------|--------|----------------------------------------|
| `B`    | sequences in a batch                 | `H`    | query heads                            |
| `L`    | tokens in a sequence                 | `K`    | key/value heads                        |
| `D`    | decoder width                        | `d`    | width of one head                      |
| `M`    | images in a sequence                 | `V`    | vocabulary                             |
| `P`    | patch tokens of an image             | `E`    | edges in a sequence (supervised)       |
| `S`    | side of an image, in pixels          | `Q`    | questions (leaves) in a sequence       |
| `W`    | vision tower width                   | `T`    | tokens decoded after a leaf            |
| `N`    | stacked layers                       | `r`    | LoRA rank                              |
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "ModelInputs": "inputs",
    "TextConfig": "config",
    "VLMConfig": "config",
    "VisionConfig": "config",
    "VisionLanguageModel": "vlm",
}

__all__ = ["ModelInputs", "TextConfig", "VLMConfig", "VisionConfig", "VisionLanguageModel"]

if TYPE_CHECKING:
    from reverie_jax.models.config import TextConfig, VisionConfig, VLMConfig
    from reverie_jax.models.inputs import ModelInputs
    from reverie_jax.models.vlm import VisionLanguageModel


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: recipes and configurations need no JAX."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
