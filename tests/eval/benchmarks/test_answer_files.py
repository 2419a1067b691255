"""Answer files of every form that users have are joined with the right questions, or refused by name."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.errors import UserError
from reverie_jax.eval import score as scores
from reverie_jax.eval.benchmarks import answer_files, choice_parsing, inputs
from tests.eval.benchmarks import makers as make
from tests.eval.benchmarks.samples import SAMPLES, answer_all, build, ids, load, refused

THINGS = ("cup", "dog", "car", "fork")
LABELS = {"random": "yynn", "popular": "ynyn", "adversarial": "ynny"}


def asked(split: str) -> list[tuple[str, str, str]]:
    """Return (image, question, label): the first question is the same in all splits, as many of POPE's are."""
    names = [name if n == 0 else f"{split[0]} {name}" for n, name in enumerate(THINGS)]
    labels = [{"y": "yes", "n": "no"}[letter] for letter in LABELS[split]]
    return [("a.jpg", f"Is there a {name} in the image?", label) for name, label in zip(names, labels, strict=True)]


@pytest.fixture(scope="module")
def pope(tmp_path_factory):
    return load("pope", make.pope(tmp_path_factory.mktemp("pope"), **{split: asked(split) for split in LABELS}))


def right(loaded: Any, split: str) -> list[dict[str, Any]]:
    """Return right answers to a split, numbered as in its file."""
    questions = [q for q in loaded.questions if q.metadata["split"] == split]
    words = {True: "Yes", False: "No"}
    return [
        {"question_id": n, "prompt": q.text, "text": words[q.metadata["label"]]} for n, q in enumerate(questions, 1)
    ]


def without(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def own_form(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"question": row["prompt"].split("\n")[0], "answer": row["text"]} for row in rows]


# A file of one split: its name, what its rows are made into, and whether its split can be known.
ONE_SPLIT = {
    "by its name": ("{}.jsonl", lambda rows, split: without(rows, "prompt"), True),
    "by its prompts": ("a.jsonl", lambda rows, split: rows, True),
    "by a column": (
        "a.jsonl",
        lambda rows, split: [{**row, "category": split} for row in without(rows, "prompt")],
        True,
    ),
    "by a column in capitals": (
        "a.jsonl",
        lambda rows, split: [{**row, "split": "test", "category": split.title()} for row in without(rows, "prompt")],
        True,
    ),
    "ids alone": ("a.jsonl", lambda rows, split: without(rows, "prompt"), False),
    "the shared question alone": ("a.jsonl", lambda rows, split: rows[:1], False),
    "a name that prompts contradict": (
        *("{}.jsonl", lambda rows, split: [{**row, "prompt": f"Is there a w {n}?"} for n, row in enumerate(rows)]),
        False,
    ),
    "POPE's own form": ("{}.json", lambda rows, split: own_form(rows), True),
    "POPE's own form without a name": ("a.json", lambda rows, split: own_form(rows), True),
    "POPE's own form in another order": ("{}.json", lambda rows, split: own_form(rows)[::-1], False),
}


@pytest.mark.parametrize("split", LABELS)
@pytest.mark.parametrize("kind", ONE_SPLIT)
def test_answers_to_one_split_are_never_another_splits(pope, tmp_path, kind, split):
    bench, loaded = pope
    name, change, known = ONE_SPLIT[kind]
    path = make.write_lines(tmp_path / name.format(split), change(right(loaded, split), split))
    if not known:
        with refused(path.name):
            answer_files.read_answers(path, bench, loaded, partial=True)
        return
    for rule in bench.rules:
        result = scores.score(bench, loaded, path, rule, partial=True, draws=0)
        assert next(iter(result.metrics.values())) == (100 if rule == "vlmevalkit" else 1)
        assert rule == "lmms-eval" or not any(
            other in name for other in LABELS if other != split for name in result.metrics
        )
        assert any(split in note for note in result.notes)
    if "own form" not in kind:
        with refused(path.name, f"about {split} alone", "--partial"):
            answer_files.read_answers(path, bench, loaded)


def test_all_splits_of_pope_in_a_folder_or_with_llavas_ids(pope, tmp_path):
    bench, loaded = pope
    texts = answer_all(loaded, lambda q: f"{'Yes' if q.metadata['label'] else 'No'} {q.id}")
    bench.export(loaded, texts, tmp_path / "out")
    assert answer_files.read_answers(tmp_path / "out", bench, loaded) == texts
    for split in LABELS:
        path = tmp_path / "out" / f"pope_{split}_answers.json"
        found = answer_files.read_answers(path, bench, loaded)
        assert found == {str(q.id): texts[str(q.id)] for q in loaded.questions if q.metadata["split"] == split}
    rows = [{"question_id": float(id), "text": text} for id, text in texts.items()]
    assert answer_files.read_answers(make.write_lines(tmp_path / "a.jsonl", rows), bench, loaded) == texts
    (tmp_path / "empty").mkdir()
    with refused(tmp_path / "empty", "predictions.jsonl"):
        answer_files.read_answers(tmp_path / "empty", bench, loaded)


@pytest.mark.parametrize("name", SAMPLES)
def test_what_export_writes_is_read(cases, tmp_path, name):
    """The answers are read as they were, or as the official script would read them; the score is the same."""
    case = cases(name)
    paths = case.bench.export(case.loaded, case.answers, tmp_path)
    if not paths:
        assert name == "textvqa"
        return
    found = answer_files.read_answers(tmp_path if len(paths) > 1 else paths[0], case.bench, case.loaded)
    changed = {"gqa": lambda text: text.lower().rstrip(".")}.get(name, lambda text: text)
    assert found == {id: changed(text) for id, text in case.answers.items()}


FILES_OF_QUESTIONS = ("pope/coco_pope_random.json", "pope/", "mmbench/mmbench_dev_20230712.tsv")
# Files of questions, which have ids and texts or labels too, and what their rows are made of.
QUESTIONS = {
    "LLaVA's question file": ("text", lambda q, row: {"question_id": q.id, "text": q.text}),
    "the benchmark's own questions": ("text", lambda q, row: {"question_id": q.id, "text": row["question"]}),
    "options and labels": ("answer", lambda q, row: {"question_id": q.id, **row, "answer": "B"}),
    "one row without a prediction": (
        "prediction",
        lambda q, row: {"question_id": q.id, "answer": "B", **({} if row["first"] else {"prediction": "B"})},
    ),
}


@pytest.mark.parametrize("name", ["mmbench", "scienceqa", "seed"])
@pytest.mark.parametrize("kind", QUESTIONS)
def test_questions_and_labels_are_no_answers(cases, tmp_path, name, kind):
    case, (fact, change) = cases(name), QUESTIONS[kind]
    options = {"mmbench": "A", "scienceqa": "choices", "seed": "choice_a"}[name]
    rows = [
        change(q, {"question": case.bench.question_text(q), options: "x", "first": n == 0})
        for n, q in enumerate(case.loaded.questions)
    ]
    case.rejects(tmp_path / "a.jsonl", rows, fact)
    for suffix in (".csv", ".TSV"):
        if kind != "one row without a prediction":
            write_csv(path := tmp_path / f"a{suffix}", rows)
            with refused(path, "text"):
                answer_files.read_answers(path, case.bench, case.loaded)


@pytest.mark.parametrize("file", FILES_OF_QUESTIONS)
def test_official_question_files_are_no_answers(cases, file):
    name, path = file.split("/", 1)
    case = cases(name)
    with refused(Path(path).name):
        answer_files.read_answers(case.data / path, case.bench, case.loaded, partial=True)


def test_a_damaged_workbook_is_named(cases, tmp_path):
    path = tmp_path / "a.xlsx"
    path.write_bytes(b"PK")
    with refused(path):
        answer_files.read_answers(path, cases("mmbench").bench, cases("mmbench").loaded)


# Names of LLaVA's folders in playground/data/eval, and where the benchmark's files are in them.
LLAVA = {
    "pope": "pope/coco",
    "mme": "MME/MME_Benchmark_release_version/MME_Benchmark",
    "mmbench": "mmbench",
    "mmbench-cn": "mmbench",
    "scienceqa": "scienceqa",
    "seed": "seed_bench",
    "gqa": "gqa/data/questions1.2",
    "textvqa": "textvqa",
    "llava-bench": "llava-bench-in-the-wild",
    "mm-vet": "mm-vet/mm-vet",
}


@pytest.mark.parametrize("name", LLAVA)
def test_llavas_folders_are_found(tmp_path, name):
    SAMPLES[name](tmp_path / LLAVA[name])
    for folder in (tmp_path, tmp_path / LLAVA[name].split("/")[0]):
        assert inputs.load(build(name), folder).questions
    with refused(tmp_path / "none", build(name).required_files):
        inputs.load(build(name), tmp_path / "none")


FILES = {"pope": "coco_pope_random.json", "mmbench": "mmbench_dev_20230712.tsv", "seed": "SEED-Bench.json"}
FILES |= {"scienceqa": "problems.json", "gqa": "testdev_balanced_questions.json", "textvqa": "TextVQA_0.5.1_val.json"}
FILES |= {"hallusionbench": "HallusionBench.json", "mmhal": "response_template.json", "gavie": "evaluation_set.json"}
FILES |= {"mm-vet": "mm-vet.json", "llava-bench": "questions.jsonl", "amber": "query/query_all.json"}


@pytest.mark.parametrize("name", FILES)
def test_data_may_be_the_file_itself(cases, name):
    case = cases(name)
    found = inputs.load(case.bench, case.data / FILES[name])
    assert set(ids(found)) <= set(ids(case.loaded))
    assert all(found.read_image(question.image) for question in found.questions if question.image)


# Repeated ids.


def test_an_id_of_two_questions_has_the_last_answer_for_both(tmp_path):
    """As 49914 of SEED-Bench's official file, by LLaVA's script."""
    questions = [make.seed_question("49914", 1, "A", text="Where?"), make.seed_question("5", 1, "B")]
    questions.append(make.seed_question("49914", 2, "C", text="Who?", data="other"))
    bench, loaded = load("seed", make.seed(tmp_path, questions))
    assert loaded.protocol["ids of several questions"] == "49914"
    rows = [{"question_id": id, "text": text} for id, text in ((49914, "A"), (5, "B"), (49914, "C"))]
    for part, expected in ((rows, 200 / 3), (rows[:2], 200 / 3), (rows[::-1], 200 / 3)):
        result = scores.score(bench, loaded, make.write_lines(tmp_path / "a.jsonl", part), draws=0)
        assert (result.items, result.metrics["accuracy"]) == (3, pytest.approx(expected))
        last = [row["text"] for row in part if row["question_id"] == 49914][-1]
        assert result.answers["49914"] == last
    with refused("49914"):
        scores.score(bench, loaded, make.write_lines(tmp_path / "a.jsonl", [*rows, rows[0]]))


def test_ids_of_gqa_that_lost_their_zeros(tmp_path):
    ids = ("05", "17", "006", "6")
    questions = {id: make.gqa_question(f"n{id}", f"What is {id}?", "red") for id in ids}
    bench, loaded = load("gqa", make.gqa(tmp_path, questions))
    rows = [{"questionId": id, "prediction": str(id)} for id in (5, 17, "006", 6)]
    found = answer_files.read_answers(make.write_json(tmp_path / "a.json", rows), bench, loaded)
    assert found == {"05": "5", "17": "17", "006": "006", "6": "6"}
    rows[3] = {"questionId": "06", "prediction": "x"}  # of 006 or of 6
    with refused("question 06"):
        answer_files.read_answers(make.write_json(tmp_path / "a.json", rows), bench, loaded)


@pytest.mark.parametrize(("value", "text"), [(5, "5"), (5.0, "5"), (2.5, "2.5"), (True, None), ([5], None), ({}, None)])
def test_numbers_are_answers_and_truth_values_are_not(cases, tmp_path, value, text):
    """Nothing says which word a truth value stands for."""
    case = cases("gqa")
    rows = [{"question_id": q.id, "text": value} for q in case.loaded.questions]
    if text is None:
        case.rejects(tmp_path / "a.jsonl", rows, "row 0", "question 00", value)
    else:
        assert set(case.read(tmp_path / "a.jsonl", rows).values()) == {text}


# Likely causes of missing answers.


@pytest.mark.parametrize(
    ("keep", "facts"),
    [
        (lambda n, q: n < 3, ["1 of 4", "the first 3", "--limit"]),
        (lambda n, q: q.image is not None, ["2 of 4", "about questions with an image alone"]),
        (lambda n, q: n == 1, ["3 of 4", "another version"]),
    ],
)
def test_missing_answers_have_a_likely_cause(cases, tmp_path, keep, facts):
    case = cases("scienceqa")
    rows = [row for n, (row, q) in enumerate(zip(case.rows, case.loaded.questions, strict=True)) if keep(n, q)]
    case.rejects(tmp_path / "a.jsonl", rows, *facts)
    file = make.write_lines(tmp_path / "a.jsonl", rows)
    assert facts[1] in answer_files.read_answer_file(file, case.bench, case.loaded, partial=True).notes[0]


# Thoughts.

THOUGHTS = ["<think>{}</think>\n{}", "{}</think>{}", "<think>\n{}\n</think>\n\n{}"]


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("form", THOUGHTS)
def test_thoughts_are_taken_out_or_counted(cases, tmp_path, name, form):
    """Those of answers as the rule's harness does, those of a judge always."""
    case = cases(name)
    thoughtful = {id: form.format("No, not A. Yes? A dog", text) for id, text in case.answers.items()}
    rows = [{"question_id": q.id, "text": thoughtful[str(q.id)]} for q in case.loaded.questions]
    path, judged = make.write_lines(tmp_path / "a.jsonl", rows), tmp_path / "replies.jsonl"
    for rule in case.bench.rules:
        answers = case.answers if rule in case.bench.thoughtless_rules else thoughtful
        replies = case.replies(answers, rule)
        hasty = "It is incorrect, Rating: 1, 0.1, 1 9, score of the answer1: 1, B"
        make.write_lines(judged, [{"id": id, "reply": form.format(hasty, reply)} for id, reply in replies.items()])
        given = judged if rule in case.bench.judged_rules else None
        result = scores.score(case.bench, case.loaded, path, rule, replies=given, draws=0)
        assert result.scored.values() == case.bench.score(case.loaded, answers, rule, replies).values()
        told = [note for note in result.notes if f"{len(rows)} answers hold" in note]
        assert len(told) == (rule not in case.bench.thoughtless_rules)


# Any file that a user may have: what is joined is right, what is not is refused by name.

IDS = {"as they are": lambda id: id, "text": str, "floats": lambda id: float(id) if isinstance(id, int) else f"{id}"}
IDS["text with spaces"] = lambda id: f" {id}\n"
IDS["text of floats"] = lambda id: f"{id}.0" if isinstance(id, int) else id
IDS["text with zeros"] = lambda id: f"00{id}" if str(id).isdecimal() else id
PROMPTS = {
    "none": lambda q, other: None,
    "ours": lambda q, other: q.text,
    "another suffix": lambda q, other: q.text.split("\nAnswer")[0] + "\nPlease answer briefly.",
    "a prefix": lambda q, other: f"Look at the image. {q.text}",
    "another question": lambda q, other: "Is it said so?",
}


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix.lower() == ".tsv" else delimiter)
        writer.writeheader()
        writer.writerows(rows)


WRITERS = {
    "a.jsonl": lambda path, rows: make.write_lines(path, rows),
    "a.json": lambda path, rows: make.write_json(path, rows),
    "b.json": lambda path, rows: make.write_lines(path, rows),
    "a.csv": write_csv,
    "A.CSV": write_csv,
    "a.tsv": write_csv,
    "b.csv": lambda path, rows: write_csv(path, rows, ";"),
    "a.parquet": lambda path, rows: pandas.DataFrame(rows).to_parquet(path),
}
UNIQUE = ("scienceqa", "seed", "gqa", "hallusionbench", "amber", "chair", "mm-vet")
SHARED = ("pope", "mmbench", "mmhal", "gavie", "llava-bench")


@settings(max_examples=60)
@given(
    st.sampled_from(UNIQUE + SHARED),
    st.sampled_from(list(IDS)),
    st.sampled_from(list(PROMPTS)),
    st.sampled_from(list(WRITERS)),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.randoms(use_true_random=False),
)
def test_any_answer_file_is_read_right_or_refused(cases, tmp_path_factory, name, id, prompt, file, encoding, random):
    case = cases(name)
    path = tmp_path_factory.mktemp("any") / file
    rows = []
    for question in case.loaded.questions:
        row = {"question_id": IDS[id](question.id), "text": case.answers[str(question.id)]}
        told = PROMPTS[prompt](question, None)
        rows.append(row if told is None else {**row, "prompt": told})
    if id in ("floats", "text with zeros") and len({type(row["question_id"]) for row in rows}) > 1:
        rows = [{**row, "question_id": str(row["question_id"])} for row in rows]  # a column of Parquet has one type
    random.shuffle(rows)
    WRITERS[file](path, rows)
    if encoding != "utf-8" and path.suffix != ".parquet":  # as on Windows: also two characters at a line's end
        text = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n").decode()
        path.write_bytes(text.encode(encoding))
    contradicts = prompt == "another question"
    if contradicts and name in SHARED:
        with refused(path):
            answer_files.read_answers(path, case.bench, case.loaded)
        return
    found = answer_files.read_answer_file(path, case.bench, case.loaded)
    assert found.texts == case.answers
    assert len(found.notes) == contradicts


# Characters that no file can hold.


def test_halves_of_surrogate_pairs_are_dropped(cases, tmp_path):
    """As Python's and JavaScript's JSON writers leave them where a text was cut within an emoji."""
    case = cases("amber")
    path = tmp_path / "a.jsonl"
    texts = {id: f"No \ud83d{'' if n else chr(0xDE00)}" for n, id in enumerate(case.answers)}
    path.write_text("".join(json.dumps({"question_id": id, "text": text}) + "\n" for id, text in texts.items()))
    result = scores.score(case.bench, case.loaded, path, draws=0)
    assert list(result.answers.values()) == ["No \U0001f600", *["No "] * (len(texts) - 1)]
    result.write_details(tmp_path / "details.jsonl")
    (exported,) = case.bench.export(case.loaded, result.answers, tmp_path / "out")
    assert answer_files.read_answers(exported, case.bench, case.loaded) == result.answers


# Letters stand for options in an order.

OPTIONS = dict(zip("ABCD", ("water in a glass", "a rock", "A dog", "none"), strict=True))
PROMPTS_WITH_OPTIONS = {
    True: [
        "Which?\nA. water in a glass\nB. a rock\nC. A dog\nD. none\nAnswer with the letter.",
        "Question: Which? Options: (A) water in a glass (B) a rock (C) A dog (D) none\nAnswer:",
        "Which?\nA) Water in a glass\nB) a  rock",
        "Hint: A. Smith saw it. B. is short.\nA. water in a glass\nB. a rock",
        "Which? None of them.",
        "",
    ],
    False: [
        "Which?\nA. a rock\nB. water in a glass\nC. A dog\nD. none",
        "Options: (A) a rock (B) water in a glass",
        "A: water in a glass\nB: none",
    ],
}


@pytest.mark.parametrize("same", PROMPTS_WITH_OPTIONS)
def test_a_letter_that_stands_for_another_option_is_another_prompt(same):
    for prompt in PROMPTS_WITH_OPTIONS[same]:
        assert choice_parsing.same_options(prompt, OPTIONS) is same, prompt


def test_tables_of_mmbench_show_their_questions(cases, tmp_path):
    """Its English and Chinese files have the same ids; a table has the question and its options."""
    case = cases("mmbench")
    rows = [
        {"index": q.id, "question": q.metadata["question"], **q.metadata["options"], "prediction": "B"}
        for q in case.loaded.questions
    ]
    assert set(case.read(tmp_path / "cn.jsonl", rows).values()) == {"B"}
    case.rejects(tmp_path / "a.jsonl", [{**rows[0], "A": rows[0]["B"], "B": rows[0]["A"]}, *rows[1:]], "question 3 ")
    case.rejects(tmp_path / "a.jsonl", [{**rows[0], "question": "\u8c01"}, *rows[1:]], "question 3 ")
    bare = without(rows, "question")
    assert case.read(tmp_path / "mmbench_dev_en.jsonl", bare)
    case.rejects(tmp_path / "mmbench_dev_cn.jsonl", bare, "cn", "another language")
    case.rejects(tmp_path / "a.jsonl", bare[:1] + bare[4:5], "first passes alone")


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_label_beside_an_empty_prediction_is_no_answer(cases, tmp_path, suffix):
    case = cases("mmbench")
    rows = [
        {"index": q.id, "answer": q.metadata["answer"], "prediction": "B" * (n != 1)}
        for n, q in enumerate(case.loaded.questions)
    ]
    write_csv(path := tmp_path / f"a{suffix}", rows)
    with refused(path, "1 of 7", ids(case.loaded)[1]):
        answer_files.read_answers(path, case.bench, case.loaded)
    found = answer_files.read_answers(path, case.bench, case.loaded, partial=True)
    assert found == {id: "B" for n, id in enumerate(ids(case.loaded)) if n != 1}


# Any file with any value anywhere: one line, never a traceback.

JUNK = [None, True, 0, -1, 1.5, 1e12, "", "x", "\ud83d", [], ["a"], {}, {"a": 1}, 10**30, "7.0", [1, [2]]]


def damaged(value: Any, random: Any) -> Any:
    """Return a JSON value with junk in one place, or with a part twice or gone."""
    if random.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return random.choice(JUNK)
    value = value.copy()
    place = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
    what = random.random()
    if what < 0.2:
        del value[place]
    elif what < 0.3 and isinstance(value, list):
        value.append(value[place])
    else:
        value[place] = damaged(value[place], random)
    return value


def damaged_row(rows: list[Any], random: Any) -> list[str]:
    """Return rows as JSON, one of them damaged."""
    chosen = random.randrange(len(rows)) if rows else -1
    return [json.dumps(damaged(row, random) if n == chosen else row) for n, row in enumerate(rows)]


@settings(max_examples=80)
@given(
    st.sampled_from(list(SAMPLES)), st.sampled_from(["data", "answers", "replies"]), st.randoms(use_true_random=False)
)
def test_a_damaged_file_is_read_or_refused_in_one_line(cases, tmp_path_factory, name, what, random):
    case, folder = cases(name), tmp_path_factory.mktemp("damaged")
    loaded, rule = case.loaded, random.choice(case.bench.rules)
    replies = [{"id": id, "reply": reply} for id, reply in case.replies(case.answers, rule).items()]
    parts = {"answers": case.rows, "replies": replies}
    try:
        if what == "data":
            data = SAMPLES[name](folder)
            path = random.choice(
                [p for p in sorted(data.rglob("*")) if p.suffix in (".json", ".jsonl", ".tsv", ".txt")]
            )
            if path.suffix == ".json" and name != "pope":
                path.write_text(json.dumps(damaged(json.loads(path.read_text("utf-8")), random)))
            elif path.suffix in (".json", ".jsonl"):
                lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
                make.write_lines(path, damaged_row(lines, random))
            else:
                content = bytearray(path.read_bytes())
                content[random.randrange(len(content))] = random.randrange(256)
                path.write_bytes(content)
            loaded = inputs.load(case.bench, data)
            if rule not in case.bench.judged_rules:
                case.bench.score(loaded, case.answers, rule)
        parts |= {what: damaged_row(parts[what], random)} if what in parts else {}
        answers, given = (make.write_lines(folder / f"{part}.jsonl", rows) for part, rows in parts.items())
        judged = given if rule in case.bench.judged_rules else None
        scores.score(case.bench, loaded, answers, rule, replies=judged, partial=True, draws=0)
    except UserError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert "\n" not in refusal


# Rows that are nearly another question's.


def test_the_longer_of_two_questions_that_a_prompt_holds_is_meant(tmp_path):
    pair = [("Is it a cat? Please answer yes or no.", "Yes"), ("Is it a cat? Or a dog?", "No")]
    bench, loaded = load("mme", make.mme(tmp_path / "mme", {"count": {"1.jpg": pair}}))
    rows = [make.answer_row("count/1.jpg", f"Look. {text.split(' Please')[0]}", f"To {text}") for text, _ in pair]
    path = make.write_lines(tmp_path / "a.jsonl", rows)
    assert list(answer_files.read_answers(path, bench, loaded).values()) == [f"To {text}" for text, _ in pair]
    rows = [{"question" if name == "prompt" else name: value for name, value in row.items()} for row in rows]
    assert answer_files.read_answers(make.write_lines(tmp_path / "b.jsonl", rows), bench, loaded)
    asked = ["what is it", "what is it made of"]
    data = make.textvqa(
        tmp_path, [make.textvqa_row(n, "a", text, ["x"] * 10) for n, text in enumerate(asked)], {"a": "X"}
    )
    bench, loaded = load("textvqa", data)
    rows = [make.answer_row("a", f"Look: {text}?", f"To {text}") for text in asked]
    found = answer_files.read_answers(make.write_lines(tmp_path / "a.jsonl", rows), bench, loaded)
    assert found == {"0": f"To {asked[0]}", "1": f"To {asked[1]}"}


def test_images_tell_a_split_and_ids_are_not_rounded(tmp_path):
    question = ("Is there a cup in the image?", "yes")
    bench, loaded = load("pope", make.pope(tmp_path, random=[("a.jpg", *question)], popular=[("b.jpg", *question)]))
    rows = [{"question_id": 1, "image": "b.jpg", "text": "Yes"}]
    path = make.write_lines(tmp_path / "a.jsonl", rows)
    assert answer_files.read_answers(path, bench, loaded, partial=True) == {"20000001": "Yes"}
    with refused(path, "10000001.5"):
        rows = [{"question_id": 10_000_001.5, "text": "Yes"}]
        answer_files.read_answers(make.write_lines(path, rows), bench, loaded, partial=True)


def test_failed_outputs_of_llavas_script_are_missing_answers(cases, tmp_path):
    case = cases("scienceqa")
    fewer = dict(list(case.answers.items())[1:])
    (path,) = case.bench.export(case.loaded, fewer, tmp_path)
    assert answer_files.read_answers(path, case.bench, case.loaded, partial=True) == fewer
