"""HallusionBench: a judge's codes, groups by question and by figure; the yes/no rule that needs no judge."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.eval.benchmarks import answer_files, inputs
from reverie_jax.eval.benchmarks.interface import BenchmarkError
from tests.eval.benchmarks.makers import asked, check, dump, everyone, ids, lines, opened, picture, shade

PROMPTS: dict[str, str] = {}


def row(category: str, sub: str, visual: int, set_id: int, figure: int, question: int, truth: int, **more: Any) -> dict:
    """One of the file's rows: all values are text."""
    name = f"{category} {sub} set {set_id} figure {figure} question {question}"
    made = {
        "category": category,
        "subcategory": sub,
        "visual_input": str(visual),
        "set_id": str(set_id),
        "figure_id": str(figure),
        "sample_note": "note",
        "question_id": str(question),
        "question": f"Is {name} right?",
        "gt_answer_details": f"It is {'so' if truth else 'not so'}: {name}.",
        "gt_answer": str(truth),
        "filename": None if visual == 0 else f"./{category}/{sub}/{set_id}_{figure}.png",
    }
    return {**made, **more}


# Two sets of figures and questions; "ocr" is a part of both VD and VS, with the same numbers.
ROWS = [
    row("VD", "ocr", 1, 0, 0, 0, 1),
    row("VD", "ocr", 1, 0, 0, 1, 0),
    row("VD", "ocr", 2, 0, 1, 0, 0),
    row("VD", "ocr", 2, 0, 1, 1, 1),
    row("VS", "ocr", 0, 0, 0, 0, 1),
    row("VS", "ocr", 0, 0, 0, 1, 0),
    row("VS", "ocr", 1, 0, 1, 0, 1),
    row("VS", "ocr", 1, 0, 1, 1, 0),
    row("VS", "ocr", 2, 0, 2, 0, 0),
    row("VD", "math", 1, 1, 0, 0, 1),
    row("VD", "math", 2, 1, 1, 0, 0),
]


@pytest.fixture
def data(tmp_path):
    dump(tmp_path / "HallusionBench.json", ROWS)
    for number, each in enumerate(ROWS):
        if each["filename"]:
            picture(tmp_path / each["filename"], number)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    dump(folder / "HallusionBench.json", ROWS)
    return opened("hallusionbench", folder)


def judged(
    bench, loaded, answers: Mapping[str, str], codes: Mapping[str, str], same: Mapping[str, str]
) -> dict[str, str]:
    """Replies to whatever the rule asks a judge: a code for each answer, and for comparisons "same" or not."""
    replies = {}
    for request in bench.judge_requests(loaded, answers, "official", prompts()):
        id, _, kind = request.id.partition("#")
        replies[request.id] = (same if kind else codes)[id]
    return replies


def prompts() -> dict[str, str]:
    """The templates that come with the package."""
    if not PROMPTS:
        home = resources.files("reverie_jax.eval").joinpath("prompts")
        PROMPTS.update({file.name.removesuffix(".txt"): file.read_text("utf-8") for file in home.iterdir()})
    return PROMPTS


def test_all_rows_are_asked_with_the_bare_question(data):
    _, loaded = opened("hallusionbench", data)
    assert [q.text for q in loaded.questions] == [each["question"] for each in ROWS]
    assert len(set(ids(loaded))) == len(ROWS)


def test_rows_without_a_picture_have_none(data):
    _, loaded = opened("hallusionbench", data)
    assert [q.image is None for q in loaded.questions] == [each["filename"] is None for each in ROWS]


@pytest.mark.parametrize("level", ["", "hallusion_bench"])
def test_pictures_are_found_with_and_without_a_level_more(tmp_path, level):
    dump(tmp_path / "HallusionBench.json", ROWS)
    picture(tmp_path / level / "VS" / "ocr" / "0_1.png", 200)
    _, loaded = opened("hallusionbench", tmp_path)
    question = asked(loaded, "VS ocr set 0 figure 1 question 0")
    assert shade(loaded.read_image(question.image)) == 200


def test_same_numbers_in_both_parts_are_two_pictures(data):
    _, loaded = opened("hallusionbench", data)
    first, second = asked(loaded, "VD ocr", "figure 1 question 0"), asked(loaded, "VS ocr", "figure 1 question 0")
    assert loaded.read_image(first.image) != loaded.read_image(second.image)


def test_missing_and_broken_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(BenchmarkError, match=r"HallusionBench\.json") as error:
        opened("hallusionbench", tmp_path)
    assert "\n" not in str(error.value)
    for broken in ({**ROWS[1], "gt_answer": "2"}, {**ROWS[1], "category": None}, {"question": "Is it?"}, ROWS[0]):
        dump(tmp_path / "HallusionBench.json", [ROWS[0], broken])
        with pytest.raises(BenchmarkError, match=r"HallusionBench\.json") as error:
            opened("hallusionbench", tmp_path)
        assert "\n" not in str(error.value)


def official(rows: list[dict], codes: list[int], same: list[bool]) -> dict[str, float]:
    """The published arithmetic, group by group."""
    right = [
        code == 1 or (code == 2 and each["category"] == "VS" and each["figure_id"] == "0")
        for each, code in zip(rows, codes, strict=True)
    ]

    def groups(names: tuple[str, ...], keep=lambda each: True) -> float:
        """Share of groups by those columns that are all right."""
        found: dict[tuple, list[bool]] = {}
        for each, good in zip(rows, right, strict=True):
            if keep(each):
                found.setdefault(tuple(each[name] for name in names), []).append(good)
        return 100 * sum(map(all, found.values())) / len(found) if found else 0.0

    question = ("category", "subcategory", "set_id", "question_id")
    figure = ("category", "subcategory", "set_id", "figure_id")
    origin = {
        tuple(each[name] for name in question): code
        for each, code in zip(rows, codes, strict=True)
        if each["figure_id"] == "0"
    }
    blame = [
        cause(each, code, origin[tuple(each[name] for name in question)], alike)
        for each, code, alike in zip(rows, codes, same, strict=True)
    ]
    errors = sum(kind != "" for kind in blame)
    said_yes = [good == (each["gt_answer"] == "1") for each, good in zip(rows, right, strict=True)]
    truly_yes = [each["gt_answer"] == "1" for each in rows]
    wrong = [each["gt_answer"] == "0" for each, good in zip(rows, right, strict=True) if not good]
    return {
        "aAcc": 100 * sum(right) / len(rows),
        "qAcc": groups(question),
        "fAcc": groups(figure, lambda each: (each["category"], each["figure_id"]) != ("VS", "0")),
        "easy": groups(question, lambda each: each["visual_input"] != "2"),
        "hard": groups(question, lambda each: each["visual_input"] == "2"),
        "diff": (sum(said_yes) - sum(truly_yes)) / len(rows),
        "fp": sum(wrong) / len(wrong) if wrong else 0.0,
        "LH": 100 * blame.count("LH") / errors if errors else 0.0,
        "VI": 100 * blame.count("VI") / errors if errors else 0.0,
        "Mixed": 100 * blame.count("Mixed") / errors if errors else 0.0,
    }


def cause(each: dict, code: int, origin: int, alike: bool) -> str:
    """What an error is put down to, by the published table."""
    vision = each["category"] == "VD"
    if each["figure_id"] == "0":
        return ("VI" if code != 1 else "") if vision else ("LH" if code == 0 else "")
    if code == 1:
        return ""
    if vision:
        return "Mixed" if origin == 1 and code == 0 and alike else "VI"
    if origin == 0:
        return "LH" if code == 0 and alike else "Mixed"
    if origin == 1 and code == 0 and each["visual_input"] == "2" and alike:
        return "LH"
    return "VI"


REPLIES = {0: "Incorrect.", 1: "The prediction is CORRECT", 2: "unclear"}


def score(bench, loaded, codes: list[int], same: list[bool], *, full: bool = True):
    answers = everyone(loaded, "Yes, it is.")
    names = ids(loaded)
    replies = judged(
        bench,
        loaded,
        answers,
        dict(zip(names, (REPLIES[code] for code in codes), strict=True)),
        dict(zip(names, ("Same" if alike else "different" for alike in same), strict=True)),
    )
    assert len(replies) >= len(ROWS)
    return (check if full else plain)(bench, loaded, answers, "official", replies=replies)


def plain(bench, loaded, answers, rule, *, replies):
    return bench.score(loaded, answers, rule, replies)


def test_metrics_are_those_of_the_published_arithmetic(whole):
    """Random codes, seeded: enough of them to meet every row of the table of causes."""
    bench, loaded = whole
    rng, met = random.Random(0), set()
    for turn in range(25):
        codes = rng.choices([0, 1, 2], [2, 3, 1], k=len(ROWS))
        same = rng.choices([False, True], k=len(ROWS))
        values = score(bench, loaded, codes, same, full=turn < 2).values()
        wanted = official(ROWS, codes, same)
        assert {name: values[name] for name in wanted} == pytest.approx(wanted)
        for part in ("VD", "VS"):
            kept = [row["category"] == part for row in ROWS]
            few = official(*(list(itertools.compress(each, kept)) for each in (ROWS, codes, same)))
            assert {name: values[f"{part}/{name}"] for name in few} == pytest.approx(few)
        met |= {
            (row["figure_id"], row["category"], code, alike) for row, code, alike in zip(ROWS, codes, same, strict=True)
        }
    assert len(met) == 30  # figures 0 and 1 of both parts and figure 2 of VS, three codes, the same or not


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("correct", 1),
        ("Correct.", 1),
        ("incorrect", 0),
        ("INCORRECT", 0),
        ("unclear", 2),
        ("Not correct", 1),
        ("The answer is not incorrect, it is correct", 0),
        ("\u201ccorrect\u201d", 1),
        ("", 2),
        ("wrong", 2),
        ("true", 2),
        ("correctness is unclear", 1),
    ],
    ids=repr,
)
def test_replies_are_read_as_published(data, reply, code):
    bench, loaded = opened("hallusionbench", data)
    answers, names = everyone(loaded, "No."), ids(loaded)
    replies = judged(bench, loaded, answers, dict.fromkeys(names, reply), dict.fromkeys(names, "same"))
    values = bench.score(loaded, answers, "official", replies=replies).values()
    assert values["aAcc"] == pytest.approx(official(ROWS, [code] * len(ROWS), [True] * len(ROWS))["aAcc"])


@pytest.mark.parametrize(
    ("reply", "alike"), [("same", True), ("not the SAME", True), ("different", False), ("", False)], ids=repr
)
def test_comparisons_are_read_as_published(data, reply, alike):
    bench, loaded = opened("hallusionbench", data)
    answers, names = everyone(loaded, "No."), ids(loaded)
    codes = [0 if each["visual_input"] == "2" else 1 for each in ROWS]
    replies = judged(
        bench,
        loaded,
        answers,
        dict(zip(names, (REPLIES[code] for code in codes), strict=True)),
        dict.fromkeys(names, reply),
    )
    values = bench.score(loaded, answers, "official", replies=replies).values()
    wanted = official(ROWS, codes, [alike] * len(ROWS))
    for name in ("LH", "VI", "Mixed"):
        assert values[name] == pytest.approx(wanted[name])


def test_not_knowing_without_a_picture_is_right_for_vs_alone(data):
    bench, loaded = opened("hallusionbench", data)
    scored = score(bench, loaded, [2] * len(ROWS), [False] * len(ROWS))
    right = {id for id, reading in zip(ids(loaded), scored.parsed_answers, strict=True) if reading.right}
    blind = {str(q.id) for q, each in zip(loaded.questions, ROWS, strict=True) if each["visual_input"] == "0"}
    assert right == blind


def test_perfect_and_hopeless_runs_divide_by_nothing(data):
    bench, loaded = opened("hallusionbench", data)
    for code, value in ((1, 100), (0, 0)):
        values = score(bench, loaded, [code] * len(ROWS), [True] * len(ROWS)).values()
        assert [values[name] for name in ("aAcc", "qAcc", "fAcc", "easy", "hard")] == [value] * 5
        assert all(np.isfinite(list(values.values())))


def test_score_without_replies_is_refused_in_one_line(data):
    bench, loaded = opened("hallusionbench", data)
    assert "official" in bench.judged_rules
    for replies in (None, {}, {ids(loaded)[0]: "correct"}):
        with pytest.raises(BenchmarkError) as error:
            bench.score(loaded, everyone(loaded, "Yes"), "official", replies=replies)
        assert "\n" not in str(error.value)


def test_judge_reads_question_reference_and_answer(data):
    bench, loaded = opened("hallusionbench", data)
    answers = {id: f"My answer {n}." for n, id in enumerate(ids(loaded))}
    made = {request.id: request for request in bench.judge_requests(loaded, answers, "official", prompts())}
    assert set(ids(loaded)) <= set(made)
    for number, (id, each) in enumerate(zip(ids(loaded), ROWS, strict=True)):
        for part in (each["question"], each["gt_answer_details"], f"My answer {number}."):
            assert part in made[id].prompt
    others = {id: request for id, request in made.items() if "#" in id}
    assert others  # the comparison with the answer to the first figure
    last = asked(loaded, "VS ocr", "figure 2 question 0")
    (compared,) = [request for id, request in others.items() if id.partition("#")[0] == str(last.id)]
    assert "My answer 8." in compared.prompt
    assert "My answer 4." in compared.prompt


# The rule without a judge: yes or no as a word, not both.
READ = {
    "Yes": "yes",
    "no": "no",
    "No, it is not.": "no",
    "Yes.": "yes",
    "The answer is yes!": "yes",
    "Yes and no": "",
    "none": "",
    "I do not know": "",
    "": "",
    "Eyes": "",
    "S\u00ed": "",
    "**Yes**": "",
}


@pytest.mark.parametrize("answer", READ, ids=repr)
def test_rule_without_a_judge_reads_words(data, answer):
    bench, loaded = opened("hallusionbench", data)
    scored = bench.score(loaded, everyone(loaded, answer), "vlmevalkit")
    read = {q.id: reading for q, reading in zip(loaded.questions, scored.parsed_answers, strict=True)}
    for question, each in zip(loaded.questions, ROWS, strict=True):
        if each["filename"] is None:
            continue
        reading = read[question.id]
        assert reading.parsed == READ[answer]
        assert reading.unparsed is (READ[answer] == "")
        assert bool(reading.right) is (READ[answer] == {"1": "yes", "0": "no"}[each["gt_answer"]])


def kit(rows: list[dict], said: list[str]) -> dict[str, float]:
    """VLMEvalKit: rows with a picture; groups leave out VD and VS, so those of "ocr" fall together."""
    pairs = [
        (each, word == {"1": "yes", "0": "no"}[each["gt_answer"]])
        for each, word in zip(rows, said, strict=True)
        if each["filename"]
    ]

    def groups(*names: str) -> float:
        found: dict[tuple, list[bool]] = {}
        for each, good in pairs:
            found.setdefault(tuple(each[name] for name in names), []).append(good)
        return 100 * sum(map(all, found.values())) / len(found)

    values = {
        "aAcc": 100 * sum(good for _, good in pairs) / len(pairs),
        "fAcc": groups("subcategory", "set_id", "figure_id"),
        "qAcc": groups("subcategory", "set_id", "question_id"),
    }
    return values | {"mean": sum(values.values()) / 3}


@settings(max_examples=15)
@given(st.lists(st.sampled_from(["yes", "no", ""]), min_size=11, max_size=11))
def test_vlmevalkits_groups_fall_together(whole, said):
    bench, loaded = whole
    scored = check(bench, loaded, dict(zip(ids(loaded), said, strict=True)), "vlmevalkit")
    values, wanted = scored.values(), kit(ROWS, said)
    for name in ("aAcc", "fAcc", "qAcc"):
        assert values[name] == pytest.approx(wanted[name])
    assert wanted["mean"] == pytest.approx(next(iter(values.values())))


def test_groups_that_fall_together_are_fewer():
    rows = [each for each in ROWS if each["filename"]]
    figures = {tuple(each[name] for name in ("subcategory", "set_id", "figure_id")) for each in rows}
    apart = {(each["category"], each["subcategory"], each["set_id"], each["figure_id"]) for each in rows}
    assert (len(figures), len(apart)) == (5, 6)


def test_answers_are_joined_in_any_order(data, tmp_path):
    bench, loaded = opened("hallusionbench", data)
    rows = [{"question_id": q.id, "text": f"{n}"} for n, q in enumerate(loaded.questions)]
    wanted = {id: f"{n}" for n, id in enumerate(ids(loaded))}
    assert answer_files.read_answers(lines(tmp_path / "a.jsonl", rows[::-1]), bench, loaded) == wanted


def test_official_result_file_is_written_and_read_back(data, tmp_path):
    """The same rows with `model_prediction`."""
    bench, loaded = opened("hallusionbench", data)
    answers = {id: f"Answer {n}." for n, id in enumerate(ids(loaded))}
    (path,) = bench.export(loaded, answers, tmp_path / "out")
    rows = inputs.read_json(path)
    assert [{**each, "model_prediction": f"Answer {n}."} for n, each in enumerate(ROWS)] == rows
    assert answer_files.read_answers(path, bench, loaded) == answers


def test_decision_table_has_every_case():
    """Both of the table's parts name a cause for every error and none for every right answer."""
    for each, code, origin, alike in itertools.product(ROWS, (0, 1, 2), (0, 1, 2), (False, True)):
        blind = each["category"] == "VS" and each["figure_id"] == "0"
        wrong = code == 0 or (code == 2 and not blind)
        assert bool(cause(each, code, origin, alike)) is wrong
