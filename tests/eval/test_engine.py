"""Decoding through the tree gives, token for token, what asking one question at a time gives."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from reverie_jax.data.conversation import Conversation, Turn
from reverie_jax.data.images import decode, preprocess
from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.errors import DataError
from reverie_jax.eval import engine as engines
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine, EngineShape
from reverie_jax.models import ModelInputs, VisionLanguageModel
from reverie_jax.models.sharding import make_mesh
from tests.train import tiny

NEW_TOKENS = 9


@functools.cache
def model():
    """Random weights, large enough that answers differ from one another and some end early."""
    made = VisionLanguageModel(tiny.CONFIG, rngs=nnx.Rngs(3))
    head = made.decoder.head.kernel
    head.set_value(head[...] * 3)
    return made


def picture(name, questions, seed):
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(buffer, format="PNG")
    return ImageQuestions(name, buffer.getvalue(), questions)


def ask(text, *more):
    turns = [Turn("user", f"<image>\n{text}")]
    for answer, prompt in more:
        turns += [Turn("assistant", answer), Turn("user", prompt)]
    return Conversation(tuple(turns))


PICTURES = [
    picture("a", [(0, ask("is it?")), (1, ask("is it red?")), (2, ask("is it?", ("yes", "why?")))], 0),
    picture(
        "b", [(3, ask("what")), (4, ask("is it?")), (5, ask("z")), (6, ask("is it red?", ("no", "why is that?")))], 1
    ),
    picture("c", [(7, ask("is it?"))], 2),
]


@jax.jit
def _last_logits(tokens, image_slots, pixels, last):
    length = tokens.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    # Plain causal attention over one conversation, padding behind it.
    hidden = model().hidden(ModelInputs(tokens, positions, jnp.full_like(tokens, length), image_slots, pixels))
    return model().decoder.logits(hidden[0, last])


def one_at_a_time(encoded, talk):
    """Greedy decoding by running the whole conversation again for each token: no tree, no cache."""
    tokens = tiny.processor().encoder(talk)
    ids, image_slots = tokens.ids.tolist(), tokens.image_slots.tolist()
    pixels = jnp.asarray(preprocess(decode(encoded, "x"), 24)[None, None])
    answer = []
    for _ in range(NEW_TOKENS):
        pad = 96 - len(ids)
        logits = _last_logits(
            jnp.asarray([ids + [0] * pad], jnp.int32),
            jnp.asarray([image_slots + [-1] * pad], jnp.int32),
            pixels,
            len(ids) - 1,
        )
        token = int(logits.argmax())
        if token == tiny.Words.eos_token_id:
            break
        answer.append(token)
        ids.append(token)
        image_slots.append(-1)
    return tiny.processor().encoder.decode(answer)


@functools.cache
def expected():
    return {n: one_at_a_time(p.encoded, talk) for p in PICTURES for n, talk in p.questions}


@pytest.mark.parametrize(
    "shape",
    [
        EngineShape(),
        EngineShape(batch_size=2),
        EngineShape(batch_size=1, questions=2),
        EngineShape(sequence_length=80, batch_size=3),
    ],
    ids=["default", "two rows", "two leaves", "short rows"],
)
def test_tree_decoding_equals_one_question_at_a_time(shape):
    answers = Engine(model(), tiny.processor(), shape).answer(PICTURES, max_new_tokens=NEW_TOKENS)
    assert answers == expected()
    assert len(set(answers.values())) > 3, "the answers are too alike to tell the questions apart"


def test_answers_do_not_depend_on_their_company():
    engine = Engine(model(), tiny.processor())
    alone = {}
    for shown in PICTURES:
        for number, talk in shown.questions:
            alone |= engine.answer(
                [ImageQuestions(shown.name, shown.encoded, [(number, talk)])], max_new_tokens=NEW_TOKENS
            )
    assert alone == expected()


def test_a_mesh_gives_the_same_answers():
    engine = Engine(model(), tiny.processor(), EngineShape(batch_size=4), mesh=make_mesh(2, 2, 1))
    assert engine.answer(PICTURES, max_new_tokens=NEW_TOKENS) == expected()


def test_a_question_asked_twice_is_answered_twice():
    twice = [picture("a", [(0, ask("is it?")), (9, ask("is it?"))], 0)]
    answers = Engine(model(), tiny.processor()).answer(twice, max_new_tokens=NEW_TOKENS)
    assert answers == {0: expected()[0], 9: expected()[0]}


def test_one_token_answers():
    answers = Engine(model(), tiny.processor()).answer(PICTURES, max_new_tokens=1)
    assert all(expected()[number].startswith(text) for number, text in answers.items())


def test_nothing_to_ask():
    assert Engine(model(), tiny.processor()).answer([], max_new_tokens=3) == {}


def test_the_same_number_twice_is_refused():
    with pytest.raises(ValueError, match="same number"):
        Engine(model(), tiny.processor()).answer([picture("a", [(0, ask("x")), (0, ask("y"))], 0)], max_new_tokens=2)


def test_a_question_longer_than_a_row_is_named():
    long = [picture("long.png", [(0, ask("x" * 300))], 0)]
    with pytest.raises(DataError, match=r"long\.png"):
        Engine(model(), tiny.processor(), EngineShape(sequence_length=128)).answer(long, max_new_tokens=2)


@pytest.mark.parametrize("room", [8000, 400])
def test_little_room_for_answers_changes_none(room, monkeypatch):
    """Fewer questions a row, fewer rows a batch; and long answers are decoded again a part of the rows at a time."""
    monkeypatch.setattr(engines, "SUFFIX_BYTES", room)
    engine, how = Engine(model(), tiny.processor()), Decoding(NEW_TOKENS)
    work = engine.schedule(PICTURES, how, expected_new_tokens=2)
    (group,) = work.groups
    assert group.shape.questions < 4
    found = {}
    for answers in engine.stream(work, how, expected_new_tokens=2):
        found |= {number: answer.text for number, answer in answers.items()}
    assert found == expected()
