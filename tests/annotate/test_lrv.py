"""LRV's generation from captions: what is asked, what is written, how it is balanced."""

import json

import pytest

from reverie_jax.annotate import lrv
from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import RequestSettings
from reverie_jax.hosted.runner import Limits
from tests.hosted.server import HARMLESS, REPLY, TRANSPORT, Server, share

pytest.importorskip("openai")
KEY = {"OPENAI_API_KEY": "sk-a-key-of-no-worth", "NO_PROXY": "127.0.0.1"}
KINDS = {"something that is not there": "nonexistent", "a wrong attribute": "existent", "false knowledge": "knowledge"}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def kind_of(text: str) -> str:
    return next((kind for words, kind in KINDS.items() if words in text), "positive")


def answer(call) -> str:
    kind, count = kind_of(call.text), int(call.text.split("Write ")[1].split()[0])
    first = call.text.split("\n\n")[1].splitlines()[0]
    rows = [
        {
            "instruction": f"{kind} {n} of {first}?",
            "answer": f"Answer {n}.",
            "task": "attributes" if kind == "positive" else "",
        }
        for n in range(count)
    ]
    return json.dumps({"instructions": rows})


@pytest.fixture
def genome(tmp_path):
    """Two pictures as Visual Genome describes them; the second has more regions than a prompt holds."""
    rows = [
        {
            "id": number,
            "regions": [
                {
                    "region_id": n,
                    "image_id": number,
                    "phrase": f"thing {n}\nof {number}",
                    "x": n,
                    "y": 2,
                    "width": 3,
                    "height": 4,
                }
                for n in range(count)
            ],
        }
        for number, count in ((7, 2), (8, 60))
    ]
    path = tmp_path / "region_descriptions.json"
    path.write_text(json.dumps(rows))
    return path


def job(tmp_path, genome, server, **options):
    quick = Limits(backoff=0.01, longest=0.05)
    who = f"openai:m@{server.url}/v1"
    return lrv.LrvJob(tmp_path / "out", genome, who, settings=RequestSettings(timeout=2.0), limits=quick, **options)


def written(tmp_path):
    return json.loads((tmp_path / "out" / lrv.INSTRUCTIONS).read_text())


def test_records_are_lrvs(tmp_path, genome):
    with Server(answer) as server, lrv.Generation(job(tmp_path, genome, server, counts=(3, 2, 1, 1)), KEY) as made:
        outcome = made.generate()
        assert outcome.usable == len(server.calls) == 8
    rows = written(tmp_path)
    assert [row["image_id"] for row in rows] == [7] * 7 + [8] * 7
    assert [row["kind"] for row in rows[:7]] == ["positive"] * 3 + ["nonexistent"] * 2 + ["existent", "knowledge"]
    assert all(row["task"] == ("attributes" if row["kind"] == "positive" else "negative") for row in rows)
    assert all(row.keys() >= {"image_id", "question", "answer", "task"} for row in rows)
    assert rows[0]["question"] == "positive 0 of thing 0 of 7 (0, 2, 3, 4)?"
    for call in server.calls:
        assert call.images == []  # text only
        assert call.structured
        assert "thing 49 of 8" in call.text or "of 7" in call.text
        assert "thing 50 of 8" not in call.text


def test_faults_are_survived_and_nothing_is_asked_twice(tmp_path, genome):
    with Server(answer, share(0.5, 3, (*TRANSPORT, *REPLY, *HARMLESS)), hold=3.0, retry_after=0.01) as server:
        wanted = job(tmp_path, genome, server, counts=(3, 2, 1, 1))
        with lrv.Generation(wanted, KEY) as made:
            assert made.generate().failed == {}
        asked, rows = len(server.calls), written(tmp_path)
        with lrv.Generation(wanted, KEY) as made:
            again = made.generate()
        assert (again.had, again.asked, len(server.calls)) == (8, 0, asked)
    assert written(tmp_path) == rows
    assert len(rows) == 14


@pytest.mark.parametrize(
    ("ratio", "positive", "negative"), [(None, 6, 10), (1.0, 6, 6), (0.5, 6, 3), (2.0, 5, 10), (0, 6, 0)]
)
def test_balance(ratio, positive, negative):
    rows = [{"task": "negative" if n % 8 > 2 else "any", "n": n} for n in range(16)]
    kept = lrv.balanced(rows, ratio)
    assert [row["n"] for row in kept] == sorted(row["n"] for row in kept)
    assert sum(row["task"] == "negative" for row in kept) == negative
    assert len(kept) == positive + negative
    assert kept == lrv.balanced(rows, ratio)


def test_our_own_form_of_captions(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(
        json.dumps([{"image_id": "a.jpg", "captions": [{"caption": "a cup", "x": 1, "y": 2, "width": 3, "height": 4}]}])
    )
    assert lrv.read_captions(path) == [lrv.Described("a.jpg", "a cup (1, 2, 3, 4)")]


@pytest.mark.parametrize(
    "text",
    ["{", "{}", "[]", "[3]", '[{"id": 1}]', '[{"id": 1, "regions": [{"phrase": "a"}]}]', '[{"id": 1, "regions": []}]'],
)
def test_other_files_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"captions\.json") as caught:
        lrv.read_captions(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (-1, 2, 2, 2)])
def test_counts_that_make_no_sense(tmp_path, genome, counts):
    with pytest.raises(UserError, match="--counts"):
        lrv.Generation(lrv.LrvJob(tmp_path / "out", genome, "openai:m", counts=counts), KEY)
