"""Reflective instruction tuning of vision-language models in JAX (REVERIE, arXiv 2407.11422).

model, processor = reverie_jax.load_model("path/to/llava-1.5-7b-hf", dtype="bfloat16")
reverie_jax.generate(model, processor, [reverie_jax.ask("cat.png", "What is this?")])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "Conversation": "data.conversation",
    "ImageRecord": "data.conversation",
    "Processor": "data.processor",
    "Turn": "data.conversation",
    "VisionLanguageModel": "models",
    "ask": "data.processor",
    "generate": "eval.engine",
    "load_model": "loading",
}

__all__ = ["__version__", *sorted(_EXPORTS)]

if TYPE_CHECKING:
    from reverie_jax.data.conversation import Conversation as Conversation
    from reverie_jax.data.conversation import ImageRecord as ImageRecord
    from reverie_jax.data.conversation import Turn as Turn
    from reverie_jax.data.processor import Processor as Processor
    from reverie_jax.data.processor import ask as ask
    from reverie_jax.eval.engine import generate as generate
    from reverie_jax.loading import load_model as load_model
    from reverie_jax.models import VisionLanguageModel as VisionLanguageModel


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `reverie --help` does not wait for JAX."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
