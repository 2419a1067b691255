"""HallusionBench: groups by question and by figure, causes of errors; the yes/no rules that need no judge."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.eval.benchmarks.makers import HALLUSION as ROWS
from tests.eval.benchmarks.makers import hallusionbench, shade, write_image, write_json
from tests.eval.benchmarks.samples import answer_all, check, find_question, ids, load, prompts

LABELS = [{"1": "yes", "0": "no"}[row["gt_answer"]] for row in ROWS]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return load("hallusionbench", hallusionbench(tmp_path_factory.mktemp("hallusion")))


def test_questions_are_bare_and_some_have_no_image(sample):
    _, loaded = sample
    assert [q.text for q in loaded.questions] == [row["question"] for row in ROWS]
    assert [q.image is None for q in loaded.questions] == [row["filename"] is None for row in ROWS]
    first, second = (find_question(loaded, part, "figure 1 question 0") for part in ("VD ocr", "VS ocr"))
    assert loaded.read_image(first.image) != loaded.read_image(second.image)


def test_images_may_be_one_folder_deeper(tmp_path):
    write_json(tmp_path / "HallusionBench.json", ROWS)
    write_image(tmp_path / "hallusion_bench" / "VS" / "ocr" / "0_1.png", 200)
    _, loaded = load("hallusionbench", tmp_path)
    assert shade(loaded.read_image(find_question(loaded, "VS ocr set 0 figure 1 question 0").image)) == 200


def right_groups(rows: list[dict], right: list[bool], *names: str, keep=lambda row: True) -> float:
    """Return the share of groups by those columns that are all right, in percent."""
    found: dict[tuple, list[bool]] = {}
    for row, good in zip(rows, right, strict=True):
        if keep(row):
            found.setdefault(tuple(row[name] for name in names), []).append(good)
    return 100 * sum(map(all, found.values())) / len(found) if found else 0.0


def official(rows: list[dict], codes: list[int], same: list[bool]) -> dict[str, float]:
    """Return the metrics of the published arithmetic, group by group."""
    right = [
        code == 1 or (code == 2 and row["category"] == "VS" and row["figure_id"] == "0")
        for row, code in zip(rows, codes, strict=True)
    ]
    question = ("category", "subcategory", "set_id", "question_id")
    figure = ("category", "subcategory", "set_id", "figure_id")
    origin = {
        tuple(row[name] for name in question): code
        for row, code in zip(rows, codes, strict=True)
        if row["figure_id"] == "0"
    }
    causes = [
        cause(row, code, origin[tuple(row[name] for name in question)], alike)
        for row, code, alike in zip(rows, codes, same, strict=True)
    ]
    errors = sum(kind != "" for kind in causes)
    says_yes = [good == (row["gt_answer"] == "1") for row, good in zip(rows, right, strict=True)]
    wrong = [row["gt_answer"] == "0" for row, good in zip(rows, right, strict=True) if not good]
    return {
        "aAcc": 100 * sum(right) / len(rows),
        "qAcc": right_groups(rows, right, *question),
        "fAcc": right_groups(rows, right, *figure, keep=lambda r: (r["category"], r["figure_id"]) != ("VS", "0")),
        "easy": right_groups(rows, right, *question, keep=lambda row: row["visual_input"] != "2"),
        "hard": right_groups(rows, right, *question, keep=lambda row: row["visual_input"] == "2"),
        "diff": (sum(says_yes) - sum(row["gt_answer"] == "1" for row in rows)) / len(rows),
        "fp": sum(wrong) / len(wrong) if wrong else 0.0,
        **{kind: 100 * causes.count(kind) / errors if errors else 0.0 for kind in ("LH", "VI", "Mixed")},
    }


def cause(row: dict, code: int, origin: int, alike: bool) -> str:
    """Return the cause of an error by the published table."""
    vision = row["category"] == "VD"
    if row["figure_id"] == "0":
        return ("VI" if code != 1 else "") if vision else ("LH" if code == 0 else "")
    if code == 1:
        return ""
    if vision:
        return "Mixed" if origin == 1 and code == 0 and alike else "VI"
    if origin == 0:
        return "LH" if code == 0 and alike else "Mixed"
    if origin == 1 and code == 0 and row["visual_input"] == "2" and alike:
        return "LH"
    return "VI"


def test_second_derivation_has_a_cause_for_every_error():
    for row, code, origin, alike in itertools.product(ROWS, (0, 1, 2), (0, 1, 2), (False, True)):
        blind = row["category"] == "VS" and row["figure_id"] == "0"
        assert bool(cause(row, code, origin, alike)) is (code == 0 or (code == 2 and not blind))


def judged(sample, codes: Mapping[str, str], same: Mapping[str, str]) -> dict[str, str]:
    """Return replies to all requests: a code for each answer, and for comparisons "same" or not."""
    bench, loaded = sample
    requests = bench.judge_requests(loaded, answer_all(loaded, "Yes, it is."), "official", prompts())
    return {r.id: (same if "#" in r.id else codes)[r.id.partition("#")[0]] for r in requests}


REPLIES = {0: "Incorrect.", 1: "The prediction is CORRECT", 2: "unclear"}


def score(sample, codes: list[int], same: list[bool], *, full: bool = True):
    bench, loaded = sample
    words = [["different", "Same"][alike] for alike in same]
    replies = judged(sample, answer_all(loaded, [REPLIES[code] for code in codes]), answer_all(loaded, words))
    answers = answer_all(loaded, "Yes, it is.")
    return (check if full else type(bench).score)(bench, loaded, answers, "official", replies=replies)


def test_metrics_are_those_of_the_published_arithmetic(sample):
    """All right and all wrong; then random codes, seeded: enough of them for every row of the table of causes."""
    rng, met = random.Random(0), set()
    drawn = [(rng.choices([0, 1, 2], k=len(ROWS)), rng.choices([False, True], k=len(ROWS))) for _ in range(14)]
    for turn, (codes, same) in enumerate([([1] * len(ROWS), [True] * 11), ([0] * len(ROWS), [True] * 11), *drawn]):
        values = score(sample, codes, same, full=turn < 3).values()
        expected = official(ROWS, codes, same)
        assert {name: values[name] for name in expected} == pytest.approx(expected)
        for part in ("VD", "VS"):
            kept = [row["category"] == part for row in ROWS]
            few = official(*(list(itertools.compress(column, kept)) for column in (ROWS, codes, same)))
            assert {name: values[f"{part}/{name}"] for name in few} == pytest.approx(few)
        met |= {(row["figure_id"], row["category"], *pair) for row, *pair in zip(ROWS, codes, same, strict=True)}
    assert len(met) == 30  # figures 0 and 1 of both parts and figure 2 of VS, three codes, the same or not


@pytest.mark.parametrize(
    ("reply", "alike"), [("same", True), ("not the SAME", True), ("different", False), ("", False)], ids=repr
)
def test_comparisons_are_parsed_as_published(sample, reply, alike):
    bench, loaded = sample
    codes = [0 if row["visual_input"] == "2" else 1 for row in ROWS]
    replies = judged(sample, answer_all(loaded, [REPLIES[code] for code in codes]), answer_all(loaded, reply))
    values = bench.score(loaded, answer_all(loaded, "No."), "official", replies=replies).values()
    expected = official(ROWS, codes, [alike] * len(ROWS))
    for name in ("LH", "VI", "Mixed"):
        assert values[name] == pytest.approx(expected[name])


def test_unclear_is_right_only_without_an_image(sample):
    scored = score(sample, [2] * len(ROWS), [False] * len(ROWS))
    assert [bool(parsed.right) for parsed in scored.parsed_answers] == [row["visual_input"] == "0" for row in ROWS]


def test_causes_are_left_out_without_comparisons(sample):
    bench, loaded = sample
    scored = bench.score(loaded, answer_all(loaded, "No."), "official", dict.fromkeys(ids(loaded), "incorrect"))
    assert "LH" not in scored.metrics
    assert "LH, VI and Mixed" in scored.protocol


def test_judge_reads_question_reference_and_answer(sample):
    bench, loaded = sample
    answers = answer_all(loaded, [f"My answer {n}." for n in range(len(ROWS))])
    requests = {r.id: r.prompt for r in bench.judge_requests(loaded, answers, "official", prompts())}
    for number, (id, row) in enumerate(zip(ids(loaded), ROWS, strict=True)):
        for part in (row["question"], row["gt_answer_details"], f"My answer {number}."):
            assert part in requests[id]
    last = find_question(loaded, "VS ocr", "figure 2 question 0")
    compared = requests[f"{last.id}#same"]  # with the answer about the first figure
    assert "My answer 8." in compared
    assert "My answer 4." in compared


def vlmevalkit(words: list[str]) -> dict[str, float]:
    """Return VLMEvalKit's metrics: rows with an image; groups without VD and VS, so those of "ocr" fall together."""
    pairs = [(row, word == label) for row, word, label in zip(ROWS, words, LABELS, strict=True) if row["filename"]]
    rows, right = map(list, zip(*pairs, strict=True))
    values = {
        "aAcc": 100 * sum(right) / len(right),
        "fAcc": right_groups(rows, right, "subcategory", "set_id", "figure_id"),
        "qAcc": right_groups(rows, right, "subcategory", "set_id", "question_id"),
    }
    return {"Overall": sum(values.values()) / 3, **values}


@settings(max_examples=10)
@given(st.lists(st.sampled_from(["Yes.", "no", "Yes and no"]), min_size=11, max_size=11))
def test_rules_without_a_judge(sample, texts):
    bench, loaded = sample
    words = [{"Yes.": "yes", "no": "no"}.get(text, "") for text in texts]
    values, expected = check(bench, loaded, answer_all(loaded, texts), "vlmevalkit").values(), vlmevalkit(words)
    assert next(iter(values)) == "Overall"
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    codes = [1 if word == label else 0 if word else 2 for word, label in zip(words, LABELS, strict=True)]
    values = check(bench, loaded, answer_all(loaded, texts), "yes-no").values()
    expected = official(ROWS, codes, [False] * len(ROWS))
    for name in ("aAcc", "qAcc", "fAcc", "diff", "fp"):
        assert values[name] == pytest.approx(expected[name])
