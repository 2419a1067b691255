"""Chat in a terminal: lines in, lines out."""

from __future__ import annotations

import io
import itertools
import json
import sys

import pytest
from rich.console import Console

from reverie_jax.chat.feedback import FeedbackFolder
from reverie_jax.chat.session import ChatSession
from reverie_jax.chat.terminal import Terminal
from reverie_jax.data.mixture import MixtureEntry, read_mixture
from reverie_jax.data.preferences import find_pairs
from reverie_jax.data.reflection import WHY, WHY_WRONG
from reverie_jax.data.sources import ReadLog
from tests.chat.test_session import IMAGE_FILE, expected


@pytest.fixture
def terminal(models, options, tmp_path, monkeypatch):
    """Return a function that types lines, and returns what is printed behind each of them."""
    picture = tmp_path / "scene.png"
    picture.write_bytes(IMAGE_FILE)

    def type_lines(*lines, count=1, **console):
        printed = io.StringIO()
        screen = Console(file=printed, highlight=False, soft_wrap=True, **console)
        typed, parts = iter(lines), []

        def read(prompt):
            parts.append(printed.getvalue())
            printed.seek(printed.truncate(0))
            line = next(typed, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr(screen, "input", read)
        Terminal(models[:count], options, FeedbackFolder(tmp_path / "feedback"), picture, screen).run()
        return [part.rstrip("\n") for part in parts[1:]]

    return type_lines


def test_questions_are_answered_and_explained(terminal, models):
    asked = "Is there a cup in the image?"
    answer, why, why_not, again, both, fresh = terminal(
        *(asked, "/explain", "/why-not A cat", "/retry", f"/reflect {asked}", "/new"), ""
    )[:6]
    model = models[0]
    assert answer == expected(model, [asked])
    assert why == expected(model, [asked, answer, WHY])
    assert why_not == again == expected(model, [asked, answer, WHY_WRONG.format(answer="A cat")])
    said_before = [asked, answer, WHY, why, WHY_WRONG.format(answer="A cat"), why_not, asked]
    second = expected(model, said_before)
    assert both == f"{second}\n{expected(model, [*said_before, second, WHY])}"
    assert fresh == ""


def test_options_are_set(terminal, models):
    cut, options, whole = terminal(
        "/set max_new_tokens=3 temperature=0", "/set max_new_tokens=24", "Describe the image."
    )
    assert "max_new_tokens=3, temperature=0.0" in cut
    assert "max_new_tokens=24" in options
    assert whole == expected(models[0], ["Describe the image."])
    assert terminal("/set max_new_tokens=3", "Describe the image.")[1].endswith(" […]")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/image nothing.png", "nothing.png"),
        ("/image {broken}", "broken.png"),
        ("/image", "usage: /image FILE"),
        ("/explain now", "usage: /explain"),
        ("/explain", "no answer yet"),
        ("/unheard of", "/unheard"),
        ("/set speed=3", "speed"),
        ("/set temperature=warm", "temperature=warm"),
        ("/set top_p=2", "top_p"),
        ("/better 3", "must be 1 or 2"),
        ("/correct No.", "no answer yet"),
        ("[bold]<image>[/bold]", "<image>"),
    ],
)
def test_mistakes_are_said_and_the_chat_goes_on(terminal, models, tmp_path, line, named):
    broken = tmp_path / "broken.png"
    broken.write_bytes(IMAGE_FILE[:60])
    error, answer = terminal(line.format(broken=broken), "Is there a cup in the image?")
    assert named in error
    assert answer == expected(models[0], ["Is there a cup in the image?"])


def test_two_models_side_by_side_with_the_difference_marked(terminal, models, options):
    answers, kept, corrected = terminal(
        "Describe the image.", "/better 2", "/correct 1 A cup.", count=2, force_terminal=True, color_system="standard"
    )
    expected_answers = [expected(model, ["Describe the image."]) for model in models]
    first, second = "".join(part.partition("m")[2] for part in ("m" + answers).split("\x1b[")).split("\n")
    assert [first, second] == [f"1 base: {expected_answers[0]}", f"2 other: {expected_answers[1]}"]
    assert "\x1b[7m" in answers
    assert "pairs.jsonl" in kept
    assert "pairs.jsonl" in corrected


def test_feedback_is_read_back(terminal, models, tmp_path):
    terminal("Describe the image.", "/better 2", "/correct 1 A cup.", "/quit", "never asked", count=2)
    with read_mixture([MixtureEntry(file=tmp_path / "feedback" / "pairs.jsonl")], ReadLog()) as mixture:
        (record,) = mixture
    first, second = (expected(model, ["Describe the image."]) for model in models)
    pairs = find_pairs("a", record.conversations)
    assert {tuple(side.turns[1].text for side in pair) for pair in pairs} == {(second, first), ("A cup.", first)}


def test_ctrl_c_stops_an_answer_and_not_the_chat(terminal, models, monkeypatch):
    grow = ChatSession._grow
    calls = itertools.count()

    def interrupted(self, number, delta):
        grow(self, number, delta)
        if next(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ChatSession, "_grow", interrupted)
    stopped, again = terminal("Describe the image.", "/retry")
    whole = expected(models[0], ["Describe the image."])
    assert stopped.endswith(" (stopped)")
    assert whole.startswith(stopped.removesuffix(" (stopped)"))
    assert again == whole


def test_the_command_in_a_pipe(reverie, monkeypatch, tmp_path, models):
    picture = tmp_path / "a.png"
    picture.write_bytes(IMAGE_FILE)
    lines = ["/help", "Is there a cup in the image?", "/correct Yes, a red one."]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    words = ["--terminal", "--image", picture, "--max-new-tokens", "24", "--feedback", tmp_path, "--dtype", "float32"]
    code, out, err = reverie("chat", "scenes-base", *words)
    assert (code, err) == (0, "")
    assert "/why-not ANSWER" in out
    answer = expected(models[0], [lines[1]])
    assert f"\n> {answer}\n" in out
    (row,) = map(json.loads, (tmp_path / "pairs.jsonl").read_text("utf-8").splitlines())
    assert (row["chosen"], row["rejected"]) == ("Yes, a red one.", answer)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--compare-adapter", "x"], "--compare-with"),
        (["--image", "a.png"], "--terminal"),
        (["--port", "70000"], "--port"),
        (["--host", "0.0.0.0"], "REVERIE_API_KEY"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--mesh", "data=1000", "--terminal"], "--mesh"),
        (["--template", "none"], "--template"),
        (["--terminal", "--image", "nothing.png"], "nothing.png"),
    ],
)
def test_options_are_checked(reverie, monkeypatch, words, named):
    monkeypatch.delenv("REVERIE_API_KEY", raising=False)
    code, out, err = reverie("chat", "scenes-base", *words)
    assert (code, out) == (2, "")
    assert named in err
    assert err.count("\n") == 1


def test_without_the_extra_it_says_what_to_install(reverie, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "reverie_jax.chat.page", raising=False)
    code, _, err = reverie("chat", "scenes-base")
    assert code == 2
    assert "[web]" in err
    assert "--terminal" in err
