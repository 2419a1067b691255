"""The walk from sentence to sentence, with an engine whose draws are given; arms made of what it finds."""

from __future__ import annotations

from types import SimpleNamespace

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.eval.engine import Answer, Engine
from reverie_jax.scenes.evidence import samples
from reverie_jax.scenes.evidence.arms import ARMS, Pictures
from tests.scenes.makers import make_object, make_scene

TABLE = make_scene(make_object("cup", "red", 0.16), make_object("plate", "blue", 0.84))
PETS = make_scene(make_object("cat", x=0.2), make_object("dog", "pink", x=0.8))
CUP, PLATE, FORK = "There is a red cup on the left.", "There is a blue plate on the right.", "There is a fork."
CAT, BOTH = "There is a red cat.", "The cat is left of the dog."
DRAWS = {
    (b"table", ""): ["", FORK, CUP, PLATE],
    (b"table", CUP): [CUP, "There is a key.", f" {PLATE}", "Nice."],
    (b"table", f"{CUP} {PLATE}"): [CUP, PLATE, "There is no cup.", FORK],  # nothing true that is new
    (b"pets", ""): [CAT, CAT, CAT, BOTH],  # nothing false
    (b"pets", CAT): ["There are two cats.", BOTH, "", ""],
    (b"pets", f"{CAT} {BOTH}"): ["", "", "", ""],
}
SIBLINGS = [
    [("", CUP, FORK), (CUP, f" {PLATE}", " There is a key.")],
    [(CAT, f" {BOTH}", " There are two cats.")],
]


class Scripted(Engine):
    """Draws what `DRAWS` says behind each context, and keeps what it was asked."""

    def __init__(self) -> None:
        self.contexts, self.numbers = [], []

    def schedule(self, images, decoding, **_):
        assert (decoding.temperature, decoding.stop, decoding.seed) == (1.0, ".", 0)  # another seed is another program
        return SimpleNamespace(images=images)

    def stream(self, schedule, decoding, **_):
        for image in schedule.images:
            (turns,) = {conversation.turns for _, conversation in image.questions}  # siblings
            self.contexts.append((image.read(), turns[1].prefix if len(turns) > 1 else ""))
            self.numbers += [number for number, _ in image.questions]
            drawn = zip(image.questions, DRAWS[self.contexts[-1]], strict=True)
            yield dict(reversed([(number, Answer(text)) for (number, _), text in drawn]))


def test_pairs_are_siblings_behind_a_true_context(monkeypatch):
    numbers = []
    for seed in range(3):
        engine = Scripted()
        assert samples.draw_siblings(engine, [b"table", b"pets"], [TABLE, PETS], seed) == SIBLINGS
        # Each context is drawn from once, and none behind which no true sentence came.
        assert sorted(engine.contexts) == sorted(DRAWS)
        numbers += engine.numbers
    assert len(set(numbers)) == len(numbers)  # randomness is keyed by number
    monkeypatch.setattr(samples, "SENTENCES", 1)
    assert samples.draw_siblings(Scripted(), [b"table", b"pets"], [TABLE, PETS], 0) == [SIBLINGS[0][:1], []]


def test_arms_are_tuned_on_these_pairs_and_on_corrections_and_instructions():
    records = [ImageRecord("0", b"", ())] * 2
    pictures = Pictures(records, [TABLE, PETS], [f"{FORK} {PLATE}", CAT], SIBLINGS, 0)
    # What is true already has no pair.
    corrected = [[("", f"{CUP} {PLATE}", f"{FORK} {PLATE}")]]
    for arm, pairs in {"dpo": corrected, "ddpo-5": corrected, "sentences": SIBLINGS}.items():
        found = [record.conversations for record in ARMS[arm].records(pictures, 2)]
        # Behind a sentence the description may go on; a whole description ends.
        sides = [[(one.turns[1].prefix, one.turns[1].text, one.turns[1].ended) for one in ones] for ones in found]
        assert sides == [[(c, text, arm != "sentences") for c, *two in rows for text in two] for rows in pairs]
        kinds = [(one.kind, one.pair) for ones in found for one in ones]
        assert kinds == [(kind, str(n)) for rows in pairs for n in range(len(rows)) for kind in ("chosen", "rejected")]
    for arm, negatives in {"lrv-0": 0, "lrv-0.5": 2, "lrv-1": 3, "lrv-2": 4}.items():
        for record in ARMS[arm].records(pictures, 2):
            answers = [conversation.turns[1].text for conversation in record.conversations]
            assert (len(answers), sum(text.startswith(("No, ", "There is no ")) for text in answers)) == (6, negatives)
