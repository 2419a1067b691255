"""Google's older SDK against the loopback server: `make test-old-sdk` runs it, in an environment of its own."""

import json
import os

import pytest

from reverie_jax.annotate.pipeline import RELEASED, AnnotationJob, Pipeline, export
from reverie_jax.errors import UserError
from reverie_jax.hosted import images
from reverie_jax.hosted.interface import RequestSettings
from reverie_jax.hosted.runner import Limits
from tests.data.fakes import png
from tests.hosted.server import ALL, Server, share

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
KEY = {"GEMINI_API_KEY": "AIza-a-key-of-no-worth"}


@pytest.fixture(autouse=True)
def _sdk(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    pytest.importorskip("google.generativeai", reason="google-generativeai wants an environment of its own")


def is_judge(call):
    return "contradict each other" in call.text


def answer(call):
    if is_judge(call):
        return "No"
    if "exercises" not in call.text:
        return f"Because of what it shows ({len(call.text)})."
    asked = {"question": "What is it?", "type": "short", "correct_answer": "a cup", "confusing_answers": ["a jug"]}
    return json.dumps({"questions": [asked]})


def job(tmp_path, url):
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)
    for n in range(12):
        (folder / f"{n:02}.png").write_bytes(png((20 * n, 3, 4)))
    limits = Limits(backoff=0.01, longest=0.1)
    names = tuple(images.listed(folder))
    return AnnotationJob(
        tmp_path / "out",
        folder,
        names,
        f"google-generativeai:m@{url}",
        count=1,
        settings=RequestSettings(1.0),
        limits=limits,
    )


def test_every_fault_is_survived(tmp_path):
    with Server(answer, share(0.4, 5, ALL), is_judge=is_judge, hold=3.0, retry_after=0.01) as server:
        with Pipeline(job(tmp_path, server.url), KEY) as pipeline:
            for step in (pipeline.questions, pipeline.rationales, pipeline.judge):
                assert step().failed == {}
            assert pipeline.journal.spent().tokens_in > 0
        assert len(server.faulted) > 8
        asked = len(server.calls)
        with Pipeline(job(tmp_path, server.url), KEY) as pipeline:
            pipeline.questions()
        assert len(server.calls) == asked
    assert export(tmp_path / "out") == 24
    assert len(json.loads((tmp_path / "out" / RELEASED).read_text())) == 24
    for file in (tmp_path / "out").iterdir():
        assert KEY["GEMINI_API_KEY"].encode() not in file.read_bytes(), file


def test_a_key_is_needed(tmp_path):
    with (
        Server(answer) as server,
        Pipeline(job(tmp_path, server.url), {}) as pipeline,
        pytest.raises(UserError, match="GEMINI_API_KEY"),
    ):
        pipeline.questions()
    assert "AIza" not in os.environ.get("GEMINI_API_KEY", "")
