"""One small model, and another that differs from it, for the tests of a file."""

from __future__ import annotations

import jax
import pytest

import reverie_jax
from reverie_jax.chat.model import ChatModel, Options
from reverie_jax.eval.engine import Engine
from reverie_jax.eval.schedule import EngineShape
from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.serve.scheduler import Scheduler
from tests.hosted.fixtures import reverie

__all__ = ["reverie"]


def adapted(model: VisionLanguageModel) -> VisionLanguageModel:
    """Return a model with an adapter that no training made."""
    lora.attach(model, rank=4, alpha=4, seed=1)
    for _, _, _, b in lora.adapters(model):
        lora.assign(b, 0.6 * jax.random.normal(jax.random.key(0), b.shape))
    return model


@pytest.fixture(scope="session")
def models():
    """Return the base, and it with an adapter: other answers to the same questions."""
    found = []
    for name in ("base", "other"):
        model, processor = reverie_jax.load_model("scenes-base", dtype="float32")
        if name == "other":
            lora.merge(adapted(model))
        engine = Engine(model, processor, EngineShape(sequence_length=processor.context, questions=1, batch_size=1))
        found.append(ChatModel(name, Scheduler(engine, keep=1)))
    yield found
    for model in found:
        model.scheduler.close()


@pytest.fixture
def options():
    return Options(max_new_tokens=24)
