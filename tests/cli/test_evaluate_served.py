"""`reverie eval` of models that are served elsewhere: the same scores, what is missing, and no request paid twice."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter

import pytest

from reverie_jax.eval.benchmarks import find_benchmark
from tests.cli.helpers import MODEL, assert_refused, plain, rows
from tests.hosted.faults import Fault
from tests.hosted.helpers import Memory, addresses, spec_of, until
from tests.hosted.server import Server

pytestmark = pytest.mark.usefixtures("wide_terminal")


SERVED = {
    "--adapter": "runs/mine",
    "--beams": 3,
    "--top-p": 0.9,
    "--contrast": "image",
    "--template": "vicuna_v1",
    "--protocol": "lrv-minigpt4",
    "--batch-size": 4,
    "--seed": 1,
    "--dump-prompts": "prompts.jsonl",
}
HERE = {"--max-cost": 1, "--requests-per-minute": 9, "--temperature": "none", "--timeout": 3}


@pytest.mark.parametrize(
    ("model", "option", "value"),
    [("openai:tiny", *pair) for pair in SERVED.items()] + [("scenes-base", *pair) for pair in HERE.items()],
)
def test_options_without_a_meaning_are_refused(reverie, data, tmp_path, no_model, model, option, value):
    words = ("eval", "--model", model, "--benchmark", "pope", "--data", data / "pope", "--out", tmp_path / "out")
    assert_refused(reverie(*words, option, value), option, model)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("keys")
@pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")
def test_a_served_model_scores_as_the_same_model_here(reverie, data, tmp_path):
    """The server answers as our own model did: predictions and scores are the same, and nothing is asked twice."""
    words = ("--benchmark", "pope,mme", "--data", data)
    assert reverie(*MODEL, *words, "--out", tmp_path / "here", "--max-new-tokens", 8)[0] == 0
    here = {name: rows(tmp_path / "here" / name / "predictions.jsonl") for name in ("pope", "mme")}
    loaded = {name: find_benchmark(name).load(data / name) for name in here}
    known = {
        (loaded[n].read_image(row["image"]), row["prompt"]): row["text"] for n, part in here.items() for row in part
    }
    with Memory(lambda call: known[call.images[0], call.text]) as server:
        served = ("eval", "--model", spec_of(server), *words, "--out", tmp_path / "there")
        code, shown, _ = reverie(*served, "--dry-run")
        assert (code, server.calls) == (0, [])
        assert re.search(rf"answers +│ 0 +│ {len({q for q in known if 'Is there' in q[1]})} +│", shown), shown
        assert not (tmp_path / "there").exists()
        assert reverie(*served)[0] == 0
        assert len(server.calls) == len(known)
        assert reverie(*served)[0] == 0
        assert len(server.calls) == len(known)
    for name, expected in here.items():
        folders = [tmp_path / place / name for place in ("here", "there")]
        texts = [
            [(row["question_id"], row["image"], row["prompt"], row["text"].strip()) for row in part]
            for part in (expected, rows(folders[1] / "predictions.jsonl"))
        ]
        assert texts[0] == texts[1]
        scores = [json.loads((folder / "scores.json").read_text()) for folder in folders]
        assert all(scores[0][key] == scores[1][key] for key in ("metrics", "intervals", "items"))
        assert scores[1]["protocol"]["run/model"] == "openai:tiny"
        assert scores[1]["protocol"]["run/versions"] == ["tiny-2026-01-01"]
    page = tmp_path / "page.html"
    runs = [f"{place}={tmp_path / place}" for place in ("here", "there")]
    assert reverie("report", *runs, "--data", data, "--out", page)[0] == 0
    assert "served elsewhere, temperature 0.0" in page.read_text("utf-8")


@pytest.mark.usefixtures("keys")
@pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")
def test_answers_of_a_served_model_that_are_missing(reverie, data, tmp_path):
    out = tmp_path / "out"
    with Memory(lambda call: "Yes", lambda call: Fault.BLOCKED if "dog" in call.text else None) as server:
        words = ("eval", "--model", spec_of(server), "--benchmark", "pope", "--data", data / "pope", "--out", out)
        code, shown, err = reverie(*words)
    assert (code, shown) == (1, "")
    assert "3 questions have no answer" in plain(err)
    assert "total: " in err
    answers = ("--predictions", out / "predictions.jsonl", "--data", data / "pope")
    assert not (out / "scores.json").exists()
    assert_refused(reverie("score", "pope", *answers), "3 of 9")
    assert reverie("score", "pope", *answers, "--partial")[0] == 0


def test_a_killed_run_pays_again_only_for_what_was_in_flight(zygote, keys, data, tmp_path):
    words = (
        "eval",
        "--model",
        "openai:tiny",
        "--benchmark",
        "pope,mme",
        "--data",
        data,
        "--out",
        "out",
        "--concurrency",
        2,
    )
    with Server(lambda call: "Yes", latency=0.2) as server:
        child = zygote.start(words, keys | addresses(server), tmp_path)
        until(lambda: len(server.calls) > 4)
        child.signal(signal.SIGKILL)
        child.wait()
        child = zygote.start(words, keys | addresses(server), tmp_path)
        assert child.wait() == 0, child.log
    sent = Counter(call.digest for call in server.calls)
    assert len(sent) == 7  # the images of POPE are alike, and so are its questions, but for three; MME has four
    assert sent.total() <= 7 + 2
    assert [len(rows(tmp_path / "out" / name / "predictions.jsonl")) for name in ("pope", "mme")] == [9, 4]
