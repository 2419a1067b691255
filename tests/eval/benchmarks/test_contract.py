"""What holds for every benchmark and every rule: loading, answer files, scores, judges, exports."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks import _BUILT_IN, answer_files, find_benchmark, inputs
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, BenchmarkError, NotScorable
from tests.eval.benchmarks.makers import LETTER, answer_row, prompts, write_json, write_lines
from tests.eval.benchmarks.samples import SAMPLES, answer_all, build, check, ids

NAMES = tuple(SAMPLES)
RULES = [(name, rule) for name in NAMES for rule in find_benchmark(name).rules]
JUDGED = [(name, rule) for name, rule in RULES if rule in find_benchmark(name).judged_rules]
GAVIE = "Relevancy:\nscore of the answer1: 8\nreason: so\n\nAccuracy:\nscore of the answer1: 6\nreason: so"
REPLIES = {
    **{"mmhal": "Rating: 5", "gavie": GAVIE, "llava-bench": "8 6", "llava-bench-coco": "8 6", "mm-vet": "0.5"},
    **{"hallusionbench": "correct", "object-halbench": '["dog", "kite"]', "mmbench": "A", "mmbench-cn": "A"},
}
MAX_NEW_TOKENS = dict.fromkeys(SAMPLES, 1024) | {"chair": 512, "gavie": 512}
MAX_NEW_TOKENS |= dict.fromkeys(("pope", "mme", "seed", "gqa", "textvqa", "hallusionbench"), 128)
"""LLaVA's limits, or those of the benchmark's protocol."""


@dataclasses.dataclass
class Case:
    """A loaded sample, with answers to all of its questions."""

    bench: Benchmark
    loaded: BenchmarkData
    data: Path

    @property
    def answers(self) -> dict[str, str]:
        texts = ("A dog and a kite are here.", "Yes", "No, there is no {question} in it.")
        return {id: texts[n % 3] for n, id in enumerate(ids(self.loaded))}

    def replies(self, answers: dict[str, str], rule: str) -> dict[str, str]:
        requests = self.bench.judge_requests(self.loaded, answers, rule, prompts())
        return dict.fromkeys([request.id for request in requests], REPLIES.get(self.bench.name, ""))

    def read(self, path: Path, rows: list[Any], **more: Any) -> dict[str, str]:
        return answer_files.read_answers(write_lines(path, rows), self.bench, self.loaded, **more)

    def rejects(self, path: Path, rows: list[Any], *named: str, **more: Any) -> None:
        """Check that an answer file is an error of one line that names it."""
        with pytest.raises(BenchmarkError) as error:
            self.read(path, rows, **more)
        assert_one_line(error.value, path.name, *named)


def assert_one_line(error: Exception, *named: str) -> None:
    assert "\n" not in str(error)
    for name in named:
        assert name in str(error)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    found: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in found:
            data = SAMPLES[name](tmp_path_factory.mktemp(name))
            found[name] = Case(build(name), build(name).load(data), data)
        return found[name]

    return case


@pytest.fixture(params=NAMES)
def case(request, cases):
    return cases(request.param)


@pytest.fixture
def rows(case):
    return [{"question_id": q.id, "text": case.answers[str(q.id)]} for q in case.loaded.questions]


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
    with pytest.raises(BenchmarkError) as error:
        loaded.read_image("123456789012")
    assert_one_line(error.value, "123456789012")


def test_missing_files_are_reported_with_their_source(case, tmp_path):
    with pytest.raises(BenchmarkError) as error:
        case.bench.load(tmp_path)
    assert_one_line(error.value, str(tmp_path), case.bench.required_files)


FILES = {
    "pope": ("coco_pope_random.json", "coco_pope_adversarial.json"),
    "mme": ("count/1.txt",),
    "mmbench": ("mmbench_dev_20230712.tsv",),
    "mmbench-cn": ("mmbench_dev_cn_20231003.tsv",),
    "scienceqa": ("problems.json", "pid_splits.json"),
    "seed": ("SEED-Bench.json",),
    "gqa": ("testdev_balanced_questions.json",),
    "textvqa": ("TextVQA_0.5.1_val.json", "llava_textvqa_val_v051_ocr.jsonl"),
    "hallusionbench": ("HallusionBench.json",),
    "chair": ("instances_val2014.json", "captions_val2014.json"),
    "object-halbench": ("obj_halbench_300_with_image.jsonl", "instances_val2014.json", "captions_val2014.json"),
    "amber": ("annotations.json", "query/query_all.json", "relation.json"),
    "mmhal": ("response_template.json",),
    "llava-bench": ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl"),
    "llava-bench-coco": ("qa90_questions.jsonl", "caps_boxes_coco2014_val_80.jsonl", "qa90_gpt4_answer.jsonl"),
    "mm-vet": ("mm-vet.json",),
    "gavie": ("evaluation_set.json", "vg_annotation.json"),
}
NEEDED = {"scienceqa": "pid_splits.json", "amber": "relation.json", "llava-bench-coco": "qa90_gpt4_answer.jsonl"}
NEEDED |= {"chair": "captions_val2014.json", "object-halbench": "captions_val2014.json", "llava-bench": "context.jsonl"}
"""A second file without which a benchmark is not loaded."""


@pytest.mark.parametrize("text", ["{", "3", "[]", "\xff"], ids=["cut off", "number", "empty list", "not text"])
@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_invalid_file_is_named(name, file, text, tmp_path):
    data = SAMPLES[name](tmp_path)
    (data / file).write_bytes(text.encode("latin1"))
    with pytest.raises(BenchmarkError) as error:
        build(name).load(data)
    assert_one_line(error.value, Path(file).name)


@pytest.mark.parametrize("name", NEEDED)
def test_missing_second_file_is_named(name, tmp_path):
    data = SAMPLES[name](tmp_path)
    (data / NEEDED[name]).unlink()
    with pytest.raises(BenchmarkError) as error:
        build(name).load(data)
    assert_one_line(error.value, NEEDED[name])


FIELDS = {
    ("pope", "coco_pope_random.json"): "question_id image text label",
    ("scienceqa", "problems.json"): "question choices answer",
    ("seed", "SEED-Bench.json", "questions"): "answer choice_b data_id data_type question question_id question_type_id",
    ("gqa", "testdev_balanced_questions.json"): "question imageId answer types",
    ("textvqa", "TextVQA_0.5.1_val.json", "data"): "question_id image_id question answers",
    ("hallusionbench", "HallusionBench.json"): "category visual_input set_id figure_id question question_id gt_answer",
    ("chair", "instances_val2014.json", "annotations"): "image_id category_id",
    ("chair", "captions_val2014.json", "annotations"): "image_id caption",
    ("object-halbench", "obj_halbench_300_with_image.jsonl"): "image_id question",
    ("amber", "annotations.json"): "id type truth",
    ("amber", "query/query_all.json"): "id image query",
    ("mmhal", "response_template.json"): "question gt_answer image_content question_type",
    ("llava-bench", "questions.jsonl"): "question_id image text category",
    ("llava-bench", "context.jsonl"): "image caption",
    ("llava-bench", "answers_gpt4.jsonl"): "question_id text",
    ("llava-bench-coco", "caps_boxes_coco2014_val_80.jsonl"): "image captions instances",
    ("mm-vet", "mm-vet.json"): "imagename question answer capability",
    ("gavie", "evaluation_set.json"): "image_id question",
}
"""Fields that a row of a file must have."""
VALUES = {
    ("pope", "coco_pope_random.json"): [("label", "maybe"), ("question_id", "four"), ("question_id", None)],
    ("scienceqa", "problems.json"): [("answer", 2), ("choices", "x"), ("choices", ["x"])],
    ("seed", "SEED-Bench.json", "questions"): [("answer", "E"), ("data_type", "sound"), ("question_type_id", 99)],
    ("gqa", "testdev_balanced_questions.json"): [("answer", None)],
    ("textvqa", "TextVQA_0.5.1_val.json", "data"): [("answers", ["red"] * 9), ("answers", [3] * 10)],
    ("hallusionbench", "HallusionBench.json"): [("gt_answer", "2"), ("category", None), ("visual_input", "3")],
    ("chair", "instances_val2014.json", "annotations"): [("category_id", 777)],
    ("chair", "captions_val2014.json", "annotations"): [("caption", None)],
    ("object-halbench", "obj_halbench_300_with_image.jsonl"): [("image", "***"), ("question", 3), ("image_id", "x")],
    ("amber", "annotations.json"): [("type", "x"), ("truth", 3)],
    ("amber", "query/query_all.json"): [("query", 3)],
    ("mmhal", "response_template.json"): [("image_content", "Chair"), ("question", 3), ("question_type", "other")],
    ("llava-bench", "questions.jsonl"): [("category", "x"), ("text", 3)],
    ("llava-bench", "answers_gpt4.jsonl"): [("text", None)],
    ("mm-vet", "mm-vet.json"): [("answer", 3), ("capability", [])],
    ("gavie", "evaluation_set.json"): [("question", 3)],
}
"""Fields with values that are not allowed."""
UNIQUE = (
    ("pope", "coco_pope_random.json"),
    ("seed", "SEED-Bench.json", "questions"),
    ("textvqa", "TextVQA_0.5.1_val.json", "data"),
    ("hallusionbench", "HallusionBench.json"),
    ("object-halbench", "obj_halbench_300_with_image.jsonl"),
    ("amber", "query/query_all.json"),
    ("llava-bench", "questions.jsonl"),
    ("llava-bench", "answers_gpt4.jsonl"),
)
"""Files whose rows have ids of their own."""


def edited(data: Path, file: str, key: str | None, edit: Any) -> None:
    """Edit the list of rows of a JSON or JSON-lines file."""
    path = data / file
    text = path.read_text("utf-8")
    if file.endswith(".jsonl") or file.startswith("coco_pope"):
        rows = [json.loads(line) for line in text.splitlines()]
        edit(rows)
        write_lines(path, rows)
        return
    content = json.loads(text)
    rows = content[key] if key else content
    edit(list(rows.values()) if isinstance(rows, dict) else rows)
    write_json(path, content)


def rejects_edit(where: tuple[str, ...], tmp_path: Path, edit: Any) -> None:
    name, file, *key = where
    data = SAMPLES[name](tmp_path)
    edited(data, file, key[0] if key else None, edit)
    with pytest.raises(BenchmarkError) as error:
        build(name).load(data)
    assert_one_line(error.value, Path(file).name)


@pytest.mark.parametrize(("where", "field"), [(w, field) for w, fields in FIELDS.items() for field in fields.split()])
def test_row_without_a_field_is_an_error(where, field, tmp_path):
    rejects_edit(where, tmp_path, lambda rows: rows[1].pop(field))


@pytest.mark.parametrize(("where", "pair"), [(where, pair) for where, pairs in VALUES.items() for pair in pairs])
def test_row_with_an_invalid_value_is_an_error(where, pair, tmp_path):
    rejects_edit(where, tmp_path, lambda rows: rows[1].update([pair]))


@pytest.mark.parametrize("where", UNIQUE)
def test_duplicate_question_is_an_error(where, tmp_path):
    rejects_edit(where, tmp_path, lambda rows: rows.append(dict(rows[1])))


def test_answers_are_joined_by_id_in_any_order(case, rows, path):
    assert case.read(path, rows) == case.answers
    shuffled = random.Random(0).sample(rows, len(rows))
    assert case.read(path, [{**row, "question_id": str(row["question_id"])} for row in shuffled]) == case.answers
    assert (
        answer_files.read_answers(write_json(path.with_suffix(".json"), rows), case.bench, case.loaded) == case.answers
    )


@pytest.mark.parametrize("name", ["text", "answer", "prediction"])
def test_answer_may_have_three_names(case, rows, path, name):
    assert case.read(path, [{"question_id": row["question_id"], name: row["text"]} for row in rows]) == case.answers


def test_missing_answer_is_an_error_unless_partial(case, rows, path):
    missing = ids(case.loaded)[1]
    case.rejects(path, rows[:1] + rows[2:], f"1 of {len(rows)}", missing, "--partial")
    assert set(case.read(path, rows[:1] + rows[2:], partial=True)) == set(case.answers) - {missing}


@pytest.mark.parametrize("partial", [False, True])
def test_duplicate_or_unknown_answer_is_an_error(case, rows, path, partial):
    case.rejects(path, [*rows, rows[0]], ids(case.loaded)[0], partial=partial)
    case.rejects(path, [*rows, {"question_id": 987_654_321, "text": "A"}], "987654321", partial=partial)


BROKEN = ["{", '{"question_id": 1, "text": "A"', "3", "null", '["A"]', '"A"', '{"text": "A"}']
BROKEN += ['{"question_id": null, "text": "A"}']


@pytest.mark.parametrize("row", BROKEN)
def test_invalid_row_is_an_error(case, rows, path, row):
    case.rejects(path, [*rows, row])
    case.rejects(path, [row, *rows], partial=True)


def test_text_must_be_text_and_may_have_any_character(case, rows, path):
    for text in (None, 3, ["A"], {"A": 1}, True):
        case.rejects(path, [{**rows[0], "text": text}, *rows[1:]])
    for text in ("No\u2028\x85 caf\u00e9\n\t\u7b54", ""):
        assert set(case.read(path, [{**row, "text": text} for row in rows]).values()) == {text}


def test_empty_and_missing_answer_files_are_errors(case, path):
    assert case.bench.match_question({}, case.loaded) is None
    path.write_text("", "utf-8")
    for wrong in (path, path.with_name("none.jsonl"), path.parent):
        with pytest.raises(BenchmarkError) as error:
            answer_files.read_answers(wrong, case.bench, case.loaded)
        assert_one_line(error.value, wrong.name)


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
    case.rejects(path, [{**rows[0], "prompt": "Who is it?\nSo."}, *rows[1:]])
    if name != "mme":  # the prompt is part of MME's ids: two questions of an image may swap places
        first, second = rows[:2]
        swapped = [{**first, "prompt": second["prompt"]}, {**second, "prompt": first["prompt"]}]
        if name != "textvqa":  # likewise
            case.rejects(path, [*swapped, *rows[2:]])
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
        for id in set(ids(loaded)) - set(answers):
            assert not by_id[id].right
        json.dumps(dict(scored.protocol))


@pytest.mark.parametrize(("name", "rule"), JUDGED)
def test_judge_is_asked_about_every_answer_once(cases, name, rule):
    case = cases(name)
    requests = case.bench.judge_requests(case.loaded, case.answers, rule, prompts())
    names = [request.id for request in requests]
    assert len(names) == len(set(names))
    assert {id.partition("#")[0] for id in names} <= set(ids(case.loaded))
    assert all(request.image is None for request in requests)
    if not name.startswith("mmbench"):
        assert any("{question}" in request.prompt for request in requests)  # braces of an answer are kept
    short = ids(case.loaded)[0]
    answers = {id: text for id, text in case.answers.items() if id != short}
    fewer = case.bench.judge_requests(case.loaded, answers, rule, prompts())
    assert short not in {request.id.partition("#")[0] for request in fewer}
    for broken in ({}, dict.fromkeys(prompts(), "{nothing} {"), dict.fromkeys(prompts(), "{0}")):
        if requests:
            with pytest.raises(BenchmarkError, match=r"\.txt"):
                case.bench.judge_requests(case.loaded, case.answers, rule, broken)


@pytest.mark.parametrize(("name", "rule"), JUDGED)
def test_missing_replies_are_named(cases, name, rule):
    case = cases(name)
    answers = answer_all(case.loaded, "It is hard to say which it is.")
    replies = case.replies(answers, rule)
    with pytest.raises(NotScorable):
        case.bench.score(case.loaded, answers, rule, None)
    missing = next(iter(replies))
    fewer = {id: reply for id, reply in replies.items() if id != missing}
    with pytest.raises(BenchmarkError, match=missing.partition("#")[0]):
        case.bench.score(case.loaded, answers, rule, fewer)


def test_rules_without_a_judge_and_repeats_ask_nothing(case):
    for rule in set(case.bench.rules) - case.bench.judged_rules:
        assert case.bench.judge_requests(case.loaded, case.answers, rule, prompts()) == []
    if case.bench.name == "mm-vet":
        assert len(case.bench.with_repeats(3).judge_requests(case.loaded, case.answers, "official", prompts())) == 12
    with pytest.raises(BenchmarkError):
        case.bench.with_repeats(9)


# Exports. MMBench's workbook is tested with MMBench.

READ_BACK = {
    "hallusionbench",
    "chair",
    "object-halbench",
    "amber",
    "mmhal",
    "llava-bench",
    "llava-bench-coco",
    "mm-vet",
}
READ_BACK |= {"seed", "gavie"}
"""Benchmarks whose upload is an answer file with the answers unchanged."""


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("mmbench")])
def test_export_is_read_back(cases, name, tmp_path):
    case = cases(name)
    paths = case.bench.export(case.loaded, case.answers, tmp_path / "new" / "folder")
    assert all(path.is_file() for path in paths)
    if name in READ_BACK:
        (path,) = paths
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
    with pytest.raises(BenchmarkError, match=r"none\.jpg"):
        loaded.read_image("none.jpg")
    with pytest.raises(BenchmarkError, match="leads out"):
        inputs.image_reader(tmp_path)("../x.jpg")
    with pytest.raises(BenchmarkError, match="no-folder"):
        inputs.with_images(case.loaded, tmp_path / "no-folder")
    assert inputs.with_images(case.loaded, None) is case.loaded
