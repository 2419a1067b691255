"""Each answer of a session is the engine's to the same conversation, and readers of training data read its feedback."""

from __future__ import annotations

import itertools
import threading
from functools import partial

import pytest

from reverie_jax.chat.feedback import FeedbackFolder
from reverie_jax.chat.model import Options
from reverie_jax.chat.session import ChatSession
from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.images import BrokenImage
from reverie_jax.data.mixture import MixtureEntry, read_mixture
from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.data.preferences import find_pairs
from reverie_jax.data.reflection import WHY, WHY_WRONG
from reverie_jax.data.sources import ReadLog
from reverie_jax.errors import UserError
from reverie_jax.eval.decode import Decoding
from reverie_jax.scenes.corpus import render_png
from reverie_jax.scenes.graph import World, take_scenes

IMAGE_FILE = render_png(take_scenes(World.skewed(), "test", 0, 1)[0], 96)


def expected(model, texts, image=IMAGE_FILE, **decoding):
    """The engine's answer to a conversation of texts, the user's first."""
    turns = [Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]
    if image:
        turns[0] = Turn("user", f"{IMAGE}\n{texts[0]}")
    conversation = Conversation(tuple(turns), (0,) * bool(image))
    engine, how = model.scheduler.engine, Decoding(**{"max_new_tokens": 24} | decoding)
    schedule = engine.schedule([ImageQuestions("a", image, [(0, conversation)])], how)
    return next(engine.stream(schedule, how))[0].text


def said(exchanges):
    """The last state of an exchange."""
    *_, last = exchanges
    return last


def test_each_answer_is_the_engines_to_what_was_said_before(models, options):
    model = models[0]
    session = ChatSession([model], IMAGE_FILE)
    (first,) = said(session.ask(" Describe the image. ", options)).answers
    assert first == expected(model, ["Describe the image."])
    (second,) = said(session.ask("Is there a cup in the image?", options)).answers
    before = ["Describe the image.", first, "Is there a cup in the image?"]
    assert second == expected(model, before)
    # Rationales are about the last answer that is none itself, and do not see each other.
    (why,) = said(session.explain(options)).answers
    assert why == expected(model, [*before, second, WHY])
    (why_not,) = said(session.why_not("A cat ", options)).answers
    assert why_not == expected(model, [*before, second, WHY_WRONG.format(answer="A cat")])
    assert said(session.retry(options)).answers == (why_not,)
    # A later question sees all.
    (third,) = said(session.ask("Are you sure?", options)).answers
    rationales = [WHY, why, WHY_WRONG.format(answer="A cat"), why_not]
    assert third == expected(model, [*before, second, *rationales, "Are you sure?"])
    assert [exchange.kind for exchange in session.exchanges] == ["", "", "positive", "negative", ""]
    assert all(exchange.answers[0] for exchange in session.exchanges)


def test_a_further_question_computes_only_itself(models, options):
    """Neither the picture nor what was said is prefilled again; a new chat about the picture begins behind the picture."""
    scheduler = models[0].scheduler
    encoder, counter = scheduler.engine.encoder, scheduler.metrics.prefilled_tokens._value
    session = ChatSession([models[0]], IMAGE_FILE)
    texts = ["Describe the image.", "Is there a cup in the image?", "How many cups are there?"]

    def computed(exchanges):
        before = counter.get()
        assert not any(said(exchanges).cut)
        return counter.get() - before

    assert computed(session.ask(texts[0], options)) > encoder.patches
    for text in texts[1:]:
        # The end of the answer before is new too; the text's first token is not.
        assert computed(session.ask(text, options)) == len(encoder(Conversation((Turn("user", text),), ())))
    assert computed(session.retry(options)) == 1
    session = ChatSession([models[0]], IMAGE_FILE, session.name)
    own = len(encoder(Conversation((Turn("user", f"\n{texts[1]}"),), ())))
    assert computed(session.ask(texts[1], options)) <= own
    session = ChatSession([models[0]], b"", session.name)
    assert computed(session.ask(texts[1], options)) == len(encoder(Conversation((Turn("user", texts[1]),), ())))


def test_answers_grow_and_end_whole(models, options):
    session = ChatSession([models[0]], IMAGE_FILE)
    seen = [exchange.answers[0] for exchange in session.ask("Describe the image.", options)]
    assert len(seen) > 1
    assert all(after.startswith(before) for before, after in itertools.pairwise(seen))
    assert session.exchanges[-1].cut == (False,)
    assert said(session.ask("Describe the image.", Options(max_new_tokens=3))).cut == (True,)


def test_without_a_picture(models, options):
    model = models[0]
    session = ChatSession([model])
    assert said(session.ask("Is there a cup?", options)).answers == (expected(model, ["Is there a cup?"], b""),)
    with pytest.raises(UserError, match="picture"):
        session.correct("No.")


def test_reflect_answers_and_then_explains(models, options):
    model = models[0]
    session = ChatSession([model], IMAGE_FILE)
    kinds = [exchange.kind for exchange in session.reflect("Is there a cup in the image?", options)]
    answer, why = (exchange.answers[0] for exchange in session.exchanges)
    assert kinds == sorted(kinds)
    assert [exchange.kind for exchange in session.exchanges] == ["", "positive"]
    assert why == expected(model, ["Is there a cup in the image?", answer, WHY])


def test_retry_samples_again(models):
    model = models[0]
    options = Options(max_new_tokens=12, temperature=1.5, top_p=0.9, seed=3)
    sampled = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.9}
    session = ChatSession([model], IMAGE_FILE)
    assert said(session.ask("Describe the image.", options)).answers == (
        expected(model, ["Describe the image."], **sampled, seed=3),
    )
    for seed in (4, 5):
        again = said(session.retry(options))
        assert again.answers == (expected(model, ["Describe the image."], **sampled, seed=seed),)
    assert len(session.exchanges) == 1


def test_two_models_answer_side_by_side_each_after_its_own_answers(models, options):
    session = ChatSession(models, IMAGE_FILE)
    first = said(session.ask("Describe the image.", options)).answers
    assert first == tuple(expected(model, ["Describe the image."]) for model in models)
    assert first[0] != first[1]
    second = said(session.explain(options)).answers
    assert second == tuple(
        expected(model, ["Describe the image.", answer, WHY]) for model, answer in zip(models, first, strict=True)
    )
    with pytest.raises(UserError, match="earlier answers"):
        session.prefer(0)


def test_stopped_answers_remain_and_nothing_else_changes(models, options):
    session = ChatSession([models[0]], IMAGE_FILE)
    answers = session.ask("Describe the image.", Options(max_new_tokens=200))
    next(exchange for exchange in answers if exchange.answers[0])
    with pytest.raises(UserError, match="stop it"):
        next(session.ask("Is there a cup?", options))
    with pytest.raises(UserError, match="stop it"):
        next(session.retry(options))
    thread = threading.Thread(target=session.stop)
    thread.start()
    thread.join()
    for _ in answers:
        pass
    (stopped,) = session.exchanges
    whole = expected(models[0], ["Describe the image."], max_new_tokens=200)
    assert stopped.cut == (True,)
    assert whole.startswith(stopped.answers[0])
    assert stopped.answers[0] not in ("", whole)
    session.stop()  # nothing to stop
    # An iterator that is given up stops too.
    answers = session.ask("Is there a dog?", options)
    next(answers)
    answers.close()
    assert said(session.ask("Is there a cup?", options)).answers[0]


BAD = {
    "empty": (lambda session, o: session.ask(" \n", o), "empty question"),
    "marker": (lambda session, o: session.ask(f"What is {IMAGE}?", o), IMAGE),
    "too long": (lambda session, o: session.ask("cup " * 5000, o), "context"),
    "explain nothing": (lambda session, o: session.explain(o), "no answer yet"),
    "why not, without an answer": (lambda session, o: session.why_not("A cat", o), "no answer yet"),
    "retry nothing": (lambda session, o: session.retry(o), "no answer yet"),
    "correct nothing": (lambda session, o: [session.correct("A cat.")], "no answer yet"),
    "prefer nothing": (lambda session, o: [session.prefer(0)], "no answer yet"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_asked_is_refused_and_the_next_question_is_answered(models, options, name):
    do, named = BAD[name]
    session = ChatSession([models[0]], IMAGE_FILE)
    with pytest.raises(UserError, match=named):
        list(do(session, options))
    assert session.exchanges == []
    assert said(session.ask("Is there a cup?", options)).answers[0]


def test_a_broken_picture(models, options):
    session = ChatSession([models[0]], IMAGE_FILE[:50])
    with pytest.raises(BrokenImage):
        next(session.ask("Is there a cup?", options))
    assert session.exchanges == []


def test_a_failed_batch_leaves_the_session_as_it_was(models, options, monkeypatch):
    session = ChatSession([models[0]], IMAGE_FILE)
    kept = said(session.ask("Is there a cup in the image?", options))
    with monkeypatch.context() as patch:
        patch.setattr(models[0].scheduler, "_begin", lambda sequences: 1 / 0)
        for iterate in (partial(session.ask, "Why?"), session.explain, session.retry):
            with pytest.raises(UserError, match="base: the batch failed"):
                list(iterate(options))
            assert session.exchanges == [kept]
    assert said(session.retry(options)).answers == kept.answers


@pytest.mark.parametrize(
    "option", [{"max_new_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"seed": -1}]
)
def test_options_are_checked(option):
    with pytest.raises(UserError, match=next(iter(option))):
        Options(**option)


# Feedback.


def test_pairs_are_read_back_as_preference_pairs(models, options, tmp_path):
    """A correction, a preference, and a correction later in a chat: what was asked, seen and said, nothing else."""
    folder = FeedbackFolder(tmp_path / "feedback")
    session = ChatSession(models, IMAGE_FILE)
    answers = said(session.ask("Describe the image.", options)).answers
    folder.add(session.correct(" There is a red cup.\nNothing else. ", 1), session.image)
    folder.add(session.prefer(0), session.image)
    (why, _) = said(session.explain(options)).answers
    folder.add(session.correct("Because I see it: “ça”.", 0), session.image)
    log = ReadLog()
    with read_mixture([MixtureEntry(file=folder.path)], log) as mixture:
        (record,) = mixture
    assert log == ReadLog()
    assert record.image == IMAGE_FILE
    asked = Turn("user", f"{IMAGE}\nDescribe the image.")
    context = (asked, Turn("assistant", answers[0], weight=0.0), Turn("user", WHY))
    found = [tuple(side.turns for side in pair) for pair in find_pairs("a", record.conversations)]
    assert sorted(found, key=str) == sorted(
        [
            ((asked, Turn("assistant", chosen)), (asked, Turn("assistant", rejected)))
            for chosen, rejected in [("There is a red cup.\nNothing else.", answers[1]), answers]
        ]
        + [((*context, Turn("assistant", "Because I see it: “ça”.")), (*context, Turn("assistant", why)))],
        key=str,
    )
    assert {one.dataset for one in record.conversations} == {"chat"}


def test_pairs_of_two_pictures_are_appended_to_older_ones(models, options, tmp_path):
    images = [render_png(scene, 96) for scene in take_scenes(World.skewed(), "test", 7, 2)]
    for image in images:
        session = ChatSession([models[0]], image)
        said(session.ask("Describe the image.", options))
        FeedbackFolder(tmp_path).add(session.correct("A cup."), image)
    with read_mixture([MixtureEntry(file=tmp_path / "pairs.jsonl")], ReadLog()) as mixture:
        assert [record.image for record in mixture] == images


def test_feedback_that_cannot_be_used_is_refused(models, options, tmp_path):
    session = ChatSession([models[0]], IMAGE_FILE)
    (answer,) = said(session.ask("Describe the image.", options)).answers
    for text, named in (("", "empty"), (f" {answer}\n", "the same"), (f"See {IMAGE}.", IMAGE)):
        with pytest.raises(UserError, match=named):
            session.correct(text)
    with pytest.raises(UserError, match="two models"):
        session.prefer(0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        FeedbackFolder(tmp_path / "file").add(session.correct("A cup."), IMAGE_FILE)
