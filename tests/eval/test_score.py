"""Scores: what they refuse, what they say beside the metrics, and every interval and test against a slow loop."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest

from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks.interface import BenchmarkError
from reverie_jax.eval.benchmarks.pope import says_yes
from reverie_jax.eval.judge_replies import answers_digest
from reverie_jax.eval.score import LISTED, agreement, compare, score, write_score
from reverie_jax.eval.statistics import resamples
from tests.eval.benchmarks.makers import dump, lines, mme, opened, pope, said
from tests.eval.benchmarks.makers_free import mmhal_rows

THINGS = ("cup", "dog", "car", "fork", "kite")
IMAGES = 6
DRAWS = 60
SAYS = ("Yes", "No", "Yes, there is.", "No, there is not.", "yes", "no", "I see a table.", "")


@pytest.fixture(scope="module")
def opened_pope(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("pope"), random.Random(1)
    splits = {}
    for split, count in (("random", 4), ("adversarial", 3)):
        splits[split] = [
            (f"{n}.jpg", f"Is there a {thing} in the image?", draw.choice(("yes", "no")))
            for n in range(IMAGES)
            for thing in draw.sample(THINGS, count)
        ]
    return opened("pope", pope(folder, **splits))


@pytest.fixture(scope="module")
def loaded(opened_pope):
    return opened_pope[1]


def written(path, loaded, answers, **more):
    """An answer file; more: a function of the question for each further field."""
    made = [
        said(q.id, q.text, answers[str(q.id)], **{name: make(q) for name, make in more.items()})
        for q in loaded.questions
        if str(q.id) in answers
    ]
    return lines(path, made)


def drawn(loaded, seed, among=SAYS):
    draw = random.Random(seed)
    return {str(question.id): draw.choice(among) for question in loaded.questions}


@pytest.fixture
def predictions(loaded, tmp_path):
    return written(tmp_path / "answers.jsonl", loaded, drawn(loaded, 0))


def official(questions, answers):
    """POPE's numbers by counting, over questions that may stand there several times."""
    found = {}
    for split in ("random", "adversarial"):
        asked = [
            # What is not answered is wrong.
            (q.metadata["label"], says_yes(answers[str(q.id)]) if str(q.id) in answers else not q.metadata["label"])
            for q in questions
            if q.metadata["split"] == split
        ]
        both = sum(label and yes for label, yes in asked)
        found[f"{split}/accuracy"] = sum(label == yes for label, yes in asked) / len(asked) if asked else 0.0
        found[f"{split}/yes_ratio"] = sum(yes for _, yes in asked) / len(asked) if asked else 0.0
        over, under = 2 * both, sum(yes for _, yes in asked) + sum(label for label, _ in asked)
        found[f"{split}/f1"] = over / under if both else 0.0
    return found | {"f1": (found["random/f1"] + found["adversarial/f1"]) / 2}


def percentile(values, percent):
    """Linear between the two nearest ranks."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def resampled(loaded, *, draws=DRAWS):
    """The questions of each resample, units drawn with all that belongs to them."""
    units = list(dict.fromkeys(question.cluster for question in loaded.questions))
    for weights in resamples(len(units), draws=draws).tolist():
        times = dict(zip(units, weights, strict=True))
        yield [question for question in loaded.questions for _ in range(times[question.cluster])]


def test_intervals_are_those_of_a_slow_loop_over_units(opened_pope, predictions):
    bench, loaded = opened_pope
    found = score(bench, loaded, predictions, draws=DRAWS)
    answers = drawn(loaded, 0)
    assert found.scored.clusters == [f"{n}.jpg" for n in range(IMAGES)]
    samples = [official(questions, answers) for questions in resampled(loaded)]
    for name, value in official(loaded.questions, answers).items():
        assert found.metrics[name] == pytest.approx(value), name
        low, high = found.intervals[name]
        assert low == pytest.approx(percentile([sample[name] for sample in samples], 2.5)), name
        assert high == pytest.approx(percentile([sample[name] for sample in samples], 97.5)), name
        assert low <= value <= high
        assert low < high
    assert next(iter(found.metrics)) == "f1"
    assert found.intervals.keys() == found.metrics.keys()


def test_one_unit_has_no_interval(opened_pope, tmp_path):
    bench, loaded = opened_pope
    one = dataclasses.replace(loaded, questions=[q for q in loaded.questions if q.cluster == "0.jpg"])
    path = written(tmp_path / "one.jsonl", one, drawn(one, 0))
    assert score(bench, one, path).intervals == {}
    assert score(bench, loaded, written(tmp_path / "all.jsonl", loaded, drawn(loaded, 0)), draws=0).intervals == {}


def test_a_score_is_one_plain_object(opened_pope, predictions, tmp_path):
    bench, loaded = opened_pope
    found = score(bench, loaded, predictions)
    path = tmp_path / "deep" / "scores.json"
    write_score(found, path)
    text = path.read_text("utf-8")
    made = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert made == json.loads(json.dumps(found.json()))
    assert {"benchmark", "rule", "protocol", "metrics", "items", "unparsed"} <= made.keys()
    assert not {"scored", "answers", "readings"} & made.keys()
    assert (made["benchmark"], made["rule"], made["items"], made["missing"]) == ("pope", "official", 42, 0)
    assert made["protocol"]["questions/random"] == 24
    assert made["metrics"] == {name: round(value, 6) for name, value in found.metrics.items()}
    assert made["intervals"]["f1"] == [round(bound, 6) for bound in found.intervals["f1"]]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["scores.json"]


def test_an_unknown_rule_is_refused_with_those_there_are(opened_pope, predictions):
    with pytest.raises(BenchmarkError, match="--rule strict: pope has official, lmms-eval, vlmevalkit"):
        score(*opened_pope, predictions, "strict")


@pytest.mark.parametrize("seed", range(3))
def test_what_says_nothing_is_listed_and_counted(opened_pope, tmp_path, seed):
    bench, loaded = opened_pope
    answers = drawn(loaded, seed, ("Yes", "No", "A table.", "It may be.", ""))
    found = score(bench, loaded, written(tmp_path / "a.jsonl", loaded, answers), "lmms-eval", draws=0)
    unparsed = [q.id for q in loaded.questions if answers[str(q.id)] not in ("Yes", "No")]
    assert len(unparsed) > LISTED
    assert found.unparsed == len(unparsed)
    assert found.unparsed_ids == unparsed[:LISTED]
    assert found.json()["unparsed_ids"] == unparsed[:LISTED]
    found.write_details(tmp_path / "deep" / "items.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "deep" / "items.jsonl").read_text("utf-8").splitlines()]
    assert [row["question_id"] for row in rows] == [q.id for q in loaded.questions]
    assert [row["question_id"] for row in rows if row["unparsed"]] == unparsed
    for row, question in zip(rows, loaded.questions, strict=True):
        text = answers[str(question.id)]
        assert row["text"] == text
        assert row["parsed"] == (text.lower() if text in ("Yes", "No") else "")
        assert row["right"] == (text == ("Yes" if question.metadata["label"] else "No"))
        assert row["category"] == question.metadata["split"]


def test_partial_counts_what_is_missing(opened_pope, tmp_path):
    bench, loaded = opened_pope
    answers = drawn(loaded, 0)
    gone = [str(question.id) for question in loaded.questions][::5]
    few = {id: text for id, text in answers.items() if id not in gone}
    path = written(tmp_path / "few.jsonl", loaded, few)
    with pytest.raises(
        BenchmarkError, match=rf"{len(gone)} of 42 questions have no answer, the first is {gone[0]};.*--partial"
    ):
        score(bench, loaded, path)
    found = score(bench, loaded, path, partial=True, draws=0)
    assert (found.missing, found.items) == (len(gone), 42)
    assert found.metrics["f1"] == pytest.approx(official(loaded.questions, few)["f1"])
    found.write_details(tmp_path / "items.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert {str(row["question_id"]) for row in rows if row["text"] is None} == set(gone)
    with pytest.raises(BenchmarkError, match="is none of pope's"):  # an id too many is no partial file
        score(bench, loaded, lines(tmp_path / "more.jsonl", [said(999, "Is there?", "yes")]), partial=True)


@pytest.fixture
def judged(tmp_path):
    """MMHal's questions, an answer file, and a judge's reply to each."""
    bench, loaded = opened("mmhal", dump(tmp_path / "data" / "response_template.json", mmhal_rows()).parent)
    answers = {str(question.id): f"Answer {question.id}." for question in loaded.questions}
    path = written(tmp_path / "answers.jsonl", loaded, answers)

    def replies(name="replies.jsonl", **more):
        common = {"judge": "openai:tiny", "version": "tiny-1", "date": "2026-01-02", "prompt": "p", "temperature": 0.0}
        common |= {"answers": answers_digest(answers)} | more
        rows = [{"id": id, "reply": f"Rating: {int(id) % 7}", **common} for id in answers]
        return lines(tmp_path / name, rows)

    return bench, loaded, path, replies


def test_a_judged_rule_needs_its_replies(judged):
    bench, loaded, path, replies = judged
    with pytest.raises(BenchmarkError, match=r"`reverie judge mmhal` writes them.*--replies"):
        score(bench, loaded, path)
    found = score(bench, loaded, path, replies=replies(), draws=0)
    count = len(loaded.questions)
    assert found.metrics["score"] == pytest.approx(sum(n % 7 for n in range(count)) / count)
    assert found.protocol["judge"] == "openai:tiny"
    assert found.protocol["judge/version"] == "tiny-1"
    assert found.protocol["judge/date"] == "2026-01-02"
    assert found.json()["protocol"] == found.protocol


def test_replies_to_other_answers_are_refused(judged, tmp_path):
    bench, loaded, path, replies = judged
    other = replies("other.jsonl", answers=answers_digest({"0": "another"}))
    with pytest.raises(
        BenchmarkError, match=r"other\.jsonl: the judge saw other answers than those of .*answers\.jsonl"
    ):
        score(bench, loaded, path, replies=other)
    mine = {str(question.id): f"Answer {question.id}." for question in loaded.questions}
    changed = written(tmp_path / "changed.jsonl", loaded, mine | {"1": "Changed."})
    with pytest.raises(BenchmarkError, match="the judge saw other answers"):
        score(bench, loaded, changed, replies=replies())
    two = tmp_path / "two.jsonl"
    two.write_text(
        replies().read_text() + replies("b.jsonl", judge="gemini:x").read_text().replace('"id": "', '"id": "x')
    )
    with pytest.raises(BenchmarkError, match="replies of several judges"):
        score(bench, loaded, path, replies=two)


def test_replies_from_elsewhere_need_only_ids_and_texts(judged, tmp_path):
    bench, loaded, path, _ = judged
    plain = lines(tmp_path / "plain.jsonl", [{"id": q.id, "reply": "Rating: 4"} for q in loaded.questions])
    found = score(bench, loaded, path, replies=plain, draws=0)
    assert found.metrics["score"] == 4
    assert found.protocol["judge"] == "not said"


def test_a_run_differs_from_itself_by_nothing(opened_pope, predictions):
    mine = score(*opened_pope, predictions, draws=0)
    found = compare(mine, mine)
    assert (found["benchmark"], found["rule"]) == ("pope", "official")
    assert list(found["differences"]) == list(mine.metrics)
    assert all(row == {"value": 0, "ci95": [0, 0]} for row in found["differences"].values())
    assert found["mcnemar"] == {"only_ours": 0, "only_theirs": 0, "p": 1.0}


@pytest.mark.parametrize("seed", range(4))
def test_a_comparison_is_that_of_a_slow_loop(opened_pope, tmp_path, seed):
    bench, loaded = opened_pope
    said_by = [drawn(loaded, seed), drawn(loaded, seed + 10, SAYS[:3])]
    mine, yours = (
        score(bench, loaded, written(tmp_path / f"{n}.jsonl", loaded, answers), draws=0)
        for n, answers in enumerate(said_by)
    )
    found = compare(mine, yours, draws=DRAWS)
    samples = [[official(questions, answers) for answers in said_by] for questions in resampled(loaded)]
    ours, theirs = (official(loaded.questions, answers) for answers in said_by)
    for name in ours:
        row = found["differences"][name]
        assert row["value"] == pytest.approx(ours[name] - theirs[name], abs=1e-6)
        apart = [one[name] - other[name] for one, other in samples]
        assert row["ci95"] == pytest.approx([percentile(apart, 2.5), percentile(apart, 97.5)], abs=1e-6), name
    right = [[says_yes(answers[str(q.id)]) == q.metadata["label"] for q in loaded.questions] for answers in said_by]
    only_ours = sum(one and not other for one, other in zip(*right, strict=True))
    only_theirs = sum(other and not one for one, other in zip(*right, strict=True))
    apart = only_ours + only_theirs
    tail = sum(math.comb(apart, k) for k in range(min(only_ours, only_theirs) + 1)) / 2**apart
    assert found["mcnemar"] == {
        "only_ours": only_ours,
        "only_theirs": only_theirs,
        "p": pytest.approx(min(1.0, 2 * tail)),
    }
    back = compare(yours, mine, draws=DRAWS)
    assert back["mcnemar"]["p"] == pytest.approx(found["mcnemar"]["p"])
    assert back["differences"]["f1"]["value"] == -found["differences"]["f1"]["value"]


def test_partial_marks_are_no_pairs(judged):
    """McNemar asks who is right: a rating of 3 of 6 is neither."""
    bench, loaded, path, replies = judged
    mine = score(bench, loaded, path, replies=replies(), draws=0)
    found = compare(mine, mine)
    assert found["mcnemar"]["only_ours"] == 0
    half = dataclasses.replace(
        mine,
        scored=dataclasses.replace(
            mine.scored,
            parsed_answers=[dataclasses.replace(reading, right=0.5) for reading in mine.scored.parsed_answers],
        ),
    )
    assert "mcnemar" not in compare(half, mine)


def test_only_the_same_questions_by_the_same_rule_are_compared(opened_pope, predictions, tmp_path):
    bench, loaded = opened_pope
    mine = score(bench, loaded, predictions, draws=0)
    other = score(bench, loaded, predictions, "lmms-eval", draws=0)
    few = dataclasses.replace(loaded, questions=loaded.questions[:-1])
    fewer = score(bench, few, written(tmp_path / "few.jsonl", few, drawn(loaded, 0)), draws=0)
    for theirs in (other, fewer):
        with pytest.raises(UserError, match="only answers to the same questions, by the same rule, are compared"):
            compare(mine, theirs)
    units = dataclasses.replace(mine, scored=dataclasses.replace(mine.scored, clusters=mine.scored.clusters[::-1]))
    with pytest.raises(UserError, match="different units"):
        compare(mine, units)


def test_agreement_of_rules_is_counted(opened_pope, predictions):
    bench, loaded = opened_pope
    scores = [score(bench, loaded, predictions, rule, draws=0) for rule in bench.rules]
    answers = drawn(loaded, 0)

    def right(rule, question):
        text = answers[str(question.id)]
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        spoken = {
            "official": "yes" if says_yes(text) else "no",
            "lmms-eval": text.strip().lower(),
            "vlmevalkit": next((w for w in ("yes", "no") if w in words), ""),
        }[rule]
        return spoken == ("yes" if question.metadata["label"] else "no")

    found = {tuple(row["rules"]): row for row in agreement(scores)}
    assert found.keys() == {("official", "lmms-eval"), ("official", "vlmevalkit"), ("lmms-eval", "vlmevalkit")}
    for (one, other), row in found.items():
        same = sum(right(one, question) == right(other, question) for question in loaded.questions)
        assert row["items"] == 42
        assert row["agree"] == pytest.approx(same / 42, abs=1e-6)
    assert len({row["agree"] for row in found.values()}) > 1
    assert agreement(scores[:1]) == []


def calibration(pairs):
    """Ten bins of chance, by a loop."""
    gap = 0.0
    for low in range(10):
        here = [(p, label) for p, label in pairs if low / 10 <= p < (low + 1) / 10 or (low == 9 and p == 1)]
        if here:
            mean, share = sum(p for p, _ in here) / len(here), sum(label for _, label in here) / len(here)
            gap += len(here) / len(pairs) * abs(mean - share)
    return {
        "calibration/error": pytest.approx(gap, abs=1e-6),
        "calibration/brier": pytest.approx(sum((p - label) ** 2 for p, label in pairs) / len(pairs), abs=1e-6),
        "calibration/mean_yes": pytest.approx(sum(p for p, _ in pairs) / len(pairs), abs=1e-6),
    }


def of_calibration(found):
    return {name: value for name, value in found.protocol.items() if name.startswith("calibration/")}


@pytest.mark.parametrize("seed", range(3))
def test_calibration_is_that_of_a_slow_loop(opened_pope, tmp_path, seed):
    bench, loaded = opened_pope
    draw = random.Random(seed)
    chance = {q.id: round(draw.random(), 6) for q in loaded.questions}
    chance |= dict(zip([q.id for q in loaded.questions[:3]], (0.0, 1.0, 0.999999), strict=True))
    path = written(
        tmp_path / "p.jsonl", loaded, drawn(loaded, seed), metadata=lambda question: {"yes": chance[question.id]}
    )
    found = score(bench, loaded, path, draws=0)
    assert of_calibration(found) == calibration([(chance[q.id], q.metadata["label"]) for q in loaded.questions])


def test_labels_in_words_are_calibrated_too(tmp_path):
    """MME's."""
    asked = [("Is it one? Please answer yes or no.", "Yes"), ("Is it two? Please answer yes or no.", "No")]
    bench, loaded = opened("mme", mme(tmp_path / "mme", {"count": {f"{n}.jpg": asked for n in range(4)}}))
    chance = {q.id: round(random.Random(str(q.id)).random(), 6) for q in loaded.questions}
    path = written(
        tmp_path / "p.jsonl", loaded, drawn(loaded, 0), metadata=lambda question: {"yes": chance[question.id]}
    )
    found = score(bench, loaded, path, draws=0)
    pairs = [(chance[q.id], q.metadata["label"] == "yes") for q in loaded.questions]
    assert {label for _, label in pairs} == {True, False}
    assert of_calibration(found) == calibration(pairs)


def test_only_what_says_its_chances_is_calibrated(opened_pope, predictions, tmp_path):
    bench, loaded = opened_pope
    assert of_calibration(score(bench, loaded, predictions, draws=0)) == {}
    some = written(
        tmp_path / "some.jsonl",
        loaded,
        drawn(loaded, 0),
        metadata=lambda question: {"yes": 0.25} if question.id < 10 else None,
    )
    pairs = [(0.25, q.metadata["label"]) for q in loaded.questions if q.id < 10]
    assert of_calibration(score(bench, loaded, some, draws=0)) == calibration(pairs)
    words = written(tmp_path / "words.jsonl", loaded, drawn(loaded, 0), metadata=lambda question: "none")
    assert of_calibration(score(bench, loaded, words, draws=0)) == {}
    by_id = dump(tmp_path / "by_id.json", drawn(loaded, 0))  # an object of texts by id, as MM-Vet has it
    assert score(bench, loaded, by_id, draws=0).metrics == score(bench, loaded, predictions, draws=0).metrics


def test_the_record_of_a_run_is_carried_along(opened_pope, tmp_path):
    bench, loaded = opened_pope
    record = {
        "benchmark": "pope",
        "model": "llava-7b",
        "identity": {"decoder": "ab"},
        "template": "vicuna_v1",
        "decoding": {"beams": 3},
        "new_tokens": 8,
        "reflect": True,
        "content": "0",
    }
    dump(tmp_path / "run.json", record)
    path = written(tmp_path / "predictions.jsonl", loaded, drawn(loaded, 0))
    found = score(bench, loaded, path, draws=0).protocol
    kept = ("model", "identity", "template", "decoding", "new_tokens", "reflect")
    assert {f"run/{name}": record[name] for name in kept}.items() <= found.items()
    assert not {"run/content", "run/benchmark"} & found.keys()
    other = written(tmp_path / "theirs.jsonl", loaded, drawn(loaded, 0))  # not the file that the record is of
    assert not any(name.startswith("run/") for name in score(bench, loaded, other, draws=0).protocol)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(BenchmarkError, match=r"run\.json: not valid JSON"):
        score(bench, loaded, path)
