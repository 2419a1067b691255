"""The annotator's questions and rationales, and the annotation of one image in memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.annotate.in_memory import annotate
from reverie_jax.data.conversation import Turn
from reverie_jax.data.reflection import WHY, WHY_WRONG, AnnotatedQuestion, Reflection, reflection_conversations
from reverie_jax.hosted.interface import AnnotationError, Request, RequestImage
from reverie_jax.scenes import annotator as questions
from reverie_jax.scenes.annotator import SceneAnnotator
from reverie_jax.scenes.corpus import generate_texts, make_plain_conversations
from reverie_jax.scenes.language import parse_claims
from reverie_jax.scenes.tokenizer import SPECIAL, train_tokenizer
from tests.scenes.makers import TEST, TRAIN, is_right, sample_scene

numbers, seeds = st.integers(0, 10**9), st.integers(0, 10**6)


@pytest.mark.parametrize("ask", questions.QUESTION_MAKERS, ids=lambda ask: ask.__name__)
def test_right_answers_are_right_and_confusing_ones_wrong(ask):
    asked = 0
    for number, scene in enumerate((*TRAIN[:80], *TEST[:80])):
        question = ask(scene, np.random.default_rng(number))
        if question is None:
            continue
        asked += 1
        assert is_right(scene, question.question, question.correct_answer), (scene, question)
        assert question.confusing_answers
        wrong = [is_right(scene, question.question, answer) for answer in question.confusing_answers]
        assert not any(wrong), (scene, question)
        if ask is questions.ask_choice:
            assert [is_right(scene, question.question, letter) for letter in "ABCD"].count(True) == 1
    assert asked > 30


@given(numbers, seeds, st.integers(1, 12))
def test_no_question_comes_twice(number, seed, count):
    asked = SceneAnnotator({}).questions(sample_scene(number), np.random.default_rng(seed), count)
    assert min(count, 4) <= len({q.question for q in asked}) == len(asked) <= count


@settings(max_examples=20)
@given(numbers, seeds)
def test_plain_conversations_are_right(number, seed):
    scene = sample_scene(number)
    for conversation in make_plain_conversations(scene, np.random.default_rng(seed), 6, 0.3):
        question, answer = conversation.turns
        assert is_right(scene, question.text.removeprefix("<image>\n"), answer.text)


@pytest.fixture
def annotator() -> SceneAnnotator:
    return SceneAnnotator({f"{n}.png": scene for n, scene in enumerate(TRAIN[:20])}, seed=3)


def test_the_same_request_has_the_same_reply(annotator):
    image, alone = RequestImage("3.png", b""), SceneAnnotator({"3.png": TRAIN[3]}, seed=3)
    assert annotate(image, annotator, 6) == annotate(image, annotator, 6) == annotate(image, alone, 6)
    assert annotate(image, SceneAnnotator(annotator.scenes, seed=4), 6) != annotate(image, annotator, 6)


def test_unknown_images_and_stages_are_refused(annotator):
    reflections, dropped = annotate(RequestImage("none.png", b""), annotator, 6)
    assert (reflections, len(dropped)) == ([], 1)
    assert "none.png" in dropped[0]
    with pytest.raises(AnnotationError, match="evaluate"):
        annotator.reply(Request("evaluate", RequestImage("3.png", b""), {}))


def test_nothing_true_is_dropped(annotator):
    for number in range(20):
        reflections, dropped = annotate(RequestImage(f"{number}.png", b""), annotator, 6)
        assert (len(reflections), dropped) == (6, [])
        for reflection in reflections:
            assert len(reflection.negatives) == len(reflection.question.confusing_answers)
            for text in (reflection.positive, *(why for _, why in reflection.negatives)):
                assert parse_claims(text)
                assert all(claim.holds(TRAIN[number]) for claim in parse_claims(text)), text


class Scripted:
    """An annotator whose replies are given, some of them unusable."""

    name = "scripted"

    def __init__(self, questions: str, verdict: str = "No", negative: str | None = "because."):
        self.questions, self.verdict, self.negative = questions, verdict, negative

    def reply(self, request: Request) -> str:
        if request.stage == "negative" and self.negative is None:
            raise AnnotationError("blocked")
        replies = {"questions": self.questions, "judge": self.verdict, "negative": self.negative}
        return str(replies.get(request.stage, "Because."))


QUESTION = {"question": "Is it red?", "type": "yes/no", "correct_answer": "No", "confusing_answers": ["Yes", "Maybe"]}
REPLY = json.dumps({"questions": [QUESTION]})


@pytest.mark.parametrize(
    ("verdict", "kept"),
    [(text, ["Yes", "Maybe"]) for text in ("No", "no", " No\n", "No.", "No, they agree.", "**No**")]
    + [(text, []) for text in ("Yes", "yes, they do", "", "Nobody can say", "?", None)],
)
def test_negatives_are_dropped_with_the_reason(verdict, kept):
    script = Scripted(REPLY, negative=None) if verdict is None else Scripted(REPLY, verdict)
    (reflection,), dropped = annotate(RequestImage("a", b""), script, 1)
    assert reflection.positive
    assert [wrong for wrong, _ in reflection.negatives] == kept
    assert len(dropped) == 2 - len(kept)
    assert all("Is it red?" in reason and reason.startswith("a: ") for reason in dropped)
    assert all("blocked" in reason for reason in dropped) or verdict is not None


@pytest.mark.parametrize(
    "reply", ["", "{", "[]", json.dumps({"questions": [{**QUESTION, "confusing_answers": ["no."]}]})]
)
def test_unusable_questions_are_dropped_with_one_line(reply):
    reflections, dropped = annotate(RequestImage("a", b""), Scripted(reply), 1)
    assert (reflections, len(dropped)) == ([], 1)
    assert "\n" not in dropped[0]


def test_a_reflection_is_one_conversation_for_each_rationale():
    question = AnnotatedQuestion(**QUESTION)
    reflection = Reflection(question, "It is green.", (("Yes", "Not so."), ("Maybe", "It is plain.")))
    turns = [conversation.turns for conversation in reflection_conversations(reflection)]
    assert [t[0] for t in turns] == [Turn("user", "<image>\nIs it red?")] * 3
    assert [(t[1].text, t[1].weight) for t in turns] == [("No", 1)] * 3
    assert [t[2].text for t in turns] == [WHY, WHY_WRONG.format(answer="Yes"), WHY_WRONG.format(answer="Maybe")]
    assert [t[3] for t in turns] == [Turn("assistant", text) for text in ("It is green.", "Not so.", "It is plain.")]


def test_the_tokenizer_reads_any_text_back(monkeypatch):
    monkeypatch.setattr("reverie_jax.scenes.tokenizer.take_scenes", lambda *_: TRAIN[:20])
    tokenizer = train_tokenizer(300, 0)
    assert tokenizer.convert_ids_to_tokens(range(4)) == list(SPECIAL)
    for text in (*generate_texts(TRAIN[20:21], 0), "Größe: 3 µm 🙂"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("<image>", "")
