"""What holds for every benchmark and every rule: loading, answer files, scores, judges, exports."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest

from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks import _BUILT_IN, answer_files, find_benchmark, inputs
from reverie_jax.eval.benchmarks.interface import BenchmarkError, NotScorable
from tests.eval.benchmarks.makers import HALLUSION, LETTER, answer_row, mmhal_rows, write_json, write_lines
from tests.eval.benchmarks.samples import SAMPLES, answer_all, build, check, ids, prompts, refused

NAMES = tuple(SAMPLES)
RULES = [(name, rule) for name in NAMES for rule in find_benchmark(name).rules]
JUDGED = [(name, rule) for name, rule in RULES if rule in find_benchmark(name).judged_rules]
MAX_NEW_TOKENS = dict.fromkeys(SAMPLES, 1024) | {"chair": 512, "gavie": 512}
MAX_NEW_TOKENS |= dict.fromkeys(("pope", "mme", "seed", "gqa", "textvqa", "hallusionbench"), 128)
"""LLaVA's limits, or those of the benchmark's protocol."""


@pytest.fixture(params=NAMES)
def case(request, cases):
    return cases(request.param)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


def test_every_benchmark_has_a_sample_and_a_limit():
    assert set(SAMPLES) == set(_BUILT_IN) == set(MAX_NEW_TOKENS)
    assert {name: find_benchmark(name).max_new_tokens for name in SAMPLES} == MAX_NEW_TOKENS
    with pytest.raises(UserError, match="no-such"):
        find_benchmark("no-such")


def test_questions_have_unique_ids_and_images(case):
    loaded = case.loaded
    assert len(set(ids(loaded))) == len(loaded.questions)
    assert all(question.cluster and question.text for question in loaded.questions)
    assert all(loaded.read_image(q.image) for q in loaded.questions if q.image is not None)
    json.dumps(dict(loaded.protocol))
    with refused("123456789012"):
        loaded.read_image("123456789012")


UNREAD = {"query_generative.json", "query_discriminative.json", "safe_words.txt"}
UNREAD |= {f"{kind}_train2014.json" for kind in ("instances", "captions")}
"""Files of the samples that nothing is read of, or any text."""
OPTIONAL = {"coco_pope_random.json", "coco_pope_adversarial.json", "1.txt", "2.txt", "vg_annotation.json"}
OPTIONAL |= {"llava_textvqa_val_v051_ocr.jsonl", "query_all.json"}


@pytest.mark.parametrize("name", NAMES)
def test_missing_and_invalid_files_are_named(name, tmp_path):
    with refused(tmp_path, build(name).required_files):
        build(name).load(tmp_path)
    data = SAMPLES[name](tmp_path)
    files = [path for end in ("json", "jsonl", "tsv", "txt") for path in data.rglob(f"*.{end}")]
    for path in files:
        if path.name in UNREAD:
            continue
        content = path.read_bytes()
        for broken in (b"{", b"3", b"[]", b"\xff"):
            path.write_bytes(broken)
            with refused(path.name):
                build(name).load(data)
        path.unlink()
        if path.name not in OPTIONAL:
            with refused(path.name):
                build(name).load(data)
        path.write_bytes(content)


UNIQUE = "unique ids"
ROWS = {
    ("pope", "coco_pope_random.json"): (
        *("question_id image text label", UNIQUE),
        *(("label", "maybe"), ("question_id", "four"), ("question_id", None)),
    ),
    ("scienceqa", "problems.json"): (
        "question choices answer",
        *(("answer", 5), ("choices", "x"), ("choices", ["x"])),
    ),
    ("seed", "SEED-Bench.json", "questions"): (
        *("answer choice_b data_id data_type question question_id question_type_id", UNIQUE),
        *(("answer", "E"), ("data_type", "sound"), ("question_type_id", 99)),
    ),
    ("gqa", "testdev_balanced_questions.json"): ("question imageId answer types", ("answer", None)),
    ("textvqa", "TextVQA_0.5.1_val.json", "data"): (
        *("question_id image_id question answers", UNIQUE),
        *(("answers", ["red"] * 9), ("answers", [3] * 10)),
    ),
    ("hallusionbench", "HallusionBench.json"): (
        *("category visual_input set_id figure_id question question_id gt_answer", UNIQUE),
        *(("gt_answer", "2"), ("category", None), ("visual_input", "3")),
    ),
    ("chair", "instances_val2014.json", "annotations"): ("image_id category_id", ("category_id", 777)),
    ("chair", "captions_val2014.json", "annotations"): ("image_id caption", ("caption", None)),
    ("object-halbench", "obj_halbench_300_with_image.jsonl"): (
        *("image_id question", UNIQUE),
        *(("image", "***"), ("question", 3), ("image_id", "x")),
    ),
    ("amber", "annotations.json"): ("id type truth", ("type", "x"), ("truth", 3)),
    ("amber", "query/query_all.json"): ("id image query", UNIQUE, ("query", 3)),
    ("mmhal", "response_template.json"): (
        "question gt_answer image_content question_type",
        *(("image_content", "Chair"), ("question", 3), ("question_type", "other")),
    ),
    ("llava-bench", "questions.jsonl"): ("question_id image text category", UNIQUE, ("category", "x"), ("text", 3)),
    ("llava-bench", "context.jsonl"): ("image caption",),
    ("llava-bench", "answers_gpt4.jsonl"): ("question_id text", UNIQUE, ("text", None)),
    ("llava-bench-coco", "caps_boxes_coco2014_val_80.jsonl"): ("image captions instances",),
    ("mm-vet", "mm-vet.json"): ("imagename question answer capability", ("answer", 3), ("capability", [])),
    ("gavie", "evaluation_set.json"): ("image_id question", ("question", 3)),
}
"""Of the rows of a file: fields that each must have, whether ids are unique, fields with values that are not allowed."""


@pytest.mark.parametrize("where", ROWS)
def test_invalid_and_duplicate_rows_are_named(where, tmp_path):
    name, file, *key = where
    path = SAMPLES[name](tmp_path) / file
    text = path.read_text("utf-8")
    lines = file.endswith(".jsonl") or file.startswith("coco_pope")
    fields, *faults = ROWS[where]
    edits = [lambda rows, field=field: rows[1].pop(field) for field in fields.split()]
    for fault in faults:
        if fault == UNIQUE:
            edits.append(lambda rows: rows.append(dict(rows[1])))
        else:
            edits.append(lambda rows, fault=fault: rows[1].update([fault]))
    for edit in edits:
        content = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
        rows = content[key[0]] if key else content
        edit(list(rows.values()) if isinstance(rows, dict) else rows)
        (write_lines if lines else write_json)(path, content)
        with refused(path.name):
            build(name).load(tmp_path)


def test_answers_are_joined_by_id_in_any_order(case, path):
    rows = case.rows
    assert case.read(path, rows) == case.answers
    shuffled = random.Random(0).sample(rows, len(rows))
    assert case.read(path, [{**row, "question_id": str(row["question_id"])} for row in shuffled]) == case.answers
    as_json = write_json(path.with_suffix(".json"), rows)
    assert answer_files.read_answers(as_json, case.bench, case.loaded) == case.answers
    for name in ("answer", "prediction"):
        assert case.read(path, [{"question_id": row["question_id"], name: row["text"]} for row in rows]) == case.answers


BROKEN = ["{", '{"question_id": 1, "text": "A"', "3", "null", '["A"]', '"A"', '{"text": "A"}']
BROKEN += ['{"question_id": null, "text": "A"}']


def test_missing_duplicate_unknown_and_invalid_rows_are_errors(case, path):
    rows, (first, missing) = case.rows, ids(case.loaded)[:2]
    case.rejects(path, rows[:1] + rows[2:], f"1 of {len(rows)}", missing, "--partial")
    assert set(case.read(path, rows[:1] + rows[2:], partial=True)) == set(case.answers) - {missing}
    for partial in (False, True):
        case.rejects(path, [*rows, rows[0]], first, partial=partial)
        case.rejects(path, [*rows, {"question_id": 987_654_321, "text": "A"}], "987654321", partial=partial)
    for broken in BROKEN:
        case.rejects(path, [*rows, broken])
        case.rejects(path, [broken, *rows], partial=True)
    for text in (None, ["A"], {"A": 1}, True):
        case.rejects(path, [{**rows[0], "text": text}, *rows[1:]])
    for text in ("No\u2028\x85 caf\u00e9\n\t\u7b54", ""):
        assert set(case.read(path, [{**row, "text": text} for row in rows]).values()) == {text}


def test_empty_and_missing_answer_files_are_errors(case, path):
    assert case.bench.match_question({}, case.loaded) is None
    path.write_text("", "utf-8")
    for wrong in (path, path.with_name("none.jsonl"), path.parent):
        with refused(wrong.name):
            answer_files.read_answers(wrong, case.bench, case.loaded)


LLAVA = {"pope", "mme", "mmbench", "mmbench-cn", "scienceqa", "seed", "gqa", "textvqa", "llava-bench", "mm-vet"}
"""Benchmarks that LLaVA writes answer files of."""


def llava_id(name: str, question: Any) -> Any:
    """Return the id that LLaVA's file has for a question."""
    if name == "mme":
        return question.id.partition("#")[0]
    if name == "textvqa":
        return question.image.removesuffix(".jpg")
    id = str(question.id).removeprefix("v1_")
    return int(id) if id.isdigit() and name != "scienceqa" and not id.startswith("0") else id


@pytest.mark.parametrize("name", sorted(LLAVA))
def test_answer_files_of_llava_are_read(cases, name, path):
    case = cases(name)
    questions = case.loaded.questions
    rows = [
        answer_row(llava_id(name, q), ("<image>\n" if q.image else "") + q.text, case.answers[str(q.id)])
        for q in questions
    ]
    for order in (rows, rows[::-1], rows[2:] + rows[:2]):
        assert case.read(path, order) == case.answers
    changes = (
        lambda text: text.replace("<image>\n", ""),
        lambda text: text.replace(f"\n{LETTER}", ""),  # as in LLaVA's file of MMBench
        lambda text: f"  {text} \n",
    )
    for change in changes if name != "textvqa" else changes[:1]:  # its layout tells the question
        assert case.read(path, [{**row, "prompt": change(row["prompt"])} for row in rows]) == case.answers
    case.rejects(path, [*rows, rows[0]])
    first, second = rows[:2]
    swapped = [{**first, "prompt": second["prompt"]}, {**second, "prompt": first["prompt"]}]
    # The prompt is a part of the ids of MME and TextVQA: two questions about an image may swap places.
    for odd in ([{**first, "prompt": "It is said so."}, second], swapped)[: 1 if name in ("mme", "textvqa") else 2]:
        if case.bench.unique_ids and name != "textvqa":  # ids decide, and a note tells the number of odd prompts
            file = answer_files.read_answer_file(write_lines(path, [*odd, *rows[2:]]), case.bench, case.loaded)
            assert file.texts == case.answers
            assert f"{len(odd) - (odd[1] == second)} of {len(rows)} answers" in file.notes[0]
        else:
            case.rejects(path, [*odd, *rows[2:]])
    part = dataclasses.replace(case.loaded, questions=questions[:-1])
    with pytest.raises(BenchmarkError):
        answer_files.read_answers(write_lines(path, rows), case.bench, part)


@pytest.mark.parametrize(("name", "rule"), RULES)
def test_score_is_sound_with_all_and_with_some_answers(cases, name, rule):
    case = cases(name)
    loaded = dataclasses.replace(case.loaded, questions=case.loaded.available)
    for answers in (case.answers, answer_all(loaded, ""), dict(list(case.answers.items())[1:])):
        scored = check(case.bench, loaded, answers, rule, replies=case.replies(answers, rule))
        by_id = {str(parsed.id): parsed for parsed in scored.parsed_answers}
        assert not any(by_id[id].right for id in set(ids(loaded)) - set(answers))
        json.dumps(dict(scored.protocol))


@pytest.mark.parametrize(("name", "rule"), JUDGED)
def test_judge_is_asked_about_every_answer_once_and_its_replies_are_needed(cases, name, rule):
    case = cases(name)
    requests = case.bench.judge_requests(case.loaded, case.answers, rule, prompts())
    names = [request.id for request in requests]
    assert len(names) == len(set(names)) > 0
    assert {id.partition("#")[0] for id in names} <= set(ids(case.loaded))
    assert all(request.image is None for request in requests)
    if not name.startswith("mmbench"):
        assert any("{question}" in request.prompt for request in requests)  # braces of an answer are kept
    short = ids(case.loaded)[0]
    answers = {id: text for id, text in case.answers.items() if id != short}
    fewer = case.bench.judge_requests(case.loaded, answers, rule, prompts())
    assert short not in {request.id.partition("#")[0] for request in fewer}
    for broken in ({}, dict.fromkeys(prompts(), "{nothing} {"), dict.fromkeys(prompts(), "{0}")):
        with refused(".txt"):
            case.bench.judge_requests(case.loaded, case.answers, rule, broken)
    answers = answer_all(case.loaded, "It is hard to say which it is.")
    replies = case.replies(answers, rule)
    with pytest.raises(NotScorable):
        case.bench.score(case.loaded, answers, rule, None)
    missing = next(iter(replies))
    del replies[missing]
    with refused(missing.partition("#")[0]):
        case.bench.score(case.loaded, answers, rule, replies)


def test_rules_without_a_judge_and_repeats_ask_nothing(case):
    for rule in set(case.bench.rules) - case.bench.judged_rules:
        assert case.bench.judge_requests(case.loaded, case.answers, rule, prompts()) == []
    if case.bench.name == "mm-vet":
        assert len(case.bench.with_repeats(3).judge_requests(case.loaded, case.answers, "official", prompts())) == 12
    with pytest.raises(BenchmarkError):
        case.bench.with_repeats(9)


LANGUAGE = dict.fromkeys(["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "CIDEr", "SPICE", "ROUGE_L"], 0)


def official_rows(name: str, file: str, rows: Any) -> Any:
    """Return the content of a file that an export of (question, answer) writes."""
    if name == "chair":
        shown = {q.cluster: {"image_id": q.id, "caption": text, **LANGUAGE} for q, text in rows}
        return {"overall": LANGUAGE, "imgToEval": shown}
    if name == "mm-vet":
        return {f"v1_{n}": text for n, (_, text) in enumerate(rows)}
    if name == "pope":
        rows = [(q, text) for q, text in rows if q.metadata["split"] in file]
    forms = {
        "pope": lambda q, text: {"question": q.text.partition("\n")[0], "answer": text},
        "gqa": lambda q, text: {"questionId": q.id, "prediction": text.lower().rstrip(".")},
        "seed": lambda q, text: {"question_id": str(q.id), "prediction": text},
        "hallusionbench": lambda q, text: {
            **next(row for row in HALLUSION if row["question"] == q.text),
            "model_prediction": text,
        },
        "amber": lambda q, text: {"id": q.id, "response": text},
        "mmhal": lambda q, text: {**mmhal_rows()[q.id], "model_answer": text},
        "gavie": lambda q, text: {"image_id": q.cluster, "question": q.text, "answer": text},
        "object-halbench": lambda q, text: {"image_id": q.id, "question": q.text, "answer": text},
        **dict.fromkeys(
            ("llava-bench", "llava-bench-coco"),
            lambda q, text: answer_row(q.id, q.text, text, answer_id=str(q.id), model_id=""),
        ),
    }
    return [forms[name](q, text) for q, text in rows]


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"mmbench", "mmbench-cn", "mme", "scienceqa"}))
def test_export_is_in_the_official_form_and_read_back(cases, name, tmp_path):
    """The files of MMBench, MME and ScienceQA are tested with them."""
    case = cases(name)
    paths = case.bench.export(case.loaded, case.answers, tmp_path / "new" / "folder")
    assert bool(paths) is (name != "textvqa")
    pairs = [(question, case.answers[str(question.id)]) for question in case.loaded.questions]
    for path in paths:
        text = path.read_text("utf-8")
        lines = path.suffix == ".jsonl" or name == "pope"
        found = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
        assert found == official_rows(name, path.name, pairs)
        if name not in ("gqa", "pope"):  # whose answers are changed, or have no id
            assert answer_files.read_answers(path, case.bench, case.loaded) == case.answers


def test_images_of_the_user_come_first(case, tmp_path):
    question = next(q for q in case.loaded.questions if q.image is not None)
    path = tmp_path / "images" / question.image
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    loaded = inputs.with_images(case.loaded, tmp_path / "images")
    assert loaded.read_image(question.image) == b"mine"
    path.unlink()
    assert loaded.read_image(question.image) == case.loaded.read_image(question.image)
    for named, read in (("none.jpg", loaded.read_image), ("leads out", inputs.image_reader(tmp_path))):
        with refused(named):
            read("none.jpg" if named == "none.jpg" else "../x.jpg")
    with refused("no-folder"):
        inputs.with_images(case.loaded, tmp_path / "no-folder")
    assert inputs.with_images(case.loaded, None) is case.loaded
