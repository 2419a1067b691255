"""`reverie annotate`: what it prints, its exit codes, and what it never writes."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from reverie_jax.annotate.files import DROPPED, JUDGED, QUESTIONS, RATIONALES, RELEASED
from reverie_jax.cli import hosted as cli_hosted
from reverie_jax.data.mixture import MixtureEntry, read_mixture
from reverie_jax.data.sources import ReadLog
from reverie_jax.hosted.interface import RefusedError
from tests.annotate import helpers
from tests.annotate.helpers import JOURNAL, SECRETS, Memory, answer, check_files, load, spec_of, stage_of
from tests.data.fakes import png
from tests.hosted.faults import Fault
from tests.hosted.helpers import secret_of
from tests.hosted.server import Server
from tests.hosted.wires import Call, usage

pytestmark = pytest.mark.usefixtures("keys", "sdks")
PROVIDERS = pytest.mark.parametrize("provider", ["openai", "gemini"])
STAGES = ("questions", "positive", "negative", "judge")


def check_refused(result: tuple[int, str, str], *words: object) -> None:
    """Check for exit code 2, nothing on stdout, and one line on stderr that contains the words."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("reverie: error: ")
    assert err.count("\n") == 1
    assert all(str(word) in err for word in words)


def table(text: str) -> list[list[str]]:
    """Return the cells of a printed table."""
    rows = [re.split("[│┃]", line) for line in text.splitlines() if "│" in line or "┃" in line]
    return [[cell.strip() for cell in row[1:-1]] for row in rows]


@PROVIDERS
def test_run(annotate, tmp_path, images, provider):
    """All steps: exit code 0, the conversations on stdout, counts and costs on stderr; a further run sends nothing."""
    with Server(answer) as server:
        spec = spec_of(server, provider)
        code, out, err = annotate("run", spec, price=(2, 10))
        tokens = [usage(call, answer(call)) for call in server.calls]
        again = annotate("run", spec, price=(2, 10))
        assert len(server.calls) == 20
    wanted = helpers.expected(images, spec)
    check_files(tmp_path / "out", wanted)
    assert (code, out) == (0, f"{len(wanted[RELEASED])} conversations: {tmp_path / 'out' / RELEASED}\n")
    for step, count in (("questions", 5), ("rationales", 10), ("judge", 5)):
        assert re.search(rf"{step}: {count} .*\b0 .*\b0 ", err)
        assert re.search(rf"{step}: 0 .*\b{count} .*\b0 ", again[2])
    tokens_in, tokens_out = (sum(column) for column in zip(*tokens, strict=True))
    price = (2 * tokens_in + 10 * tokens_out) / 1e6
    for text in (err, again[2]):
        assert all(number in text for number in (f"{tokens_in:,}", f"{tokens_out:,}", f"{price:.4f}"))
    assert table(err) == []
    assert again[:2] == (0, out)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*helpers.FILES, JOURNAL, f"{JOURNAL}.lock"}


def test_failures_are_listed(annotate, tmp_path, images):
    """A count for each reason and step, and the images; exit code 1. The rest is written."""
    names = list(images.values())

    def plan(call: Call) -> Fault | tuple[int, str] | None:
        if stage_of(call) == "questions" and call.images[0] == names[0]:
            return (400, "Invalid [/contents] or [bold]parts[/bold]: [red")
        if stage_of(call) == "negative" and call.images[0] in names[1:3]:
            return Fault.EMPTY
        return Fault.UNSURE if stage_of(call) == "judge" and doubtful in call.text else None

    with Server(answer, plan, is_judge=lambda call: stage_of(call) == "judge") as server:
        doubtful = helpers.expected(images, spec_of(server))[QUESTIONS][4]["question"]
        code, _, err = annotate("run", spec_of(server))
    assert code == 1
    failures = [cells[:2] for cells in table(err)]
    assert failures[1:] == [["questions", "1"], ["rationales", "2"], ["judge", "1"]]
    assert "Invalid [/contents] or [bold]parts[/bold]: [red" in err  # no markup
    assert all(name in err for name in ("0000.png", "0001.png", "0002.png", "0004.png"))
    assert [row["image"] for row in load(tmp_path / "out", JUDGED)] == ["0003.png"]


def test_a_budget_ends_a_run(annotate):
    with Memory(answer) as server:
        code, _, err = annotate("run", spec_of(server), max_tokens=1000, concurrency=1)
        assert 0 < len(server.calls) < 20
        assert code == 1
        assert "1,000 tokens" in table(err)[-1][2]
        assert annotate("run", spec_of(server), max_cost=1.0, price=(1, 1))[0] == 0
        assert len(server.calls) == 20


def test_dry_run_sends_nothing(annotate, tmp_path, monkeypatch):
    """Requests, tokens and price, from defaults and then from the journal; a batch costs half. No key is needed."""
    for name in SECRETS:
        monkeypatch.delenv(name)

    def estimates(*more, **changes) -> dict[str, list[float]]:
        code, out, _ = annotate("run", "openai:tiny", "--dry-run", *more, **changes)
        assert code == 0
        return {row[0]: [float(cell.replace(",", "") or 0) for cell in row[1:]] for row in table(out)[1:]}

    rows = estimates(price=(1000, 2000), questions=2, confusing=3)
    assert [rows[stage][:2] for stage in STAGES] == [[0, 5], [0, 10], [0, 30], [0, 30]]
    for _, _, tokens_in, tokens_out, price in (rows[stage] for stage in STAGES):
        assert min(tokens_in, tokens_out) > 0
        assert price == pytest.approx((1000 * tokens_in + 2000 * tokens_out) / 1e6, abs=0.01)
    total = [sum(column) for column in zip(*(rows[stage][1:] for stage in STAGES), strict=True)]
    assert rows["total"][1:] == pytest.approx(total, abs=0.05)
    half = estimates("--batch", price=(1000, 2000), questions=2, confusing=3)
    assert half["total"] == pytest.approx([*rows["total"][:-1], rows["total"][-1] / 2], abs=0.05)
    assert not (tmp_path / "out").exists()  # nothing was recorded
    with Memory(answer) as server:
        annotate("questions", "openai:tiny")
        annotate("rationales", "openai:tiny")
        rows = estimates()
        assert len(server.calls) == 15
    assert [rows[stage][:2] for stage in STAGES] == [[5, 0], [5, 0], [5, 0], [0, 5]]
    assert rows["total"][1] == 5
    assert rows["total"][-1] == 0
    assert "--price" in annotate("run", "openai:tiny", "--dry-run")[1]


SIZES = [
    ("gemini", (300, 300), 258),
    ("gemini", (1500, 700), 2 * 258),
    ("openai", (300, 300), 85 + 170),
    ("openai", (4096, 2048), 85 + 6 * 170),
]


@pytest.mark.parametrize(("provider", "size", "tokens"), SIZES)
def test_an_estimate_depends_on_the_sizes_of_images(annotate, tmp_path, images, provider, size, tokens):
    for number, name in enumerate(images):
        (tmp_path / "images" / name).write_bytes(png((number, 2, 3), size))
    code, out, _ = annotate("questions", f"{provider}:m", "--dry-run")
    assert code == 0
    assert int(table(out)[1][3].replace(",", "")) == 5 * (600 - 258 + tokens)


HOPELESS = [
    ("every", (402, {"error": {"message": "Insufficient Balance"}}), 2, "Insufficient Balance"),
    ("every", (200, {"error": {"message": "Insufficient credits", "code": 402}}), 2, "Insufficient credits"),
    ("one", (403, {"error": {"message": "Your input was flagged by moderation"}}), 1, "flagged by moderation"),
]


@pytest.mark.parametrize(("which", "fault", "code", "words"), HOPELESS)
def test_hopeless_requests_are_sent_once(annotate, tmp_path, images, which, fault, code, words):
    """No credit ends the run; one picture that the service does not like stops no other."""
    flagged = images["0001.png"]
    plan = lambda call: fault if which == "every" or call.images == [flagged] else None  # noqa: E731
    with Server(answer, plan) as server:
        got, _, err = annotate("questions", spec_of(server), concurrency=2)
        assert (got, words in err) == (code, True)
        assert len(server.calls) <= (2 if which == "every" else 5)
    if which == "one":
        assert [row["image"] for row in load(tmp_path / "out", QUESTIONS)] == [n for n in images if n != "0001.png"]


def test_pictures_that_are_too_large_are_scaled_down(annotate, images, tmp_path):
    """A reason names the option; with it, pictures are new ones, and are sent again."""
    (tmp_path / "images" / "0001.png").write_bytes(large := png((1, 2, 3), (90, 30)))
    plan = lambda call: (413, b"<title>413</title>") if call.images == [large] else None  # noqa: E731
    with Server(answer, plan) as server:
        code, _, err = annotate("questions", spec_of(server))
        assert (code, "413: Request Entity Too Large" in err, "--max-image-size" in err) == (1, True, True)
        assert annotate("questions", spec_of(server), max_image_size=30)[0] == 0
        assert len(server.calls) == 10
        sizes = [Image.open(io.BytesIO(call.images[0])).size for call in server.calls[5:]]
    assert (30, 10) in sizes
    assert max(map(max, sizes)) == 30


@pytest.mark.parametrize(("given", "sent"), [(None, None), (0.5, 0.5), ("none", None), ("None", None)])
def test_temperature(annotate, given, sent):
    with Server(answer) as server:
        assert annotate("questions", spec_of(server), temperature=given)[0] == 0
    assert {call.body.get("temperature") for call in server.calls} == {sent}


def test_many_reasons_are_cut_short(annotate, monkeypatch):
    monkeypatch.setattr(cli_hosted, "_REASONS", 2)
    with Memory(answer, lambda call: RefusedError(f"request {call.digest}")) as server:
        code, _, err = annotate("questions", spec_of(server))
    assert code == 1
    assert [cells[1:] for cells in table(err)][-1] == ["3", "3 other reasons, in the journal"]
    assert sum(name in err for name in (call.digest for call in server.calls)) == 2


def test_replies_without_counts_are_told(annotate):
    def plan(call: Call) -> tuple[int, dict]:
        return 200, {"choices": [{"message": {"content": answer(call)}}], "usage": {}}

    with Server(answer, plan) as server:
        code, _, err = annotate("questions", spec_of(server))
    assert code == 0
    assert "5 new" in err
    assert "5 replies" in err


def test_a_run_that_sent_nothing_leaves_no_journal(annotate, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    check_refused(annotate("run", "openai:tiny"), "OPENAI_API_KEY")
    assert not (tmp_path / "out").exists()


# Keys.

ERRORS = {
    "in part": (401, "Incorrect API key provided: {start}********{end}. Visit https://example.invalid/?key={key}"),
    "refused": (400, "Request of {key} could not be processed."),
    "limit": (429, "Rate limit reached for key {key} in organization."),
}


def everything(folder: Path) -> bytes:
    """Return all files below a folder, with their names."""
    return b"\0".join(str(path).encode() + b"\0" + path.read_bytes() for path in folder.rglob("*") if path.is_file())


@PROVIDERS
@pytest.mark.parametrize("case", ["good", *ERRORS])
def test_keys_are_written_nowhere(annotate, provider, case, tmp_path, caplog):
    """Neither to the journal nor to any other file, log or line, even if the service's error quotes them."""
    caplog.set_level(0)
    secret = secret_of(provider)
    journals = []

    def plan(call: Call):
        journals.append(everything(tmp_path / "out"))  # during the run, the journal's bytes are in the file beside it
        if case == "good" or call.attempt > 1 or stage_of(call) != "questions":
            return None
        status, message = ERRORS[case]
        return status, message.format(key=secret, start=secret[:8], end=secret[-4:])

    with Server(answer, plan, retry_after=0.01) as server:
        code, out, err = annotate("run" if case == "good" else "questions", spec_of(server, provider))
        assert {call.key for call in server.calls} == {secret}
    assert code == {"in part": 2, "refused": 1}.get(case, 0)
    # Not a record's times and numbers: any four digits may be in them by chance.
    log = out + err + caplog.text + repr([(record.msg, record.args, record.exc_text) for record in caplog.records])
    found = b"\0".join([everything(tmp_path / "out"), *journals]) + log.encode()
    assert b"SQLite" in found
    assert not any(value.encode() in found for value in SECRETS.values())
    if case == "in part":
        assert secret[:8] not in log
        assert secret[-4:] not in log
    if case == "refused":
        assert "could not be processed" in repr(helpers.rows_of(tmp_path / "out" / JOURNAL, "reason"))


def test_keys_are_not_options(reverie):
    """A command line is in the shell's history and in everybody's list of processes."""
    code, out, _ = reverie("annotate", "--help")
    assert code == 0
    assert not re.search(r"--\S*key", out)
    assert "GEMINI_API_KEY" in out
    assert "OPENAI_API_KEY" in out


# Recorded runs, and the embedded world.


def test_replay(annotate, tmp_path):
    """The files of a recorded run again, with other prompts too; what was not recorded is reported."""
    with Memory(answer) as server:
        assert annotate("run", spec_of(server), questions=2, confusing=2)[0] == 0
    recording = tmp_path / "recording.sqlite"
    shutil.copy(tmp_path / "out" / JOURNAL, recording)
    before = recording.read_bytes()
    replay = f"replay:{recording}"
    code, _, err = annotate("run", replay, out=tmp_path / "again", prompts=None, questions=2, confusing=2)
    assert code == 0, err
    for name in (QUESTIONS, RATIONALES, RELEASED):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    for name in (JUDGED, DROPPED):
        one, other = (load(tmp_path / folder, name) for folder in ("out", "again"))
        assert [row | {"judges": None} for row in one] == [row | {"judges": None} for row in other]
        assert [list(row["judges"].values()) for row in one] == [list(row["judges"].values()) for row in other]
    assert recording.read_bytes() == before
    code, _, err = annotate("run", replay, out=tmp_path / "third", questions=3)
    assert code == 1
    assert ["questions", "5", "not in the recording"] in table(err)


def test_scenes(annotate, reverie, tmp_path):
    """From drawn images to a file that can be trained on, with exact truth and no network."""
    assert reverie("scenes", "render", tmp_path / "world", "--count", 4, "--size", 64)[0] == 0
    folder, spec, files = tmp_path / "world" / "images", f"scenes:{tmp_path / 'world'}", []
    for out in (tmp_path / "notes", tmp_path / "again"):
        code, _, err = annotate("run", spec, out=out, images=folder, prompts=None, questions=3)
        assert code == 0, err
        files.append({name: (out / name).read_bytes() for name in (QUESTIONS, RATIONALES, JUDGED, RELEASED)})
    assert files[0] == files[1]
    questions, judged = load(out, QUESTIONS), load(out, JUDGED)
    assert len(questions) == len(judged) == 12
    assert {row["question_type"] for row in questions} <= {"yes/no", "choice", "short", "open"}
    assert {row["gemini_pro_judge"] for row in judged} == {"no"}  # exact rationales never contradict each other
    assert load(out, DROPPED) == []
    assert len(list(read_mixture([MixtureEntry(file=out / RELEASED, images=folder)], ReadLog()))) == 4
    assert len(load(out, RELEASED)) == 24
