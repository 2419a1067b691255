"""Answer files: joined by id, whatever their order; whatever is wrong is one clear line."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reverie_jax.eval.benchmarks import answer_files
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, BenchmarkError, Question
from tests.eval.benchmarks.makers import (
    LETTER,
    dump,
    ids,
    lines,
    mmbench,
    mme,
    opened,
    pope,
    problem,
    rotations,
    said,
    scienceqa,
    seed,
    seed_question,
)


def make_pope(folder: Path) -> Path:
    rows = [(f"{n}.jpg", f"Is there a {thing} in the image?", "yes") for n, thing in enumerate(("cup", "dog", "car"))]
    return pope(folder, random=rows, adversarial=rows)


def make_mmbench(folder: Path) -> Path:
    rows = [*rotations(3, "What?", ["one", "two"], "A", hint="Look."), *rotations(5, "Who?", ["me", "you", "she"], "B")]
    mmbench(folder / "mmbench_dev_20230712.tsv", rows)
    return folder


def make_scienceqa(folder: Path) -> Path:
    texts = ("Which is iron?", "Which is wood?", "Which is glass?", "Which is tin?")
    return scienceqa(
        folder,
        {
            str(7 * n): problem(
                text, ["this", "that"], n % 2, image="image.png" if n % 2 else None, hint="Read." * (n == 1)
            )
            for n, text in enumerate(texts, 1)
        },
    )


def make_seed(folder: Path) -> Path:
    return seed(
        folder, [seed_question(id, kind, "A", text=f"What is {id}?") for id, kind in (("31", 1), ("v31", 10), ("8", 2))]
    )


def make_mme(folder: Path) -> Path:
    def pair(name: str) -> list[tuple[str, str]]:
        return [
            (f"Is it {name}? Please answer yes or no.", "Yes"),
            (f"Is it not {name} but a hat? Please answer yes or no.", "No"),
        ]

    return mme(folder, {"count": {"1.jpg": pair("one"), "2.jpg": pair("two")}, "scene": {"1.jpg": pair("a shop")}})


def make_gqa(folder: Path) -> Path:
    kinds = {"structural": "query", "semantic": "attr", "detailed": "x"}
    rows = {
        f"0{n}": {
            "question": f"What is {n}?",
            "answer": "red",
            "imageId": "n1",
            "types": kinds,
            "isBalanced": True,
            "semantic": [],
            "entailed": [],
            "groups": {"global": None, "local": "x"},
        }
        for n in range(3)
    }
    dump(folder / "testdev_balanced_questions.json", rows)
    return folder


def llava_id(name: str, question: Question) -> Any:
    """The id that LLaVA's file has for the question."""
    if name == "mme":
        task = "scene" if "shop" in question.text else "count"
        return f"{task}/{2 if 'two' in question.text else 1}.jpg"
    id = str(question.id)
    return int(id) if id.isdigit() and name != "scienceqa" and not id.startswith("0") else id


MAKE: dict[str, Callable[[Path], Path]] = {
    "pope": make_pope,
    "mmbench": make_mmbench,
    "scienceqa": make_scienceqa,
    "seed": make_seed,
    "mme": make_mme,
    "gqa": make_gqa,
}


@dataclasses.dataclass
class Case:
    bench: Benchmark
    loaded: BenchmarkData
    rows: list[dict[str, Any]]
    path: Path

    def read(self, rows: list[Any], **more: Any) -> dict[str, str]:
        return answer_files.read_answers(lines(self.path, rows), self.bench, self.loaded, **more)

    def refused(self, rows: list[Any], **more: Any) -> str:
        with pytest.raises(BenchmarkError) as error:
            self.read(rows, **more)
        message = str(error.value)
        assert "\n" not in message
        assert self.path.name in message
        return message


@pytest.fixture(params=MAKE)
def case(request, tmp_path):
    bench, loaded = opened(request.param, MAKE[request.param](tmp_path / "data"))
    rows = [
        said(llava_id(request.param, q), ("<image>\n" if q.image else "") + q.text, "AB"[n % 2])
        for n, q in enumerate(loaded.questions)
    ]
    return Case(bench, loaded, rows, tmp_path / "answers.jsonl")


def wanted(case: Case) -> dict[str, str]:
    return {id: row["text"] for id, row in zip(ids(case.loaded), case.rows, strict=True)}


def test_rows_of_llava_are_answers_by_id(case):
    assert case.read(case.rows) == wanted(case)


def test_order_of_rows_changes_nothing(case):
    scores = []
    for start in range(3):
        rows = random.Random(start).sample(case.rows, len(case.rows))
        found = case.read(rows)
        assert found == wanted(case)
        scores.append(case.bench.score(case.loaded, found).values())
    assert scores[0] == scores[1] == scores[2]
    assert scores[0] == case.bench.score(case.loaded, case.read(case.rows)).values()


def test_rows_of_ours_are_answers_by_id(case):
    rows = [{"question_id": q.id, "text": row["text"]} for q, row in zip(case.loaded.questions, case.rows, strict=True)]
    assert case.read(rows) == wanted(case)
    as_text = [{**row, "question_id": str(row["question_id"])} for row in rows]
    assert case.read(as_text) == wanted(case)


@pytest.mark.parametrize("name", ["text", "answer", "prediction"])
def test_answer_may_have_any_of_three_names(case, name):
    rows = [{"question_id": q.id, name: row["text"]} for q, row in zip(case.loaded.questions, case.rows, strict=True)]
    assert case.read(rows) == wanted(case)


def test_file_may_be_a_list(case):
    path = dump(case.path.with_suffix(".json"), case.rows)
    assert answer_files.read_answers(path, case.bench, case.loaded) == wanted(case)


def test_missing_answer_is_refused_and_counted_when_partial(case):
    message = case.refused(case.rows[:1] + case.rows[2:])
    assert f"1 of {len(case.rows)}" in message
    assert ids(case.loaded)[1] in message
    assert "--partial" in message
    found = case.read(case.rows[:1] + case.rows[2:], partial=True)
    assert set(found) == set(ids(case.loaded)) - {ids(case.loaded)[1]}
    case.bench.score(case.loaded, found)


@pytest.mark.parametrize("partial", [False, True])
def test_repeated_answer_is_refused(case, partial):
    message = case.refused([*case.rows, case.rows[0]], partial=partial)
    assert "twice" in message
    assert ids(case.loaded)[0] in message


@pytest.mark.parametrize("partial", [False, True])
def test_unknown_id_is_refused(case, partial):
    own = [{"question_id": q.id, "text": "A"} for q in case.loaded.questions]
    message = case.refused([*own, {"question_id": 987_654_321, "text": "A"}], partial=partial)
    assert "987654321" in message


@pytest.mark.parametrize(
    "row",
    [
        "{",
        '{"question_id": 1, "text": "A"',
        "3",
        "null",
        '["A"]',
        '"A"',
        '{"text": "A"}',
        '{"question_id": null, "text": "A"}',
    ],
)
def test_broken_row_is_refused(case, row):
    case.refused([*case.rows, row])
    case.refused([row, *case.rows], partial=True)


@pytest.mark.parametrize("text", [None, 3, ["A"], {"A": 1}, True], ids=repr)
def test_text_that_is_no_text_is_refused(case, text):
    message = case.refused([{**case.rows[0], "text": text}, *case.rows[1:]])
    assert "text" in message


def test_another_question_under_the_same_id_is_refused(case):
    """The sign of another version of the labels: an id that means another question."""
    first, second, *rest = case.rows
    first, second = {**first, "prompt": second["prompt"]}, {**second, "prompt": first["prompt"]}
    if case.bench.name == "mme":  # the question is part of its id: two of one picture change places and stay right
        return
    case.refused([first, second, *rest])
    case.refused([first], partial=True)


def test_longer_version_of_the_questions_is_refused(case):
    """3,000 answers for 2,910 questions, or the other way round."""
    part = dataclasses.replace(case.loaded, questions=case.loaded.questions[:-1])
    with pytest.raises(BenchmarkError) as error:
        answer_files.read_answers(lines(case.path, case.rows), case.bench, part)
    assert "\n" not in str(error.value)


def test_empty_text_is_an_answer(case):
    rows = [{**row, "text": ""} for row in case.rows]
    assert set(case.read(rows).values()) == {""}
    case.bench.score(case.loaded, case.read(rows))


def test_text_may_hold_any_character(case):
    odd = "No\u2028\x85 caf\u00e9\n\t\u7b54"
    assert set(case.read([{**row, "text": odd} for row in case.rows]).values()) == {odd}


def test_empty_and_missing_files_are_refused(case):
    case.path.write_text("", "utf-8")
    for path in (case.path, case.path.with_name("none.jsonl"), case.path.parent):
        with pytest.raises(BenchmarkError) as error:
            answer_files.read_answers(path, case.bench, case.loaded)
        assert "\n" not in str(error.value)


def test_prompt_without_suffix_or_marker_is_the_question(case):
    """LLaVA's MMBench file has neither; spaces and line ends may differ."""
    for change in (
        lambda text: text.replace("<image>\n", ""),
        lambda text: text.replace(f"\n{LETTER}", ""),
        lambda text: f"  {text} \n",
    ):
        assert case.read([{**row, "prompt": change(row["prompt"])} for row in case.rows]) == wanted(case)


def test_older_pope_questions_are_not_taken_for_newer_ones(tmp_path):
    """The random split agrees for the first few rows alone; afterwards an id is another question."""

    def rows(names: list[str]) -> list[tuple[str, str, str]]:
        return [("a.jpg", f"Is there a {name} in the image?", "yes") for name in names]

    old, new = ["cup", "dog", "car"], ["cup", "car", "dog", "hat"]
    bench, older = opened("pope", pope(tmp_path / "old", random=rows(old)))
    _, newer = opened("pope", pope(tmp_path / "new", random=rows(new)))
    path = lines(tmp_path / "a.jsonl", [said(q.id, q.text, "Yes") for q in older.questions])
    assert len(answer_files.read_answers(path, bench, older)) == 3
    with pytest.raises(BenchmarkError, match="version"):
        answer_files.read_answers(path, bench, newer)
    bare = lines(tmp_path / "b.jsonl", [{"question_id": q.id, "text": "Yes"} for q in older.questions])
    with pytest.raises(BenchmarkError, match="version"):
        answer_files.read_answers(bare, bench, newer)


def test_score_of_joined_rows_is_not_that_of_rows_by_order(tmp_path):
    """Zipping by position, as upstream, would give another score to the same rows."""
    bench, loaded = opened("pope", make_pope(tmp_path / "data"))
    rows = [{"question_id": q.id, "text": "Yes" if n % 2 else "No"} for n, q in enumerate(loaded.questions)]
    path = lines(tmp_path / "a.jsonl", rows[::-1])
    found = answer_files.read_answers(path, bench, loaded)
    by_order = {
        id: json.loads(line)["text"] for id, line in zip(ids(loaded), path.read_text().splitlines(), strict=True)
    }
    assert found != by_order
    assert (
        bench.score(loaded, found).values()
        == bench.score(loaded, {str(r["question_id"]): r["text"] for r in rows}).values()
    )
