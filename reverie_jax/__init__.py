"""Reflective instruction tuning of vision-language models in JAX (REVERIE, arXiv 2407.11422).

model, processor = reverie_jax.load_model("path/to/llava-1.5-7b-hf", dtype="bfloat16")
reverie_jax.generate(model, processor, [reverie_jax.ask("cat.png", "What is this?")])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "Batch": "data.packing",
    "Conversation": "data.conversation",
    "ConversationTree": "data.tree",
    "DPOConfig": "data.preferences",
    "Engine": "eval.engine",
    "EngineShape": "eval.schedule",
    "ImageRecord": "data.conversation",
    "JudgeRun": "eval.judge",
    "PredictOptions": "eval.predict",
    "Processor": "data.processor",
    "Recipe": "train.recipe",
    "RecordSource": "data.records",
    "SequenceShape": "data.sequence_shape",
    "Supervision": "data.supervision",
    "Turn": "data.conversation",
    "UserError": "errors",
    "VisionLanguageModel": "models",
    "ask": "data.processor",
    "build_tree": "data.tree",
    "compare": "eval.score",
    "find_benchmark": "eval.benchmarks",
    "find_recipe": "train.recipes",
    "finetune": "train.loop",
    "generate": "eval.engine",
    "load_model": "loading",
    "predict": "eval.predict",
    "read_recipe": "train.recipes",
    "score": "eval.score",
    "write_records": "data.records",
}

__all__ = ["__version__", *sorted(_EXPORTS)]

if TYPE_CHECKING:
    from reverie_jax.data.conversation import Conversation as Conversation
    from reverie_jax.data.conversation import ImageRecord as ImageRecord
    from reverie_jax.data.conversation import Turn as Turn
    from reverie_jax.data.packing import Batch as Batch
    from reverie_jax.data.preferences import DPOConfig as DPOConfig
    from reverie_jax.data.processor import Processor as Processor
    from reverie_jax.data.processor import ask as ask
    from reverie_jax.data.records import RecordSource as RecordSource
    from reverie_jax.data.records import write_records as write_records
    from reverie_jax.data.sequence_shape import SequenceShape as SequenceShape
    from reverie_jax.data.supervision import Supervision as Supervision
    from reverie_jax.data.tree import ConversationTree as ConversationTree
    from reverie_jax.data.tree import build_tree as build_tree
    from reverie_jax.errors import UserError as UserError
    from reverie_jax.eval.benchmarks import find_benchmark as find_benchmark
    from reverie_jax.eval.engine import Engine as Engine
    from reverie_jax.eval.engine import generate as generate
    from reverie_jax.eval.judge import JudgeRun as JudgeRun
    from reverie_jax.eval.predict import PredictOptions as PredictOptions
    from reverie_jax.eval.predict import predict as predict
    from reverie_jax.eval.schedule import EngineShape as EngineShape
    from reverie_jax.eval.score import compare as compare
    from reverie_jax.eval.score import score as score
    from reverie_jax.loading import load_model as load_model
    from reverie_jax.models import VisionLanguageModel as VisionLanguageModel
    from reverie_jax.train.loop import finetune as finetune
    from reverie_jax.train.recipe import Recipe as Recipe
    from reverie_jax.train.recipes import find_recipe as find_recipe
    from reverie_jax.train.recipes import read_recipe as read_recipe


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `reverie --help` does not wait for JAX."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
