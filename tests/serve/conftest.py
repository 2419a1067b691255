"""One server for the tests of a file."""

from __future__ import annotations

import functools
import warnings

import pytest

import reverie_jax
from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.data.processor import ask as open_questions
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine
from reverie_jax.eval.schedule import EngineShape
from reverie_jax.serve.app import Service
from reverie_jax.serve.scheduler import Scheduler
from tests.hosted.fixtures import reverie
from tests.serve.helpers import SECONDS, Running

__all__ = ["reverie"]


@pytest.fixture(scope="session", autouse=True)
def imported() -> None:
    """Import the SDK once: where aiohttp is installed, it warns about a class that others derive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pytest.importorskip("openai")


@pytest.fixture(scope="module")
def engine() -> Engine:
    model, processor = reverie_jax.load_model("scenes-base", dtype="float32")
    return Engine(model, processor, EngineShape(sequence_length=1024, batch_size=4))


@pytest.fixture
def serve(engine):
    """Return a function that makes a server; options are the service's."""
    return lambda **options: Running(Service(Scheduler(engine), "scenes-base", max_new_tokens=48, **options))


@pytest.fixture(scope="module")
def server(engine):
    with Running(Service(Scheduler(engine), "scenes-base", max_new_tokens=48)) as running:
        yield running


@pytest.fixture(scope="module")
def alone(engine):
    """Return a function that answers one question by the engine."""

    @functools.cache
    def answer(text, encoded=b"", longest=24, index=0, **options):
        (conversation,) = open_questions(encoded or None, text).conversations
        decoding = Decoding(longest, **options)
        schedule = engine.schedule([ImageQuestions("x", encoded, [(index, conversation)])], decoding)
        return next(engine.stream(schedule, decoding))[index].text

    return answer


@pytest.fixture
def client(server):
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=SECONDS) as made:
        yield made
