"""The engine gives, token for token, what transformers answers to one question at a time, however questions are batched."""

from __future__ import annotations

import itertools

import pytest

from reverie_jax.data.conversation import Conversation, ImageRecord, Turn
from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.errors import DataError, UserError
from reverie_jax.eval import engine as engine_module
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine, generate
from reverie_jax.eval.schedule import EngineShape
from reverie_jax.models.sharding import make_mesh
from tests.eval import decode_oracle as oracle
from tests.eval.decode_oracle import IMAGES, MANY_IMAGES, NEW_TOKENS, ask, decoded, greedy, png

SHAPE = EngineShape(batch_size=4)
DECODING = Decoding(NEW_TOKENS)


@pytest.fixture(scope="module")
def engine():
    return Engine(oracle.ours(2), oracle.PROCESSOR, SHAPE)


@pytest.mark.parametrize(
    ("seeds", "images", "shape", "axes", "expected_new_tokens"),
    [
        pytest.param(range(2), MANY_IMAGES, SHAPE, None, None, id="two shapes"),
        pytest.param(
            (2,), IMAGES, EngineShape(96, questions=2, batch_size=3), None, None, id="several trees per image"
        ),
        pytest.param(range(6), MANY_IMAGES, SHAPE, None, 3, id="decoded twice", marks=pytest.mark.slow),
        pytest.param((2, 4), IMAGES, SHAPE, (4, 1, 1), None, id="data parallel", marks=pytest.mark.slow),
        pytest.param((2, 4), IMAGES, SHAPE, (1, 2, 2), None, id="tensor parallel", marks=pytest.mark.slow),
        pytest.param((2, 4), MANY_IMAGES, SHAPE, (2, 2, 1), 3, id="all at once", marks=pytest.mark.slow),
    ],
)
def test_greedy_answers_are_transformers(seeds, images, shape, axes, expected_new_tokens):
    lengths = set()
    for seed in seeds:
        expected = greedy(seed, images)
        mesh = make_mesh(*axes) if axes else None
        assert decoded(seed, DECODING, images, shape, mesh=mesh, expected_new_tokens=expected_new_tokens) == expected
        lengths |= {len(text.split()) for text in expected.values()}
    assert NEW_TOKENS in lengths
    assert len(lengths) > 2, "too few answers end"


def test_skipped_batches_do_not_change_others():
    engine = Engine(oracle.ours(0), oracle.PROCESSOR, SHAPE)
    schedule = engine.schedule(MANY_IMAGES, DECODING)
    assert len(schedule.groups) == 2  # questions of different lengths have two shapes
    announced = list(schedule.numbers())
    assert len(announced) > 3
    for skip in range(len(announced) + 1):
        rest = list(engine.stream(schedule, DECODING, skip=skip))
        assert [list(part) for part in rest] == announced[skip:]
        for part in rest:
            assert {n: answer.text for n, answer in part.items()} == {n: oracle.greedy_answer(0, n) for n in part}


@pytest.mark.parametrize(("room", "questions"), [(45_000, 4), (2_000, 1)])
def test_little_room_for_answers_does_not_change_them(engine, room, questions, monkeypatch):
    """Fewer questions or sequences together; and long answers are decoded again, part of a batch at a time."""
    monkeypatch.setattr(engine_module, "SUFFIX_BYTES", room)
    schedule = engine.schedule(IMAGES, DECODING, expected_new_tokens=2)
    assert {group.shape.questions for group in schedule.groups} == {questions}
    parts = list(engine.stream(schedule, DECODING, expected_new_tokens=2))
    assert {n: answer.text for part in parts for n, answer in part.items()} == greedy(2)


def test_repeated_questions_and_no_questions(engine):
    twice = [ImageQuestions("a", png(0), [(0, ask("is it?")), (9, ask("is it?"))])]
    batches = []
    answers = engine.answer(twice, max_new_tokens=NEW_TOKENS, on_progress=batches.append)
    assert answers == dict.fromkeys((0, 9), greedy(2)[0])
    assert batches == [2]
    assert engine.answer([], max_new_tokens=3) == {}


def test_bad_questions_are_refused():
    engine = Engine(oracle.ours(2), oracle.PROCESSOR, EngineShape(sequence_length=128))
    for questions, error, match in (
        ([(0, ask("x")), (0, ask("y"))], ValueError, "same number"),
        ([(0, ask("x" * 300))], DataError, r"long\.png"),
    ):
        with pytest.raises(error, match=match):
            engine.answer([ImageQuestions("long.png", png(0), questions)], max_new_tokens=2)
    closed = ImageRecord("7", png(0), (Conversation((*ask("x").turns, Turn("assistant", "yes")), (0,)),))
    with pytest.raises(UserError, match="record 7"):
        generate(oracle.ours(2), oracle.PROCESSOR, [closed])
    processor = oracle.processor()
    processor.encoder.stop_ids = ()
    with pytest.raises(ValueError, match="end-of-sequence"):
        Engine(oracle.ours(2), processor)


def test_one_program_serves_all_sizes_of_a_bucket():
    """1 to 8 questions of any length, 33 to 128 new tokens, 3 or 4 images."""
    engine = Engine(oracle.ours(0), oracle.PROCESSOR, EngineShape(batch_size=4))

    def programs_after(images, questions, new_tokens):
        numbers = itertools.count()
        records = [
            ImageQuestions(f"p{n}", png(n), [(next(numbers), ask("is it red? " * (1 + q))) for q in range(questions)])
            for n in range(images)
        ]
        assert len(engine.answer(records, max_new_tokens=new_tokens)) == images * questions
        return engine_module._decode._cache_size()

    first = programs_after(3, 1, 33)
    assert {programs_after(*size) for size in [(4, 2, 64), (3, 5, 65), (4, 8, 128)]} == {first}
    assert programs_after(4, 9, 64) == first + 1
