"""Descriptions, rationales and whole runs on scenes made by hand; every number is counted on paper."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from reverie_jax.eval.benchmarks.interface import BenchmarkError, Question
from reverie_jax.scenes import benchmark, dataset, report, scoring
from tests.scenes.makers import about, make_object, make_scene

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


# text: (claims, true claims, whether one of them is about the cup, which the question is about)
RATIONALES = {
    "There is a red cup on the left.": (1, 1, 1),
    "There is a blue cup on the left.": (1, 0, 1),
    "There are two green apples.": (1, 1, 0),
    "There are three green apples.": (1, 0, 0),
    "There is no fork.": (1, 1, 0),
    "There is no cup.": (1, 0, 1),
    "The cup is left of the plate.": (3, 3, 1),  # the relation, the cup and the plate
    "The plate is left of the cup.": (3, 2, 1),
    "This is wrong because a teapot is often seen with a cup, but there is no teapot. There is a red cup.": (2, 2, 1),
    "There is a fork, and there is a red cup.": (2, 1, 1),
    "A teapot is often seen with a cup.": (0, 0, 0),
    "It just is so.": (0, 0, 0),
    "": (0, 0, 0),
}


@pytest.mark.parametrize("text", RATIONALES, ids=repr)
def test_claims_of_a_rationale_are_checked(text):
    rationale = scoring.check_rationale(TABLE, text, "What colour is the cup?")
    claims, true, relevant = RATIONALES[text]
    assert rationale.text == text
    assert (len(rationale.checked), sum(holds for _, holds in rationale.checked)) == (claims, true)
    assert rationale.correct == (claims > 0 and claims == true)
    assert rationale.relevant == relevant


def test_counts_of_rationales():
    checked = [scoring.check_rationale(TABLE, text, "What colour is the cup?") for text in RATIONALES]
    claims, true, relevant = (sum(column) for column in zip(*RATIONALES.values(), strict=True))
    correct = sum(c > 0 and c == t for c, t, _ in RATIONALES.values())
    assert scoring.rationale_counts(checked).tolist() == [13, correct, claims, true, 3, relevant]
    assert scoring.rationale_counts([]).tolist() == [0] * 6


YES, NO = ("Yes", "No"), ("No", "Yes")
# (right answer, confusing answer), answer of a model: whether it is right
SHORT_ANSWERS = [
    (YES, "Yes, there is.", True),
    (YES, "No.", False),
    (NO, "There is not.", True),
    (("red", "blue"), "It is RED.", True),
    (("red", "blue"), "red or blue", False),
    (("red", "blue"), "Redder.", False),
    (("red", "blue"), "", False),
    (("on the left", "on the right"), "left", False),
    (("the cup", "the plate"), "A cup.", True),
]


@pytest.mark.parametrize(("sides", "text", "right"), SHORT_ANSWERS)
def test_a_short_answer_is_right_by_its_words(sides, text, right):
    assert benchmark.is_right(ask("skill/count", 0, "a", sides), text) == right


def ask(kind: str, number: int, image: str, sides: tuple[str, str] | None) -> Question:
    metadata = {"kind": kind, "about": "Is the cup red?", **dict(zip(("answer", "wrong"), sides or (), strict=False))}
    return Question(f"{kind}/{number}", image, "?", image, metadata)


# kind, picture, right answer, probability of Yes, answer, what it adds to the columns of its kind
COUNTED = [
    ("pope/random", 0, YES, 0.95, "Yes", [1, 0, 0, 0]),  # TP, FP, TN, FN
    ("pope/random", 0, NO, 0.65, "Yes", [0, 1, 0, 0]),
    ("pope/popular", 0, NO, 0.05, "No", [0, 0, 1, 0]),
    ("pope/adversarial", 1, YES, 0.25, "No", [0, 0, 0, 1]),
    ("skill/count", 0, YES, 1.0, "Yes", [1, 1, 1]),  # right, asked, yes
    ("skill/count", 0, NO, 0.68, "Yes", [0, 1, 1]),
    ("skill/two-step", 1, NO, None, "No", [1, 1, 0]),
    ("skill/two-step", 1, ("red", "blue"), None, "red", [0, 0, 0]),
    ("skill/relation", 1, ("the cup", "the fork"), 0.9, "the fork", [0, 0, 0]),
    ("description", 0, None, None, "A cup and a fork.", [2, 1, 1, 1, 3, 1]),
    ("description", 1, None, None, "A cat and a dog.", [2, 0, 1, 0, 2, 2]),
    ("rationale", 0, None, None, "There is a red cup.", [1, 1, 1, 1, 0, 1]),
    ("rationale", 0, None, None, "There is a fork.", [1, 0, 1, 0, 0, 0]),
    ("rationale", 1, None, None, "Because.", [1, 0, 0, 0, 1, 0]),
]
SCORES = {
    "pope/random/f1": 2 / 3,
    "pope/accuracy": (1 / 2 + 1 + 0) / 3,
    "pope/yes_ratio": (1 + 0 + 0) / 3,
    "skills": (1 / 2 + 1) / 2,  # of the skills that are asked for
    "skills/yes_ratio": (1 + 0) / 2,
    "short_answers": 1 / 2,
    # By tenths of probability: 0.95 and 1.0 for Yes; 0.65 and 0.68 for No; 0.05 for No; 0.25 for Yes.
    "calibration_error": (0.05 + (0.65 + 0.68) + 0.05 + 0.75) / 6,
    "chair_i": 1 / 4,
    "chair_s": 1 / 2,
    "coverage": 3 / 5,
    "object_f1": 2 * 0.75 * 0.6 / 1.35,
    "rationale_correct": 1 / 3,
    "rationale_relevant": 1 / 3,
    "rationale_empty": 1 / 3,
    "claims_true": 1 / 2,
}


def test_every_column_and_score_is_as_counted_by_hand():
    columns = benchmark.COLUMNS
    expected, answers, chances = np.zeros((2, columns["rationale"].stop)), {}, {}
    questions = [ask(kind, n, "ab"[picture], sides) for n, (kind, picture, sides, *_) in enumerate(COUNTED)]
    for question, (kind, picture, sides, chance, text, counts) in zip(questions, COUNTED, strict=True):
        answers[question.id] = text
        expected[picture, columns[kind]] += counts
        if sides not in (None, YES, NO):
            expected[picture, columns["short"]] += (text == sides[0], 1)
        if chance is not None:
            chances[question.id] = chance
            bins = expected[picture, columns["calibration"]].reshape(10, 2)
            bins[min(9, int(10 * chance))] += (chance - (sides == YES), 1) if sides in (YES, NO) else 0
    counts = benchmark.count_answers({"a": TABLE, "b": PETS}, questions, answers, chances)
    np.testing.assert_allclose(counts, expected, rtol=0, atol=1e-12)
    assert {name: float(benchmark.METRICS[name](counts.sum(0))) for name in SCORES} == pytest.approx(SCORES, abs=1e-12)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Two images, POPE questions on both, and predictions that are right for the first alone."""
    data, out = tmp_path / "data", tmp_path / "out"
    out.mkdir()
    names = dataset.write_images(data, [TABLE, PETS], 8)
    questions = ((0, "cup", "yes"), (0, "cat", "no"), (1, "cat", "yes"), (1, "cup", "no"))
    for file in dataset.POPE_FILES.values():
        rows = [
            {"question_id": id, "image": names[image], "text": f"Is there a {category} in the image?", "label": label}
            for id, (image, category, label) in enumerate(questions, 1)
        ]
        write_rows(data / file, rows)
    rows = []
    for question in benchmark.build_questions(data):
        first, kind = question.image == names[0], question.metadata["kind"]
        texts = {"description": ("A red cup.", "A cup."), "rationale": ("There is a red cup.", "A fish.")}
        sides = texts.get(kind) or (question.metadata["answer"], question.metadata["wrong"])
        yes = 0.9 if sides[0] == "Yes" else 0.2
        rows.append({"question_id": question.id, "text": sides[not first], "metadata": {"yes": yes}})
    write_rows(out / "predictions.jsonl", rows[::-1])
    return data, out


def test_scores_of_a_folder_are_those_counted_by_hand(folders):
    counts, columns = benchmark.count_predictions(*folders), benchmark.COLUMNS
    for split in dataset.POPE_FILES:
        assert counts[:, columns[f"pope/{split}"]].tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    asked = [question.metadata for question in benchmark.build_questions(folders[0]) if question.image == "000000.png"]
    for skill in ("attribute", "count", "relation", "comparison", "two-step"):
        pairs = sum(q["kind"] == f"skill/{skill}" and q["answer"] in YES for q in asked)
        assert counts[0, columns[f"skill/{skill}"]].tolist() == [pairs, pairs, pairs / 2]
    assert counts[:, columns["description"]].tolist() == [[1, 0, 1, 0, 3, 1], [1, 1, 1, 1, 2, 0]]
    relevant = ["cup" in about(TABLE, q["about"]) for q in asked if q["kind"] == "rationale"]
    assert counts[0, columns["rationale"]].tolist() == [*[len(relevant)] * 4, 0, sum(relevant)]
    bins = counts[:, columns["calibration"]].sum(0).reshape(10, 2)
    np.testing.assert_allclose(bins[:, 0], bins[:, 1] * (0, 0, 0.2, 0, 0, 0, 0, 0, 0, -0.1))
    # A run differs from itself by nothing, and counts of two runs add up.
    for estimate in benchmark.differences(counts, counts).values():
        assert estimate == {"value": 0, "ci95": [0, 0]}
    assert benchmark.estimates(counts + counts) == benchmark.estimates(counts)


@pytest.mark.parametrize("id", ["pope/random/1", "description/0", "rationale/0"])
def test_missing_predictions_are_named(folders, id):
    data, out = folders
    path = out / "predictions.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if f'"{id}"' not in line))
    with pytest.raises(BenchmarkError, match=id):
        benchmark.count_predictions(data, out)
    assert benchmark.count_predictions(data, out, partial=True).shape == (2, benchmark.COLUMNS["rationale"].stop)


def test_an_unknown_image_is_named(folders):
    path = folders[0] / dataset.POPE_FILES["popular"]
    path.write_text(path.read_text().replace("000001.png", "000009.png"))
    with pytest.raises(BenchmarkError, match=rf"{path.name}.*000009\.png"):
        benchmark.build_questions(folders[0])


def test_every_question_has_its_own_id(folders):
    questions = benchmark.build_questions(folders[0])
    assert len({question.id for question in questions}) == len(questions)
    assert {question.metadata["kind"] for question in questions} <= benchmark.COLUMNS.keys()


def test_the_benchmark_has_the_numbers_of_the_demo(folders):
    data, out = folders
    scenes = benchmark.Scenes()
    inputs = scenes.load(data)
    scored = scenes.score(inputs, benchmark.read_predictions(data, out))
    values, estimates = scored.values(), benchmark.estimates(benchmark.count_predictions(data, out))
    assert values.keys() == estimates.keys() - {"calibration_error"}
    for name, value in values.items():
        assert value == pytest.approx(estimates[name]["value"], abs=1e-4)
    pairs = list(zip(inputs.questions, scored.parsed_answers, strict=True))
    assert all((parsed.right == 1) == (q.image == "000000.png") for q, parsed in pairs if "answer" in q.metadata)
    named = {q.id: scenes.hallucinated(inputs, q, "A cup.", p) for q, p in pairs}
    assert {id: list(names) for id, names in named.items() if names} == {"description/1": ["cup"]}


def test_the_table_of_scores_has_every_arm_and_its_interval(folders):
    data, out = folders
    scores = benchmark.estimates(benchmark.count_predictions(data, out))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.scores_table("Scores", {"before": scores, "after": scores}))
    lines = console.export_text().splitlines()
    assert {"before", "after"} <= {word for line in lines for word in line.split()}
    (row,) = (line for line in lines if "POPE F1" in line)
    low, high = scores["pope/f1"]["ci95"]
    assert row.count(f"0.500 {low:.2f}-{high:.2f}") == 2
