"""`reverie annotate` as its user meets it: what it prints, how it ends, and what it never writes anywhere."""

from __future__ import annotations

import html
import json
import re
import shutil
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from reverie_jax.data.mixture import MixtureEntry, mixture
from reverie_jax.data.sources import ReadLog
from tests.annotate import helpers
from tests.annotate.helpers import (
    DROPPED,
    JOURNAL,
    JUDGED,
    QUESTIONS,
    RATIONALES,
    RELEASED,
    Memory,
    answer,
    load,
    stage_of,
)
from tests.hosted import server as loopback
from tests.hosted.server import Call, Fault, Server

pytest.importorskip("openai")
pytest.importorskip("google.genai")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning"),
    pytest.mark.usefixtures("keys"),
]
PROVIDERS = pytest.mark.parametrize("provider", ["openai", "gemini"])
STAGES = ("questions", "positive", "negative", "judge")


@pytest.fixture
def pictures(tmp_path) -> dict[str, bytes]:
    return helpers.write_pictures(tmp_path / "images", 5)


@pytest.fixture
def annotate(reverie, tmp_path, pictures):
    """`reverie annotate STEP` over five pictures with the tests' own prompts; options are keywords."""
    prompts = helpers.write_prompts(tmp_path / "prompts")

    def run(step: str, model: str = "", *more, **changes) -> tuple[int, str, str]:
        options = {"out": tmp_path / "out", "images": tmp_path / "images", "prompts": prompts, "questions": 1}
        words: list = ["annotate", step]
        for name, value in (options | ({"writer": model} if model else {}) | changes).items():
            if value is not None:
                words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else (value,))]
        return reverie(*words, *more)

    return run


def name_of(server: Server | Memory, provider: str = "openai", model: str = "tiny") -> str:
    return f"{provider}:{model}@{server.url}" + ("/v1" if provider == "openai" else "")


def refused(result: tuple[int, str, str], *words: object) -> bool:
    """Exit code 2, nothing on stdout, one line on stderr that holds the words."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("reverie: error: ")
    assert err.count("\n") == 1
    for word in words:
        assert str(word) in err
    return True


def table(text: str) -> list[list[str]]:
    """The cells of what was printed as a table."""
    rows = [re.split("[│┃]", line) for line in text.splitlines() if "│" in line or "┃" in line]
    return [[cell.strip() for cell in row[1:-1]] for row in rows]


@PROVIDERS
def test_run(annotate, tmp_path, pictures, provider):
    """All of it: exit code 0, the number of conversations on stdout, counts on stderr, no table."""
    with Server(answer) as server:
        code, out, err = annotate("run", name_of(server, provider), price=(2, 10))
        told = [loopback.usage(call, answer(call)) for call in server.calls]
        wanted = helpers.expected(pictures, name_of(server, provider))
        again = annotate("run", name_of(server, provider), price=(2, 10))
        assert len(server.calls) == 20
    assert code == 0
    for name in (QUESTIONS, RATIONALES, JUDGED, RELEASED):
        assert load(tmp_path / "out", name) == wanted[name]
    assert out == f"{len(wanted[RELEASED])} conversations: {tmp_path / 'out' / RELEASED}\n"
    assert "questions: 5 new, 0 already answered, 0 failed" in err
    assert "rationales: 10 new, 0 already answered, 0 failed" in err
    assert "judge: 5 new, 0 already answered, 0 failed" in err
    inside, outside = (sum(column) for column in zip(*told, strict=True))
    price = (2 * inside + 10 * outside) / 1e6
    assert f"20 requests, {inside:,} tokens in, {outside:,} out, price {price:.4f}" in err
    assert table(err) == []
    assert (again[0], again[1]) == (0, out)
    assert "questions: 0 new, 5 already answered, 0 failed" in again[2]
    assert f"20 requests, {inside:,} tokens in" in again[2]


def test_the_table_of_reasons(annotate, tmp_path, pictures):
    """A count for each reason, and where; exit code 1; what could be done is written."""
    names = list(pictures.values())

    def plan(call: Call) -> Fault | None:
        if stage_of(call) == "questions" and call.images[0] == names[0]:
            return Fault.BLOCKED
        if stage_of(call) == "negative" and call.images[0] in names[1:3]:
            return Fault.EMPTY
        return Fault.UNSURE if stage_of(call) == "judge" and call.text.split("\n")[1] == doubtful else None

    with Server(answer, plan, is_judge=lambda call: stage_of(call) == "judge") as server:
        wanted = helpers.expected(pictures, name_of(server))
        doubtful = wanted[QUESTIONS][4]["question"]
        code, out, err = annotate("run", name_of(server))
    assert code == 1
    assert "conversations" in out
    cells = table(err)
    assert ["questions", "1", "blocked (content_filter)"] in cells
    assert ["rationales", "2", "an empty reply"] in cells
    assert ["judge", "1", "neither yes nor no"] in cells
    assert len(cells) == 4
    assert "run the command again" in err
    assert [row["image"] for row in load(tmp_path / "out", JUDGED)] == ["0003.png"]


def test_a_judge_that_never_says_anything_usable(annotate, tmp_path):
    """No row is kept, none is dropped, and the command says so."""
    with Server(answer, lambda call: Fault.UNSURE, is_judge=lambda call: stage_of(call) == "judge") as server:
        code, out, err = annotate("run", name_of(server))
        assert Counter(map(stage_of, server.calls))["judge"] == 15
    assert code == 1
    assert ["judge", "5", "neither yes nor no"] in table(err)
    assert load(tmp_path / "out", JUDGED) == load(tmp_path / "out", DROPPED) == load(tmp_path / "out", RELEASED) == []
    assert out.startswith("0 conversations")
    kept = helpers.rows_of(tmp_path / "out" / JOURNAL, "reply", "stage = 'judge'")
    assert kept == [(loopback.NOT_SURE,)] * 15


def test_a_services_words_are_shown_as_they_are(annotate, monkeypatch):
    """Brackets in an error are no markup: not swallowed, and no crash."""
    said = "Invalid value at [/contents] or [bold]parts[/bold] [0]: see [red"
    helpers.unhappy(monkeypatch, lambda call: (400, said))
    with Server(answer) as server:
        code, _, err = annotate("questions", name_of(server))
    assert code == 1
    assert said in err


def test_a_budget_ends_a_run(annotate, tmp_path):
    with Memory(answer) as server:
        code, _, err = annotate("run", name_of(server), max_tokens=1000, concurrency=1)
        asked = len(server.calls)
        assert 0 < asked < 20
        assert code == 1
        assert any(cells[2].startswith("stopped early: the budget of 1,000 tokens") for cells in table(err))
        assert annotate("run", name_of(server), max_cost=1.0, price=(1, 1))[0] == 0
        assert len(server.calls) == 20


def test_dry_run_asks_nothing(annotate, tmp_path, pictures, monkeypatch):
    """Requests, tokens and price, from guesses at first and from what was seen later; it needs no key and no server."""
    for name in helpers.SECRETS:
        monkeypatch.delenv(name)
    code, out, _ = annotate("run", "openai:tiny", "--dry-run", price=(1000, 2000), questions=2, confusing=3)
    assert code == 0
    rows = {cells[0]: cells[1:] for cells in table(out)}
    assert [rows[stage][:2] for stage in STAGES] == [["0", "5"], ["0", "10"], ["0", "30"], ["0", "30"]]
    numbers = {stage: [float(cell.replace(",", "")) for cell in rows[stage]] for stage in STAGES}
    for _, _, tokens_in, tokens_out, price in numbers.values():
        assert tokens_in > 0
        assert tokens_out > 0
        assert price == pytest.approx((1000 * tokens_in + 2000 * tokens_out) / 1e6, abs=0.01)
    total = [sum(column) for column in zip(*(row[1:] for row in numbers.values()), strict=True)]
    assert [float(cell.replace(",", "")) for cell in rows["total"][1:]] == pytest.approx(total, abs=0.05)
    files = {path.name for path in (tmp_path / "out").iterdir()} - {JOURNAL, f"{JOURNAL}.lock"}
    assert files == set()
    assert helpers.rows_of(tmp_path / "out" / JOURNAL) == []


def test_dry_run_knows_what_is_there(annotate):
    with Memory(answer) as server:
        annotate("questions", name_of(server))
        annotate("rationales", name_of(server))
        asked = len(server.calls)
        code, out, _ = annotate("run", name_of(server), "--dry-run")
        assert len(server.calls) == asked
    assert code == 0
    rows = {cells[0]: cells[1:] for cells in table(out)}
    assert [rows[stage][:2] for stage in STAGES] == [["5", "0"], ["5", "0"], ["5", "0"], ["0", "5"]]
    assert rows["total"][1] == "5"


# Keys.


def everything(folder: Path) -> bytes:
    """All files below a folder, and their names."""
    return b"\0".join(str(path).encode() + b"\0" + path.read_bytes() for path in folder.rglob("*") if path.is_file())


ERRORS = {
    "wrong": (401, "Incorrect API key provided: {key}. Visit https://example.invalid/?key={key}"),
    "in part": (401, "Incorrect API key provided: {start}********{end}."),
    "refused": (400, "Request of {key} could not be processed."),
    "down": (503, "Backend of {key} is down."),
    "limit": (429, "Rate limit reached for key {key} in organization."),
}


@PROVIDERS
@pytest.mark.parametrize("case", ["good", *ERRORS])
def test_keys_are_nowhere(annotate, provider, case, tmp_path, monkeypatch, caplog):
    """Neither in the journal nor in any other file, log or line, even when the service's error quotes them."""
    caplog.set_level(0)
    secret = helpers.SECRETS[f"{provider.upper()}_API_KEY"]
    journals = []

    def broken(call: Call):
        # While the run goes on, the journal's bytes are in the file beside it.
        journals.append(everything(tmp_path / "out"))
        if case == "good" or call.attempt > 1 or stage_of(call) != "questions":
            return None
        status, message = ERRORS[case]
        return status, message.format(key=secret, start=secret[:8], end=secret[-4:])

    helpers.unhappy(monkeypatch, broken)
    with Server(answer) as server:
        code, out, err = annotate("run" if case == "good" else "questions", name_of(server, provider))
        assert {call.key for call in server.calls} == {secret}
    assert code == (2 if case in ("wrong", "in part") else 0)
    # Not a record's times and numbers: any four digits may be in them by chance.
    said = out + err + caplog.text + repr([(record.msg, record.args, record.exc_text) for record in caplog.records])
    found = b"\0".join([everything(tmp_path / "out"), *journals]) + said.encode()
    assert len(journals) >= 1
    assert b"SQLite" in found
    for value in helpers.SECRETS.values():
        assert value.encode() not in found
    if case == "in part":
        assert secret[:8] not in said
        assert secret[-4:] not in said
    if case == "refused":
        assert "could not be processed" in "".join(
            row[0] for row in helpers.rows_of(tmp_path / "out" / JOURNAL, "reason")
        )


def test_keys_are_no_options(reverie):
    """What stands on a command line stands in the shell's history and in everybody's list of processes."""
    code, out, _ = reverie("annotate", "--help")
    assert code == 0
    assert not re.search(r"--\S*key", out)
    assert "GEMINI_API_KEY" in out
    assert "OPENAI_API_KEY" in out


def test_keys_that_are_missing(annotate, monkeypatch):
    for name in helpers.SECRETS:
        monkeypatch.delenv(name)
    assert refused(annotate("questions", "openai:tiny"), "OPENAI_API_KEY")
    assert refused(annotate("questions", "gemini:tiny"), "GEMINI_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "  ")
    assert refused(annotate("questions", "openai:tiny"), "OPENAI_API_KEY")


def test_a_server_of_ones_own_needs_no_key(annotate, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with Server(answer) as server:
        assert annotate("questions", name_of(server))[0] == 0
        monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
        assert annotate("rationales", "openai:tiny")[0] == 0
        assert len(server.calls) == 15


def test_googles_other_name_for_the_key(annotate, monkeypatch):
    monkeypatch.delenv("GEMINI_API_KEY")
    monkeypatch.setenv("GOOGLE_API_KEY", "AIzaTheOtherOne")
    with Server(answer) as server:
        assert annotate("questions", name_of(server, "gemini"))[0] == 0
        assert {call.key for call in server.calls} == {"AIzaTheOtherOne"}


# Mistakes.


def test_mistakes_are_one_line(annotate, tmp_path, reverie):
    assert refused(annotate("rationals", "openai:tiny"), "rationals", "judge")
    assert refused(annotate("run"), "--writer")
    assert refused(annotate("run", "tiny"), "tiny", "openai")
    assert refused(annotate("run", "mistral:tiny"), "mistral", "gemini")
    assert refused(annotate("run", "openai:"), "openai")
    assert refused(annotate("run", "openai:tiny", judge="tiny"), "tiny")
    assert refused(annotate("run", "openai:tiny", votes="most"), "--votes", "majority")
    assert refused(annotate("run", "openai:tiny", questions=0), "--questions")
    assert refused(annotate("run", "openai:tiny", confusing=0), "--confusing")
    assert refused(annotate("run", "openai:tiny", max_cost=3), "--price")
    assert refused(annotate("run", "openai:tiny", timeout=0), "--timeout")
    assert refused(annotate("run", "openai:tiny", requests_per_minute=0), "--requests-per-minute")
    assert refused(annotate("run", "openai:tiny", tokens_per_minute=-1), "--tokens-per-minute")
    assert refused(annotate("run", "openai:tiny", images=tmp_path / "gone"), tmp_path / "gone")
    assert refused(annotate("run", "openai:tiny", images=None), "--images")
    assert refused(annotate("run", "openai:tiny", prompts=tmp_path / "gone"), tmp_path / "gone")
    assert refused(annotate("run", "openai:tiny", list=tmp_path / "gone.json"), "gone.json")
    assert refused(annotate("rationales", "openai:tiny"), QUESTIONS)
    assert refused(annotate("judge", "openai:tiny"), RATIONALES)
    assert refused(annotate("export"), JUDGED)
    assert refused(annotate("audit"), JUDGED)
    (tmp_path / "empty").mkdir()
    assert refused(annotate("run", "openai:tiny", images=tmp_path / "empty"), "empty", "no pictures")


@pytest.mark.parametrize("text", ["", "{}", "[3]", '[""]', "[", "[]", '["a.png", null]'])
def test_a_list_that_is_none(annotate, tmp_path, text):
    (tmp_path / "list.json").write_text(text)
    assert refused(annotate("run", "openai:tiny", list=tmp_path / "list.json"), "list.json")


def test_a_file_in_the_way_is_one_line(annotate, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert refused(annotate("run", "openai:tiny", out=tmp_path / "file"), tmp_path / "file")
    assert refused(annotate("run", "openai:tiny", out=tmp_path / "file" / "below"), tmp_path / "file")
    assert refused(annotate("run", "openai:tiny", images=tmp_path / "file"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_broken_journal_is_one_line(annotate, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / JOURNAL).write_text("years of work")
    assert refused(annotate("run", "openai:tiny"), JOURNAL)
    assert (tmp_path / "out" / JOURNAL).read_text() == "years of work"


def test_a_sample_that_is_none(annotate):
    with Memory(answer) as server:
        annotate("run", name_of(server))
    assert refused(annotate("audit", count=-1), "--count")


def test_images_are_listed(annotate, tmp_path, pictures):
    """By `--list`, by the original's image_list.json in OUT, or all in the folder and below, sorted."""
    (tmp_path / "images" / "b").mkdir()
    (tmp_path / "images" / "b" / "ä.JPG").write_bytes(pictures["0000.png"][:-3] + b"abc")
    (tmp_path / "images" / "notes.txt").write_text("no picture")
    (tmp_path / "list.json").write_text(json.dumps(["0003.png", "0001.png", "0003.png"]))
    with Memory(answer) as server:
        code, *_ = annotate("questions", name_of(server))
        assert code in (0, 1)
        assert len({call.images[0] for call in server.calls}) == len(server.calls)
        listed = [row["image"] for row in load(tmp_path / "out", QUESTIONS)]
        assert listed == sorted(listed)
        assert set(listed) >= set(pictures)
        annotate("questions", name_of(server), list=tmp_path / "list.json")
        assert [row["image"] for row in load(tmp_path / "out", QUESTIONS)] == ["0003.png", "0001.png"]
        (tmp_path / "out" / "image_list.json").write_text(json.dumps(["0004.png"]))
        annotate("questions", name_of(server))
        assert [row["image"] for row in load(tmp_path / "out", QUESTIONS)] == ["0004.png"]


# A recorded run.


def test_replay(annotate, tmp_path):
    """Without a server, the files of a recorded run again, byte for byte."""
    with Memory(answer) as server:
        assert annotate("run", name_of(server), questions=2, confusing=2)[0] == 0
    recording = tmp_path / "recording.sqlite"
    shutil.copy(tmp_path / "out" / JOURNAL, recording)
    before = recording.read_bytes()
    code, _, err = annotate("run", f"replay:{recording}", out=tmp_path / "again", questions=2, confusing=2)
    assert code == 0, err
    for name in (QUESTIONS, RATIONALES, RELEASED):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    for name in (JUDGED, DROPPED):
        one, other = (load(tmp_path / folder, name) for folder in ("out", "again"))
        assert [row | {"judges": None} for row in one] == [row | {"judges": None} for row in other]
        assert [list(row["judges"].values()) for row in one] == [list(row["judges"].values()) for row in other]
    assert recording.read_bytes() == before


def test_replay_with_other_prompts(annotate, tmp_path):
    """In whatever words: a recording knows contents."""
    with Memory(answer) as server:
        annotate("run", name_of(server))
    recording = f"replay:{tmp_path / 'out' / JOURNAL}"
    assert annotate("run", recording, out=tmp_path / "again", prompts=None)[0] == 0
    assert (tmp_path / "again" / RELEASED).read_bytes() == (tmp_path / "out" / RELEASED).read_bytes()


def test_replay_of_what_was_not_recorded(annotate, tmp_path):
    with Memory(answer) as server:
        annotate("questions", name_of(server))
    recording = f"replay:{tmp_path / 'out' / JOURNAL}"
    code, _, err = annotate("run", recording, out=tmp_path / "again")
    assert code == 1
    assert ["rationales", "10", "not in the recording"] in table(err)
    assert refused(annotate("run", f"replay:{tmp_path / 'gone.sqlite'}", out=tmp_path / "o"), "gone.sqlite")


@pytest.mark.parametrize("form", ["relative", "with a dot", "with two slashes"])
def test_replay_however_the_file_is_named(annotate, tmp_path, monkeypatch, form):
    with Memory(answer) as server:
        annotate("questions", name_of(server))
    monkeypatch.chdir(tmp_path)
    path = {"relative": f"out/{JOURNAL}", "with a dot": f"./out/{JOURNAL}", "with two slashes": f"out//{JOURNAL}"}[form]
    assert annotate("questions", f"replay:{path}", out=tmp_path / "again")[0] == 0
    assert load(tmp_path / "again", QUESTIONS) == load(tmp_path / "out", QUESTIONS)


@pytest.mark.parametrize("content", [b"no database", b""])
def test_replay_of_what_is_no_journal(annotate, tmp_path, content):
    (tmp_path / "recording.sqlite").write_bytes(content)
    assert refused(annotate("questions", f"replay:{tmp_path / 'recording.sqlite'}"), "recording.sqlite")


def test_replay_of_a_running_journal(annotate, tmp_path):
    """Read while another writes it: what is there already is found."""
    with Memory(answer) as server:
        annotate("questions", name_of(server))
    db = sqlite3.connect(tmp_path / "out" / JOURNAL, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("BEGIN IMMEDIATE")
    assert annotate("questions", f"replay:{tmp_path / 'out' / JOURNAL}", out=tmp_path / "again")[0] == 0
    db.execute("ROLLBACK")
    db.close()


# The embedded world.


def test_scenes(annotate, reverie, tmp_path):
    """From drawn pictures to what can be trained on, with exact truth and no network."""
    assert reverie("scenes", "render", tmp_path / "world", "--count", 4, "--size", 64)[0] == 0
    folder, out = tmp_path / "world" / "images", tmp_path / "notes"
    model = f"scenes:{tmp_path / 'world'}"
    code, _, err = annotate("run", model, out=out, images=folder, prompts=None, questions=3)
    assert code == 0, err
    questions, judged = load(out, QUESTIONS), load(out, JUDGED)
    assert len(questions) == len(judged) == 12
    assert {row["question_type"] for row in questions} <= {"yes/no", "choice", "short", "open"}
    assert {row["gemini_pro_judge"] for row in judged} == {"no"}  # exact rationales never contradict each other
    assert load(out, DROPPED) == []
    assert len(list(mixture([MixtureEntry(file=out / RELEASED, images=folder)], ReadLog()))) == 4
    assert len(load(out, RELEASED)) == 24
    first = {name: (out / name).read_bytes() for name in (QUESTIONS, RATIONALES, JUDGED, RELEASED)}
    again = tmp_path / "again"
    assert annotate("run", model, out=again, images=folder, prompts=None, questions=3)[0] == 0
    assert {name: (again / name).read_bytes() for name in first} == first
    assert reverie("annotate", "audit", "--out", out, "--images", folder)[0] == 0


def test_scenes_that_are_not_there(annotate, tmp_path):
    assert refused(annotate("questions", f"scenes:{tmp_path / 'gone'}"), "gone")


# The page to look through.


class Page:
    def __init__(self, text: str):
        self.text = text
        self.articles = re.findall(r"<article>(.*?)</article>", text, re.DOTALL)


def test_audit(annotate, tmp_path):
    """Kept and dropped rows with their pictures, everything that was said, nothing fetched from anywhere."""
    with Memory(answer) as server:
        annotate("run", name_of(server), questions=4)
        who = name_of(server)
    code, out, _ = annotate("audit")
    assert code == 0
    assert out == f"{tmp_path / 'out' / 'audit.html'}\n"
    page = Page((tmp_path / "out" / "audit.html").read_text("utf-8"))
    judged = load(tmp_path / "out", JUDGED)
    dropped = [row for row in judged if row["gemini_pro_judge"] == "yes"]
    assert dropped
    assert len(page.articles) == len(judged) == 20
    kept, gone = page.text.split("<h2>dropped")
    for row in judged:
        half = gone if row in dropped else kept
        (article,) = [text for text in page.articles if row["question"] in html.unescape(text)]
        assert article in half
        for key in ("image", "correct_answer", "confusing_answer", "correct_rationale", "incorrect_rationale"):
            assert row[key] in html.unescape(article)
        assert row["question_type"] in article
        assert f"{who}: {row['gemini_pro_judge']}" in html.unescape(article)
    assert page.text.count("data:image/jpeg;base64,") == 20
    assert not any(mark in page.text for mark in ("<script", "<link", 'src="http', "url(http"))
    assert f"{20 - len(dropped)} rows kept, {len(dropped)} dropped" in page.text


def test_audit_draws_a_sample(annotate, tmp_path, reverie):
    with Memory(answer) as server:
        annotate("run", name_of(server), questions=5)
    assert annotate("audit", count=2)[0] == 0
    text = (tmp_path / "out" / "audit.html").read_text("utf-8")
    assert 2 < len(Page(text).articles) <= 4
    annotate("audit", count=2)
    assert (tmp_path / "out" / "audit.html").read_text("utf-8") == text
    assert annotate("audit", count=0)[0] == 0


def test_audit_escapes_what_models_write(annotate, tmp_path):
    evil = "<script>alert('a & b')</script>\"'<img src=x onerror=alert(1)>"

    def reply(call: Call) -> str:
        if stage_of(call) == "questions":
            one = {"question": evil, "type": "short", "correct_answer": f"r{evil}", "confusing_answers": [f"w{evil}"]}
            return json.dumps({"questions": [one]})
        return "No" if stage_of(call) == "judge" else f"because {evil}"

    name = "<b>&.png"
    (tmp_path / "images" / "0000.png").rename(tmp_path / "images" / name)
    with Memory(reply) as server:
        annotate("run", name_of(server))
        annotate("audit")
    text = (tmp_path / "out" / "audit.html").read_text("utf-8")
    assert "<script>" not in text
    assert "<img src=x" not in text
    assert "<b>" not in text
    assert f"because {evil}" in html.unescape(text)


def test_audit_without_a_picture(annotate, tmp_path):
    """A picture that is gone or broken since then is a word in its place."""
    with Memory(answer) as server:
        annotate("run", name_of(server))
    (tmp_path / "images" / "0001.png").unlink()
    (tmp_path / "images" / "0002.png").write_bytes(b"no picture")
    assert annotate("audit")[0] == 0
    text = (tmp_path / "out" / "audit.html").read_text("utf-8")
    assert text.count("data:image/jpeg;base64,") == 3
    assert text.count("picture cannot be read") == 2


def test_files_are_what_the_documentation_says(annotate, tmp_path):
    with Memory(answer) as server:
        annotate("run", name_of(server))
        annotate("audit")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {QUESTIONS, RATIONALES, JUDGED, DROPPED, RELEASED, JOURNAL, "audit.html"}
    assert {name for name in names if name.startswith(".") or name.endswith(".part")} == set()
