"""`reverie data review` and `reverie data build --marks` as commands."""

from __future__ import annotations

import contextlib
import html
import json
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from reverie_jax.data.records import RecordSource
from reverie_jax.data.sources.annotated import KEYS
from reverie_jax.data.sources.marks import Mark
from tests.review.helpers import judged_row

WRONG = [
    ((), "FILE"),
    (("judged.json",), "--marks"),
    (("none.json", "--marks", "m"), "none.json"),
    (("judged.json", "--marks", "judged.json"), "judged.json"),
    (("judged.json", "--marks", "images"), "images"),
    (("judged.json", "--marks", "m", "--images", "none"), "--images none"),
    (("judged.json=none", "--marks", "m"), "none"),
    (("judged.json", "--marks", "m", "--reviewer", " "), "--reviewer"),
    (("judged.json", "--marks", "m", "--host", "0.0.0.0"), "REVERIE_API_KEY"),
    (("judged.json", "--marks", "m", "--port", "70000"), "--port"),
    (("judged.json", "--export", "page", "--count", "0"), "--count"),
    (("judged.json", "--export", "page", "--marks", "none"), "--marks none"),
    (("judged.json", "llava.json", "--export", "llava.json"), "llava.json"),
]


@pytest.mark.parametrize(("words", "named"), WRONG)
def test_options_are_checked(reverie, world, monkeypatch, words, named):
    monkeypatch.chdir(world.folder)
    monkeypatch.delenv("REVERIE_API_KEY", raising=False)
    before = {path.name: path.read_bytes() for path in world.files}
    code, out, err = reverie("data", "review", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert named in err
    assert {path.name: path.read_bytes() for path in world.files} == before
    assert not (world.folder / "page").exists()


def test_without_the_extra_it_says_what_to_install_and_exports(reverie, world, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    monkeypatch.delitem(sys.modules, "reverie_jax.review.app", raising=False)
    code, _, err = reverie("data", "review", *world.files, "--marks", world.marks)
    assert (code, "[web]" in err) == (2, True)
    page = world.folder / "page.html"
    assert reverie("data", "review", *world.files, "--export", page)[:2] == (0, f"{page}\n")


def test_an_exported_page(reverie, world):
    """Rows of each verdict, escaped, with images and marks, nothing from elsewhere; a sample of them is the seed's."""
    world.marks.write_text(Mark(row=world.digests[0], reviewer="reviewer", mark="bad").model_dump_json() + "\n")
    (world.folder / "images" / "1.png").write_bytes(b"not an image")
    page, words = world.folder / "page.html", ("data", "review", world.files[0], "--marks", world.marks, "--export")
    assert reverie(*words, page)[0] == 0
    text = page.read_text("utf-8")
    articles = [html.unescape(article) for article in re.findall(r"<article.*?</article>", text, re.DOTALL)]
    assert len(articles) == 12
    order = [row for verdict in ("no", "yes") for row in world.judged if row["gemini_pro_judge"] == verdict]
    for row, article in zip(order, articles, strict=True):
        assert all(row[key].strip() in article for key in KEYS)
        assert ("judge: dropped" in article) == (row["gemini_pro_judge"] == "yes")
    assert 'tag bad">bad' in articles[0]
    assert text.count("data:image/jpeg;base64,") == 8
    assert not any(
        mark in text for mark in ("<script", "<img src=x", "<link", 'src="http', "url(http", "<button", "<form")
    )
    assert reverie(*words, page, "--count", 2)[0] == 0
    sample = page.read_text("utf-8")
    assert sample.count("<article") == 4
    for seed, same in ((0, True), (1, False)):
        assert reverie(*words, page, "--count", 2, "--seed", seed)[0] == 0
        assert (page.read_text("utf-8") == sample) == same


def test_build_honors_marks(reverie, world):
    """Records equal those of files that were corrected by hand; what was done is said."""
    digests = world.digests
    lines = [
        {"row": digests[12], "mark": "bad"},
        {"row": digests[13], "edits": {"conversations/1/value": "new"}},
        {"row": digests[3], "mark": "good"},
        {"row": "0" * 32, "mark": "bad", "where": "old.json: row 7"},
    ]
    world.marks.write_text("".join(Mark(reviewer="a", **line).model_dump_json() + "\n" for line in lines))
    words = ("data", "build", *(f"{file}={world.folder / 'images'}" for file in world.files), "--overwrite", "--out")
    world.rows.pop()  # whose image is missing
    world.files[1].write_text(json.dumps(world.rows))
    code, _, err = reverie(*words, world.folder / "marked", "--marks", world.marks)
    assert code == 0, err
    assert "1 rows are marked bad" in err
    assert "1 rows have edited texts" in err
    assert "line 4: fits no row any more: old.json: row 7" in err
    world.rows[1]["conversations"][1]["value"] = "new"
    del world.rows[0]
    world.judged[3] = judged_row(3)
    for file, rows in zip(world.files, (world.judged, world.rows), strict=True):
        file.write_text(json.dumps(rows))
    assert reverie(*words, world.folder / "by hand")[0] == 0
    found, expected = (list(RecordSource(world.folder / name)) for name in ("marked", "by hand"))
    assert found == expected
    code, out, err = reverie(*words, world.folder / "none", "--marks", world.files[0])
    assert (code, out) == (2, "")
    assert f"{world.files[0]}: line 1" in err


def test_the_process_serves_and_ends(world):
    words = [sys.executable, "-m", "reverie_jax.cli", "data", "review", *map(str, world.files)]
    words += ["--marks", str(world.marks), "--port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as child:
        try:
            line = child.stderr.readline()
            found = re.search(r"27 samples at (http://127\.0\.0\.1:\d+);", line)
            assert found, line
            with contextlib.closing(urllib.request.urlopen(found[1])) as response:
                assert response.read().count(b"<article") == 10
            child.send_signal(signal.SIGINT)
            assert child.wait(60) == 130
            assert child.stderr.read() == "reverie: stopped by Ctrl-C\n"
        finally:
            child.kill()
