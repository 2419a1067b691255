"""ScienceQA and A-OKVQA as they are published: human rationales are supervised, wrong options are to be annotated."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.data import check as checking
from reverie_jax.data.conversation import IMAGE
from reverie_jax.data.sources import ReadLog, multiple_choice
from reverie_jax.data.sources.annotated import QUESTION_KEYS
from reverie_jax.data.sources.reverie import parse_rationale_prompt
from reverie_jax.data.supervision import Supervision
from reverie_jax.errors import DataError
from tests.data.fakes import (
    Given,
    assert_one_line,
    kinds,
    png,
    problem_rows,
    read_examples,
    read_records,
    texts,
    write_json_rows,
    write_parquet,
)

QUESTIONS, RATIONALES = "reasoning_instruct_data.json", "rationale_instruct_data.json"


def problem(**changes):
    """A row of ScienceQA's problems.json, an object by id."""
    return {
        **{"question": "Which of these is a rock?", "choices": ["coal", "glass", "paper"], "answer": 0, "hint": ""},
        **{"image": "image.png", "task": "closed choice", "grade": "grade4", "subject": "natural science"},
        **{"topic": "earth-science", "category": "Rocks and minerals", "skill": "Identify rocks"},
        **{"lecture": "A rock is a solid.", "solution": "Coal forms in nature.", "split": "train"},
    } | changes


def annotated(**changes):
    """A row of A-OKVQA's list."""
    return {
        **{"split": "train", "image_id": 299207, "question_id": "22MexNkBPpdZGX6sxbxVBH"},
        **{"question": "What is the man by the bags awaiting?", "correct_choice_idx": 3},
        **{"choices": ["skateboarder", "train", "delivery", "cab"], "direct_answers": ["ride", "taxi", "bus"]},
        **{"difficult_direct_answer": False},
        "rationales": ["He stands at the kerb.", "He has bags.", "He looks down the road."],
    } | changes


def without(row, *keys):
    return {key: value for key, value in row.items() if key not in keys}


def embedded(row, number, path="image.png", encoded=None):
    """The row as the Parquet file has it: with its image, which is named like every other."""
    encoded = png((number, 0, 0)) if encoded is None else encoded
    return without(row, "split", "image_id", "direct_answers") | {"image": {"bytes": encoded, "path": path}}


def read(tmp_path, rows, **options):
    return read_examples(write_json_rows(tmp_path / "rows.json", rows), **options)


@pytest.fixture
def images(tmp_path):
    """ScienceQA's folders, with an image of the same name in each, and COCO's, by 12 digits."""
    folder = tmp_path / "images"
    for number in (1, 2, 3):
        (folder / "train" / str(number)).mkdir(parents=True)
        (folder / "train" / str(number) / "image.png").write_bytes(png((number, 1, 0)))
        (folder / f"{number:012d}.jpg").write_bytes(png((number, 2, 0)))
    return folder


# ScienceQA.


def test_a_problem_is_asked_answered_by_letter_and_explained(tmp_path):
    (example,), log = read(tmp_path, {"7": problem()})
    assert log == ReadLog()
    question, answer, prompt, why = texts([example])[0]
    assert question.startswith(f"{IMAGE}\nWhich of these is a rock?\n")
    assert [line for line in question.split("\n") if line[1:3] == ". "] == ["A. coal", "B. glass", "C. paper"]
    assert (answer, why) == ("A", "Coal forms in nature.")
    assert parse_rationale_prompt(prompt) == ("positive", "")
    assert (example.conversation.kind, example.conversation.dataset) == ("positive", "scienceqa")
    assert example.image == "train/7/image.png"
    assert example.where.endswith("row 7")


def test_a_hint_is_context_before_the_question(tmp_path):
    hint = "The samples are two."
    rows = {"1": problem(hint=hint), "2": problem(hint=None), "3": problem(hint="  ")}
    first, second, third = (question for question, *_ in texts(read(tmp_path, rows)[0]))
    assert 0 < first.index(hint) < first.index("Which of these")
    assert second == third
    assert "Context" not in second


def test_without_a_solution_a_question_is_only_answered(tmp_path):
    examples, log = read(tmp_path, {str(n): problem(solution=empty) for n, empty in enumerate(["", " \n", None])})
    assert log.problems == []
    assert [turns[1:] for turns in texts(examples)] == [["A"]] * 3
    assert kinds(examples) == [""] * 3
    conversations = [example.conversation for example in examples]
    assert Supervision("negative")(conversations) == conversations


def test_each_problem_shows_the_image_of_its_own_folder(tmp_path, images):
    rows = {str(number): problem() for number in (3, 1, 2)}
    rows |= {"4": problem(image=None), "5": without(problem(), "image")}
    path = tmp_path / "problems.json"
    records = read_records(write_json_rows(path, rows))
    assert [record.image for record in records] == [*(png((number, 1, 0)) for number in (3, 1, 2)), b"", b""]
    assert [record.id for record in records[:3]] == [f"train/{number}/image.png" for number in (3, 1, 2)]
    assert [record.conversations[0].images for record in records] == [(0,)] * 3 + [()] * 2
    assert IMAGE not in records[3].conversations[0].turns[0].text
    with pytest.raises(DataError) as error:  # and not of another one, if it is missing
        read_records(write_json_rows(path, {"1": problem(), "9": problem()}))
    assert_one_line(error, "train/9/image.png")


def test_the_parquet_file_has_images_of_the_same_name(tmp_path):
    rows = [embedded(problem(), number) for number in range(3)] + [without(problem(image=None), "split")]
    path = write_parquet(tmp_path / "train.parquet", rows)
    examples, log = read_examples(path)
    assert log == ReadLog()
    assert {tuple(turns[1:]) for turns in texts(examples)} == {("A", "Explain why.", "Coal forms in nature.")}
    records = read_records(path)
    assert [record.image for record in records] == [*(png((number, 0, 0)) for number in range(3)), b""]
    assert len({record.id for record in records}) == 4
    report = checking.check(path, None)
    assert (report.stats["images"], report.stats["instructions"], report.problems) == (3, 4, [])


def test_the_parquet_file_joins_problems_about_one_image_and_names_broken_ones(tmp_path):
    rows = [embedded(problem(question=f"Q{number}?"), number % 2, path=None) for number in range(4)]
    records = read_records(write_parquet(tmp_path / "train.parquet", rows))
    questions = [[conversation.turns[0].text[8:10] for conversation in record.conversations] for record in records]
    assert questions == [["Q0", "Q2"], ["Q1", "Q3"]]
    rows[1] = embedded(problem(), 1, encoded=b"not an image")
    report = checking.check(write_parquet(tmp_path / "train.parquet", rows), None)
    assert [problem.where[-5:] for problem in report.problems if problem.fatal] == ["row 1"]


BAD_PROBLEMS = {
    "answer beyond the options": problem(answer=3),
    "answer before the options": problem(answer=-1),
    "answer a letter": problem(answer="A"),
    "answer a boolean": problem(answer=True),
    "no answer": problem(answer=None),
    "answer a half": problem(answer=0.5),
    "no options": problem(choices=[]),
    "one option": problem(choices=["coal"]),
    "eleven options": problem(choices=list("abcdefghijk")),
    "options not a list": problem(choices="coal"),
    "an empty option": problem(choices=["coal", " "]),
    "an option not a text": problem(choices=["coal", True]),
    "options null": problem(choices=None),
    "options missing": without(problem(), "choices"),
    "empty question": problem(question=" "),
    "no question": without(problem(), "question"),
    "question not a text": problem(question=["Q?"]),
    "solution not a text": problem(solution=["because"]),
    "image a number": problem(image=5),
    "image a list": problem(image=["image.png"]),
    "image an object": problem(image={"name": "image.png"}),
    "marker in the solution": problem(solution=f"see {IMAGE}"),
    "marker without an image": problem(image=None, question=f"{IMAGE} Q?"),
}
BAD_QUESTIONS = {
    "no choice": annotated(correct_choice_idx=None),
    "choice beyond": annotated(correct_choice_idx=4),
    "choice a text": annotated(correct_choice_idx="three"),
    "an empty option": annotated(choices=["a", "b", "c", ""]),
    "no options": annotated(choices=[]),
    "no image": annotated(image_id=None),
    "image a text": annotated(image_id="coco"),
    "image a boolean": annotated(image_id=True),
    "rationales not a list": annotated(rationales="He has bags."),
    "a rationale not a text": annotated(rationales=[None]),
    "marker in a rationale": annotated(rationales=[f"see {IMAGE}"]),
    "empty question": annotated(question=""),
    "not an object": 3,
}


@pytest.mark.parametrize(
    ("good", "bad"), [(problem(), BAD_PROBLEMS), (annotated(), BAD_QUESTIONS)], ids=["scienceqa", "aokvqa"]
)
def test_bad_rows_are_reported_and_the_others_are_read(tmp_path, good, bad):
    rows = [good, *bad.values(), good]
    if bad is BAD_PROBLEMS:
        rows = {"first": good, **bad, "last": good}
    examples, log = read(tmp_path, rows)
    assert len(examples) == 2 * max(1, len(good.get("rationales", ())))
    assert problem_rows(log) == [*bad] if bad is BAD_PROBLEMS else [str(n + 1) for n in range(len(bad))]


# A-OKVQA.


def test_a_question_has_a_conversation_for_each_rationale(tmp_path):
    examples, log = read(tmp_path, [annotated()])
    assert log == ReadLog()
    assert {example.image for example in examples} == {"000000299207.jpg"}
    assert {(e.conversation.kind, e.conversation.dataset) for e in examples} == {("positive", "aokvqa")}
    assert len({turns[0] for turns in texts(examples)}) == 1
    assert [turns[1:] for turns in texts(examples)] == [["D", "Explain why.", why] for why in annotated()["rationales"]]
    supervised = Supervision()([example.conversation for example in examples])
    assert [conversation.turns[1].weight for conversation in supervised] == [1, 0, 0]
    assert [conversation.turns[3].weight for conversation in supervised] == [1, 1, 1]


@pytest.mark.parametrize(
    ("rationales", "kept"),
    [([], []), (None, []), (["", " "], []), (["One.", "One.", " One. ", "", "Two."], ["One.", "Two."])],
    ids=repr,
)
def test_empty_and_repeated_rationales_are_dropped(tmp_path, rationales, kept):
    examples, log = read(tmp_path, [annotated(rationales=rationales)])
    assert log.problems == []
    assert [turns[3:] for turns in texts(examples)] == ([[why] for why in kept] or [[]])
    assert kinds(examples) == (["positive"] * len(kept) or [""])


def test_aokvqa_images_are_coco_numbers_or_embedded(tmp_path, images):
    rows = [annotated(image_id=number) for number in (2, 1, 2)]
    records = read_records(write_json_rows(tmp_path / "rows.json", rows))
    assert [record.image for record in records] == [png((number, 2, 0)) for number in (2, 1)]
    assert [len(record.conversations) for record in records] == [6, 3]
    rows = [embedded(annotated(), number, path=None) for number in (0, 1, 0)]
    records = read_records(write_parquet(tmp_path / "train.parquet", rows))
    assert [record.image for record in records] == [png((number, 0, 0)) for number in range(2)]
    assert [len(record.conversations) for record in records] == [6, 3]


@pytest.mark.parametrize("number", ["2", 2.0, "2.0"], ids=repr)
def test_numbers_may_be_written_as_tables_write_them(tmp_path, number):
    rows = [annotated(correct_choice_idx=number, image_id=number)]
    (example, *_), log = read(tmp_path, rows)
    assert (log.problems, example.image, texts([example])[0][1]) == ([], "000000000002.jpg", "C")
    (example,), _ = read(tmp_path, {"1": problem(answer=number)})
    assert texts([example])[0][1] == "C"


# Splits.


def test_other_splits_are_skipped_and_counted(tmp_path):
    splits = {"1": "train", "2": "val", "3": "test", "4": "val", "6": "minival"}
    rows = {id: problem(split=split) for id, split in splits.items()}
    rows["3"]["answer"] = None  # a broken row of another split does not matter
    examples, log = read(tmp_path, rows)
    assert [example.image for example in examples] == ["train/1/image.png"]
    assert log.problems == []
    assert len(log.notes) == 3
    for count, split in ((1, "minival"), (1, "test"), (2, "val")):
        assert sum(f" {count} rows" in note and repr(split) in note for note in log.notes) == 1


def test_named_splits_are_read(tmp_path):
    rows = [annotated(image_id=number, split=split) for number, split in enumerate(("train", "val", "test"))]
    for splits in (("train",), ("val",), ("val", "train"), ("test", "val", "train")):
        images = {example.image for example in read(tmp_path, rows, splits=splits)[0]}
        assert images == {f"{row['image_id']:012d}.jpg" for row in rows if row["split"] in splits}


options = st.lists(
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=9), min_size=2, max_size=10
).filter(lambda options: all(option.strip() and IMAGE not in option for option in options))


@settings(max_examples=30)
@given(options, st.data())
def test_the_letter_is_the_right_options(tmp_path_factory, choices, data):
    answer = data.draw(st.integers(0, len(choices) - 1))
    path = tmp_path_factory.mktemp("letters")
    for rows in (
        {"1": problem(choices=choices, answer=answer)},
        [annotated(choices=choices, correct_choice_idx=answer)],
    ):
        examples, log = read(path, rows)
        assert log == ReadLog()
        question, letter = texts(examples)[0][:2]
        assert f"\n{letter}. {choices[answer].strip()}\n" in question


# Wrong options for annotation.


def annotation_rows(rows, max_wrong=3):
    log = ReadLog()
    return multiple_choice.annotation_rows(Given(rows), log, splits=("train",), max_wrong=max_wrong), log


@pytest.mark.parametrize("max_wrong", [1, 2, 99])
def test_each_wrong_option_is_a_row_of_the_first_stage(max_wrong):
    rows, log = annotation_rows([annotated(), {"pid": "7", **problem(solution="")}], max_wrong)
    assert log == ReadLog()
    assert [row["confusing_answer"][0] for row in rows] == [*"ABC"[:max_wrong], *"BC"[:max_wrong]]
    for row in rows:
        assert set(QUESTION_KEYS) <= row.keys()
        assert all(isinstance(value, str) and value.strip() for value in row.values())
        assert f"\n{row['correct_answer']}\n" in row["question"]
        assert f"\n{row['confusing_answer']}\n" in row["question"]
        assert IMAGE not in row["question"]
    assert {(row["image"], row["correct_answer"], row.get("correct_rationale")) for row in rows} == {
        ("000000299207.jpg", "D. cab", "He stands at the kerb."),
        ("train/7/image.png", "A. coal", None),
    }


def test_questions_without_an_image_file_are_reported():
    rows, log = annotation_rows(
        [problem(image=None), embedded(problem(), 1), annotated(), annotated(split="val"), annotated(choices=[])]
    )
    assert {row["image"] for row in rows} == {"000000299207.jpg"}
    assert problem_rows(log) == ["0", "1", "4"]
    assert len(log.notes) == 1


def test_the_command_writes_a_folder_for_annotation_once(reverie, tmp_path):
    rows = {"1": problem(), "2": problem(image=None), "3": problem(split="test")}
    path = write_json_rows(tmp_path / "problems.json", rows)
    code, out, err = reverie("data", "questions", path, "--out", tmp_path / "out", "--confusing", 1)
    assert (code, out) == (0, f"1 rows: {tmp_path / 'out' / QUESTIONS}\n")
    assert "'test'" in err
    assert "row 2" in err
    (row,) = json.loads((tmp_path / "out" / QUESTIONS).read_text("utf-8"))
    assert (row["image"], row["confusing_answer"]) == ("train/1/image.png", "B. glass")
    code, out, err = reverie("data", "questions", path, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert QUESTIONS in err


@pytest.mark.parametrize("case", ["no choices", "confusing=-1", "other split"])
def test_the_command_refuses(reverie, tmp_path, case):
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    rows = {"no choices": [{"image": "a.png", "conversations": turns}], "other split": [annotated(split="val")]}
    path = write_json_rows(tmp_path / "rows.json", rows.get(case, [annotated()]))
    extra = ["--confusing=-1"] if case == "confusing=-1" else []
    code, out, err = reverie("data", "questions", path, "--out", tmp_path / "out", *extra)
    assert (code, out) == (2, "")
    assert all(line.startswith("reverie: ") for line in err.splitlines())
    assert not (tmp_path / "out").exists()
    if case == "other split":
        assert reverie("data", "build", path, "--out", tmp_path / "records")[0] == 2
        assert not (tmp_path / "records").exists()


def test_annotation_explains_wrong_options_and_keeps_human_rationales(tmp_path, images, keys, reverie):
    from tests.annotate import helpers

    rows = [annotated(image_id=1), annotated(image_id=2, rationales=[])]
    path = write_json_rows(tmp_path / "aokvqa.json", rows)
    assert reverie("data", "questions", path, "--out", tmp_path / "out")[0] == 0
    prompts = helpers.write_prompts(tmp_path / "prompts")
    arguments = ["--out", tmp_path / "out", "--images", images, "--writer", "openai:tiny", "--prompts", prompts]
    with helpers.Memory(helpers.answer) as memory:
        code, _, err = reverie("annotate", "rationales", *arguments)
    assert code == 0, err
    rows = json.loads((tmp_path / "out" / RATIONALES).read_text("utf-8"))
    assert [row["confusing_answer"] for row in rows] == ["A. skateboarder", "B. train", "C. delivery"] * 2
    assert all(row["incorrect_rationale"].startswith("It is not seen") for row in rows)
    human, generated = ([row["correct_rationale"] for row in rows if row["image"][11] == id] for id in "12")
    assert set(human) == {"He stands at the kerb."}
    assert all(rationale.startswith("It is seen") for rationale in generated)
    stages = [helpers.stage_of(call) for call in memory.calls]
    assert (stages.count("negative"), stages.count("positive")) == (6, 1)
