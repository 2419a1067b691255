"""The journal: one holder, nothing forgotten, nothing asked twice, and items known by what they are."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from reverie_jax.annotate.pipeline import AnnotationJob, Pipeline
from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import Reply, RequestSettings
from reverie_jax.hosted.journal import Item, Journal
from reverie_jax.hosted.runner import Limits
from tests.annotate import helpers
from tests.data.fakes import png

ITEM = Item("positive", "content", "openai", "m", "prompt")
OTHER = Item("positive", "other", "openai", "m", "prompt")

HOLDER = """
import sys
from pathlib import Path
from reverie_jax.hosted.interface import Reply
from reverie_jax.hosted.journal import Item, Journal
journal = Journal(Path(sys.argv[1]))
items = [Item("positive", f"content {n}", "openai", "m", "prompt") for n in range(5)]
for item in items:
    journal.sent(item)
journal.done(1, "usable", Reply("first", 10, 5))
journal.done(2, "unusable", Reply("second"), reason="of no use")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "notes" / "journal.sqlite"


def attempts(path: Path) -> list[tuple[str, str, str | None]]:
    return helpers.rows_of(path, "content, state, reply")


def test_one_process_holds_it_and_what_it_had_in_flight_is_lost(path):
    """Another is refused while it lives; after a kill the journal is free, and says what never came back."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught:
            Journal(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        child.kill()
    with Journal(path) as journal:
        assert journal.lost == 3
        assert journal.spent() == (journal.spent().__class__)(5, 10, 5, 0.0)
        items = [Item("positive", f"content {n}", "openai", "m", "prompt") for n in range(5)]
        assert [journal.usable(item) for item in items] == ["first", None, None, None, None]
        assert journal.why(items[1]) == "of no use"
        assert "in flight" in journal.why(items[2])
    assert [state for _, state, _ in attempts(path)] == ["usable", "unusable", "lost", "lost", "lost"]
    with Journal(path) as journal:
        assert journal.lost == 0


def test_the_same_process_cannot_hold_it_twice(path):
    with Journal(path), pytest.raises(UserError, match="another run"):
        Journal(path)
    with Journal(path):
        pass


def test_every_attempt_is_kept_with_all_that_is_known(path):
    with Journal(path) as journal:
        first = journal.sent(ITEM)
        journal.done(first, "failed", reason="the service said 503")
        second = journal.sent(ITEM)
        journal.done(second, "unusable", Reply("", 100, 0, "m-1"), price=0.25, reason="an empty reply")
        third = journal.sent(ITEM)
        assert journal.usable(ITEM) is None
        assert journal.why(ITEM) == "" or "empty" in journal.why(ITEM)
        journal.done(third, "usable", Reply(" raw ✓\x00\n", 100, 7, "m-1"), price=0.5)
        assert journal.usable(ITEM) == " raw ✓\x00\n"
        assert journal.usable(OTHER) is None
        found = journal.spent()
        assert (found.requests, found.tokens_in, found.tokens_out, found.price) == (3, 200, 7, 0.75)
        assert journal.spent("positive") == found
        assert journal.spent("judge").requests == 0
        assert journal.recorded("content") == (" raw ✓\x00\n", "m-1")
        assert journal.mean_tokens("positive") == (100.0, 3.5)
        assert journal.mean_tokens("judge") is None
    columns = "state, reason, reply, tokens_in, tokens_out, price, version, stage, provider, model, prompt"
    assert helpers.rows_of(path, columns) == [
        ("failed", "the service said 503", None, 0, 0, 0.0, "", "positive", "openai", "m", "prompt"),
        ("unusable", "an empty reply", "", 100, 0, 0.25, "m-1", "positive", "openai", "m", "prompt"),
        ("usable", "", " raw ✓\x00\n", 100, 7, 0.5, "m-1", "positive", "openai", "m", "prompt"),
    ]
    assert all(0 <= seconds < 60 for (seconds,) in helpers.rows_of(path, "seconds"))
    assert all(started > 1_700_000_000 for (started,) in helpers.rows_of(path, "started"))


def test_the_first_usable_reply_stays(path):
    with Journal(path) as journal:
        for text in ("first", "second"):
            journal.done(journal.sent(ITEM), "usable", Reply(text))
        journal.done(journal.sent(ITEM), "failed", reason="the service said 500")
        assert journal.usable(ITEM) == "first"
    with Journal(path) as journal:
        assert journal.usable(ITEM) == "first"
        assert journal.recorded("content")[0] == "first"


def test_adopted_replies_serve_whoever_asks_and_cost_nothing(path):
    with Journal(path) as journal:
        journal.adopt(ITEM, "theirs")
        journal.adopt(ITEM, "again")
        assert journal.usable(ITEM) == "theirs"
        assert journal.usable(dataclasses.replace(ITEM, provider="gemini", model="x", prompt="y")) == "theirs"
        assert journal.usable(OTHER) is None
        assert journal.spent().requests == 0
        assert journal.recorded("content") == ("theirs", "original")
    assert attempts(path) == [("content", "usable", "theirs")]


def test_what_is_written_together_is_whole_or_not_at_all(path):
    with Journal(path) as journal:

        def cut_short() -> None:
            with journal.together():
                journal.adopt(ITEM, "theirs")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cut_short()
        assert journal.usable(ITEM) is None
        with journal.together():
            journal.adopt(ITEM, "theirs")
        assert journal.usable(ITEM) == "theirs"


@pytest.mark.parametrize("change", ["stage", "content", "provider", "model", "prompt"])
def test_each_part_of_an_item_is_part_of_its_name(change):
    parts = {"stage": "positive", "content": "c", "provider": "p", "model": "m", "prompt": "w"}
    other = parts | {change: "another"}
    # A stage is part of the content's digest; a bare item need not repeat it.
    assert (Item(**parts).key == Item(**other).key) == (change == "stage")


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def used(path: Path, items: int = 300) -> bytes:
    """A journal with something in it, closed properly: the bytes of its one file."""
    with Journal(path) as journal, journal.together():
        for number in range(items):
            item = Item("positive", f"content {number}", "openai", "m", "prompt")
            journal.done(journal.sent(item), "usable", Reply(f"reply {number} " * 20, 5, 5))
    assert not path.with_name(path.name + "-wal").exists()
    return path.read_bytes()


def refused(path: Path) -> str:
    """The one line with which a journal is refused; nothing stays open behind it."""
    with pytest.raises(UserError) as caught:
        Journal(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    del caught
    gc.collect()  # a file left open would be a warning, which is an error here
    return message


@pytest.mark.parametrize(
    "content",
    [b"This is no database at all.\n" * 400, b"SQLite format 3\x00" + b"\xff" * 5000, b"{}", b"\x00" * 8192],
    ids=["text", "a header alone", "JSON", "zeros"],
)
def test_what_is_no_journal_is_refused(path, content):
    write(path, content)
    refused(path)
    assert path.read_bytes() == content
    refused(path)  # and is not held by the first who tried


def test_a_folder_is_no_journal(path):
    path.mkdir(parents=True)
    refused(path)


def test_an_empty_file_is_a_new_journal(path):
    write(path, b"")
    with Journal(path) as journal:
        assert journal.spent().requests == 0


def test_a_newer_journal_is_refused(path):
    used(path)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    assert "newer" in refused(path)
    refused(path)


def test_another_programs_database_is_refused(path):
    path.parent.mkdir(parents=True)
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE attempts (id INTEGER, who TEXT)")
    db.close()
    refused(path)


@pytest.mark.parametrize("part", [0.25, 0.5, 0.9])
def test_a_journal_cut_off_is_refused(path, part):
    """By the copy of a disk that was full: the header is whole, pages are missing."""
    content = used(path)
    write(path, content[: int(len(content) * part)])
    refused(path)


@pytest.mark.parametrize("page", [1, 2, 20, 30])
def test_a_journal_with_a_broken_page_is_refused(path, page):
    """When it is opened or when the page is read, but always as an error that the command can show in a line."""
    content = bytearray(used(path))
    assert len(content) > 4096 * (page + 1)
    content[4096 * page : 4096 * (page + 1)] = b"\xa5" * 4096
    write(path, bytes(content))

    def read_all() -> None:
        with Journal(path) as journal:
            for number in range(300):
                journal.usable(Item("positive", f"content {number}", "openai", "m", "prompt"))
            journal.spent()
            journal.mean_tokens("positive")

    with pytest.raises(UserError) as caught:
        read_all()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    del caught
    gc.collect()


def test_the_folder_cannot_be_made(tmp_path):
    (tmp_path / "notes").write_text("a file")
    with pytest.raises(UserError, match="notes"):
        Journal(tmp_path / "notes" / "journal.sqlite")


# What makes two items the same, through the whole pipeline: which requests are sent a second time.


@pytest.fixture
def asked(tmp_path, keys):
    """Runs the stage `questions` over pictures; returns how many requests were sent."""
    folder, prompts = tmp_path / "images", helpers.write_prompts(tmp_path / "prompts")
    helpers.write_pictures(folder, 3)

    def run(images=("0000.png", "0001.png", "0002.png"), **changes) -> int:
        options = {"model": "openai:m", "prompts": prompts, "count": 1, "limits": Limits(concurrency=2)} | changes
        rows = len(images) * options["count"] * options.get("confusing", 1)
        with helpers.Memory(helpers.answer) as service:
            with Pipeline(AnnotationJob(tmp_path / "out", folder, tuple(images), **options), keys) as pipeline:
                outcome = pipeline.questions()
            assert not outcome.failed
            assert len(helpers.load(tmp_path / "out", helpers.QUESTIONS)) == rows
            return len(service.calls)

    run.folder, run.prompts = folder, prompts
    return run


def test_the_same_again_is_not_asked(asked):
    assert asked() == 3
    assert asked() == 0
    assert asked(limits=Limits(concurrency=1, requests=1e6)) == 0
    assert asked(settings=RequestSettings(timeout=3.0)) == 0


def test_another_prompt_is_asked(asked):
    assert asked() == 3
    helpers.write_prompts(asked.prompts, questions="questions in other words")
    assert asked() == 3
    helpers.write_prompts(asked.prompts, questions="questions in other words", judge="judge in other words")
    assert asked() == 0
    helpers.write_prompts(asked.prompts)
    assert asked() == 0


def test_another_model_is_asked(asked):
    assert asked() == 3
    assert asked(model="openai:n") == 3
    assert asked(model="openai:n@http://elsewhere/v1") == 0
    assert asked(model="openai:m") == 0


def test_another_temperature_is_asked(asked):
    assert asked() == 3
    assert asked(settings=RequestSettings(temperature=0.0)) == 3
    assert asked(settings=RequestSettings(temperature=0.5)) == 3
    assert asked(settings=RequestSettings(temperature=0.0)) == 0


def test_another_count_is_asked(asked):
    assert asked() == 3
    assert asked(count=2) == 3
    assert asked(confusing=2) == 3
    assert asked() == 0


def test_changed_bytes_are_asked(asked):
    assert asked() == 3
    (asked.folder / "0001.png").write_bytes(png((1, 2, 3), (8, 8)))
    assert asked() == 1
    assert asked() == 0


def test_changed_bytes_of_the_same_size_are_asked(asked):
    old = (asked.folder / "0001.png").read_bytes()
    new = old[:-1] + bytes([old[-1] ^ 1])  # in the checksum of the end: still a picture
    assert asked() == 3
    (asked.folder / "0001.png").write_bytes(new)
    assert asked() == 1


def test_a_touched_picture_is_not_asked(asked):
    assert asked() == 3
    os.utime(asked.folder / "0001.png", (1, 1))
    assert asked() == 0


def test_a_renamed_picture_is_not_asked(asked):
    assert asked() == 3
    (asked.folder / "sub").mkdir()
    (asked.folder / "0001.png").rename(asked.folder / "sub" / "new name.png")
    shutil.copy(asked.folder / "0002.png", asked.folder / "copy.png")
    assert asked(("0000.png", "sub/new name.png", "copy.png", "0002.png")) == 0


def test_another_place_in_the_list_is_not_asked(asked):
    assert asked() == 3
    assert asked(("0002.png", "0000.png", "0001.png")) == 0
    assert asked(("0002.png",)) == 0


def test_two_names_of_one_picture_are_asked_once(asked):
    shutil.copy(asked.folder / "0000.png", asked.folder / "twin.png")
    assert asked(("0000.png", "twin.png")) == 1
