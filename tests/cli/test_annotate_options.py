"""`reverie annotate`: options, lists of images and files that are invalid are named; nothing is sent about them."""

from __future__ import annotations

import json

import pytest

from reverie_jax.annotate.files import JUDGED, QUESTIONS, RATIONALES
from tests.annotate.helpers import JOURNAL, Memory, answer, load, spec_of
from tests.cli.test_annotate import check_refused
from tests.data.fakes import png

pytestmark = pytest.mark.usefixtures("keys", "sdks")

WRONG_OPTIONS = [
    ("rationals", "openai:tiny", {}, ("rationals", "judge")),
    ("run", None, {}, ("--writer",)),
    ("run", "mistral:tiny", {}, ("mistral", "gemini")),
    ("run", "openai:tiny", {"judge": "tiny"}, ("tiny",)),
    ("run", "openai:tiny", {"votes": "most"}, ("--votes", "majority")),
    ("run", "openai:tiny", {"questions": 0}, ("--questions",)),
    ("run", "openai:tiny", {"confusing": 0}, ("--confusing",)),
    ("run", "openai:tiny", {"concurrency": 0}, ("--concurrency",)),
    ("run", "openai:tiny", {"max_cost": 3}, ("--price",)),
    ("run", "openai:tiny", {"timeout": 0}, ("--timeout",)),
    ("run", "openai:tiny", {"max_image_size": 0}, ("--max-image-size",)),
    ("run", "openai:tiny", {"temperature": "warm"}, ("--temperature",)),
    ("run", "openai:tiny", {"temperature": -1}, ("--temperature",)),
    ("run", "openai:tiny", {"poll": 0}, ("--poll",)),
    ("run", "openai:tiny", {"requests_per_minute": 0}, ("--requests-per-minute",)),
    ("run", "openai:tiny", {"tokens_per_minute": -1}, ("--tokens-per-minute",)),
    ("run", "openai:tiny", {"images": "gone"}, ("gone",)),
    ("run", "openai:tiny", {"images": "empty"}, ("empty",)),
    ("run", "openai:tiny", {"images": "file"}, ("file",)),
    ("run", "openai:tiny", {"images": None}, ("--images",)),
    ("run", "openai:tiny", {"prompts": "gone"}, ("gone",)),
    ("run", "openai:tiny", {"list": "gone.json"}, ("gone.json",)),
    ("run", "openai:tiny", {"out": "file"}, ("file",)),
    ("run", "openai:tiny", {"out": "file/below"}, ("file",)),
    ("run", "openai:tiny", {"out": "broken"}, (JOURNAL,)),
    ("run", "scenes:gone", {}, ("gone",)),
    ("run", "replay:gone.sqlite", {}, ("gone.sqlite",)),
    ("run", "replay:file", {}, ("file",)),
    ("rationales", "openai:tiny", {}, (QUESTIONS,)),
    ("judge", "openai:tiny", {}, (RATIONALES,)),
    ("export", None, {}, (JUDGED,)),
    ("audit", None, {}, ("audit", "lrv")),
]


@pytest.mark.parametrize(("step", "writer", "options", "words"), WRONG_OPTIONS)
def test_invalid_options_are_named(annotate, tmp_path, monkeypatch, step, writer, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / JOURNAL).write_text("years of work")
    check_refused(annotate(step, writer, **options), *words)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "broken" / JOURNAL).read_text() == "years of work"


LISTS = ["", "{}", "[3]", '[""]', "[", "[]", '["a.png", null]', '["../secret.png"]']
LISTS += ['["sub/../../secret.png"]', '["a\\u0000b.png"]', '["\\ud800.png"]', f'["{"n" * 400}.png"]']


@pytest.mark.parametrize("text", LISTS, ids=lambda text: text[:30])
def test_invalid_lists_of_images_are_named(annotate, tmp_path, text):
    """Also names outside the folder, and names that no file can have; nothing is sent about them."""
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "list.json").write_text(text)
    with Memory(answer) as server:
        code, out, err = annotate("questions", spec_of(server), list=tmp_path / "list.json")
        assert server.calls == []
    assert code in (1, 2)
    if code == 2:
        check_refused((code, out, err), "list.json" if ".png" not in text or "null" in text else ".png")


def test_images_are_listed(annotate, tmp_path, images):
    """By `--list`, by OUT/image_list.json, or all in the folder and below, sorted; also behind links that are in it."""
    (tmp_path / "images" / "b").mkdir()
    (tmp_path / "images" / "b" / "ä.JPG").write_bytes(png((9, 9, 9)))
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.jfif").write_bytes(png((8, 8, 8)))
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "elsewhere" / "c.jfif")
    (tmp_path / "list.json").write_text(json.dumps(["0003.png", "0001.png", "0003.png"]))

    def names(**options) -> list[str]:
        with Memory(answer) as server:
            assert annotate("questions", spec_of(server), **options)[0] == 0
        return [row["image"] for row in load(tmp_path / "out", QUESTIONS)]

    assert names() == [*images, "b/ä.JPG", "link.png", "linked/c.jfif"]
    assert names(list=tmp_path / "list.json") == ["0003.png", "0001.png"]
    (tmp_path / "out" / "image_list.json").write_text(json.dumps(["0004.png"]))
    assert names() == ["0004.png"]
