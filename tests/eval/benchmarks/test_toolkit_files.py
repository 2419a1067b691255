"""Answer files of lmms-eval and VLMEvalKit, and POPE's splits in one file: joined with the right questions, or refused."""

from __future__ import annotations

import itertools
import json
from pathlib import PurePosixPath
from typing import Any

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.eval import score as scores
from reverie_jax.eval.benchmarks import answer_files
from tests.eval.benchmarks import makers as make
from tests.eval.benchmarks.samples import SAMPLES, answer_all, load, refused
from tests.eval.benchmarks.test_answer_files import LABELS, own_form, pope, right, without

__all__ = ["pope"]  # a fixture

TABLES = {
    "a.xlsx": lambda path, rows: pandas.DataFrame(rows).to_excel(path, index=False),
    "a.tsv": lambda path, rows: pandas.DataFrame(rows).to_csv(path, sep="\t", index=False),
    "a.json": lambda path, rows: path.write_text(json.dumps(rows)),
}

# POPE's splits in one file, without a word about which is which.

JOINED = {
    "ids and prompts": lambda rows, split: rows,
    "lmms-eval's samples": lambda rows, split: [
        {
            "doc_id": n,
            "input": row["prompt"],
            "target": "no",
            "filtered_resps": [row["text"]],
            "pope_accuracy": {"question_id": str(row["question_id"]), "score": 1.0, "prediction": "x"},
        }
        for n, row in enumerate(rows)
    ],
    "POPE's own form": lambda rows, split: own_form(rows),
    "ids and categories": lambda rows, split: [{**row, "category": split} for row in without(rows, "prompt")],
}


@pytest.mark.parametrize("order", list(itertools.permutations(LABELS)))
@pytest.mark.parametrize("kind", JOINED)
def test_splits_in_one_file_are_told_apart(pope, tmp_path, kind, order):
    bench, loaded = pope
    rows = [row for split in order for row in JOINED[kind](right(loaded, split), split)]
    path = make.write_lines(tmp_path / "a.jsonl", rows)
    answers = answer_all(loaded, lambda q: "Yes" if q.metadata["label"] else "No")
    assert answer_files.read_answers(path, bench, loaded) == answers
    assert scores.score(bench, loaded, path, draws=0).metrics["f1"] == 1


def test_splits_in_one_file_that_nothing_tells_apart_are_refused(pope, tmp_path):
    bench, loaded = pope
    parts = [right(loaded, split) for split in LABELS]
    files = {
        "ids alone": [row for part in parts for row in without(part, "prompt")],
        "sorted by id": [row for rows in zip(*parts, strict=True) for row in rows],
        "a split twice": [*parts[0], *parts[0]],
        "a category against the prompts": [{**parts[0][0], "category": "popular"}, *parts[0][1:]],
        "own form, one row less": [row for part in parts for row in own_form(part)][:-1],
        "own form, shuffled": [row for part in parts for row in own_form(part)][::-1],
        "own form of the same questions": own_form(parts[0]) * 3,
    }
    for name, rows in files.items():
        with refused(path := make.write_lines(tmp_path / f"{name}.jsonl", rows)):
            answer_files.read_answers(path, bench, loaded, partial=True)


def test_abbreviations_of_splits_in_file_names(pope, tmp_path):
    bench, loaded = pope
    for name, split in (
        ("samples_pope_adv", "adversarial"),
        ("samples_pope_pop", "popular"),
        ("pope_random", "random"),
    ):
        path = make.write_lines(tmp_path / f"{name}.jsonl", without(right(loaded, split), "prompt"))
        found = answer_files.read_answers(path, bench, loaded, partial=True)
        assert found.keys() == {str(q.id) for q in loaded.questions if q.metadata["split"] == split}
    with refused("samples_pope.jsonl"):  # which has no "pop" of its own
        path = make.write_lines(tmp_path / "samples_pope.jsonl", without(right(loaded, "random"), "prompt"))
        answer_files.read_answers(path, bench, loaded, partial=True)


# VLMEvalKit's tables: numbered anew, with the label as `answer`, and one row for the same question of several splits.


def pope_table(loaded: Any, *columns: str) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for q in loaded.questions:
        row = rows.setdefault(
            (q.image, q.metadata["plain"]),
            {
                "index": len(rows),
                "question": q.metadata["plain"],
                "answer": "Yes" if q.metadata["label"] else "No",
                "category": [],
                "image_path": f"/data/POPE/{PurePosixPath(q.image).stem}.png",
                "prediction": f"{'Yes' if q.metadata['label'] else 'No'}, {len(rows)}",
            },
        )
        row["category"].append(q.metadata["split"])
    told = [{**row, "category": ",".join(row["category"])} for row in rows.values()]
    return [{name: row[name] for name in (*columns, "index", "question", "category", "prediction")} for row in told]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("columns", [(), ("answer",), ("answer", "image_path")])
def test_tables_of_pope(pope, tmp_path, name, columns):
    bench, loaded = pope
    TABLES[name](path := tmp_path / name, pope_table(loaded, *columns))
    found = answer_files.read_answers(path, bench, loaded)
    assert {id: text.partition(",")[0] for id, text in found.items()} == answer_all(
        loaded, lambda q: "Yes" if q.metadata["label"] else "No"
    )
    assert len(set(found.values())) == 10  # the first question is one row for all splits
    assert scores.score(bench, loaded, path, "vlmevalkit", draws=0).metrics["Overall"] == 100


def test_tables_of_pope_that_do_not_tell_the_image_or_the_split(tmp_path):
    rows = [(f"{n}.jpg", "Is there a cup in the image?", "yes") for n in range(2)]
    bench, loaded = load("pope", make.pope(tmp_path, random=rows, popular=rows))
    table = pope_table(loaded, "image_path")
    TABLES["a.tsv"](path := tmp_path / "a.tsv", table)
    found = answer_files.read_answers(path, bench, loaded)
    assert {q.image: found[str(q.id)] for q in loaded.questions} == {"0.jpg": "Yes, 0", "1.jpg": "Yes, 1"}
    assert len(found) == 4
    for change in ({"image_path": "7.png"}, {"category": ""}, {"category": "often"}, {"category": "adversarial"}):
        TABLES["a.tsv"](path, [{**row, **change} for row in table])
        with refused(path, "row 0"):
            answer_files.read_answers(path, bench, loaded)
    TABLES["a.tsv"](path, without(table, "image_path"))
    with refused(path, "image_path"):
        answer_files.read_answers(path, bench, loaded)


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_mme(cases, tmp_path, name):
    case = cases("mme")
    answers = {str(q.id): "Yes" if q.metadata["label"] == "yes" else "No" for q in case.loaded.questions}
    table = [
        {
            "index": n,
            "question": q.metadata["plain"],
            "answer": q.metadata["label"].title(),
            "category": q.metadata["task"],
            "image_path": q.image,
            "prediction": answers[str(q.id)],
        }
        for n, q in enumerate(case.loaded.questions)
    ]
    for rows in (table, without(table, "answer"), without(table, "image_path")):
        TABLES[name](path := tmp_path / name, rows)
        assert answer_files.read_answers(path, case.bench, case.loaded) == answers
    TABLES[name](path, [{**row, "category": "scene"} for row in table])
    with refused(path, "scene"):
        answer_files.read_answers(path, case.bench, case.loaded)


def test_tables_of_mme_that_do_not_tell_the_image(tmp_path):
    pair = [("Is it a cat? Please answer yes or no.", "Yes"), ("Is it a dog? Please answer yes or no.", "No")]
    bench, loaded = load("mme", make.mme(tmp_path / "mme", {"count": {"1.jpg": pair, "2.jpg": pair}}))
    table = [
        {
            "index": n,
            "question": q.metadata["plain"],
            "category": "count",
            "image_path": q.image,
            "prediction": f"Yes {n}",
        }
        for n, q in enumerate(loaded.questions)
    ]
    TABLES["a.tsv"](path := tmp_path / "a.tsv", table)
    assert list(answer_files.read_answers(path, bench, loaded).values()) == [f"Yes {n}" for n in range(4)]
    TABLES["a.tsv"](path, without(table, "image_path"))
    with refused(path, "image_path"):
        answer_files.read_answers(path, bench, loaded)


# lmms-eval's samples.


def document(name: str, question: Any) -> dict[str, Any]:
    """Return what lmms-eval's datasets say of a question."""
    asked = {"question": question.metadata.get("plain", question.text), "answer": "label"}
    told = question.metadata
    match name:
        case "pope":
            return asked | {"question_id": str(question.id % 10_000_000), "category": told["split"], "id": "7"}
        case "mme":
            return asked | {"question_id": question.cluster, "category": told["task"]}
        case "mmbench" | "mmbench-cn":
            return asked | {"index": question.id, **told["options"], "category": told["category"]}
        case "hallusionbench":
            return {**told["row"], **asked}
        case "gqa" | "amber":
            return asked | {"question_id" if name == "gqa" else "id": question.id}
    return asked | {"question_id": question.id}


def sample(name: str, number: int, question: Any, text: str, form: str) -> dict[str, Any]:
    doc, prompt = document(name, question), f"{question.text}\nBriefly."
    row = {"doc_id": number, "target": "label", "doc_hash": "x", "exact_match": 1.0}
    if form == "first versions":
        return row | {"doc": doc, "resps": [[text]], "filtered_resps": [text], "arguments": [[prompt, {"until": "x"}]]}
    kept = {"input": prompt, "some_score": {**doc, "score": 1.0, "prediction": "parsed"}, "filtered_resps": [text]}
    return row | kept | ({"resps": [[text]], "filtered_resps": ["parsed"]} if form == "filtered" else {})


@pytest.mark.parametrize("form", ["first versions", "filtered", "now", "a log"])
@pytest.mark.parametrize(
    "name", sorted(set(SAMPLES) - {"chair", "object-halbench", "mmhal", "gavie", "llava-bench-coco"})
)
def test_samples_of_lmms_eval(cases, tmp_path, name, form):
    case = cases(name)
    rows = [
        sample(name, n, q, case.answers[str(q.id)], "first versions" if form == "a log" else form)
        for n, q in enumerate(case.loaded.questions)
    ]
    path = tmp_path / f"2026_samples_{name}.jsonl"
    if form == "a log":
        path = make.write_json(path.with_suffix(".json"), {"args": {"tasks": name}, "model_configs": {}, "logs": rows})
    else:
        make.write_lines(path, rows)
    assert answer_files.read_answers(path, case.bench, case.loaded) == case.answers


@pytest.mark.parametrize("kept", [lambda q: True, lambda q: q.image is not None])
def test_samples_that_name_no_question_are_joined_by_position_if_all_prompts_agree(cases, tmp_path, kept):
    """As those of ScienceQA, whose dataset has no ids."""
    case = cases("scienceqa")
    questions = [q for q in case.loaded.questions if kept(q)]
    rows = [
        {"doc_id": n, "input": q.text, "target": "A", "filtered_resps": [case.answers[str(q.id)]]}
        for n, q in enumerate(questions)
    ]
    for order in (rows, rows[::-1]):
        found = case.read(tmp_path / "a.jsonl", order, partial=True)
        assert found == {str(q.id): case.answers[str(q.id)] for q in questions}
    case.rejects(
        tmp_path / "a.jsonl", [{**row, "doc_id": len(rows) - 1 - row["doc_id"]} for row in rows], "question_id"
    )
    case.rejects(tmp_path / "a.jsonl", without(rows, "input"), "question_id")
    case.rejects(tmp_path / "a.jsonl", [*rows, {**rows[0], "doc_id": 99}], "question_id")


BAD_ANSWERS = {
    "several": [["Yes", "No"]],
    "several lists": [["Yes"], ["No"]],
    "none": [],
    "a likelihood": [[-1.5, False]],
    "a number": [3],
}


@pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_samples_without_one_text_are_refused(cases, tmp_path, answer):
    case = cases("scienceqa")
    rows = [sample("scienceqa", n, q, "A", "now") for n, q in enumerate(case.loaded.questions)]
    rows[1]["filtered_resps"] = answer
    case.rejects(tmp_path / "a.jsonl", rows, "row 1", "resps")


@settings(max_examples=20)
@given(st.permutations(list(LABELS)), st.lists(st.booleans(), min_size=12, max_size=12))
def test_answers_to_joined_splits_go_to_their_questions(pope, tmp_path_factory, order, words):
    bench, loaded = pope
    said = dict(zip((str(q.id) for q in loaded.questions), words, strict=True))
    rows = []
    for split in order:
        questions = [q for q in loaded.questions if q.metadata["split"] == split]
        rows += [
            {"question_id": n, "prompt": q.text, "text": "Yes" if said[str(q.id)] else "No"}
            for n, q in enumerate(questions, 1)
        ]
    path = make.write_lines(tmp_path_factory.mktemp("joined") / "a.jsonl", rows)
    found = answer_files.read_answers(path, bench, loaded)
    assert found == {id: "Yes" if yes else "No" for id, yes in said.items()}
