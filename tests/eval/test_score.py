"""Scores: what they refuse and record, and every interval and test against a slow loop."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import numpy as np
import pytest

from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks.interface import NotScorable
from reverie_jax.eval.benchmarks.pope import says_yes
from reverie_jax.eval.judge_replies import answers_digest
from reverie_jax.eval.score import LISTED, agreement, compare, score, write_score
from reverie_jax.eval.statistics import resamples
from tests.eval.benchmarks import makers as make
from tests.eval.benchmarks.samples import SAMPLES, load, refused
from tests.eval.test_statistics import percentile

OBJECTS = ("cup", "dog", "car", "fork", "kite")
IMAGES = 6
DRAWS = 60
TEXTS = ("Yes", "No", "Yes, there is.", "No, there is not.", "yes", "no", "I see a table.", "")


@pytest.fixture(scope="module")
def pope(tmp_path_factory):
    """POPE, with two splits about six images."""
    folder, draw = tmp_path_factory.mktemp("pope"), random.Random(1)
    splits = {
        split: [
            (f"{n}.jpg", f"Is there a {name} in the image?", draw.choice(("yes", "no")))
            for n in range(IMAGES)
            for name in draw.sample(OBJECTS, count)
        ]
        for split, count in (("random", 4), ("adversarial", 3))
    }
    return load("pope", make.pope(folder, **splits))


def write_answers(path, data, answers, **fields):
    """Write an answer file; fields: functions of the question."""
    return make.write_lines(
        path,
        [
            make.answer_row(q.id, q.text, answers[str(q.id)], **{name: value(q) for name, value in fields.items()})
            for q in data.questions
            if str(q.id) in answers
        ],
    )


def random_answers(data, seed, texts=TEXTS):
    draw = random.Random(seed)
    return {str(question.id): draw.choice(texts) for question in data.questions}


@pytest.fixture
def predictions(pope, tmp_path):
    return write_answers(tmp_path / "answers.jsonl", pope[1], random_answers(pope[1], 0))


def counted(questions, answers):
    """Return POPE's numbers by counting, over questions that may be repeated; a missing answer is wrong."""
    values = {}
    for split in ("random", "adversarial"):
        pairs = [
            (q.metadata["label"], says_yes(answers[str(q.id)]) if str(q.id) in answers else not q.metadata["label"])
            for q in questions
            if q.metadata["split"] == split
        ]
        both = sum(label and yes for label, yes in pairs)
        values[f"{split}/accuracy"] = sum(label == yes for label, yes in pairs) / len(pairs) if pairs else 0.0
        values[f"{split}/yes_ratio"] = sum(yes for _, yes in pairs) / len(pairs) if pairs else 0.0
        under = sum(yes for _, yes in pairs) + sum(label for label, _ in pairs)
        values[f"{split}/f1"] = 2 * both / under if both else 0.0
    return values | {"f1": (values["random/f1"] + values["adversarial/f1"]) / 2}


def resampled_questions(data, draws=DRAWS):
    """Yield the questions of each resample: a cluster is drawn with all its questions."""
    for weights in np.concatenate(list(resamples(len(data.clusters), draws=draws))).tolist():
        times = dict(zip(data.clusters, weights, strict=True))
        yield [question for question in data.questions for _ in range(times[question.cluster])]


def test_a_score_is_that_of_a_slow_loop_over_clusters(pope, predictions, tmp_path):
    benchmark, data = pope
    result, answers = score(benchmark, data, predictions, draws=DRAWS), random_answers(data, 0)
    assert result.scored.clusters == [f"{n}.jpg" for n in range(IMAGES)]
    samples = [counted(questions, answers) for questions in resampled_questions(data)]
    for name, value in counted(data.questions, answers).items():
        assert result.metrics[name] == pytest.approx(value), name
        drawn = [sample[name] for sample in samples]
        assert result.intervals[name] == pytest.approx((percentile(drawn, 2.5), percentile(drawn, 97.5))), name
    assert next(iter(result.metrics)) == "f1"
    assert result.intervals.keys() == result.metrics.keys()
    write_score(result, tmp_path / "deep" / "scores.json")
    written = json.loads((tmp_path / "deep" / "scores.json").read_text())
    assert written == result.json()
    assert [written[key] for key in ("benchmark", "rule", "items", "missing")] == ["pope", "official", 42, 0]
    assert written["protocol"]["questions/random"] == 24
    assert written["metrics"] == {name: round(value, 6) for name, value in result.metrics.items()}
    assert written["intervals"]["f1"] == [round(bound, 6) for bound in result.intervals["f1"]]


def test_no_intervals_and_unknown_rules(pope, predictions, tmp_path):
    benchmark, data = pope
    one = dataclasses.replace(data, questions=[q for q in data.questions if q.cluster == "0.jpg"])
    assert score(benchmark, one, write_answers(tmp_path / "1.jsonl", one, random_answers(one, 0))).intervals == {}
    assert score(benchmark, data, predictions, draws=0).intervals == {}
    with refused("strict", "official, lmms-eval, vlmevalkit"):
        score(*pope, predictions, "strict")


def test_details_list_every_answer_and_the_score_the_first_unparsed(pope, tmp_path):
    benchmark, data = pope
    answers = random_answers(data, 0, ("Yes", "No", "A table.", "It may be.", ""))
    path = write_answers(tmp_path / "a.jsonl", data, answers)
    result = score(benchmark, data, path, "lmms-eval", draws=0)
    unparsed = [q.id for q in data.questions if answers[str(q.id)] not in ("Yes", "No")]
    assert len(unparsed) > LISTED
    assert (result.unparsed, result.unparsed_ids) == (len(unparsed), unparsed[:LISTED])
    result.write_details(tmp_path / "details.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "details.jsonl").read_text("utf-8").splitlines()]
    assert [row["question_id"] for row in rows if row["unparsed"]] == unparsed
    for row, question in zip(rows, data.questions, strict=True):
        text = answers[str(question.id)]
        assert (row["question_id"], row["text"]) == (question.id, text)
        assert row["parsed"] == (text.lower() if text in ("Yes", "No") else "")
        assert row["right"] == (text == ("Yes" if question.metadata["label"] else "No"))
        assert row["category"] == question.metadata["split"]


def test_missing_answers_count_as_the_rule_defines(pope, tmp_path):
    benchmark, data = pope
    missing = [str(question.id) for question in data.questions][::5]
    few = {id: text for id, text in random_answers(data, 0).items() if id not in missing}
    path = write_answers(tmp_path / "few.jsonl", data, few)
    with refused(f"few.jsonl: {len(missing)} of 42 ", missing[0]):
        score(benchmark, data, path)
    result = score(benchmark, data, path, partial=True, draws=0)
    assert (result.missing, result.items) == (len(missing), 42)
    assert result.metrics["f1"] == pytest.approx(counted(data.questions, few)["f1"])
    result.write_details(tmp_path / "details.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "details.jsonl").read_text().splitlines()]
    assert {str(row["question_id"]) for row in rows if row["text"] is None} == set(missing)


@pytest.fixture
def judged(tmp_path):
    """MMHal's questions, an answer file, and a writer of a judge's replies."""
    benchmark, data = load("mmhal", SAMPLES["mmhal"](tmp_path))
    answers = {str(question.id): f"Answer {question.id}." for question in data.questions}

    def replies(name="replies.jsonl", **fields):
        common = {"judge": "openai:tiny", "version": "tiny-1", "date": "2026-01-02", "prompt": "p", "temperature": 0.0}
        common |= {"answers": answers_digest(answers)} | fields
        rows = [{"id": id, "reply": f"Rating: {int(id) % 7}", **common} for id in answers]
        return make.write_lines(tmp_path / name, rows)

    return benchmark, data, write_answers(tmp_path / "answers.jsonl", data, answers), replies


def test_a_judged_rule_needs_replies_about_these_answers(judged, tmp_path):
    benchmark, data, path, replies = judged
    with pytest.raises(NotScorable, match="mmhal"):
        score(benchmark, data, path)
    result = score(benchmark, data, path, replies=replies(), draws=0)
    assert result.metrics["score"] == pytest.approx(np.mean([n % 7 for n in range(len(data.questions))]))
    expected = {"judge": "openai:tiny", "judge/version": "tiny-1", "judge/date": "2026-01-02"}
    assert expected.items() <= result.protocol.items()
    other = replies("other.jsonl", answers=answers_digest({"0": "another"}))
    with refused("other.jsonl", "answers.jsonl"):
        score(benchmark, data, path, replies=other)
    plain = [{"id": q.id, "reply": "Rating: 4"} for q in data.questions]  # from elsewhere
    result = score(benchmark, data, path, replies=make.write_lines(tmp_path / "plain.jsonl", plain), draws=0)
    assert (result.metrics["score"], result.protocol["judge"]) == (4, "unknown")


def test_a_comparison_is_that_of_a_slow_loop(pope, tmp_path):
    benchmark, data = pope
    both = [random_answers(data, 1), random_answers(data, 11, TEXTS[:3])]
    mine, yours = (
        score(benchmark, data, write_answers(tmp_path / f"{n}.jsonl", data, answers), draws=0)
        for n, answers in enumerate(both)
    )
    result = compare(mine, yours, draws=DRAWS)
    assert (result["benchmark"], result["rule"]) == ("pope", "official")
    samples = [[counted(questions, answers) for answers in both] for questions in resampled_questions(data)]
    ours, theirs = (counted(data.questions, answers) for answers in both)
    for name in ours:
        row = result["differences"][name]
        assert row["value"] == pytest.approx(ours[name] - theirs[name], abs=1e-6)
        drawn = [one[name] - other[name] for one, other in samples]
        assert row["ci95"] == pytest.approx([percentile(drawn, 2.5), percentile(drawn, 97.5)], abs=1e-6), name
    right = [[says_yes(answers[str(q.id)]) == q.metadata["label"] for q in data.questions] for answers in both]
    only_ours = sum(one and not other for one, other in zip(*right, strict=True))
    only_theirs = sum(other and not one for one, other in zip(*right, strict=True))
    apart = only_ours + only_theirs
    p = 2 * sum(math.comb(apart, k) for k in range(min(only_ours, only_theirs) + 1)) / 2**apart
    expected = {"only_ours": only_ours, "only_theirs": only_theirs, "p": pytest.approx(min(1.0, p))}
    assert result["mcnemar"] == expected
    itself = compare(mine, mine)
    assert list(itself["differences"]) == list(mine.metrics)
    assert all(row == {"value": 0, "ci95": [0, 0]} for row in itself["differences"].values())
    assert itself["mcnemar"] == {"only_ours": 0, "only_theirs": 0, "p": 1.0}


def test_partial_credit_is_neither_right_nor_wrong_for_mcnemar(judged):
    benchmark, data, path, replies = judged
    mine = score(benchmark, data, path, replies=replies(), draws=0)
    assert "mcnemar" in compare(mine, mine)
    half = [dataclasses.replace(parsed, right=0.5) for parsed in mine.scored.parsed_answers]
    other = dataclasses.replace(mine, scored=dataclasses.replace(mine.scored, parsed_answers=half))
    assert "mcnemar" not in compare(other, mine)


def test_other_rules_questions_or_clusters_are_not_compared(pope, predictions, tmp_path):
    benchmark, data = pope
    mine = score(benchmark, data, predictions, draws=0)
    rule = score(benchmark, data, predictions, "lmms-eval", draws=0)
    few = dataclasses.replace(data, questions=data.questions[:-1])
    fewer = score(benchmark, few, write_answers(tmp_path / "few.jsonl", few, random_answers(data, 0)), draws=0)
    scored = dataclasses.replace(mine.scored, clusters=mine.scored.clusters[::-1])
    for theirs in (rule, fewer, dataclasses.replace(mine, scored=scored)):
        with pytest.raises(UserError, match="pope by official"):
            compare(mine, theirs)


def test_agreement_of_rules_is_counted(pope, predictions):
    benchmark, data = pope
    answers = random_answers(data, 0)

    def right(rule, question):
        text = answers[str(question.id)]
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        parsed = {
            "official": "yes" if says_yes(text) else "no",
            "lmms-eval": text.strip().lower(),
            "vlmevalkit": next((w for w in ("yes", "no") if w in words), ""),
        }[rule]
        return parsed == ("yes" if question.metadata["label"] else "no")

    scores = [score(benchmark, data, predictions, rule, draws=0) for rule in benchmark.rules]
    rows = {tuple(row["rules"]): row for row in agreement(scores)}
    assert rows.keys() == {("official", "lmms-eval"), ("official", "vlmevalkit"), ("lmms-eval", "vlmevalkit")}
    for (one, other), row in rows.items():
        same = sum(right(one, question) == right(other, question) for question in data.questions)
        assert row["items"] == 42
        assert row["agree"] == pytest.approx(same / 42, abs=1e-6)
    assert len({row["agree"] for row in rows.values()}) > 1


def slow_calibration(pairs):
    """Return the calibration of (probability, label), in ten bins, by a loop."""
    gap = 0.0
    for low in range(10):
        inside = [(p, label) for p, label in pairs if low / 10 <= p < (low + 1) / 10 or (low == 9 and p == 1)]
        if inside:
            mean, share = (sum(values) / len(inside) for values in zip(*inside, strict=True))
            gap += len(inside) / len(pairs) * abs(mean - share)
    return {
        "calibration/error": pytest.approx(gap, abs=1e-6),
        "calibration/brier": pytest.approx(sum((p - label) ** 2 for p, label in pairs) / len(pairs), abs=1e-6),
        "calibration/mean_yes": pytest.approx(sum(p for p, _ in pairs) / len(pairs), abs=1e-6),
    }


@pytest.mark.parametrize("kind", ["all", "some", "words", "labels in words", "text mapping"])
def test_calibration_of_recorded_probabilities(pope, tmp_path, kind):
    benchmark, data = pope
    if kind == "labels in words":
        benchmark, data = load("mme", SAMPLES["mme"](tmp_path / "mme"))
    draw = random.Random(0)
    chance = {q.id: round(draw.random(), 6) for q in data.questions}
    chance |= dict(zip([q.id for q in data.questions[:3]], (0.0, 1.0, 0.999999), strict=True))
    recorded = {q.id: q for n, q in enumerate(data.questions) if kind in ("all", "labels in words") or n < 10}

    def metadata(question):
        if kind == "words":
            return "none"
        return {"yes": chance[question.id]} if question.id in recorded else None

    path = write_answers(tmp_path / "a.jsonl", data, random_answers(data, 0), metadata=metadata)
    if kind == "text mapping":
        path = make.write_json(tmp_path / "a.json", random_answers(data, 0))
    protocol = score(benchmark, data, path, draws=0).protocol
    pairs = [(chance[id], q.metadata["label"] in (True, "yes")) for id, q in recorded.items()]
    expected = {} if kind in ("words", "text mapping") else slow_calibration(pairs)
    assert {name: value for name, value in protocol.items() if name.startswith("calibration/")} == expected


def test_the_record_of_a_run_is_part_of_the_score(pope, tmp_path):
    benchmark, data = pope
    kept = {"model": "llava-7b", "checksums": {"decoder": "ab"}, "template": "vicuna_v1", "decoding": {"beams": 3}}
    kept |= {"max_new_tokens": 8, "reflect": True}
    make.write_json(tmp_path / "run.json", kept | {"benchmark": "pope", "content": "0"})
    path = write_answers(tmp_path / "predictions.jsonl", data, random_answers(data, 0))

    def recorded(path):
        protocol = score(benchmark, data, path, draws=0).protocol
        return {name: value for name, value in protocol.items() if name.startswith("run/")}

    assert recorded(path) == {f"run/{name}": value for name, value in kept.items()}
    assert recorded(write_answers(tmp_path / "theirs.jsonl", data, random_answers(data, 0))) == {}
    (tmp_path / "run.json").write_text("{")
    with refused("run.json"):
        score(benchmark, data, path)
