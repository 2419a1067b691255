"""Answers are those of the engine, one question at a time, however requests are batched; prompts share their prefix."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reverie_jax.data.packing import SequenceShape, make_element, pack_sequence, stack
from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.data.tree import build_tree, unsupervised
from reverie_jax.eval import engine as engine_module
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine
from reverie_jax.eval.schedule import EngineShape
from reverie_jax.models.sharding import make_mesh
from reverie_jax.serve import scheduler as scheduler_module
from reverie_jax.serve.scheduler import Scheduler, Stopped
from tests.eval import decode_oracle as oracle
from tests.eval.decode_oracle import MANY_IMAGES, NEW_TOKENS, ask, png
from tests.serve.helpers import Answers, answers, closing, longer, request, until

MODEL = 2
QUESTIONS = [(image.encoded, conversation) for image in MANY_IMAGES for _, conversation in image.questions]


def engine(shape=None, mesh=None, processor=oracle.PROCESSOR) -> Engine:
    shape = shape or EngineShape(sequence_length=300, batch_size=4)
    return Engine(oracle.ours(MODEL), processor, shape, mesh=mesh)


@pytest.fixture(scope="module")
def alone():
    """Return a function that answers one conversation by the engine: the text of question number `index`."""
    found = engine()

    def answer(encoded, conversation, decoding, index=0):
        schedule = found.schedule([ImageQuestions("x", encoded, [(index, conversation)])], decoding)
        return next(found.stream(schedule, decoding))[index].text

    return answer


@pytest.fixture(scope="module")
def scheduler():
    with closing(Scheduler(engine())) as made:
        yield made


def of(scheduler, encoded, conversation, **options):
    options = {"longest": NEW_TOKENS} | options
    return request(scheduler.engine.processor, encoded, conversation, **options)


@pytest.mark.parametrize(
    ("shape", "mesh", "processor"),
    [
        (None, None, oracle.PROCESSOR),
        (EngineShape(sequence_length=130, questions=2, batch_size=3), None, oracle.PROCESSOR),
        (None, (2, 1, 2), oracle.PROCESSOR),
        (None, None, oracle.HOLDING),
    ],
    ids=["one shape", "small sequences", "mesh", "end is a text"],
)
def test_greedy_answers_are_the_engines(shape, mesh, processor):
    made = engine(shape, make_mesh(*mesh) if mesh else None, processor)
    single = Engine(oracle.ours(MODEL), processor, EngineShape(batch_size=1))
    questions = [one for one in QUESTIONS if len(processor.encoder(one[1])) <= made.shape.sequence_length]
    assert len(questions) > 12
    expected = [
        single.answer([ImageQuestions("x", encoded, [(0, one)])], max_new_tokens=NEW_TOKENS)[0]
        for encoded, one in questions
    ]
    with closing(Scheduler(made)) as scheduler:
        found = answers(scheduler, [of(scheduler, *one) for one in questions])
    assert [one.texts() for one in found] == [[text] for text in expected]
    finishes = {one.finishes()[0] for one in found}
    assert finishes == {"stop", "length"}


def test_requests_of_all_kinds_share_batches(scheduler, alone):
    """Lengths, greedy and sampled answers, several answers: each is what the engine answers with its options alone."""
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.0, "longest": 3},
        {"temperature": 1.0, "seed": 7, "n": 3},
        {"temperature": 0.7, "top_p": 0.6, "seed": 2**31 - 1},
        {"temperature": 1.3, "top_p": 0.3, "seed": 3, "longest": 5, "n": 2},
    ]
    cases = [(*QUESTIONS[index % len(QUESTIONS)], kinds[index % len(kinds)]) for index in range(15)]
    found = answers(scheduler, [of(scheduler, encoded, one, **kind) for encoded, one, kind in cases])
    sampled = set()
    for (encoded, conversation, kind), answer in zip(cases, found, strict=True):
        kind = {"longest": NEW_TOKENS, "n": 1} | kind
        options = {name: kind[name] for name in kind.keys() & {"temperature", "top_p", "seed"}}
        decoding = Decoding(kind["longest"], **options)
        assert answer.texts() == [alone(encoded, conversation, decoding, index) for index in range(kind["n"])]
        sampled |= {*answer.texts()} if kind["n"] == 3 else set()
    assert len(sampled) > 3, "samples are alike"


def test_log_probabilities_are_those_of_the_whole_text(scheduler):
    """Each token's, and the likeliest in its place, from one pass over prompt and answer without a cache."""
    encoded, conversation = QUESTIONS[2]
    asked = of(scheduler, encoded, conversation, top=4)
    (found,) = answers(scheduler, [asked])
    scored = [token for part in found.deltas[0] for token in part.tokens]
    ids = [int(token.text) for token in scored]
    assert " ".join(map(str, ids)) == found.texts()[0]
    tokens = longer(asked, ids).tokens
    element = make_element(build_tree([unsupervised(tokens)]), asked.image)
    batch = stack([pack_sequence([element], SequenceShape(len(tokens)), oracle.PROCESSOR.encoder.patches)], 1)
    logits = oracle.ours(MODEL)(batch.inputs)[0, len(asked.tokens) - 1 : -1]
    expected = np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=-1))
    np.testing.assert_allclose([token.logprob for token in scored], expected[range(len(ids)), ids], atol=1e-4, rtol=0)
    best = np.argsort(-expected, axis=-1)[:, :4]
    assert [[int(text) for text, _ in token.top] for token in scored] == best.tolist()
    values = [[value for _, value in token.top] for token in scored]
    np.testing.assert_allclose(values, np.take_along_axis(expected, best, axis=-1), atol=1e-4, rtol=0)


def test_one_image_is_prefilled_once():
    """18 questions about a picture take less than two prompts' image tokens; all come at once, so they are one batch."""
    with closing(Scheduler(engine())) as scheduler:
        # A first request, so that the others wait together.
        first, started = Answers(), threading.Event()
        requests = [of(scheduler, png(5), ask(f"is it {word}?")) for word in "abcdefghijklmnopqr"]

        def submit_all(event):
            if not started.is_set():
                started.set()
                for one, sink in zip(requests, found, strict=True):
                    scheduler.submit(one, sink)
            first(event)

        found = [Answers() for _ in requests]
        scheduler.submit(of(scheduler, png(6), ask("what?")), submit_all)
        for one in (first, *found):
            one.wait()
        counted = {one.name: one.samples for one in scheduler.metrics._registry.collect()}
    prefilled = counted["reverie_prefilled_tokens"][0].value
    own = sum(len(one.tokens) for one in requests)
    patches = oracle.PROCESSOR.encoder.patches
    assert prefilled < own - 16 * patches
    batches = next(one.value for one in counted["reverie_batch_answers"] if one.name.endswith("count"))
    assert batches == 2


def test_programs_are_few(scheduler):
    """Any length, temperature, seed, number of answers and questions of a bucket runs one compiled program."""
    answers(scheduler, [of(scheduler, *QUESTIONS[0], longest=8)])
    programs = scheduler_module.start._cache_size(), scheduler_module.advance._cache_size()
    for options in ({"longest": 3}, {"temperature": 0.4, "seed": 1}, {"n": 8, "temperature": 1.0}, {"top": 3}):
        answers(scheduler, [of(scheduler, *QUESTIONS[1], **{"longest": 8} | options)])
    assert (scheduler_module.start._cache_size(), scheduler_module.advance._cache_size()) == programs


def test_a_short_answer_overtakes_a_long_one(scheduler):
    """A request that comes while another is decoded is answered before that one's end."""
    sampled = [of(scheduler, *QUESTIONS[2], longest=128, temperature=1.0, seed=seed) for seed in range(12)]
    slow, found = max(
        zip(sampled, answers(scheduler, sampled), strict=True), key=lambda one: one[1].deltas[0][-1].count
    )
    assert found.deltas[0][-1].count > 30
    order, long, short = [], Answers(), Answers()

    def on_long(event):
        if not order:
            scheduler.submit(of(scheduler, *QUESTIONS[0], longest=2), on_short)
        order.append("long")
        long(event)

    def on_short(event):
        order.append("short")
        short(event)

    scheduler.submit(slow, on_long)
    long.wait()
    short.wait()
    assert order.index("short") < order.index("long", 2)
    assert order[-1] == "long"


def test_who_leaves_costs_nothing_more(scheduler):
    seen, left = [], threading.Event()

    def leave(event):
        seen.append(event)
        ready.wait()
        ticket.cancel()
        left.set()

    ready = threading.Event()
    ticket = scheduler.submit(of(scheduler, *QUESTIONS[2], longest=128), leave)
    ready.set()
    assert left.wait(60)
    assert answers(scheduler, [of(scheduler, *QUESTIONS[3])])[0].texts()
    assert len(seen) == 1
    gone = scheduler.submit(of(scheduler, *QUESTIONS[2]), seen.append)
    gone.cancel()
    until(lambda: not scheduler._waiting)
    assert answers(scheduler, [of(scheduler, *QUESTIONS[3])])[0].texts()


def test_a_failing_batch_ends_its_own_requests_only(scheduler, monkeypatch, caplog):
    def broken(*args, **options):
        monkeypatch.undo()
        raise MemoryError("no room")

    monkeypatch.setattr(scheduler_module, "start", broken)
    (failed,) = answers(scheduler, [of(scheduler, *QUESTIONS[0], n=2, temperature=1.0)])
    assert isinstance(failed.error, Stopped)
    assert "no room" in caplog.text
    assert answers(scheduler, [of(scheduler, *QUESTIONS[0])])[0].texts()


def test_little_room_for_answers_does_not_change_them(monkeypatch, alone):
    monkeypatch.setattr(engine_module, "SUFFIX_BYTES", 2_000)
    with closing(Scheduler(engine())) as scheduler:
        assert scheduler.engine.limits(Decoding(NEW_TOKENS)).questions == 1
        found = answers(scheduler, [of(scheduler, *one) for one in QUESTIONS[:3]])
        monkeypatch.undo()
    assert [one.texts() for one in found] == [[alone(*one, Decoding(NEW_TOKENS))] for one in QUESTIONS[:3]]


def test_a_prompt_that_fits_no_sequence_is_refused(scheduler):
    with pytest.raises(ValueError, match="300"):
        scheduler.submit(of(scheduler, png(0), ask("x" * 300)), Answers())


def test_closing_answers_everybody():
    scheduler = Scheduler(engine())
    sinks = [Answers() for _ in range(30)]
    for number, sink in enumerate(sinks):
        scheduler.submit(of(scheduler, *QUESTIONS[number % len(QUESTIONS)], longest=64), sink)
    scheduler.close()
    assert {type(sink.wait().error) for sink in sinks} <= {type(None), Stopped}
    assert Stopped in {type(sink.error) for sink in sinks}
    assert not scheduler.healthy
    with pytest.raises(Stopped):
        scheduler.submit(of(scheduler, *QUESTIONS[0]), Answers())
