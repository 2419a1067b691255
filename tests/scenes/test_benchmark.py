"""CHAIR and rationale checks on scenes made by hand, every number counted on paper."""

from __future__ import annotations

import json

import numpy as np
import pytest

from reverie_jax.eval.benchmarks.pope import BenchmarkError
from reverie_jax.scenes import benchmark as report
from reverie_jax.scenes import scoring as bench
from reverie_jax.scenes.graph import Scene, Thing


def scene(*things: Thing, seed: int = 0) -> Scene:
    return Scene(tuple(sorted(things)), "cream", False, seed)


TABLE = scene(
    Thing("cup", "red", "large", "plain", 0.16, 0.5),
    Thing("plate", "blue", "small", "striped", 0.84, 0.5),
    Thing("apple", "green", "small", "plain", 0.5, 0.16),
    Thing("apple", "green", "large", "plain", 0.5, 0.84),
)

# text: (mentions, hallucinated, captions, hallucinating, present, covered)
DESCRIPTIONS = {
    "The image shows a red cup on the left, two green apples and a blue plate.": (3, 0, 1, 0, 3, 3),
    "A red cup and a fork. The fork is left of the cup.": (4, 2, 1, 1, 3, 1),
    "A cat, a dog and another cat.": (3, 3, 1, 1, 3, 0),
    "There is no fork and no plate, but a cup.": (1, 0, 1, 0, 3, 1),
    "A teapot is often seen with a cup. There is a plate.": (1, 0, 1, 0, 3, 1),
    "A wrong colour is no hallucinated thing: a blue cup.": (1, 0, 1, 0, 3, 1),
    "A quiet scene.": (0, 0, 1, 0, 3, 0),
    "": (0, 0, 1, 0, 3, 0),
}


@pytest.mark.parametrize("text", DESCRIPTIONS, ids=repr)
def test_description_is_counted(text):
    assert bench.description_counts([TABLE], [text]).tolist() == [list(DESCRIPTIONS[text])]


def test_descriptions_are_counted_picture_by_picture():
    other = scene(Thing("cat", "red", "large", "plain", 0.5, 0.5))
    found = bench.description_counts([TABLE, other], ["A cat.", "A cat."])
    assert found.shape == (2, 6)
    assert found[:, bench.HALLUCINATED].tolist() == [1, 0]
    assert found[:, bench.PRESENT].tolist() == [3, 1]


def test_texts_must_match_the_pictures():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        bench.description_counts([TABLE], ["a", "b"])


# text: (claims, true claims)
RATIONALES = {
    "There is a red cup on the left.": (1, 1),
    "There is a blue cup on the left.": (1, 0),
    "There are two green apples.": (1, 1),
    "There are three green apples.": (1, 0),
    "There is no fork.": (1, 1),
    "There is no cup.": (1, 0),
    "The cup is left of the plate.": (3, 3),  # the relation, the cup and the plate
    "The cup is right of the plate.": (3, 2),
    "This is wrong because a teapot is often seen with a cup, but there is no teapot. There is a red cup.": (2, 2),
    "There is a fork, and there is a red cup.": (2, 1),
    "It just is so.": (0, 0),
    "": (0, 0),
}


@pytest.mark.parametrize("text", RATIONALES, ids=repr)
def test_rationale_is_checked(text):
    checked = bench.check(TABLE, text)
    stated, true = RATIONALES[text]
    assert checked.text == text
    assert len(checked.checked) == stated
    assert sum(holds for _, holds in checked.checked) == true
    assert checked.correct == (stated > 0 and stated == true)


def test_rationales_are_counted():
    checked = [bench.check(TABLE, text) for text in RATIONALES]
    stated, true = (sum(column) for column in zip(*RATIONALES.values(), strict=True))
    correct = sum(s > 0 and s == t for s, t in RATIONALES.values())
    assert bench.rationale_counts(checked).tolist() == [12, correct, stated, true, 2]
    assert bench.rationale_counts([]).tolist() == [0, 0, 0, 0, 0]


# From a folder of scenes and prediction files to a report.


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def folders(tmp_path):
    """Two pictures, one POPE question of each label a picture, and predictions that are right for the first only."""
    from reverie_jax.scenes import dataset

    other = scene(
        Thing("cat", "red", "large", "plain", 0.2, 0.5), Thing("dog", "red", "large", "plain", 0.8, 0.5), seed=1
    )
    data, said = tmp_path / "data", tmp_path / "said"
    said.mkdir()
    names = dataset.write_pictures(data, [TABLE, other], 8)
    texts: dict[str, str] = {}
    for split, file in dataset.POPE_FILES.items():
        lines = [
            {"question_id": 1, "image": names[0], "text": "Is there a cup in the image?", "label": "yes"},
            {"question_id": 2, "image": names[0], "text": "Is there a cat in the image?", "label": "no"},
            {"question_id": 3, "image": names[1], "text": "Is there a cat in the image?", "label": "yes"},
            {"question_id": 4, "image": names[1], "text": "Is there a cup in the image?", "label": "no"},
        ]
        write(data / file, lines)
        answers = [(4, "Yes"), (3, "No"), (2, "No"), (1, "Yes")]
        texts |= {f"pope/{split}/{n}": text for n, text in answers}
    texts |= {"description/1": "A cup.", "description/0": "A red cup."}
    asked = [a.known["number"] for a in report.questions(data) if a.known["kind"] == "rationale"]
    texts |= {f"rationale/{n}": "There is a red cup." if n < report.QUESTIONS * 2 else "A fish." for n in asked}
    write(said / "predictions.jsonl", [{"question_id": id, "text": text} for id, text in texts.items()])
    return data, said, asked


def test_scores_are_those_counted_by_hand(folders):
    data, said, asked = folders
    counts = report.score(data, said)
    for table in counts.pope.values():
        assert table.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert counts.description.tolist() == [[1, 0, 1, 0, 3, 1], [1, 1, 1, 1, 2, 0]]
    first = sum(n < report.QUESTIONS * 2 for n in asked)
    assert counts.rationale.tolist() == [
        [first, first, first, first, 0],
        [len(asked) - first, 0, len(asked) - first, 0, 0],
    ]
    found = report.estimates(counts)
    assert found["pope"]["mean"]["f1"] == 0.5
    assert found["pope"]["random"]["accuracy"] == 0.5
    assert found["chair"]["i"]["value"] == 0.5
    assert found["chair"]["coverage"]["value"] == 0.2
    assert found["rationale_correct"]["value"] == pytest.approx(first / len(asked), abs=1e-4)


def test_a_run_differs_from_itself_by_nothing(folders):
    counts = report.score(*folders[:2])
    for estimate in report.differences(counts, counts).values():
        assert estimate == {"value": 0, "ci95": [0, 0]}
    doubled = counts + counts
    assert np.array_equal(doubled.all_pope, 2 * counts.all_pope)
    assert report.estimates(doubled) == report.estimates(counts)


@pytest.mark.parametrize("id", ["pope/random/1", "description/0", "rationale/0"])
def test_missing_predictions_are_refused(folders, id):
    data, said, _ = folders
    path = said / "predictions.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if f'"{id}"' not in line))
    with pytest.raises(BenchmarkError, match=id):
        report.score(data, said)


def test_every_question_of_a_folder_has_its_own_id(folders):
    asked = report.questions(folders[0])
    assert len({a.id for a in asked}) == len(asked)
    kinds = {"pope/random", "pope/popular", "pope/adversarial", "description", "rationale"}
    assert {a.known["kind"] for a in asked} == kinds


def test_as_a_benchmark_it_has_the_same_numbers(folders):
    data, said, _ = folders
    benchmark = report.Scenes()
    scored = benchmark.score(benchmark.load(data), report.answer_file(data, said))
    found, wanted = scored.values(), report.estimates(report.score(data, said))
    assert found["pope/f1"] == wanted["pope"]["mean"]["f1"]
    assert found["chair_i"] == wanted["chair"]["i"]["value"]
    assert found["rationale_correct"] == pytest.approx(wanted["rationale_correct"]["value"], abs=1e-4)
    assert sum(reading.right == 1 for reading in scored.readings) == 6
