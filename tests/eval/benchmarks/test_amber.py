"""AMBER: the generative counts written out a second time, and the yes/no table with its odd denominators."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

from reverie_jax.eval.benchmarks import amber_words, find_benchmark
from reverie_jax.eval.benchmarks.amber import Amber
from tests.eval.benchmarks import makers_free as make

# As in the official file, the words that are needed here.
RELATION = {
    "sky": [],
    "grass": ["ground"],
    "person": ["people", "individual", "man", "woman", "boy", "girl"],
    "man": ["person", "people", "individual", "boy"],
    "dog": [],
    "cloud": [],
    "car": ["window", "door", "tire", "vehicle", "light", "mirror", "plate"],
    "bird": ["bill"],
    "ship": ["boat", "vessel", "sailing", "vehicle"],
    "bench": ["chair", "armrest"],
    "kite": [],
    "umbrella": [],
}
SAFE = ["orange", "snack", "light", "sign"]
VOCABULARY = {word for key, others in RELATION.items() for word in (key, *others)}
KINDS = {
    "existence": "discriminative-hallucination",
    "state": "discriminative-attribute-state",
    "number": "discriminative-attribute-number",
    "action": "discriminative-attribute-action",
    "relation": "discriminative-relation",
}
TRUTHS = [
    {"truth": ["sky", "person", "man", "ship", "ship"], "hallu": ["cloud", "car"]},
    {"truth": ["dog", "grass"], "hallu": ["bird", "bench"]},
    {"truth": ["kite"], "hallu": ["umbrella"]},
]


ALIKE = {("armrest", "door"): 0.9, ("window", "ground"): 0.81, ("tire", "bird"): 0.8, ("mirror", "bench"): 0.95}
"""In place of spaCy's vectors; either way round."""


def nouns(text: str) -> list[str]:
    """In place of NLTK's tags and lemmas: all words, with no plural."""
    return [word.removesuffix("s") if word != "grass" else word for word in re.findall(r"[A-Za-z]+", text)]


def similarity(one: str, other: str) -> float:
    return 1.0 if one == other else ALIKE.get((one, other), ALIKE.get((other, one), 0.1))


@pytest.fixture(scope="module")
def amber():
    assert isinstance(find_benchmark("amber"), Amber)
    return Amber(nouns, similarity)


def counts(words, truth, hallu):
    """Flagged, kept, credited, truths, invented ones credited, of how many. Words that are alike are left out here."""

    def credit(word, marks, credited):
        # Associations stand first, in the order of their marks; the first that fits takes the credit.
        pairs = [(other, n) for n, mark in enumerate(marks) for other in RELATION[mark]]
        pairs += [(mark, n) for n, mark in enumerate(marks)]
        for other, n in pairs:
            if other == word:
                credited.add(n)
                return True
        return False

    kept = [word for word in words if word in VOCABULARY]
    flagged, right, wrong = 0, set(), set()
    for word in kept:
        if word in SAFE or credit(word, truth, right):
            continue
        credit(word, hallu, wrong)
        flagged += 1
    return np.array([flagged, len(kept), len(right), len(truth), len(wrong), len(hallu), not flagged, 1.0])


def generative(rows) -> dict[str, float]:
    sums = np.sum(rows, axis=0)
    shares = sums[::2] / (sums[1::2] + 0.001) * 100
    return {"CHAIR": shares[0], "Cover": shares[1], "Hal": 100 - shares[3], "Cog": shares[2]}


def shown(number: float) -> float:
    return round(number, 1)


@pytest.fixture
def pictured(amber, tmp_path):
    return amber.load(make.amber(tmp_path, TRUTHS, [], relation=RELATION, safe=SAFE))


SAID = [
    # Response, nouns.
    ("A man on a ship under the sky.", ["man", "ship", "sky"]),
    ("A dog and a bird on a chair.", ["dog", "bird", "chair"]),
    ("An umbrella and a kite.", ["umbrella", "kite"]),
]


def check(amber, loaded, said):
    scored = amber.score(loaded, {str(n): text for n, (text, _) in enumerate(said, 1)})
    rows = [counts(words, **truth) for (_, words), truth in zip(said, TRUTHS, strict=True)]
    for name, number in generative(rows).items():
        assert shown(make.value(scored, name, f"generative/{name}")) == shown(number), name
    make.sound(loaded, scored)
    return scored


def test_generative_counts(amber, pictured):
    check(amber, pictured, SAID)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("There is a man.", ["man"]),  # the credit is person's, whose association stands before the word itself
        ("A man and a person.", ["man", "person"]),
        ("A man and a boy.", ["man", "boy"]),  # both are credited to person
        ("A ship, a boat and a vessel.", ["ship", "boat", "vessel"]),  # two ships are there, one is ever credited
        ("A light and an orange and a sign.", ["light"]),  # the vocabulary knows "light" alone of these
        ("A car with a mirror and a window.", ["car", "mirror", "window"]),  # invented, associations too
        ("A cloud, a cloud and a cloud.", ["cloud"] * 3),  # repeats count
        ("Nothing is here to see.", []),
        ("A computer and a violin.", []),  # not in the vocabulary
        ("Two dogs and three umbrellas.", ["dog", "umbrella"]),
        ("The ship, the ship.", ["ship", "ship"]),
    ],
)
def test_single_response(amber, pictured, text, words):
    check(amber, pictured, [(text, words), *SAID[1:]])


ALONE = [
    # Noun; flagged, truths credited of 2 (dog, grass), invented ones credited of 2 (bird, bench).
    ("window", 0, 1, 0),  # like "ground", which goes with grass: excused, and grass is credited
    ("tire", 1, 0, 0),  # 0.8 is not more than 0.8
    ("mirror", 1, 0, 1),  # like "bench", and like nothing that is there
    ("bench", 1, 0, 1),
    ("armrest", 1, 0, 1),  # goes with bench
    ("chair", 1, 0, 1),
    ("bill", 1, 0, 1),  # goes with bird
    ("ground", 0, 1, 0),
    ("light", 0, 0, 0),  # safe wherever it is
    ("cloud", 1, 0, 0),
    ("sunrise", 0, 0, 0),  # no word of the vocabulary
]


@pytest.mark.parametrize(("noun", "flagged", "right", "wrong"), ALONE)
def test_one_noun(amber, tmp_path, noun, flagged, right, wrong):
    loaded = amber.load(make.amber(tmp_path, TRUTHS[1:2], [], relation=RELATION, safe=SAFE))
    scored = amber.score(loaded, {"1": f"{noun}"})
    kept = noun in VOCABULARY
    assert make.value(scored, "CHAIR") == pytest.approx(100 * flagged / (kept + 0.001))
    assert make.value(scored, "Cover") == pytest.approx(100 * right / 2.001)
    assert make.value(scored, "Cog") == pytest.approx(100 * wrong / 2.001)
    assert make.value(scored, "Hal") == pytest.approx(100 - 100 * (not flagged) / 1.001)


def test_a_noun_that_is_both_credits_the_same_and_the_first_alike(amber, tmp_path):
    """ "door" goes with car, and is like "armrest", which goes with bench and stands before."""
    marks = [{"truth": ["dog"], "hallu": ["bench", "car"]}]
    loaded = amber.load(make.amber(tmp_path, marks, [], relation=RELATION, safe=SAFE))
    assert make.value(amber.score(loaded, {"1": "door"}), "Cog") == pytest.approx(100 * 2 / 2.001)


def test_case_counts(amber, tmp_path):
    """Nouns are not lower-cased: "Dog" at the beginning is no word of the vocabulary."""
    loaded = amber.load(make.amber(tmp_path, TRUTHS[1:2], [], relation=RELATION, safe=SAFE))
    assert make.value(amber.score(loaded, {"1": "Dog"}), "Cover") == 0


def test_perfect_small_set_is_not_perfect(amber, tmp_path):
    """The denominators begin at 0.001."""
    loaded = amber.load(make.amber(tmp_path, TRUTHS[2:], [], relation=RELATION, safe=SAFE))
    scored = amber.score(loaded, {"1": "A kite."})
    assert shown(make.value(scored, "Hal")) == 0.1
    assert shown(make.value(scored, "Cover")) == 99.9
    assert make.value(scored, "CHAIR") == 0


def test_descriptions_are_left_out_where_their_tools_are_missing(tmp_path, monkeypatch):
    """Yes/no questions are scored all the same; descriptions alone are an error that names what is missing."""
    for name in ("nltk", "spacy"):
        monkeypatch.setitem(sys.modules, name, None)
    amber_words.tools.cache_clear()
    plain = find_benchmark("amber")
    alone = plain.load(make.amber(tmp_path / "alone", TRUTHS, [], relation=RELATION, safe=SAFE))
    with pytest.raises(make.BenchmarkError, match="spacy") as error:
        plain.score(alone, {"1": "A dog.", "2": "A dog.", "3": "A dog."})
    assert "\n" not in str(error.value)
    both = plain.load(make.amber(tmp_path / "both", TRUTHS, [(KINDS["state"], "no")], relation=RELATION, safe=SAFE))
    scored = plain.score(both, {"1": "A dog.", "2": "A dog.", "3": "A dog.", "4": "No"})
    assert found(scored, "", "Accuracy") == 99.9
    assert "Hal" not in scored.metrics
    assert "descriptions" in scored.protocol
    make.sound(both, scored)


# Yes or no.


def asked(amber, folder, rows):
    """Questions of these kinds and truths, and nothing generative."""
    return amber.load(
        make.amber(folder, [], [(KINDS[kind], truth) for kind, truth in rows], relation=RELATION, safe=SAFE)
    )


def table(rows, said, plus: float = 0.0001) -> dict[str, float]:
    """Accuracy, precision, recall, F1 of "No", as the official script prints them."""
    right = no = no_right = told_no = 0.001 * np.array([0, 1, 0, 1])
    right, no, no_right, told_no = 0.0, 0.001, 0.0, 0.001
    for (_, truth), answer in zip(rows, said, strict=True):
        right += answer == truth.capitalize()
        no += truth == "no"
        no_right += truth == "no" and answer == "No"
        told_no += answer == "No"
    p, r = shown(no_right / told_no * 100), shown(no_right / no * 100)
    f1 = shown(2 * (p / 100) * (r / 100) / (p / 100 + r / 100 + plus) * 100)
    return {"Accuracy": shown(right / (len(rows) + 0.001) * 100), "Precision": p, "Recall": r, "F1": f1}


def found(scored, part: str, name: str) -> float:
    """A printed number of a part of the yes/no task; "" is the whole."""
    names = [f"{part}/{name}", f"attribute/{part}/{name}"] if part else [name, f"discriminative/{name}"]
    return shown(make.value(scored, *names))


@pytest.fixture(scope="module")
def mixed():
    rng = np.random.default_rng(0)
    kinds = [*KINDS] * 12
    rows = [(kind, "no" if kind == "existence" else rng.choice(["yes", "no"]).item()) for kind in kinds]
    said = [
        rng.choice(["Yes", "No", "yes", "No.", "", "maybe"], p=[0.4, 0.4, 0.05, 0.05, 0.05, 0.05]).item() for _ in rows
    ]
    return rows, said


def test_yes_no_table(amber, tmp_path, mixed):
    rows, said = mixed
    loaded = asked(amber, tmp_path, rows)
    scored = amber.score(loaded, make.by_question(loaded, said))
    for name, number in table(rows, said).items():
        assert found(scored, "", name) == number, name
    parts = {kind: [kind] for kind in KINDS} | {"attribute": ["state", "number", "action"]}
    for part, kinds in parts.items():
        at = [n for n, (kind, _) in enumerate(rows) if kind in kinds]
        plus = 0.001 if part == "existence" else 0.0001
        wanted = table([rows[n] for n in at], [said[n] for n in at], plus)
        for name, number in wanted.items():
            assert found(scored, part, name) == number, (part, name)
    make.sound(loaded, scored)


@pytest.mark.parametrize(
    ("said", "right", "told"),
    [
        ("No", True, True),
        ("Yes", False, False),
        ("no", False, False),
        ("No.", False, False),
        ("No, there is not.", False, False),
        ("NO", False, False),
        ("", False, False),
        ("There is no dog.", False, False),
    ],
)
def test_only_the_bare_word_counts(amber, tmp_path, said, right, told):
    loaded = asked(amber, tmp_path, [("relation", "no"), ("relation", "no"), ("relation", "yes")])
    scored = amber.score(loaded, make.by_question(loaded, [said, "No", "Yes"]))
    assert found(scored, "", "Accuracy") == shown((2 + right) / 3.001 * 100)
    assert found(scored, "", "Recall") == shown((1 + right) / 2.001 * 100)
    assert found(scored, "", "Precision") == shown((1 + (told and right)) / (1.001 + told) * 100)
    assert scored.parsed_answers[0].right == float(right)


def test_other_text_is_no_answer_no(amber, tmp_path):
    """It lowers recall, and precision not at all."""
    rows = [("existence", "no")] * 10
    loaded = asked(amber, tmp_path, rows)
    scored = amber.score(loaded, make.by_question(loaded, ["No"] * 5 + ["Not at all"] * 5))
    assert found(scored, "", "Precision") == 100.0
    assert found(scored, "", "Recall") == 50.0


def test_small_existence_table(amber, tmp_path):
    """Its F1 has 0.001 in it where the others have 0.0001: 90.8 where 90.9 would be right."""
    rows = [("existence", "no")] * 6
    said = ["No"] * 5 + ["Yes"]
    loaded = asked(amber, tmp_path, rows)
    scored = amber.score(loaded, make.by_question(loaded, said))
    wanted = table(rows, said, 0.001)
    for name, number in wanted.items():
        assert found(scored, "existence", name) == number, name
    assert (found(scored, "existence", "F1"), found(scored, "", "F1")) == (90.8, 90.9)


def test_existence_alone_has_a_perfect_precision_without_a_single_yes(amber, tmp_path):
    loaded = asked(amber, tmp_path, [("existence", "no")] * 4)
    scored = amber.score(loaded, make.by_question(loaded, ["Yes"] * 4))
    assert found(scored, "", "Precision") == found(scored, "", "Recall") == found(scored, "", "F1") == 0
    make.sound(loaded, scored)


def test_amber_score_joins_both_tasks(amber, tmp_path):
    rows = [("relation", "no"), ("state", "yes"), ("existence", "no"), ("action", "no")]
    said = ["No", "Yes", "Yes", "No"]
    folder = make.amber(tmp_path, TRUTHS, [(KINDS[kind], truth) for kind, truth in rows], relation=RELATION, safe=SAFE)
    loaded = amber.load(folder)
    scored = amber.score(loaded, make.by_question(loaded, [*(text for text, _ in SAID), *said]))
    chair = generative([counts(words, **truth) for (_, words), truth in zip(SAID, TRUTHS, strict=True)])["CHAIR"]
    wanted = (100 - chair + table(rows, said)["F1"]) / 2
    assert make.headline(scored) == pytest.approx(wanted, abs=0.1)
    assert shown(make.value(scored, "CHAIR", "generative/CHAIR")) == shown(chair)
    make.sound(loaded, scored)


def test_lmms_eval_searches_the_text(amber, tmp_path):
    if "lmms-eval" not in amber.rules:
        pytest.skip("no such rule here")
    loaded = asked(amber, tmp_path, [("relation", "no")] * 4)
    said = ["no.", "There is NO dog", "Nothing at all", "Oh no, yes"]
    scored = amber.score(loaded, make.by_question(loaded, said), rule="lmms-eval")
    assert [reading.parsed.lower() for reading in scored.parsed_answers] == ["no", "no", "no", "yes"]


def test_vlmevalkit_means_three_accuracies(amber, tmp_path, mixed):
    if "vlmevalkit" not in amber.rules:
        pytest.skip("no such rule here")
    rows, _ = mixed
    said = ["Yes, it is." if n % 3 else "No" for n in range(len(rows))]
    loaded = asked(amber, tmp_path, rows)
    scored = amber.score(loaded, make.by_question(loaded, said), rule="vlmevalkit")
    right = np.array([(text[:2] == "No") == (truth == "no") for text, (_, truth) in zip(said, rows, strict=True)])
    group = np.array(["attribute" if kind in ("state", "number", "action") else kind for kind, _ in rows])
    wanted = np.mean([right[group == name].mean() for name in ("attribute", "existence", "relation")])
    assert make.headline(scored) == pytest.approx(100 * wanted)


def test_questions_are_the_queries(amber, tmp_path):
    folder = make.amber(tmp_path, TRUTHS, [(KINDS["state"], "yes")] * 2, relation=RELATION, safe=SAFE)
    loaded = amber.load(folder)
    assert [str(question.id) for question in loaded.questions] == ["1", "2", "3", "4", "5"]
    wanted = ["Describe this image."] * 3 + [f"Is number {n} there in this image?" for n in (4, 5)]
    assert [question.text for question in loaded.questions] == wanted
    units = {question.image: question.cluster for question in loaded.questions}
    assert len(set(units.values())) == len(units) == 3


def test_marks_are_found_by_id(amber, tmp_path):
    """The official script takes row id - 1; a shuffled file must not give other truths."""
    folder = make.amber(tmp_path, [], [(KINDS["state"], "yes"), (KINDS["state"], "no")], relation=RELATION, safe=SAFE)
    queries = json.loads((folder / "query" / "query_all.json").read_text())
    make.dump(folder / "query" / "query_all.json", queries[::-1])
    loaded = amber.load(folder)
    scored = amber.score(loaded, {"1": "Yes", "2": "No"})
    assert found(scored, "", "Accuracy") == 100.0


def test_answers_are_written_as_the_official_script_reads_them(amber, tmp_path):
    loaded = asked(amber, tmp_path, [("state", "yes"), ("state", "no")])
    (path,) = amber.export(loaded, {"1": "Yes", "2": "No"}, tmp_path / "out")
    assert json.loads(path.read_text("utf-8")) == [{"id": 1, "response": "Yes"}, {"id": 2, "response": "No"}]
    make.comes_back(amber, loaded, {"1": "Yes", "2": "No"}, tmp_path / "out")


@pytest.fixture
def folder(tmp_path):
    return make.amber(tmp_path, TRUTHS, [(KINDS["state"], "yes")], relation=RELATION, safe=SAFE)


@pytest.mark.parametrize("lost", ["annotations.json", "relation.json"])
def test_a_missing_file_is_named(amber, folder, lost):
    (folder / lost).unlink()
    make.refused(amber, folder, lost)


def test_missing_queries_say_what_is_needed(amber, folder):
    for path in (folder / "query").iterdir():
        path.unlink()
    make.refused(amber, folder, "query")


@pytest.mark.parametrize("name", ["annotations.json", "relation.json", "query/query_all.json"])
@pytest.mark.parametrize("text", ["{", "3", "\xff"], ids=["cut off", "number", "no text"])
def test_a_broken_file_is_named(amber, folder, name, text):
    (folder / name).write_bytes(text.encode("latin1"))
    make.refused(amber, folder, name.split("/")[-1])


@pytest.mark.parametrize(
    ("name", "at", "lost"),
    [
        ("annotations.json", 3, "truth"),
        ("annotations.json", 1, "hallu"),
        ("annotations.json", 1, "type"),
        ("query/query_all.json", 2, "image"),
        ("query/query_all.json", 2, "query"),
        ("query/query_all.json", 2, "id"),
    ],
)
def test_a_row_that_lacks_something_is_named(amber, folder, name, at, lost):
    rows = json.loads((folder / name).read_text())
    del rows[at][lost]
    make.dump(folder / name, rows)
    make.refused(amber, folder, name.split("/")[-1], lost)


def test_a_question_without_marks_is_refused(amber, folder):
    rows = json.loads((folder / "annotations.json").read_text())
    make.dump(folder / "annotations.json", rows[:3])
    make.refused(amber, folder, "annotations.json", "4")


def test_a_truth_that_is_neither_yes_nor_no_is_refused(amber, folder):
    rows = json.loads((folder / "annotations.json").read_text())
    rows[3]["truth"] = "maybe"
    make.dump(folder / "annotations.json", rows)
    make.refused(amber, folder, "annotations.json", "maybe")


def test_a_word_without_associations_has_none(amber, folder):
    """The official script fails with a KeyError."""
    rows = json.loads((folder / "annotations.json").read_text())
    rows[0]["truth"] = ["unicorn", "kite"]
    make.dump(folder / "annotations.json", rows)
    scored = amber.score(amber.load(folder), {"1": "A kite.", "2": "", "3": "", "4": "Yes"})
    assert make.value(scored, "Cover") == pytest.approx(100 * 1 / 5.001)
