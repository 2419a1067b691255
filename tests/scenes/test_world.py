"""The embedded world: its laws, its pictures, and that every sentence about a picture is exactly true or exactly false.

Truth is looked up here in the things themselves, by code that shares nothing with the package's own checks.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.annotate.stages import annotate
from reverie_jax.data.conversation import ImageRecord, Turn
from reverie_jax.data.reflection import WHY, WHY_WRONG, Reflection, conversations
from reverie_jax.errors import DataError
from reverie_jax.hosted.interface import AnnotationError, Request, RequestImage
from reverie_jax.scenes import annotator as ask
from reverie_jax.scenes import dataset
from reverie_jax.scenes.corpus import plain_talks
from reverie_jax.scenes.draw import render
from reverie_jax.scenes.graph import (
    CATEGORIES,
    COLOURS,
    PARTNER,
    PLACES,
    Scene,
    Thing,
    World,
    cooccurrence,
    plural,
    relation,
    scenes,
    take,
)
from reverie_jax.scenes.language import Claim, claims, describe, mentioned

SKEWED, BROKEN = World.skewed(), World.broken()
TRAIN = take(SKEWED, "train", 0, 300)
TEST = take(BROKEN, "test", 0, 120)


def thing(category: str, colour: str = "red", x: float = 0.5, y: float = 0.5, **looks: str) -> Thing:
    return Thing(category, colour, looks.get("size", "small"), looks.get("texture", "plain"), x, y)


def scene(*things: Thing, seed: int = 0) -> Scene:
    return Scene(tuple(sorted(things)), "cream", False, seed)


numbers = st.integers(0, 10**9)
WORLDS = (SKEWED, BROKEN, World(partner=0.5, repeat=0.8))


def sampled(number: int) -> Scene:
    """Any scene of any world; called in tests, for no type check may run inside of a strategy."""
    return WORLDS[number % 3].sample(np.random.default_rng(number))


# The world's law.


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(0, 1000))
def test_splits_share_no_graph(one, other):
    keys = [
        {s.graph_key for world in (SKEWED, BROKEN) for s in take(world, split, seed, 15)}
        for split, seed in zip(("train", "validation", "test"), (one, other, one), strict=True)
    ]
    assert all(not a & b for a, b in itertools.combinations(keys, 2))


@given(numbers, st.randoms(use_true_random=False))
def test_split_depends_on_what_is_seen_alone(number, random):
    found = sampled(number)
    things = list(found.things)
    random.shuffle(things)
    other = Scene(tuple(things), "rose", not found.clutter, found.seed + 1)
    assert other.graph_key == found.graph_key
    assert other.split == found.split


def test_same_seed_same_scenes_and_none_twice():
    assert take(SKEWED, "train", 0, 50) == TRAIN[:50]
    assert take(SKEWED, "train", 1, 50) != TRAIN[:50]
    assert len({s.graph_key for s in TRAIN}) == len(TRAIN)
    assert {s.split for s in TRAIN} == {"train"}
    assert next(scenes(SKEWED, "train", 0)) == TRAIN[0]


@given(numbers)
def test_things_keep_apart_and_inside(number):
    found = sampled(number)
    tolerance = 1e-4  # places are rounded to four digits
    for t in found.things:
        left, top, right, bottom = t.box
        assert min(left, top) >= -tolerance
        assert max(right, bottom) <= 1 + tolerance
    for a, b in itertools.combinations(found.things, 2):
        reach = (a.extent + b.extent) / 2
        assert max(abs(a.x - b.x), abs(a.y - b.y)) >= reach - 2 * tolerance


@given(numbers)
def test_scenes_hold_two_to_six_things_of_one_colour_each_kind(number):
    found = sampled(number)
    assert 2 <= len(found.things) <= 6
    assert 2 <= len(found.categories) <= 4
    assert all(len({t.colour for t in found.of(category)}) == 1 for category in found.categories)
    assert sum(found.counts.values()) == len(found.things)


def partner_rate(sample: list[Scene]) -> float:
    """How often a thing's partner is in the picture too."""
    there = [PARTNER[c] in {t.category for t in s.things} for s in sample for c in {t.category for t in s.things}]
    return sum(there) / len(there)


def test_training_shows_partners_and_the_test_seldom_does():
    assert partner_rate(TRAIN) > 0.7
    assert partner_rate(TEST) < 0.3


def test_partners_are_mutual_and_every_category_has_a_place():
    assert all(PARTNER[PARTNER[c]] == c != PARTNER[c] for c in CATEGORIES)
    assert sorted(c for members in PLACES.values() for c in members) == sorted(CATEGORIES)


def test_cooccurrence_counts_pictures():
    table = cooccurrence(TRAIN[:60])
    for a, b in itertools.product(CATEGORIES[:9], CATEGORIES):
        both = sum(a != b and {a, b} <= {t.category for t in s.things} for s in TRAIN[:60])
        assert table[a][b] == both


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_relations_are_mirrored(ax, ay, bx, by):
    a, b = thing("cup", x=ax, y=ay), thing("fork", x=bx, y=by)
    other = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", None: None}
    assert relation(b, a) == other[relation(a, b)]
    if relation(a, b) == "left of":
        assert bx - ax >= 0.15
    if relation(a, b) == "above":
        assert by - ay >= 0.15


# Pictures.


def test_drawing_is_deterministic_and_has_the_size_asked_for():
    for size in (16, 48):
        pixels = render(TRAIN[0], size)
        assert pixels.shape == (size, size, 3)
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, render(TRAIN[0], size))


@settings(max_examples=10)
@given(numbers, st.sampled_from(COLOURS))
def test_recolouring_a_thing_changes_its_box_alone(number, colour):
    found = sampled(number)
    size = 48
    first = found.things[0]
    changed = dataclasses.replace(found, things=(dataclasses.replace(first, colour=colour), *found.things[1:]))
    differs = (render(found, size) != render(changed, size)).any(-1)
    assert differs.any() == (colour != first.colour)
    rows, columns = np.nonzero(differs)
    left, top, right, bottom = (edge * size for edge in first.box)
    assert ((columns >= left - 1) & (columns <= right + 1) & (rows >= top - 1) & (rows <= bottom + 1)).all()


def test_every_category_looks_like_itself():
    pictures = {c: render(scene(thing(c, size="large")), 48).tobytes() for c in CATEGORIES}
    assert len(set(pictures.values())) == len(CATEGORIES)


# Language: sentences and the claims that they make.


def exists(category: str, count: int | None = None, **looks: str) -> Claim:
    return Claim("exists", category, count=count, **looks)


SENTENCES = {
    "There is a red cup on the left.": {exists("cup", 1, colour="red", column="left")},
    "There is no umbrella.": {Claim("absent", "umbrella")},
    "there are no red cups": {Claim("absent", "cup", colour="red")},
    "I see no fish here.": {Claim("absent", "fish")},
    "There are two red apples.": {exists("apple", 2, colour="red")},
    "three fish, four dogs": {exists("fish", 3), exists("dog", 4)},
    "One large blue striped vase.": {exists("vase", 1, size="large", colour="blue", texture="striped")},
    "The cup is left of the plate.": {
        exists("cup"),
        exists("plate"),
        Claim("relation", "cup", how="left of", other="plate"),
    },
    "The trees are above the house!": {
        exists("tree"),
        exists("house"),
        Claim("relation", "tree", how="above", other="house"),
    },
    "A teapot is often seen with a cup.": set(),
    "A teapot is often seen with a cup, but there is no cup.": {Claim("absent", "cup")},
    "A teapot is often seen with a cup. There is a cat.": {exists("cat", 1)},
    "The cup is not red.": {exists("cup"), Claim("denied", "cup", colour="red")},
    "The cup is red.": {exists("cup"), exists("cup", colour="red")},
    "Both apples are green.": {exists("apple", colour="green")},
    "The boat is in the middle.": {exists("boat", column="middle")},
    "The keys are on the right": {exists("key", column="right")},
    "The cup stands on the left of the plate.": {exists("cup"), exists("plate")},
    "Another hat and an envelope": {exists("hat"), exists("envelope", 1)},
    "AN  ORANGE\nSHOE": {exists("shoe", 1, colour="orange")},
    "two\tbirds": {exists("bird", 2)},
    "Yes.": set(),
    "": set(),
    "The scupper and the catalogue are cared for.": set(),
    "This is wrong because there are two forks in the middle.": {exists("fork", 2, column="middle")},
}


@pytest.mark.parametrize("text", SENTENCES, ids=repr)
def test_sentence_makes_the_claims_that_it_makes(text):
    found = claims(text)
    assert set(found) == SENTENCES[text]
    assert len(found) == len(set(found))


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_noun_is_read_in_both_numbers(category):
    assert claims(f"There is {ask.article(category)}.") == [exists(category, 1)]
    assert claims(f"There are three {plural(category)}.") == [exists(category, 3)]
    assert claims(f"There is no {category}.") == [Claim("absent", category)]
    assert mentioned(f"The {category}, two {plural(category)}, no {category}") == [category, category]


# Two red apples left (large, then small), a blue striped cup right, a green plate between and above.
TABLE = scene(
    thing("apple", "red", 0.16, 0.5, size="large"),
    thing("apple", "red", 0.2, 0.85),
    thing("cup", "blue", 0.84, 0.5, texture="striped"),
    thing("plate", "green", 0.5, 0.16),
)
TRUTHS = {
    "There are two red apples on the left.": True,
    "There are three red apples.": False,
    "Two green apples": False,
    "A red apple": True,
    "The apples are red.": True,
    "The apples are blue.": False,
    "A large red apple and a small red apple": True,
    "One striped cup on the right": True,
    "A dotted cup": False,
    "A blue cup in the middle": False,
    "The cup is right of the apple.": True,
    "The cup is left of the apple.": False,
    "The cup is above the plate.": False,
    "The cup is not red.": True,
    "The cup is not blue.": False,
    "The fork is not blue.": False,
    "There is no fork.": True,
    "There are no cups.": False,
    "There is no red cup.": True,
    "Two cups": False,
}


@pytest.mark.parametrize("text", TRUTHS)
def test_claims_hold_where_the_picture_says_so(text):
    found = claims(text)
    assert found
    assert all(claim.holds(TABLE) for claim in found) == TRUTHS[text]


def spoken(found: Scene, seed: int) -> list[str]:
    """A description and the rationales of all questions of a scene, right and wrong answers alike."""
    rng = np.random.default_rng(seed)
    texts = [describe(found, rng)]
    for question in ask.SceneAnnotator({}).questions(found, rng, 6):
        for support, answer in [(True, question.correct_answer), *((False, w) for w in question.confusing_answers)]:
            texts.append(" ".join(ask.facts(found, question.question, answer, support=support)))
    return texts


@settings(max_examples=60)
@given(numbers, st.integers(0, 10**6))
def test_descriptions_and_rationales_claim_truths_and_nothing_else(number, seed):
    found = sampled(number)
    for text in spoken(found, seed):
        stated = claims(text)
        assert stated, text
        assert [claim for claim in stated if not claim.holds(found)] == [], text


@settings(max_examples=30)
@given(numbers, st.integers(0, 10**6))
def test_removing_what_is_spoken_of_makes_it_false(number, seed):
    found = sampled(number)
    for text in spoken(found, seed):
        positive = [claim for claim in claims(text) if claim.kind == "exists"]
        for claim in positive:
            fewer = dataclasses.replace(found, things=tuple(t for t in found.things if t.category != claim.category))
            assert not claim.holds(fewer), text


@settings(max_examples=30)
@given(numbers, st.integers(0, 10**6))
def test_recolouring_what_is_spoken_of_makes_it_false(number, seed):
    found = sampled(number)
    next_colour = dict(zip(COLOURS, (*COLOURS[1:], COLOURS[0]), strict=True))
    other = dataclasses.replace(
        found, things=tuple(dataclasses.replace(t, colour=next_colour[t.colour]) for t in found.things)
    )
    coloured = [claim for claim in claims(describe(found, np.random.default_rng(seed))) if claim.colour]
    assert len(coloured) == len(found.categories)
    assert not any(claim.holds(other) for claim in coloured)
    assert all(claim.holds(found) for claim in coloured)


@given(numbers, st.integers(0, 10**6))
def test_description_names_every_category(number, seed):
    found = sampled(number)
    rng = np.random.default_rng(seed)
    present = {t.category for t in found.things}
    assert set(mentioned(describe(found, rng))) == present


# The annotator.

NUMBER = ("none", "one", "two", "three", "four", "five", "six")
BESIDE = {
    "left of": lambda a, b: a.x < b.x,
    "right of": lambda a, b: a.x > b.x,
    "above": lambda a, b: a.y < b.y,
    "below": lambda a, b: a.y > b.y,
}
THIRD = {"on the left": (0, 1 / 3), "in the middle": (1 / 3, 2 / 3), "on the right": (2 / 3, 1)}


def singular(word: str) -> str:
    return word if word in CATEGORIES else word[:-1]


def right(found: Scene, question: str, answer: str) -> bool:
    """Whether an answer is right, read from the things."""
    of = {c: [t for t in found.things if t.category == c] for c in CATEGORIES}
    if match := re.fullmatch(r"Is there an? (\w+) in the image\?", question):
        return answer == ("Yes" if of[match[1]] else "No")
    if match := re.fullmatch(r"What colour (?:is|are) the (\w+)\?", question):
        return {t.colour for t in of[singular(match[1])]} == {answer}
    if match := re.fullmatch(r"How many (\w+) are there\?", question):
        return NUMBER.index(answer) == len(of[singular(match[1])])
    if match := re.fullmatch(r"Where is the (\w+)\?", question):
        (only,) = of[match[1]]
        low, high = THIRD[answer]
        return low <= only.x <= high
    if match := re.fullmatch(r"Is the (\w+) (left of|right of|above|below) the (\w+)\?", question):
        (a,), (b,) = of[match[1]], of[match[3]]
        across = abs(a.x - b.x) > abs(a.y - b.y)
        true = BESIDE[match[2]](a, b) and across == (match[2] in ("left of", "right of"))
        return answer == ("Yes" if true else "No")
    if match := re.fullmatch(r"Which of these is in the image\? (.*)", question):
        options = dict(re.findall(r"([A-D])\. (\w+)", match[1]))
        assert list(options) == list("ABCD")
        assert len(set(options.values())) == 4
        assert answer in options
        return bool(of[options[answer]])
    assert question == "Describe the image."
    named = [singular(w) for w in re.findall(r"\w+", answer) if singular(w) in CATEGORIES]
    assert named
    return all(of[c] for c in named)


@pytest.mark.parametrize("asker", ask.ASKERS, ids=lambda asker: asker.__name__)
def test_right_answers_are_right_and_confusing_ones_wrong(asker):
    asked = 0
    for number, found in enumerate((*TRAIN[:80], *TEST[:80])):
        question = asker(found, np.random.default_rng(number))
        if question is None:
            continue
        asked += 1
        assert right(found, question.question, question.correct_answer), (found, question)
        assert question.confusing_answers
        assert not any(right(found, question.question, wrong) for wrong in question.confusing_answers), (
            found,
            question,
        )
    assert asked > 80


def test_choices_have_one_right_letter():
    for number, found in enumerate(TEST[:40]):
        question = ask.ask_choice(found, np.random.default_rng(number))
        assert [right(found, question.question, letter) for letter in "ABCD"].count(True) == 1


@given(numbers, st.integers(0, 10**6), st.integers(1, 12))
def test_no_question_comes_twice(number, seed, count):
    found = sampled(number)
    asked = ask.SceneAnnotator({}).questions(found, np.random.default_rng(seed), count)
    assert len({q.question for q in asked}) == len(asked) <= count
    assert len(asked) >= min(count, 4)


@pytest.fixture
def annotator() -> ask.SceneAnnotator:
    return ask.SceneAnnotator({f"{n}.png": found for n, found in enumerate(TRAIN[:20])}, seed=3)


def test_same_request_same_reply(annotator):
    picture = RequestImage("3.png", b"")
    again = ask.SceneAnnotator({"3.png": TRAIN[3]}, seed=3)
    first, lost = annotate(picture, annotator, 6)
    assert annotate(picture, annotator, 6) == annotate(picture, again, 6) == (first, lost)
    assert annotate(picture, ask.SceneAnnotator(annotator.scenes, seed=4), 6) != (first, lost)


def test_unknown_picture_is_dropped_with_its_reason(annotator):
    kept, dropped = annotate(RequestImage("none.png", b""), annotator, 6)
    assert kept == []
    assert len(dropped) == 1
    assert "none.png" in dropped[0]


def test_nothing_true_is_dropped(annotator):
    for number in range(20):
        kept, dropped = annotate(RequestImage(f"{number}.png", b""), annotator, 6)
        assert dropped == []
        assert len(kept) == 6
        for reflection in kept:
            assert len(reflection.negatives) == len(reflection.question.confusing_answers)
            for text in (reflection.positive, *(why for _, why in reflection.negatives)):
                assert claims(text)
                assert all(claim.holds(TRAIN[number]) for claim in claims(text)), text


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


ASKED = {"question": "Is it red?", "type": "yes/no", "correct_answer": "No", "confusing_answers": ["Yes", "Maybe"]}
ONE_QUESTION = json.dumps({"questions": [ASKED]})


@pytest.mark.parametrize("verdict", ["No", "no", " No\n", "No.", "No, they agree.", "**No**"])
def test_judge_keeps_what_agrees(verdict):
    kept, dropped = annotate(RequestImage("a", b""), Scripted(ONE_QUESTION, verdict), 1)
    assert dropped == []
    assert [wrong for wrong, _ in kept[0].negatives] == ["Yes", "Maybe"]


@pytest.mark.parametrize("verdict", ["Yes", "yes, they do", "", "Nobody can say", "?"])
def test_judge_drops_what_contradicts_with_its_reason(verdict):
    kept, dropped = annotate(RequestImage("a", b""), Scripted(ONE_QUESTION, verdict), 1)
    assert kept[0].negatives == ()
    assert len(dropped) == 2
    assert all("Is it red?" in reason and reason.startswith("a: ") for reason in dropped)


@pytest.mark.parametrize("reply", ["", "{", "[]", json.dumps({"questions": [{**ASKED, "confusing_answers": ["no."]}]})])
def test_unusable_questions_are_dropped_with_one_line(reply):
    kept, dropped = annotate(RequestImage("a", b""), Scripted(reply), 1)
    assert kept == []
    assert len(dropped) == 1
    assert "\n" not in dropped[0]


def test_a_failed_negative_is_dropped_with_its_reason_and_the_positive_stays():
    kept, dropped = annotate(RequestImage("a", b""), Scripted(ONE_QUESTION, negative=None), 1)
    assert kept[0].positive
    assert kept[0].negatives == ()
    assert len(dropped) == 2
    assert all("blocked" in reason for reason in dropped)


def test_reflection_becomes_one_conversation_a_rationale(annotator):
    question = ask._question("Is it red?", "yes/no", "No", ["Yes", "Maybe"])
    reflection = Reflection(question, "It is green.", (("Yes", "Not so."), ("Maybe", "It is plain.")))
    talks = conversations(reflection)
    asked = Turn("user", "<image>\nIs it red?")
    assert [t.turns[0] for t in talks] == [asked] * 3
    assert [(t.turns[1].text, t.turns[1].weight) for t in talks] == [("No", 1)] * 3
    assert [t.turns[2].text for t in talks] == [WHY, WHY_WRONG.format(answer="Yes"), WHY_WRONG.format(answer="Maybe")]
    assert [t.turns[3] for t in talks] == [Turn("assistant", t) for t in ("It is green.", "Not so.", "It is plain.")]


@settings(max_examples=20)
@given(numbers, st.integers(0, 10**6))
def test_plain_talk_is_right(number, seed):
    found = sampled(number)
    for talk in plain_talks(found, np.random.default_rng(seed), 6, 0.3):
        question, answer = talk.turns[0].text.removeprefix("<image>\n"), talk.turns[1].text
        assert right(found, question, answer)
        assert len(talk.turns) == 2


# Folders of scenes.


@pytest.fixture(scope="module")
def test_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("test_set")
    names = dataset.write_pictures(folder, TEST[:12], 16)
    dataset.write_pope(folder, names, TEST[:12], TRAIN, seed=0)
    return folder, names


def pope_rows(folder, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"scenes_pope_{split}.json").read_text().splitlines()]


def test_graphs_are_read_as_written(test_set):
    folder, names = test_set
    assert dataset.read_graphs(folder) == dict(zip(names, TEST[:12], strict=True))
    assert all((folder / "images" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_broken_graphs_are_named(tmp_path):
    with pytest.raises(DataError, match=r"scenes\.jsonl"):
        dataset.read_graphs(tmp_path)
    (tmp_path / "scenes.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(DataError, match="line 1"):
        dataset.read_graphs(tmp_path)


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_pope_labels_are_the_graphs(test_set, split):
    folder, _ = test_set
    graphs, rows = dataset.read_graphs(folder), pope_rows(folder, split)
    for line in rows:
        assert right(graphs[line["image"]], line["text"], line["label"].capitalize())
    assert [line["question_id"] for line in rows] == list(range(1, len(rows) + 1))
    for name in graphs:
        labels = [line["label"] for line in rows if line["image"] == name]
        assert labels.count("yes") == labels.count("no") == min(3, len(graphs[name].categories))
        texts = [line["text"] for line in rows if line["image"] == name]
        assert len(set(texts)) == len(texts)


def test_pope_splits_share_their_positives(test_set):
    folder, _ = test_set
    positives = [
        [(line["image"], line["text"]) for line in pope_rows(folder, split) if line["label"] == "yes"]
        for split in ("random", "popular", "adversarial")
    ]
    assert positives[0] == positives[1] == positives[2]


def test_negatives_are_absent_and_as_tempting_as_the_split_says():
    chosen = dataset.pope_negatives(TEST, TRAIN, seed=0)
    seen = [{t.category for t in s.things} for s in TRAIN]
    frequency = {c: sum(c in s for s in seen) for c in CATEGORIES}
    both = {(a, b): sum(a in s and b in s for s in seen) for a in CATEGORIES for b in CATEGORIES}
    for number, found in enumerate(TEST):
        present = {t.category for t in found.things}
        absent = [c for c in CATEGORIES if c not in present]
        # How often each absent thing stood beside the present one that calls for it most.
        company = {c: max(both[p, c] / frequency[p] for p in present) for c in absent}
        picked = {split: names[number] for split, names in chosen.items()}
        for names in picked.values():
            assert len(set(names)) == len(names) == min(3, len(present))
            assert not set(names) & present
        for split, score in (("popular", frequency), ("adversarial", company)):
            best = sorted((score[c] for c in absent), reverse=True)[: len(picked[split])]
            assert [score[c] for c in picked[split]] == best


def test_adversarial_negatives_are_mostly_partners():
    chosen = dataset.pope_negatives(TEST, TRAIN, seed=0)["adversarial"]
    wanted = [{PARTNER[t.category] for t in s.things} - {t.category for t in s.things} for s in TEST]
    pairs = [(set(names), partners) for names, partners in zip(chosen, wanted, strict=True) if partners]
    tempting = [len(names & partners) / min(len(names), len(partners)) for names, partners in pairs]
    assert np.mean(tempting) > 0.95


def test_training_folder_becomes_records(tmp_path):
    made = dataset.make_training_set(tmp_path, 4, size=16, questions=3, seed=0)
    found = list(dataset.records(tmp_path))
    assert made.dropped == ()
    assert sum(len(record.conversations) for record in found) == made.conversations
    assert len(found) == 4
    graphs = dataset.read_graphs(tmp_path)
    assert list(graphs.values()) == take(World.annotated(), "train", 0, 4)
    for record in found:
        assert isinstance(record, ImageRecord)
        assert record.image == (tmp_path / "images" / record.id).read_bytes()
        for talk in record.conversations:
            question, answer = talk.turns[0].text.removeprefix("<image>\n"), talk.turns[1].text
            assert right(graphs[record.id], question, answer)
            assert len(talk.turns) == 4
