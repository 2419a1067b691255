"""The journal: one process at a time, no reply lost, requests identified by their content."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import shutil
import sqlite3
from pathlib import Path

import pytest

from reverie_jax.errors import UserError
from reverie_jax.hosted.identity import RequestIdentity
from reverie_jax.hosted.interface import Reply
from reverie_jax.hosted.journal import Journal, JournalReader, Spent
from tests.hosted import helpers

ITEM = RequestIdentity("positive", "content", "openai", "m", "prompt")
OTHER = dataclasses.replace(ITEM, content="other")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "notes" / "journal.sqlite"


def text_of(journal: JournalReader, identity: RequestIdentity) -> str | None:
    reply = journal.get_reply(identity)
    return None if reply is None else reply.text


def test_one_run_holds_it_and_requests_in_flight_at_a_kill_are_lost(path, tmp_path):
    killed = tmp_path / "killed" / path.name
    items = [dataclasses.replace(ITEM, content=f"content {n}") for n in range(5)]
    with Journal(path) as journal:
        attempts = [journal.record_request(item) for item in items]
        journal.record_result(attempts[0], "usable", Reply("first", 10, 5))
        journal.record_result(attempts[1], "unusable", Reply("second"), reason="of no use")
        assert "another run" in refused(path)
        shutil.copytree(path.parent, killed.parent)  # what a kill would leave at this moment
    with Journal(killed) as journal:
        assert journal.lost == 3
        assert journal.spent() == Spent(5, 10, 5, 0.0)
        assert [text_of(journal, item) for item in items[:3]] == ["first", None, None]
    assert [state for (state,) in helpers.rows_of(killed, "state")] == ["usable", "unusable", "lost", "lost", "lost"]
    with Journal(killed) as journal:
        assert journal.lost == 0


def test_every_attempt_is_recorded(path):
    raw = " raw ✓\x00\n"
    with Journal(path) as journal:
        assert journal.is_empty()
        journal.record_result(journal.record_request(ITEM), "failed", reason="status 503 \ud83d")
        reply = Reply("", 100, 0, "m-1")
        journal.record_result(journal.record_request(ITEM), "unusable", reply, price=0.25, reason="empty")
        assert journal.get_reply(ITEM) is None
        for text in (raw, "a later one"):  # the first usable reply stays
            journal.record_result(journal.record_request(ITEM), "usable", Reply(text, 100, 6, "m-1"), price=0.5)
        journal.record_result(journal.record_request(ITEM), "failed")
        assert not journal.is_empty()
    with Journal(path) as journal:
        assert text_of(journal, ITEM) == raw
        assert journal.get_reply(OTHER) is None
        assert journal.spent() == Spent(5, 300, 12, 1.25)
        assert journal.mean_tokens() == {"positive": (100.0, 4.0)}
    columns = "state, reason, reply, tokens_in, tokens_out, price, version, stage, provider, model, prompt"
    who = ("positive", "openai", "m", "prompt")
    assert helpers.rows_of(path, columns)[:3] == [
        ("failed", "status 503 ?", None, 0, 0, 0.0, "", *who),
        ("unusable", "empty", "", 100, 0, 0.25, "m-1", *who),
        ("usable", "", raw, 100, 6, 0.5, "m-1", *who),
    ]
    assert all(s >= 0 and t > 1_700_000_000 for s, t in helpers.rows_of(path, "seconds, started"))


@pytest.mark.parametrize("change", ["stage", "content", "provider", "model", "prompt"])
def test_each_part_of_an_identity_counts(change):
    """But the stage, which is part of the content's digest."""
    assert (ITEM.key == dataclasses.replace(ITEM, **{change: "another"}).key) == (change == "stage")


def test_adopted_replies_count_for_every_model_and_cost_nothing(path):
    verdict = dataclasses.replace(ITEM, stage="judge", content="verdict")
    with Journal(path) as journal:
        assert journal.adopt(ITEM, "theirs")
        assert not journal.adopt(ITEM, "again")
        other = dataclasses.replace(ITEM, provider="gemini", model="x", prompt="y")
        assert text_of(journal, ITEM) == text_of(journal, other) == "theirs"
        assert journal.is_original(other)
        assert journal.get_reply(OTHER) is None
        assert journal.adopt(verdict, "No")  # a verdict is that of one judge
        assert journal.get_reply(dataclasses.replace(verdict, model="x")) is None
        assert journal.spent() == Spent(0, 0, 0, 0.0)


def test_a_transaction_is_recorded_whole_or_not_at_all(path):
    with Journal(path) as journal:

        def cut_short() -> None:
            with journal.transaction():
                journal.adopt(ITEM, "theirs")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cut_short()
        assert journal.get_reply(ITEM) is None
        with journal.transaction():
            journal.adopt(ITEM, "theirs")
        assert text_of(journal, ITEM) == "theirs"


def test_a_reader_does_not_lock(path, tmp_path):
    """It reads what another process has written so far, by content alone, however the file is named."""
    with Journal(path) as journal:
        journal.record_result(journal.record_request(ITEM), "usable", Reply("said", version="m-1"))
        journal._db.execute("BEGIN IMMEDIATE")
        for name in (path, path.parent / "." / path.name):
            reader = JournalReader(name)
            assert (reader.find_reply("content") or ())[:2] == ("said", "m-1")
            assert reader.find_reply("other") is None
            reader.close()
    (tmp_path / "text").write_bytes(b"no database")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("text", "empty", "gone"):
        with pytest.raises(UserError, match=name):
            JournalReader(tmp_path / name)
    gc.collect(0)


# Image digests.


def test_a_file_is_read_again_only_if_it_changed(path, tmp_path, monkeypatch):
    image, reads = tmp_path / "a.png", []
    usual = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self) or usual(self))
    image.write_bytes(b"one")
    with Journal(path) as journal:
        first = journal.image_digest(image)
        assert journal.image_digest(image) == first
        assert len(reads) == 1
        image.write_bytes(b"two")  # of the same size
        assert journal.image_digest(image) != first
        image.rename(tmp_path / "b.png")
        (tmp_path / "c.png").write_bytes(b"one")
        assert journal.image_digest(tmp_path / "c.png") == first


# Files that are not journals.


def used(path: Path) -> bytes:
    """Make a journal of some size, closed properly, and return the bytes of its file."""
    with Journal(path) as journal, journal.transaction():
        for number in range(300):
            attempt = journal.record_request(dataclasses.replace(ITEM, content=f"content {number}"))
            journal.record_result(attempt, "usable", Reply(f"reply {number} " * 20, 5, 5))
    assert not path.with_name(path.name + "-wal").exists()
    return path.read_bytes()


def refused(path: Path) -> str:
    """Return the one line by which a journal is refused; no file stays open."""
    with pytest.raises(UserError) as caught:
        Journal(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    del caught
    gc.collect(0)  # an open file would be a warning, which is an error here
    return message


@pytest.mark.parametrize(
    "content",
    [b"This is not a database.\n" * 400, b"SQLite format 3\x00" + b"\xff" * 5000, b"{}", b"\x00" * 8192, 0.25, 0.9],
    ids=["text", "a header alone", "JSON", "zeros", "a quarter", "cut off"],
)
def test_broken_files_are_refused_and_left_alone(path, content):
    if isinstance(content, float):
        whole = used(path)
        content = whole[: int(len(whole) * content)]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    refused(path)
    assert path.read_bytes() == content
    refused(path)  # the first refusal released the lock


@pytest.mark.parametrize("page", [1, 20])
def test_a_journal_with_a_broken_page_is_refused(path, page):
    content = bytearray(used(path))
    assert len(content) > 4096 * (page + 1)
    content[4096 * page : 4096 * (page + 1)] = b"\xa5" * 4096
    path.write_bytes(bytes(content))
    refused(path)


def test_folders_newer_versions_and_other_databases_are_refused(path, tmp_path):
    used(path)
    for version in (1, 3):
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute(f"PRAGMA user_version = {version}")
        assert "version" in refused(path)
    with contextlib.closing(sqlite3.connect(tmp_path / "other.sqlite")) as db:
        db.execute("CREATE TABLE attempts (id INTEGER, who TEXT)")
    refused(tmp_path / "other.sqlite")
    refused(path.parent)
    refused(path / "below.sqlite")
