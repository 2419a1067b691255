"""LRV's generation from captions: what is requested, what is written, how it is balanced."""

import json
import os

import pytest

from reverie_jax.annotate import lrv
from reverie_jax.errors import UserError
from reverie_jax.hosted.session import RequestConfig
from reverie_jax.hosted.throttle import Limits
from tests.hosted.faults import share
from tests.hosted.helpers import spec_of
from tests.hosted.server import Server

pytestmark = pytest.mark.usefixtures("keys", "sdks")
KINDS = {"something that is not there": "nonexistent", "a wrong attribute": "existent", "false knowledge": "knowledge"}


def answer(call) -> str:
    kind = next((kind for words, kind in KINDS.items() if words in call.text), "positive")
    first = call.text.split("\n\n")[1].splitlines()[0]
    count = int(call.text.split("Write ")[1].split()[0])
    task = "attributes" if kind == "positive" else ""
    rows = [{"instruction": f"{kind} {n} of {first}?", "answer": f"Answer {n}.", "task": task} for n in range(count)]
    return json.dumps({"instructions": rows})


@pytest.fixture
def genome(tmp_path):
    """Write two images as Visual Genome describes them; the second has more regions than a prompt."""

    def region(image: int, number: int) -> dict:
        box = {"x": number, "y": 2, "width": 3, "height": 4}
        return {"region_id": number, "image_id": image, "phrase": f"thing\ud83d {number}\nof {image}", **box}

    rows = [{"id": image, "regions": [region(image, n) for n in range(count)]} for image, count in ((7, 2), (8, 60))]
    path = tmp_path / "region_descriptions.json"
    path.write_text(json.dumps(rows))
    return path


def generate(tmp_path, genome, server, **options):
    """Run a job; return its outcome and the records."""
    limits = Limits(backoff=0.01, max_backoff=0.05, batch=options.pop("batch", False), poll_seconds=0.01)
    config = RequestConfig(limits=limits)
    job = lrv.LrvJob(folder=tmp_path / "out", captions=genome, writer=spec_of(server), config=config, **options)
    with lrv.Generation(job, os.environ) as generation:
        outcome = generation.generate()
    return outcome, json.loads((tmp_path / "out" / lrv.INSTRUCTIONS).read_text())


@pytest.mark.parametrize("batch", [False, True])
def test_records_are_lrvs(tmp_path, genome, batch):
    """Faults are survived, and nothing is requested twice."""
    plans = {"lines" if batch else "faults": share(0.5, 3)}
    with Server(answer, **plans, retry_after=0.01) as server:
        outcome, rows = generate(tmp_path, genome, server, counts=(3, 2, 1, 1), batch=batch)
        assert (outcome.usable, outcome.failed) == (8, {})
        calls = len(server.calls)
        outcome, again = generate(tmp_path, genome, server, counts=(3, 2, 1, 1), batch=batch)
        assert (outcome.cached, outcome.requested, len(server.calls), again) == (8, 0, calls, rows)
    assert [row["image_id"] for row in rows] == [7] * 7 + [8] * 7
    assert [row["kind"] for row in rows[:7]] == ["positive"] * 3 + ["nonexistent"] * 2 + ["existent", "knowledge"]
    assert all(row["task"] == ("attributes" if row["kind"] == "positive" else "negative") for row in rows)
    assert rows[0]["question"] == "positive 0 of thing 0 of 7 (0, 2, 3, 4)?"
    for call in server.calls:
        assert (call.images, call.structured) == ([], True)
        assert "thing 49 of 8" in call.text or "of 7" in call.text
        assert "thing 50 of 8" not in call.text


@pytest.mark.parametrize(
    ("ratio", "positive", "negative"), [(None, 6, 10), (1.0, 6, 6), (0.5, 6, 3), (2.0, 5, 10), (0, 6, 0)]
)
def test_balance(ratio, positive, negative):
    rows = [{"task": "negative" if n % 8 > 2 else "any", "n": n} for n in range(16)]
    kept = lrv.balance_rows(rows, ratio)
    assert [row["n"] for row in kept] == sorted(row["n"] for row in kept)
    assert sum(row["task"] == "negative" for row in kept) == negative
    assert len(kept) == positive + negative
    assert kept == lrv.balance_rows(rows, ratio)


def test_our_own_form_of_captions(tmp_path):
    path = tmp_path / "captions.json"
    caption = {"caption": "a cup", "x": 1, "y": 2, "width": 3, "height": 4}
    path.write_text(json.dumps([{"image_id": "a.jpg", "captions": [caption]}]))
    assert lrv.read_captions(path) == [lrv.CaptionedImage("a.jpg", "a cup (1, 2, 3, 4)")]


BROKEN = [
    "{",
    "{}",
    "[]",
    "[3]",
    '[{"id": 1}]',
    '[{"id": 1, "regions": [{"phrase": "a"}]}]',
    '[{"id": 1, "regions": []}]',
]


@pytest.mark.parametrize("text", BROKEN)
def test_other_files_are_named(tmp_path, text):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"captions\.json") as caught:
        lrv.read_captions(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("option", "value"), [("counts", (0, 0, 0, 0)), ("counts", (-1, 2, 2, 2)), ("balance", -1.0)])
def test_invalid_options_are_named(tmp_path, genome, option, value):
    job = lrv.LrvJob(folder=tmp_path / "out", captions=genome, writer="openai:m", **{option: value})
    with pytest.raises(UserError, match=option):
        lrv.Generation(job, {})
