"""ScienceQA and A-OKVQA as they are published: what a human explained is taught, what is wrong is handed on to be asked."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.annotate.files import QUESTIONS, RATIONALES
from reverie_jax.data.sources.annotated import QUESTION_KEYS as KEYS
from reverie_jax.data import check as checking
from reverie_jax.data import sources
from reverie_jax.data.conversation import IMAGE
from reverie_jax.data.mixture import MixtureEntry, read_mixture
from reverie_jax.data.sources import ReadLog, Rows, multiple_choice
from reverie_jax.data.sources.reverie import parse_rationale_prompt
from reverie_jax.data.stats import compute_stats
from reverie_jax.data.supervision import Supervision
from reverie_jax.errors import DataError
from tests.annotate import helpers
from tests.data.fakes import Given, png
from tests.data.test_check import claimed

PICTURE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
TEXT = pyarrow.string()
SCIENCEQA = pyarrow.schema(
    [
        *[("image", PICTURE), ("question", TEXT), ("choices", pyarrow.list_(TEXT)), ("answer", pyarrow.int8())],
        *[(name, TEXT) for name in ("hint", "task", "grade", "subject", "topic", "category", "skill")],
        *[("lecture", TEXT), ("solution", TEXT)],
    ]
)
AOKVQA = pyarrow.schema(
    [
        *[("image", PICTURE), ("question_id", TEXT), ("question", TEXT), ("choices", pyarrow.list_(TEXT))],
        *[("correct_choice_idx", pyarrow.int8()), ("direct_answers", TEXT)],
        *[("difficult_direct_answer", pyarrow.bool_()), ("rationales", pyarrow.list_(TEXT))],
    ]
)


def problem(**changes):
    """A row of ScienceQA's problems.json, which holds it by its id."""
    return {
        "question": "Which of these is a rock?",
        "choices": ["coal", "glass", "paper"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade4",
        "subject": "natural science",
        "topic": "earth-science",
        "category": "Rocks and minerals",
        "skill": "Identify rocks",
        "lecture": "A rock is a solid.",
        "solution": "Coal forms in nature.",
        "split": "train",
    } | changes


def annotated(**changes):
    """A row of A-OKVQA's list."""
    return {
        "split": "train",
        "image_id": 299207,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "What is the man by the bags awaiting?",
        "choices": ["skateboarder", "train", "delivery", "cab"],
        "correct_choice_idx": 3,
        "direct_answers": ["ride", "taxi", "bus"],
        "difficult_direct_answer": False,
        "rationales": ["He stands at the kerb.", "He has bags.", "He looks down the road."],
    } | changes


def without(row, *keys):
    return {key: value for key, value in row.items() if key not in keys}


def parquet(path, rows, schema):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
    return path


def embedded(row, number, path="image.png", encoded=None):
    """The row as the Parquet file has it: its picture in it, which is called like every other."""
    encoded = png((number, 0, 0)) if encoded is None else encoded
    return without(row, "split", "image_id", "direct_answers") | {"image": {"bytes": encoded, "path": path}}


def written(path, rows):
    path.write_text(json.dumps(rows), "utf-8")
    return path


def read(path, **options):
    reading = ReadLog()
    return list(sources.read(path, reading, **options)), reading


def records(path, **options):
    with read_mixture([MixtureEntry(file=path, **options)], ReadLog()) as found:
        return list(found)


def spoken(talks):
    return [[turn.text for turn in talk.conversation.turns] for talk in talks]


def one_line(error, *names):
    text = str(error.value)
    assert "\n" not in text
    for name in names:
        assert str(name) in text


@pytest.fixture
def pictures(tmp_path):
    """ScienceQA's folders with a picture of one name in each, and COCO's with 12 digits."""
    folder = tmp_path / "images"
    for number in (1, 2, 3):
        (folder / "train" / str(number)).mkdir(parents=True)
        (folder / "train" / str(number) / "image.png").write_bytes(png((number, 1, 0)))
        (folder / f"{number:012d}.jpg").write_bytes(png((number, 2, 0)))
    return folder


# ScienceQA.


def test_a_problem_is_asked_answered_by_its_letter_and_explained_by_its_solution(tmp_path):
    talks, reading = read(written(tmp_path / "problems.json", {"7": problem()}))
    assert reading == ReadLog()
    ((asked, answer, prompt, why),) = spoken(talks)
    assert asked.startswith(f"{IMAGE}\nWhich of these is a rock?\n")
    assert [line for line in asked.split("\n") if line[1:3] == ". "] == ["A. coal", "B. glass", "C. paper"]
    assert (answer, why) == ("A", "Coal forms in nature.")
    assert parse_rationale_prompt(prompt) == ("positive", "")
    assert (talks[0].conversation.kind, talks[0].conversation.dataset) == ("positive", "scienceqa")
    assert talks[0].image == "train/7/image.png"
    assert "7" in talks[0].where.rsplit("row ")[1]


def test_a_hint_is_context_before_the_question(tmp_path):
    hint = "The pictures show two samples."
    rows = {"1": problem(hint=hint), "2": problem(hint=None), "3": problem(hint="  ")}
    first, second, third = (asked for asked, *_ in spoken(read(written(tmp_path / "problems.json", rows))[0]))
    assert hint in first
    assert first.index(hint) < first.index("Which of these")
    assert second == third
    assert "Context" not in second


def test_a_problem_without_a_picture_is_text_alone(tmp_path, pictures):
    path = written(
        tmp_path / "problems.json", {"1": problem(), "2": problem(image=None), "3": without(problem(), "image")}
    )
    found = records(path)
    assert [bool(record.image) for record in found] == [True, False, False]
    assert [record.conversations[0].images for record in found] == [(0,), (), ()]
    assert IMAGE not in found[1].conversations[0].turns[0].text


@pytest.mark.parametrize("empty", ["", " \n", None], ids=repr)
def test_an_empty_solution_leaves_a_question_and_its_answer(tmp_path, empty):
    talks, reading = read(written(tmp_path / "problems.json", {"1": problem(solution=empty)}))
    assert reading.problems == []
    assert [turns[1:] for turns in spoken(talks)] == [["A"]]
    assert talks[0].conversation.kind == ""
    assert Supervision("negative")([talks[0].conversation]) == [talks[0].conversation]


def test_each_problem_shows_the_picture_of_its_own_folder(tmp_path, pictures):
    found = records(written(tmp_path / "problems.json", {str(number): problem() for number in (3, 1, 2)}))
    assert [record.image for record in found] == [png((number, 1, 0)) for number in (3, 1, 2)]
    assert [record.id for record in found] == [f"train/{number}/image.png" for number in (3, 1, 2)]


def test_a_missing_picture_is_never_another_problems(tmp_path):
    folder = tmp_path / "images" / "train" / "1"
    folder.mkdir(parents=True)
    (folder / "image.png").write_bytes(png())
    with pytest.raises(DataError) as error:
        records(written(tmp_path / "problems.json", {"1": problem(), "2": problem()}))
    one_line(error, "train/2/image.png")


def test_the_parquet_form_holds_pictures_of_one_name_apart(tmp_path):
    rows = [embedded(problem(), number) for number in range(3)] + [without(problem(image=None), "split")]
    path = parquet(tmp_path / "train.parquet", rows, SCIENCEQA)
    talks, reading = read(path)
    assert reading == ReadLog()
    assert {tuple(turns[1:]) for turns in spoken(talks)} == {("A", "Explain why.", "Coal forms in nature.")}
    found = records(path)
    assert [record.image for record in found] == [*(png((number, 0, 0)) for number in range(3)), b""]
    assert len({record.id for record in found}) == 4


def test_the_parquet_form_joins_one_picture_of_several_problems(tmp_path):
    rows = [embedded(problem(question=f"Q{number}?"), number % 2, path=None) for number in range(4)]
    found = records(parquet(tmp_path / "train.parquet", rows, SCIENCEQA))
    assert [[talk.turns[0].text[8:10] for talk in record.conversations] for record in found] == [
        ["Q0", "Q2"],
        ["Q1", "Q3"],
    ]


def test_check_opens_every_picture_of_the_parquet_form(tmp_path):
    rows = [embedded(problem(), 0), embedded(problem(question="Q1?"), 1, encoded=b"no picture")]
    found = checking.check(parquet(tmp_path / "train.parquet", rows, SCIENCEQA), None)
    assert [offender.where[-5:] for offender in found.offenders if offender.fatal] == ["row 1"]


def test_the_card_counts_pictures_of_one_name_apart(tmp_path):
    rows = [embedded(problem(), number) for number in range(3)]
    found = checking.check(parquet(tmp_path / "train.parquet", rows, SCIENCEQA), None)
    numbers = compute_stats((talk.image, talk.conversation) for talk in found.talks)
    assert (numbers["images"], numbers["instructions"], found.offenders) == (3, 3, [])


BAD_PROBLEMS = {
    "answer beyond the options": problem(answer=3),
    "answer before the options": problem(answer=-1),
    "answer a letter": problem(answer="A"),
    "no answer": problem(answer=None),
    "answer a half": problem(answer=0.5),
    "no options": problem(choices=[]),
    "one option": problem(choices=["coal"]),
    "options no list": problem(choices="coal"),
    "an empty option": problem(choices=["coal", " "]),
    "an option no text": problem(choices=["coal", 3]),
    "options null": problem(choices=None),
    "empty question": problem(question=" "),
    "no question": without(problem(), "question"),
    "question no text": problem(question=["Q?"]),
    "solution no text": problem(solution=["because"]),
}


def test_bad_problems_are_named_and_the_others_are_read(tmp_path):
    rows = {"first": problem(), **BAD_PROBLEMS, "last": problem()}
    talks, reading = read(written(tmp_path / "problems.json", rows))
    assert [talk.image for talk in talks] == ["train/first/image.png", "train/last/image.png"]
    assert [where.split("row ")[1] for where, _ in reading.problems] == list(BAD_PROBLEMS)
    assert all("\n" not in why for _, why in reading.problems)


ESCAPES = {
    "a marker in the solution": problem(solution=f"see {IMAGE}"),
    "a marker without a picture": problem(image=None, question=f"{IMAGE} Q?"),
    "no options at all": without(problem(), "choices"),
}


@pytest.mark.parametrize("row", ESCAPES.values(), ids=ESCAPES)
def test_rows_that_are_found_bad_late_are_named_too(tmp_path, row):
    talks, reading = read(written(tmp_path / "problems.json", {"1": problem(), "2": row, "3": problem()}))
    assert len(talks) == 2
    assert [where.split("row ")[1] for where, _ in reading.problems] == ["2"]


@pytest.mark.parametrize("value", ["problem", 3, None, [1]], ids=repr)
def test_a_problem_that_is_no_object_does_not_end_the_file(tmp_path, value):
    path = written(tmp_path / "problems.json", {"1": problem(), "2": value, "3": problem()})
    try:
        talks, reading = read(path)
    except DataError:
        return
    assert len(talks) == 2
    assert len(reading.problems) == 1


@pytest.mark.parametrize("image", [5, ["image.png"], {"name": "image.png"}], ids=repr)
def test_an_image_of_another_kind_is_a_broken_row(tmp_path, image):
    _, reading = read(written(tmp_path / "problems.json", {"1": problem(), "2": problem(image=image)}))
    assert [where.split("row ")[1] for where, _ in reading.problems] == ["2"]


def test_a_clean_copy_of_problems_lacks_the_broken_ones(tmp_path):
    path = written(tmp_path / "problems.json", {"1": problem(), "2": problem(answer=9), "3": problem()})
    checking.write_clean(checking.check(path, None), path, tmp_path / "clean.json")
    kept = [row["pid"] for row in Rows(tmp_path / "clean.json")]
    assert kept == ["1", "3"]
    assert not checking.check(tmp_path / "clean.json", None).broken


def test_a_clean_copy_of_problems_is_otherwise_the_same(tmp_path):
    path = written(tmp_path / "problems.json", {"1": problem(), "2": problem()})
    checking.write_clean(checking.check(path, None), path, tmp_path / "clean.json")
    assert json.loads((tmp_path / "clean.json").read_text()) == json.loads(path.read_text())


# A-OKVQA.


def test_a_question_is_taught_once_for_each_of_its_rationales(tmp_path):
    talks, reading = read(written(tmp_path / "aokvqa.json", [annotated()]))
    assert reading == ReadLog()
    assert {talk.image for talk in talks} == {"000000299207.jpg"}
    assert {(talk.conversation.kind, talk.conversation.dataset) for talk in talks} == {("positive", "aokvqa")}
    assert len({turns[0] for turns in spoken(talks)}) == 1
    assert [turns[1:] for turns in spoken(talks)] == [["D", "Explain why.", why] for why in annotated()["rationales"]]
    once = Supervision()([talk.conversation for talk in talks])
    assert [talk.turns[1].weight for talk in once] == [1, 0, 0]
    assert [talk.turns[3].weight for talk in once] == [1, 1, 1]


@pytest.mark.parametrize(
    ("rationales", "kept"),
    [
        ([], []),
        (None, []),
        (["", " "], []),
        (["One.", "One.", " One. "], ["One."]),
        (["One.", "", "Two."], ["One.", "Two."]),
    ],
    ids=repr,
)
def test_rationales_that_say_nothing_new_are_left_out(tmp_path, rationales, kept):
    talks, reading = read(written(tmp_path / "aokvqa.json", [annotated(rationales=rationales)]))
    assert reading.problems == []
    assert [turns[3:] for turns in spoken(talks)] == ([[why] for why in kept] or [[]])
    assert [talk.conversation.kind for talk in talks] == (["positive"] * len(kept) or [""])


def test_cocos_pictures_are_found_by_number(tmp_path, pictures):
    found = records(written(tmp_path / "aokvqa.json", [annotated(image_id=number) for number in (2, 1, 2)]))
    assert [record.image for record in found] == [png((number, 2, 0)) for number in (2, 1)]
    assert [len(record.conversations) for record in found] == [6, 3]


def test_the_parquet_form_of_aokvqa_holds_its_pictures(tmp_path):
    rows = [embedded(annotated(), number, path=None) for number in (0, 1, 0)]
    path = parquet(tmp_path / "train.parquet", rows, AOKVQA)
    assert read(path)[1] == ReadLog()
    found = records(path)
    assert [record.image for record in found] == [png((number, 0, 0)) for number in range(2)]
    assert [len(record.conversations) for record in found] == [6, 3]


BAD_QUESTIONS = {
    "no choice": annotated(correct_choice_idx=None),
    "choice beyond": annotated(correct_choice_idx=4),
    "choice a text": annotated(correct_choice_idx="3"),
    "an empty option": annotated(choices=["a", "b", "c", ""]),
    "no options": annotated(choices=[]),
    "no picture": annotated(image_id=None),
    "picture a text": annotated(image_id="coco"),
    "rationales no list": annotated(rationales="He has bags."),
    "a rationale no text": annotated(rationales=[None]),
    "empty question": annotated(question=""),
    "no object": 3,
}


def test_bad_questions_are_named_and_the_others_are_read(tmp_path, pictures):
    good = annotated(image_id=1)
    path = written(tmp_path / "aokvqa.json", [good, *BAD_QUESTIONS.values(), good])
    talks, reading = read(path)
    assert len(talks) == 6
    assert [where for where, _ in reading.problems] == [f"{path}: row {n + 1}" for n in range(len(BAD_QUESTIONS))]
    with pytest.raises(DataError) as error:
        records(path)
    one_line(error, f"{path}: row 1", "more rows")


def test_a_marker_in_a_rationale_is_named(tmp_path):
    _, reading = read(written(tmp_path / "aokvqa.json", [annotated(), annotated(rationales=[f"see {IMAGE}"])]))
    assert [where[-5:] for where, _ in reading.problems] == ["row 1"]


# Splits.


def test_other_splits_are_counted_and_never_taught(tmp_path, pictures):
    splits = ["train", "val", "test", "val", "train", "minival"]
    rows = {str(number): problem(split=split) for number, split in enumerate(splits, 1)}
    path = written(tmp_path / "problems.json", {key: rows[key] for key in ("1", "2", "3", "4", "6")})
    talks, reading = read(path)
    assert [talk.image for talk in talks] == ["train/1/image.png"]
    assert reading.problems == []
    assert sorted(note.replace(str(path), "F") for note in reading.notes) == [
        "F: 1 rows of the split 'minival' are left out",
        "F: 1 rows of the split 'test' are left out",
        "F: 2 rows of the split 'val' are left out",
    ]
    assert len(records(path)) == 1


def test_a_broken_row_of_another_split_does_not_matter(tmp_path):
    _, reading = read(written(tmp_path / "problems.json", {"1": problem(), "2": problem(split="test", answer=None)}))
    assert reading.problems == []


def test_the_splits_that_are_named_are_read(tmp_path):
    rows = [annotated(image_id=number, split=split) for number, split in enumerate(("train", "val", "test"))]
    path = written(tmp_path / "aokvqa.json", rows)
    for splits in (("train",), ("val",), ("val", "train"), ("test", "val", "train")):
        found = {talk.image for talk in read(path, splits=splits)[0]}
        assert found == {f"{row['image_id']:012d}.jpg" for row in rows if row["split"] in splits}


@pytest.mark.parametrize("form", ["scienceqa", "aokvqa"])
def test_rows_that_name_no_split_are_all_read(tmp_path, form):
    if form == "scienceqa":
        path = parquet(tmp_path / "a.parquet", [embedded(problem(), 0), embedded(problem(), 1)], SCIENCEQA)
    else:
        path = parquet(tmp_path / "a.parquet", [embedded(annotated(rationales=["R"]), n) for n in (0, 1)], AOKVQA)
    talks, reading = read(path)
    assert (len(talks), reading.notes) == (2, [])


# Embedded pictures.


@pytest.mark.parametrize("encoded", [b"no picture", claimed(50_000, 50_000)], ids=["no picture", "50,000 x 50,000"])
def test_an_embedded_picture_that_cannot_be_opened_is_refused(tmp_path, encoded):
    rows = [embedded(problem(), 0), embedded(problem(), 1, path="bad.png", encoded=encoded)]
    with pytest.raises(DataError) as error:
        records(parquet(tmp_path / "a.parquet", rows, SCIENCEQA))
    one_line(error, "bad.png")


# Any row.


options = st.lists(
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=9), min_size=2, max_size=10
)


@settings(max_examples=40)
@given(st.data())
def test_the_letter_taught_is_the_right_options(tmp_path_factory, data):
    kept = data.draw(options.filter(lambda texts: all(t.strip() and IMAGE not in t for t in texts)))
    answer = data.draw(st.integers(0, len(kept) - 1))
    path = tmp_path_factory.mktemp("letters") / "rows.json"
    rows = [{"1": problem(choices=kept, answer=answer)}, [annotated(choices=kept, correct_choice_idx=answer)]]
    for content in rows:
        talks, reading = read(written(path, content))
        assert reading == ReadLog()
        asked, said = spoken(talks)[0][:2]
        lines = asked.split("\n")
        assert f"{said}. {kept[answer].strip()}" in lines
        assert [
            line for line in lines if line in {f"{c}. {t.strip()}" for c, t in zip("ABCDEFGHIJ", kept, strict=False)}
        ]


# To be asked why the wrong options are wrong.


def asked_about(rows, most=3, splits=("train",)):
    reading = ReadLog()
    return multiple_choice.annotation_rows(Given(rows), reading, splits=splits, most=most), reading


@pytest.mark.parametrize("most", [1, 2, 3])
def test_each_wrong_option_is_a_row_of_the_first_stage(most):
    made, reading = asked_about([annotated(), {"pid": "7", **problem(solution="")}], most)
    assert reading == ReadLog()
    assert [row["confusing_answer"][0] for row in made] == [*"ABC"[:most], *"BC"[:most]]
    for row in made:
        assert set(KEYS) <= row.keys()
        assert all(isinstance(value, str) and value.strip() for value in row.values())
        assert row["correct_answer"] not in (row["confusing_answer"], "")
        assert f"\n{row['correct_answer']}\n" in row["question"]
        assert f"\n{row['confusing_answer']}\n" in row["question"]
        assert IMAGE not in row["question"]
    assert {(row["image"], row["correct_answer"]) for row in made} == {
        ("000000299207.jpg", "D. cab"),
        ("train/7/image.png", "A. coal"),
    }
    assert [row.get("correct_rationale") for row in made[:most]] == ["He stands at the kerb."] * most
    assert all("correct_rationale" not in row for row in made[most:])


def test_what_has_no_picture_file_cannot_be_asked_about():
    rows = [problem(image=None), embedded(problem(), 1), annotated(), annotated(split="val"), annotated(choices=[])]
    made, reading = asked_about(rows)
    assert {row["image"] for row in made} == {"000000299207.jpg"}
    assert [where for where, _ in reading.problems] == ["f: row 0", "f: row 1", "f: row 4"]
    assert reading.notes == ["f: 1 rows of the split 'val' are left out"]


@pytest.fixture
def reverie(monkeypatch, capsys):
    """Runs the command in this process; returns (exit code, stdout, stderr)."""
    from reverie_jax import cli

    def run(*words):
        monkeypatch.setattr("sys.argv", ["reverie", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_command_writes_a_folder_to_annotate_once(reverie, tmp_path, pictures):
    path = written(tmp_path / "problems.json", {"1": problem(), "2": problem(image=None), "3": problem(split="test")})
    code, out, err = reverie("data", "questions", path, "--out", tmp_path / "out", "--confusing", 1)
    assert (code, out) == (0, f"1 rows: {tmp_path / 'out' / QUESTIONS}\n")
    assert "1 rows of the split 'test' are left out" in err
    assert "row 2" in err
    (row,) = json.loads((tmp_path / "out" / QUESTIONS).read_text("utf-8"))
    assert (row["image"], row["confusing_answer"]) == ("train/1/image.png", "B. glass")
    code, out, err = reverie("data", "questions", path, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "is there already" in err


def test_a_file_without_choices_is_refused_in_one_line(reverie, tmp_path):
    rows = [{"image": "a.png", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}]
    code, _, err = reverie("data", "questions", written(tmp_path / "llava.json", rows), "--out", tmp_path / "out")
    assert code == 2
    assert all(line.startswith("reverie: ") for line in err.splitlines())


def test_no_more_wrong_options_are_asked_about_than_there_are():
    made, _ = asked_about([annotated(), problem()], 99)
    assert len(made) == 3 + 2


def test_a_negative_number_of_wrong_options_is_refused(tmp_path, reverie):
    path = written(tmp_path / "aokvqa.json", [annotated()])
    assert reverie("data", "questions", path, "--out", tmp_path / "out", "--wrong=-1")[0] == 2


@pytest.fixture
def handed_on(monkeypatch, tmp_path, pictures, reverie):
    """A folder that `data questions` wrote and `annotate rationales` went on with; and what was asked."""
    for name, value in helpers.SECRETS.items():
        monkeypatch.setenv(name, value)
    path = written(tmp_path / "aokvqa.json", [annotated(image_id=1), annotated(image_id=2, rationales=[])])
    assert reverie("data", "questions", path, "--out", tmp_path / "out")[0] == 0
    prompts = helpers.write_prompts(tmp_path / "prompts")
    words = ["--out", tmp_path / "out", "--images", pictures, "--model", "openai:tiny", "--prompts", prompts]
    with helpers.Memory(helpers.answer) as memory:
        code, _, err = reverie("annotate", "rationales", *words)
    assert code == 0, err
    return json.loads((tmp_path / "out" / RATIONALES).read_text("utf-8")), memory.calls


def test_annotate_asks_why_each_wrong_option_is_wrong(handed_on):
    rows, calls = handed_on
    assert [row["confusing_answer"] for row in rows] == ["A. skateboarder", "B. train", "C. delivery"] * 2
    assert {row["correct_answer"] for row in rows} == {"D. cab"}
    assert all(row["incorrect_rationale"].startswith("It is not seen") for row in rows)
    assert sum(helpers.stage_of(call) == "negative" for call in calls) == 6
    without_one = [row for row in rows if row["image"] == "000000000002.jpg"]
    assert all(row["correct_rationale"].startswith("It is seen") for row in without_one)


def test_annotate_keeps_the_humans_rationale(handed_on):
    rows, calls = handed_on
    assert {row["correct_rationale"] for row in rows if row["image"] == "000000000001.jpg"} == {
        "He stands at the kerb."
    }
    assert sum(helpers.stage_of(call) == "positive" for call in calls) == 1


def test_a_file_of_another_split_alone_is_refused_and_says_why(tmp_path, reverie):
    path = written(tmp_path / "aokvqa.json", [annotated(split="val")])
    code, out, err = reverie("data", "build", path, "--out", tmp_path / "records")
    assert (code, out) == (2, "")
    assert "1 rows of the split 'val' are left out" in err
    assert not (tmp_path / "records").exists()
