"""Descriptions, rationales and whole runs on scenes made by hand; every number is counted on paper."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from reverie_jax.eval.benchmarks.interface import BenchmarkError
from reverie_jax.scenes import benchmark, dataset, report, scoring
from tests.scenes.makers import make_object, make_scene

TABLE = make_scene(
    make_object("cup", "red", 0.16, size="large"),
    make_object("plate", "blue", 0.84, texture="striped"),
    make_object("apple", "green", 0.5, 0.16),
    make_object("apple", "green", 0.5, 0.84, size="large"),
)
PETS = make_scene(make_object("cat", x=0.2, size="large"), make_object("dog", x=0.8, size="large"), seed=1)

# text: (mentions, hallucinated, captions, hallucinating, present, covered)
DESCRIPTIONS = {
    "The image shows a red cup on the left, two green apples and a blue plate.": (3, 0, 1, 0, 3, 3),
    "A red cup and a fork. The fork is left of the cup.": (4, 2, 1, 1, 3, 1),
    "A cat, a dog and another cat.": (3, 3, 1, 1, 3, 0),
    "There is no fork and no plate, but a cup.": (1, 0, 1, 0, 3, 1),
    "A teapot is often seen with a cup. There is a plate.": (1, 0, 1, 0, 3, 1),
    "A wrong color is not a hallucinated object: a blue cup.": (1, 0, 1, 0, 3, 1),
    "A quiet scene.": (0, 0, 1, 0, 3, 0),
    "": (0, 0, 1, 0, 3, 0),
}


@pytest.mark.parametrize("text", DESCRIPTIONS, ids=repr)
def test_counts_of_a_description(text):
    assert scoring.description_counts([TABLE], [text]).tolist() == [list(DESCRIPTIONS[text])]


def test_descriptions_are_counted_image_by_image():
    counts = scoring.description_counts([TABLE, PETS], ["A cat.", "A cat."])
    assert counts[:, scoring.HALLUCINATED].tolist() == [1, 0]
    assert counts[:, scoring.PRESENT].tolist() == [3, 2]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        scoring.description_counts([TABLE], ["a", "b"])


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
def test_claims_of_a_rationale_are_checked(text):
    rationale = scoring.check_rationale(TABLE, text)
    claims, true = RATIONALES[text]
    assert rationale.text == text
    assert (len(rationale.checked), sum(holds for _, holds in rationale.checked)) == (claims, true)
    assert rationale.correct == (claims > 0 and claims == true)


def test_counts_of_rationales():
    checked = [scoring.check_rationale(TABLE, text) for text in RATIONALES]
    claims, true = (sum(column) for column in zip(*RATIONALES.values(), strict=True))
    correct = sum(c > 0 and c == t for c, t in RATIONALES.values())
    assert scoring.rationale_counts(checked).tolist() == [12, correct, claims, true, 2]
    assert scoring.rationale_counts([]).tolist() == [0, 0, 0, 0, 0]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path, list[int]]:
    """Two images, POPE questions on both, predictions that are right for the first alone, and rationale numbers."""
    data, out = tmp_path / "data", tmp_path / "out"
    out.mkdir()
    names = dataset.write_images(data, [TABLE, PETS], 8)
    texts: dict[str, str] = {}
    questions = ((0, "cup", "yes"), (0, "cat", "no"), (1, "cat", "yes"), (1, "cup", "no"))
    for split, file in dataset.POPE_FILES.items():
        rows = [
            {"question_id": id, "image": names[image], "text": f"Is there a {category} in the image?", "label": label}
            for id, (image, category, label) in enumerate(questions, 1)
        ]
        write_rows(data / file, rows)
        texts |= {f"pope/{split}/{id}": text for id, text in ((4, "Yes"), (3, "No"), (2, "No"), (1, "Yes"))}
    texts |= {"description/1": "A cup.", "description/0": "A red cup."}
    asked = benchmark.build_questions(data)
    numbers = [q.metadata["number"] for q in asked if q.metadata["kind"] == "rationale"]
    first = benchmark.QUESTIONS * 2
    texts |= {f"rationale/{n}": "There is a red cup." if n < first else "A fish." for n in numbers}
    write_rows(out / "predictions.jsonl", [{"question_id": id, "text": text} for id, text in texts.items()])
    return data, out, numbers


def test_scores_are_those_counted_by_hand(folders):
    data, out, numbers = folders
    counts = benchmark.count_predictions(data, out)
    for table in counts.pope.values():
        assert table.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert counts.description.tolist() == [[1, 0, 1, 0, 3, 1], [1, 1, 1, 1, 2, 0]]
    first = sum(n < benchmark.QUESTIONS * 2 for n in numbers)
    rest = len(numbers) - first
    assert counts.rationale.tolist() == [[first, first, first, first, 0], [rest, 0, rest, 0, 0]]
    estimates = benchmark.estimates(counts)
    assert estimates["pope"]["mean"]["f1"] == estimates["pope"]["random"]["accuracy"] == 0.5
    assert estimates["chair"]["i"]["value"] == 0.5
    assert estimates["chair"]["coverage"]["value"] == 0.2
    assert estimates["rationale_correct"]["value"] == pytest.approx(first / len(numbers), abs=1e-4)
    # A run differs from itself by nothing, and counts of two runs add up.
    for estimate in benchmark.differences(counts, counts).values():
        assert estimate == {"value": 0, "ci95": [0, 0]}
    assert np.array_equal((counts + counts).all_pope, 2 * counts.all_pope)
    assert benchmark.estimates(counts + counts) == estimates


@pytest.mark.parametrize("id", ["pope/random/1", "description/0", "rationale/0"])
def test_missing_predictions_are_named(folders, id):
    data, out, _ = folders
    path = out / "predictions.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if f'"{id}"' not in line))
    with pytest.raises(BenchmarkError, match=id):
        benchmark.count_predictions(data, out)


def test_an_unknown_image_is_named(folders):
    path = folders[0] / dataset.POPE_FILES["popular"]
    path.write_text(path.read_text().replace("000001.png", "000009.png"))
    with pytest.raises(BenchmarkError, match=rf"{path.name}.*000009\.png"):
        benchmark.build_questions(folders[0])


def test_every_question_has_its_own_id(folders):
    questions = benchmark.build_questions(folders[0])
    assert len({question.id for question in questions}) == len(questions)
    kinds = {"pope/random", "pope/popular", "pope/adversarial", "description", "rationale"}
    assert {question.metadata["kind"] for question in questions} == kinds


def test_the_benchmark_has_the_numbers_of_the_demo(folders):
    data, out, _ = folders
    scenes = benchmark.Scenes()
    inputs = scenes.load(data)
    scored = scenes.score(inputs, benchmark.read_predictions(data, out))
    values, estimates = scored.values(), benchmark.estimates(benchmark.count_predictions(data, out))
    assert values["pope/f1"] == estimates["pope"]["mean"]["f1"]
    assert values["chair_i"] == estimates["chair"]["i"]["value"]
    assert values["rationale_correct"] == pytest.approx(estimates["rationale_correct"]["value"], abs=1e-4)
    assert sum(parsed.right == 1 for parsed in scored.parsed_answers) == 6
    pairs = zip(inputs.questions, scored.parsed_answers, strict=True)
    named = {q.id: scenes.hallucinated(inputs, q, "A cup.", p) for q, p in pairs}
    assert {id: list(names) for id, names in named.items() if names} == {"description/1": ["cup"]}


def test_the_table_of_scores_has_every_arm_and_its_interval(folders):
    data, out, _ = folders
    scores = benchmark.estimates(benchmark.count_predictions(data, out))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.scores_table("Scores", {"before": scores, "after": scores}))
    lines = console.export_text().splitlines()
    assert {"before", "after"} <= {word for line in lines for word in line.split()}
    (row,) = (line for line in lines if "POPE mean F1" in line)
    low, high = scores["pope"]["mean"]["ci95"]
    assert row.count(f"0.500 {low:.2f}-{high:.2f}") == 2
