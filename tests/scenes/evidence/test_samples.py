"""The walk from sentence to sentence, with an engine whose draws are given; arms made of what it finds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.eval.engine import Answer, Engine
from reverie_jax.scenes.corpus import make_conversation
from reverie_jax.scenes.evidence import samples
from reverie_jax.scenes.evidence.arms import ARMS, Pictures
from reverie_jax.scenes.questions import DESCRIBE
from tests.scenes.makers import make_object, make_scene

TABLE = make_scene(make_object("cup", "red", 0.16), make_object("plate", "blue", 0.84))
PETS = make_scene(make_object("cat", x=0.2), make_object("dog", "pink", x=0.8))
CUP, PLATE, FORK = "There is a red cup on the left.", "There is a blue plate on the right.", "There is a fork."
CAT, BOTH = "There is a red cat.", "The cat is left of the dog."
DRAWS = {
    ("table", ""): ["", FORK, CUP, PLATE],
    ("table", CUP): [CUP, "There is a key.", f" {PLATE}", "Nice."],
    ("table", f"{CUP} {PLATE}"): [CUP, PLATE, "There is no cup.", FORK],  # nothing true that is new
    ("pets", ""): [CAT, CAT, CAT, BOTH],  # nothing false
    ("pets", CAT): ["There are two cats.", BOTH, "", ""],
    ("pets", f"{CAT} {BOTH}"): ["", "", "", ""],
}
SIBLINGS = [
    [("", CUP, FORK), (CUP, f" {PLATE}", " There is a key.")],
    [(CAT, f" {BOTH}", " There are two cats.")],
]


class Scripted(Engine):
    """Draws what `DRAWS` says behind each context, and keeps what it was asked."""

    def __init__(self) -> None:
        self.contexts: list[tuple[str, str]] = []
        self.numbers: list[int] = []

    def schedule(self, images, decoding, **_):
        assert (decoding.temperature, decoding.stop, decoding.seed) == (1.0, ".", 0)  # another seed is another program
        return SimpleNamespace(images=images)

    def stream(self, schedule, decoding, **_):
        for image in schedule.images:
            answers = {}
            for draw, (number, conversation) in enumerate(image.questions):
                context = "" if len(conversation.turns) == 1 else conversation.turns[1].prefix
                assert conversation.is_open
                assert conversation.turns[0].text.endswith(DESCRIBE)
                answers[number] = Answer(DRAWS[image.read().decode(), context][draw])
                self.numbers.append(number)
            self.contexts.append((image.read().decode(), context))
            yield dict(reversed(answers.items()))


def draw_siblings(seed: int = 0) -> tuple[Scripted, list[list[tuple[str, str, str]]]]:
    engine = Scripted()
    return engine, samples.draw_siblings(engine, [b"table", b"pets"], [TABLE, PETS], seed)


def test_pairs_are_siblings_behind_a_true_context():
    engine, siblings = draw_siblings()
    assert siblings == SIBLINGS
    # Each context is drawn from once, and none behind which no true sentence came.
    assert sorted(engine.contexts) == sorted(DRAWS)


def test_no_two_draws_have_one_number():
    """Randomness is keyed by a question's number."""
    numbers = [number for seed in (0, 1, 2) for number in draw_siblings(seed)[0].numbers]
    assert len(set(numbers)) == len(numbers) == 3 * samples.DRAWS * len(DRAWS)


def test_a_description_ends_after_its_last_sentence(monkeypatch):
    monkeypatch.setattr(samples, "SENTENCES", 1)
    engine, siblings = draw_siblings()
    assert siblings == [SIBLINGS[0][:1], []]
    assert sorted(engine.contexts) == [("pets", ""), ("table", "")]


RECORD = ImageRecord("0", b"", (make_conversation("Is it?", "Yes", "a"),))
PICTURES = Pictures([RECORD] * 2, [TABLE, PETS], [f"{FORK} {PLATE}", CAT], SIBLINGS, 0)


@pytest.mark.parametrize(
    ("arm", "pairs"),
    [
        ("dpo", [[("", f"{CUP} {PLATE}", f"{FORK} {PLATE}")]]),  # what is true already has no pair
        ("sentences", SIBLINGS),
    ],
)
def test_pairs_of_an_arm(arm, pairs):
    for record, expected in zip(ARMS[arm].records(PICTURES, 2), pairs, strict=True):
        sides = iter(record.conversations)
        for (chosen, rejected), (context, right, wrong) in zip(zip(sides, sides, strict=True), expected, strict=True):
            assert (chosen.kind, rejected.kind, chosen.pair) == ("chosen", "rejected", rejected.pair)
            for side, text in ((chosen, right), (rejected, wrong)):
                turn = side.turns[-1]
                # Behind a sentence the description may go on; a whole description ends.
                assert (turn.prefix, turn.text, turn.ended) == (context, text, arm == "dpo")
    assert len({one.pair for one in ARMS["sentences"].records(PICTURES, 1)[0].conversations}) == 2


@pytest.mark.parametrize(("arm", "negatives"), [("lrv-0", 0), ("lrv-0.5", 2), ("lrv-1", 3), ("lrv-2", 4)])
def test_ratios_of_negative_instructions(arm, negatives):
    for record in ARMS[arm].records(PICTURES, 2):
        answers = [conversation.turns[1].text for conversation in record.conversations]
        assert len(answers) == 6
        assert sum(text.startswith(("No, ", "There is no ")) for text in answers) == negatives
    assert ARMS[arm].records(PICTURES, 2) == ARMS[arm].records(PICTURES, 2)
