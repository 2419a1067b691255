"""Answer files: what is in them, and that kills, full disks and further processes change nothing in them.

Run as a module, it asks a tiny model a made-up benchmark and writes the answers into the folder it is given.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import gc
import itertools
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.images import decode, preprocess
from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.data.processor import Processor
from reverie_jax.data.reflection import WHY
from reverie_jax.errors import UserError
from reverie_jax.eval import predict as prediction
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, BenchmarkError, Question
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine, EngineShape
from reverie_jax.eval.predict import PredictOptions, dump_prompts, predict
from reverie_jax.models import ModelInputs, VisionLanguageModel
from reverie_jax.models.sharding import make_mesh
from tests.train import tiny

SHAPE = EngineShape(sequence_length=192, questions=4, batch_size=2)
LONGEST = 6
YES, NO = 4 + ord("_"), 4 + ord("p")  # what the model likes to say


class Words(tiny.Words):
    """Characters, but " Yes" and " No" are tokens, as in real vocabularies."""

    def __call__(self, text, *, return_offsets_mapping):
        spans = [match.span() for match in re.finditer(r"<image>|</s>| Yes| No|.", text, re.DOTALL)]
        special = {"<image>": 3, "</s>": 2, " Yes": YES, " No": NO}
        ids = [special.get(text[a:b]) or 4 + ord(text[a]) % 190 for a, b in spans]
        return {"input_ids": [1, *ids], "offset_mapping": [(0, 0), *spans]}


@functools.cache
def model():
    """Random weights, large enough that answers differ from one another and some end early."""
    made = VisionLanguageModel(tiny.CONFIG, rngs=nnx.Rngs(3))
    head = made.decoder.head.kernel
    head.set_value(head[...] * 3)
    return made


def processor():
    return Processor.from_config(tiny.CONFIG, Words())


class Made(Benchmark):
    name = "made"
    max_new_tokens = LONGEST
    required_files = "nothing"


class Sure(Made):
    """Yes or no."""

    name = "sure"
    yes_no = True


@functools.cache
def shown(name):
    return tiny.record(sum(map(ord, name))).image


def mixed():
    """Every kind of question, of pictures in no order."""
    asked = [Question(10 + n, f"{n % 5}.png", f"Is it {'abcdefghij'[n]}?", f"{n % 5}.png") for n in range(10)]
    asked.insert(2, Question("t/1", None, "What is one?", "t/1"))
    asked.insert(5, Question("b/1", "2.png", "Why?", "2.png", {}, (("Is it a?", "no"), ("And b?", "yes"))))
    asked.insert(6, Question("s/1", "3.png", "Short: is it a?", "3.png", {}, (), 3))
    asked.insert(9, Question("t/2", None, "What is two, and what is “trois”?", "t/2"))
    asked.append(Question("s/2", "0.png", "Short: is it b?", "0.png", {}, (), 3))
    asked.append(Question(99, "4.png", "Is it e?", "4.png"))  # as 14: answered once, written twice
    return BenchmarkData(asked, shown, {"version": "made"})


def many(pictures):
    """Two questions a picture."""
    asked = [Question(n, f"{n // 2}.png", f"Is it {n}?", f"{n // 2}.png") for n in range(2 * pictures)]
    return BenchmarkData(asked, shown)


@functools.cache
def half():
    return VisionLanguageModel(tiny.CONFIG, rngs=nnx.Rngs(3), dtype=jnp.bfloat16)


@functools.cache
def engine(shape=SHAPE):
    return Engine(model(), processor(), shape)


def run(out, loaded=None, benchmark=None, ask=None, *, engine=None, model="tiny", checksums=None, **more):
    """`predict`, with what is left out as in the undisturbed run."""
    return predict(
        engine or globals()["engine"](),
        benchmark or Made(),
        loaded or mixed(),
        out,
        ask or PredictOptions(Decoding(LONGEST)),
        model=model,
        checksums={"decoder": "abc"} if checksums is None else checksums,
        **more,
    )


def rows(path):
    # Not `splitlines`: an answer may hold other ends of lines than a file has.
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def by_hand(talks, caps, shape=SHAPE):
    """Answers to conversations through the engine alone, each with a picture's copy of its own."""
    found = {}
    for cap in sorted(set(caps)):
        pictures = [
            ImageQuestions(
                f"copy {n}", b"" if name is None else shown(name), [(n, Conversation(turns, (0,) if name else ()))]
            )
            for n, ((name, turns), mine) in enumerate(zip(talks, caps, strict=True))
            if mine == cap
        ]
        found |= engine(shape).answer(pictures, max_new_tokens=cap)
    return [found[n] for n in range(len(talks))]


def turns(*texts):
    return tuple(Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(texts))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed run of the mixed questions."""
    out = tmp_path_factory.mktemp("whole")
    run(out)
    return out


@pytest.fixture
def begun(whole, tmp_path):
    """A folder in which the same run has ended its answers, but not its file."""
    folder = tmp_path / "begun"
    folder.mkdir()
    for name in (".answers.jsonl", prediction.RUN):
        (folder / name).write_bytes((whole / name).read_bytes())
    return folder


@pytest.fixture
def asked(monkeypatch):
    """How many batches went through the model."""
    counted, real = [], Engine.stream

    def count(self, *args, **more):
        for found in real(self, *args, **more):
            counted.append(sorted(found))
            yield found

    monkeypatch.setattr(Engine, "stream", count)
    return counted


def same(one, other):
    return (one / prediction.PREDICTIONS).read_bytes() == (other / prediction.PREDICTIONS).read_bytes()


def test_answers_are_in_the_questions_order_and_in_llavas_form(whole):
    questions, made = mixed().questions, rows(whole / "predictions.jsonl")
    assert [row["question_id"] for row in made] == [question.id for question in questions]
    assert [type(row["question_id"]) for row in made] == [type(question.id) for question in questions]
    assert [row["prompt"] for row in made] == [question.text for question in questions]
    assert [row["image"] for row in made] == [question.image for question in questions]
    assert [row["answer_id"] for row in made] == [str(n) for n in range(len(made))]
    assert all(list(row)[:6] == ["question_id", "image", "prompt", "text", "answer_id", "model_id"] for row in made)
    assert {row["model_id"] for row in made} == {"tiny"}
    assert all(row["metadata"] == {} for row in made)
    assert "“trois”" in (whole / "predictions.jsonl").read_text("utf-8")  # words stay readable
    talks = [
        (q.image, turns(f"{IMAGE}\n{said[0]}" if q.image else said[0], *said[1:]))
        for q in questions
        for said in [[text for pair in q.before for text in pair] + [q.text]]
    ]
    caps = [3 if str(question.id).startswith("s/") else LONGEST for question in questions]
    expected = by_hand(talks, caps)
    assert [row["text"] for row in made] == expected
    assert len(set(expected)) > 8, "the answers are too alike to tell the questions apart"
    assert all(len(text) <= cap for text, cap in zip(expected, caps, strict=True))


def test_a_limit_asks_the_first_questions_only(whole, tmp_path, asked):
    path = run(tmp_path / "few", ask=PredictOptions(Decoding(LONGEST), limit=4))
    assert path == tmp_path / "few" / "predictions.jsonl"
    assert rows(path) == rows(whole / "predictions.jsonl")[:4]
    assert sum(map(len, asked)) == 4
    with pytest.raises(UserError, match=r"questions, content differ"):
        run(tmp_path / "few", ask=PredictOptions(Decoding(LONGEST), limit=5))


def test_nothing_to_ask(tmp_path, asked):
    path = run(tmp_path, BenchmarkData([], shown), Sure())
    assert path.read_bytes() == b""
    assert asked == []


def test_the_longest_answer_of_the_command_line_is_a_limit_only(tmp_path):
    path = run(tmp_path / "two", ask=PredictOptions(Decoding(2)))
    assert all(len(row["text"]) <= 2 for row in rows(path))
    assert json.loads((tmp_path / "two" / "run.json").read_text())["new_tokens"] == 2
    assert json.loads((tmp_path / "two" / "run.json").read_text())["decoding"]["new_tokens"] == 2


@functools.cache
def _scores():
    @jax.jit
    def last(tokens, image_slots, pixels, place):
        length = tokens.shape[1]
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        hidden = model().hidden(ModelInputs(tokens, positions, jnp.full_like(tokens, length), image_slots, pixels))
        return model().decoder.logits(hidden[0, place])

    return last


def test_how_likely_yes_is(tmp_path):
    """Among yes and no as the answer's first token: against a plain forward pass over one conversation."""
    loaded = BenchmarkData([*mixed().questions[:2], *mixed().questions[3:5]], shown)
    made = rows(run(tmp_path, loaded, Sure()))
    found = [row["metadata"]["yes"] for row in made]
    expected = []
    for question in loaded.questions:
        tokens = processor().encoder(Conversation(turns(f"{IMAGE}\n{question.text}")))
        pad = 96 - len(tokens)
        logits = _scores()(
            jnp.asarray([[*tokens.ids.tolist(), *[0] * pad]], jnp.int32),
            jnp.asarray([[*tokens.image_slots.tolist(), *[-1] * pad]], jnp.int32),
            jnp.asarray(preprocess(decode(shown(question.image), "x"), 24)[None, None]),
            len(tokens) - 1,
        )
        yes, no = (float(np.exp(float(logits[token]))) for token in (YES, NO))
        expected.append(yes / (yes + no))
    assert found == pytest.approx(expected, abs=5e-6)
    assert len({round(value, 2) for value in found}) == 4
    assert [row["text"] for row in made] == [row["text"] for row in rows(run(tmp_path / "plain", loaded))]


REFLECTING = EngineShape(sequence_length=512, questions=4, batch_size=2)
ONE_EACH = BenchmarkData(mixed().questions[:5], shown)
"""One question a picture, and one about none: by hand and through the tree the programs are the same."""


@pytest.fixture
def short_rationales(monkeypatch):
    monkeypatch.setattr(prediction, "RATIONALE_TOKENS", 9)


def test_reflecting_is_the_same_conversation_by_hand(tmp_path, short_rationales):
    ask = PredictOptions(Decoding(LONGEST), reflect=True)
    made = rows(run(tmp_path, ONE_EACH, ask=ask, engine=engine(REFLECTING)))
    opened = [(q.image, [f"{IMAGE}\n{q.text}" if q.image else q.text]) for q in ONE_EACH.questions]

    def answers(longest):
        said = [(image, turns(*texts)) for image, texts in opened]
        return by_hand(said, [longest] * len(said), REFLECTING)

    first = answers(LONGEST)
    for (_, texts), text in zip(opened, first, strict=True):
        texts += [text, WHY]
    why = answers(9)
    for (_, texts), text, question in zip(opened, why, ONE_EACH.questions, strict=True):
        texts += [text, f"With this in mind, answer the question once more. {question.text}"]
    last = answers(LONGEST)
    assert [row["first_text"] for row in made] == first
    assert [row["rationale"] for row in made] == why
    assert [row["text"] for row in made] == last
    assert first != last, "nothing was revised: the stages could not be told apart"
    assert max(map(len, why)) > LONGEST


def test_reflecting_goes_on_after_any_stop(tmp_path, short_rationales, asked):
    ask = PredictOptions(Decoding(LONGEST), reflect=True)
    run(tmp_path / "whole", ONE_EACH, ask=ask, engine=engine(REFLECTING))
    batches = list(asked)
    asked.clear()
    kept = stopped(tmp_path / "cut", ONE_EACH, ask=ask, engine=engine(REFLECTING))
    assert len(kept) == 3 + len(batches)
    assert same(tmp_path / "cut", tmp_path / "whole")
    assert asked == batches, "a batch was asked twice, or left out"


def test_there_is_no_reflecting_on_a_turn_of_a_conversation(tmp_path):
    with pytest.raises(UserError, match="made: its questions are conversations"):
        run(tmp_path / "out", ask=PredictOptions(Decoding(LONGEST), reflect=True))
    assert not (tmp_path / "out").exists()


def test_a_models_answer_shows_no_picture(tmp_path, monkeypatch, short_rationales):
    """An answer with the picture's marker in it is words to the next stage."""
    real = Engine._answers

    def says(self, *args):
        return {n: dataclasses.replace(a, text=f"an {IMAGE} of {a.text}") for n, a in real(self, *args).items()}

    monkeypatch.setattr(Engine, "_answers", says)
    ask = PredictOptions(Decoding(LONGEST), reflect=True)
    made = rows(run(tmp_path, ONE_EACH, ask=ask, engine=engine(REFLECTING)))
    assert all(row[name].startswith(f"an {IMAGE}") for row in made for name in ("first_text", "rationale", "text"))


def test_prompts_are_written_whole(tmp_path):
    path = tmp_path / "deep" / "prompts.jsonl"
    dump_prompts(processor().encoder, mixed().questions, path)
    made = rows(path)
    assert [row["question_id"] for row in made] == [question.id for question in mixed().questions]
    by_id = {row["question_id"]: row for row in made}
    assert by_id[10] == {
        "question_id": 10,
        "image": "0.png",
        "text": "Is it a?",
        "prompt": f"USER: {IMAGE}\nIs it a? ASSISTANT:",
    }
    assert by_id["t/1"]["prompt"] == "USER: What is one? ASSISTANT:"
    assert (
        by_id["b/1"]["prompt"]
        == f"USER: {IMAGE}\nIs it a? ASSISTANT: no</s>USER: And b? ASSISTANT: yes</s>USER: Why? ASSISTANT:"
    )


class Stop(Exception):
    pass


def stopped(out, *args, **more):
    """Stops at every report of progress that is new, then runs to the end.

    Returns:
        What was raised, with all that hangs on it, as a debugger would keep it.
    """
    raised, known = [], set()

    def stop(*said):
        if said not in known:
            known.add(said)
            raise Stop

    while True:
        try:
            run(out, *args, on_progress=stop, **more)
            return raised
        except Stop as error:
            raised.append(error)


def test_a_run_that_was_stopped_anywhere_goes_on(whole, tmp_path, asked):
    told = []
    run(tmp_path / "told", on_progress=lambda *said: told.append(said))
    batches = list(asked)
    assert told[0] == ("answers", 0, 16)
    assert told[-1] == ("answers", 16, 16)
    assert [done for _, done, _ in told] == list(itertools.accumulate([0, *map(len, batches)]))
    for after in range(1, len(told)):
        out = tmp_path / str(after)
        asked.clear()
        calls = itertools.count()

        def stop(*said, after=after, calls=calls):
            if next(calls) == after:
                raise Stop

        with pytest.raises(Stop):
            run(out, on_progress=stop)
        assert not (out / "predictions.jsonl").exists()
        run(out)
        assert same(out, whole)
        assert asked == batches, "a batch was asked twice, or left out"
        run(out)  # all is there: nothing is asked
        assert asked == batches
        assert same(out, whole)


def test_stopped_at_every_report(whole, tmp_path, asked):
    kept = stopped(tmp_path / "cut")
    assert len(kept) == 1 + len(asked)
    assert same(tmp_path / "cut", whole)
    gc.collect()
    assert jax.sharding.get_mesh().empty, "a stopped run leaves its mesh behind"


def cut_half(lines):
    return b"".join(lines[:7]) + lines[7][:-9]


BROKEN = {
    "nothing": (lambda lines: b"", 0),
    "half a line": (cut_half, 6),
    "no end of line": (lambda lines: b"".join(lines)[:-1], 11),
    "half a batch": (lambda lines: b"".join(lines[:4]), 2),
    "a broken line in the middle": (lambda lines: b"".join([*lines[:8], b"{\x00\x00\n", *lines[9:]]), 6),
    "a line of another form": (lambda lines: b"".join([*lines[:3], b'{"number": 3}\n', *lines[3:]]), 2),
    "lines in another order": (lambda lines: b"".join([*lines[:2], *lines[2:][::-1]]), 2),
    "not a number": (lambda lines: b"".join([b"[]\n", *lines]), 0),
    "more than there is": (lambda lines: b"".join([*lines, lines[0]]), 16),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_cut(begun, whole, asked, kind):
    """The answers of whole batches before it are kept, the rest is asked again."""
    change, kept = BROKEN[kind]
    path = begun / ".answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 16
    path.write_bytes(change(lines))
    run(begun)
    assert same(begun, whole)
    assert sum(map(len, asked)) == 16 - kept
    assert path.read_bytes() == b"".join(lines)


def other_questions(change):
    questions = list(mixed().questions)
    questions[3] = dataclasses.replace(questions[3], **change)
    return {"loaded": dataclasses.replace(mixed(), questions=questions)}


OTHERS = {
    "identity": (lambda: {"identity": {"decoder": "abd"}}, "identity"),
    "adapter": (lambda: {"identity": {"decoder": "abc", "adapter": "runs/one"}}, "identity"),
    "name": (lambda: {"model": "small"}, "model"),
    "benchmark": (lambda: {"benchmark": Sure()}, "benchmark"),
    "text": (lambda: other_questions({"text": "Is it z?"}), "content"),
    "picture": (lambda: other_questions({"image": "4.png"}), "content"),
    "before": (lambda: other_questions({"before": (("a", "b"),)}), "content"),
    "fewer": (lambda: {"ask": PredictOptions(Decoding(LONGEST), limit=3)}, "questions, content"),
    "version": (lambda: {"loaded": dataclasses.replace(mixed(), protocol={"version": "2"})}, "protocol"),
    "drawn": (lambda: {"ask": PredictOptions(Decoding(LONGEST, temperature=1.0))}, "decoding"),
    "beams": (lambda: {"ask": PredictOptions(Decoding(LONGEST, beams=3))}, "decoding"),
    "contrast": (lambda: {"ask": PredictOptions(Decoding(LONGEST, contrast="image"))}, "decoding"),
    "shorter": (lambda: {"ask": PredictOptions(Decoding(5))}, "decoding, new_tokens"),
    "reflect": (lambda: {"ask": PredictOptions(Decoding(LONGEST), reflect=True), "loaded": ONE_EACH}, "reflect"),
    "template": (lambda: {"engine": Engine(model(), processor().override("plain"), SHAPE)}, "template"),
    "dtype": (lambda: {"engine": Engine(half(), processor(), SHAPE)}, "dtype"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.filterwarnings("ignore:template")
def test_another_runs_folder_is_refused_by_name(begun, asked, kind):
    before = {path.name: path.read_bytes() for path in begun.iterdir()}
    make, named = OTHERS[kind]
    with pytest.raises(UserError) as caught:
        run(begun, **make())
    said = str(caught.value)
    assert said.startswith(f"{begun}: holds answers of another run (")
    assert named in said
    assert "\n" not in said
    assert asked == []
    assert {path.name: path.read_bytes() for path in begun.iterdir()} == before


def test_a_broken_record_is_named(begun):
    for content in ('{"benchmark": ', "[]", ""):
        (begun / "run.json").write_text(content)
        with pytest.raises(UserError, match=r"run\.json: is broken"):
            run(begun)


def test_answers_without_their_record_are_nobodys(begun, tmp_path, asked):
    """`rm OUT/*` takes the record and leaves what begins with a dot: another model must not inherit it."""
    (begun / "run.json").unlink()
    (begun / "predictions.jsonl").write_text("somebody's")
    with pytest.raises(UserError, match=r"holds a predictions\.jsonl that no run here wrote"):
        run(begun)
    assert (begun / "predictions.jsonl").read_text() == "somebody's"
    (begun / "predictions.jsonl").unlink()
    other = Engine(VisionLanguageModel(tiny.CONFIG, rngs=nnx.Rngs(5)), processor(), SHAPE)
    with pytest.raises(Stop):
        run(begun, engine=other, checksums={"decoder": "other"}, on_progress=_raise)
    run(begun, engine=other, checksums={"decoder": "other"})
    run(tmp_path / "fresh", engine=other, checksums={"decoder": "other"})
    assert sum(map(len, asked)) == 32
    assert same(begun, tmp_path / "fresh")


def _raise(*said):
    raise Stop


class _Full:
    """A file on a disk that is full after some writes."""

    def __init__(self, file, writes):
        self._file, self.left = file, writes

    def write(self, data):
        self.left -= 1
        if self.left < 0:
            self._file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


@pytest.mark.parametrize("writes", [0, 1, 3])
@pytest.mark.parametrize("name", [".answers.jsonl", ".predictions.jsonl.part"])
def test_a_write_that_finds_no_room_is_one_line(whole, tmp_path, monkeypatch, name, writes):
    out, real = tmp_path / "out", Path.open

    def opened(self, *args, **more):
        file = real(self, *args, **more)
        return _Full(file, writes) if self.name == name else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); run again") as caught:
            run(out)
    assert str(caught.value).count("\n") == 0
    assert not (out / "predictions.jsonl").exists()
    run(out)
    assert same(out, whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kilobytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs rights that are not here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("room", [0, 4096, 8192])
def test_a_full_disk_is_one_line_and_the_run_goes_on(small_disk, whole, room, asked):
    """With room for nothing, for the record, for some answers: pages are 4 kB."""
    loaded = many(60)
    wanted = run(small_disk.parent / "whole", loaded).read_bytes()
    batches = list(asked)
    asked.clear()
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        for _ in range(64 * 1024 // 4096 - room // 4096):
            file.write(bytes(4096))
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        run(small_disk / "out", loaded)
    assert not (small_disk / "out" / "predictions.jsonl").exists()
    before = len(asked)
    assert bool(before) == (room > 0)
    ballast.unlink()
    assert run(small_disk / "out", loaded).read_bytes() == wanted
    assert len(asked) <= len(batches) + 1  # the batch that found no room is asked again


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run(tmp_path / "file" / "out")


def test_a_picture_that_is_missing_or_broken_is_named(tmp_path):
    def gone(name):
        raise BenchmarkError(f"picture {name}: not there")

    with pytest.raises(BenchmarkError, match=r"picture 0\.png: not there"):
        run(tmp_path / "gone", BenchmarkData(many(2).questions, gone))
    with pytest.raises(UserError, match=r"0\.png"):
        run(tmp_path / "broken", BenchmarkData(many(2).questions, lambda name: b"no picture"))


def test_pictures_are_read_when_their_turn_comes(tmp_path):
    """Each once, and only a few batches ahead of the answers; those that are answered are not read again."""
    loaded, opened = many(60), []
    ahead = []

    def read(name):
        opened.append(name)
        return shown(name)

    def look(stage, done, total):
        ahead.append(len(opened) - done // 2)
        if done >= 80:
            raise Stop

    loaded = dataclasses.replace(loaded, read_image=read)
    with pytest.raises(Stop):
        run(tmp_path, loaded, on_progress=look)
    assert ahead[0] == 0
    assert max(ahead) <= 5 * SHAPE.batch_size
    assert sorted(opened, key=lambda name: int(name[:-4])) == [f"{n}.png" for n in range(len(opened))]
    before = len(opened)
    run(tmp_path, loaded)
    assert opened[before:] == [f"{n}.png" for n in range(40, 60)]


def start(out, *words, processes=1, devices=1):
    """Runs of this module, as processes of their own."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1"
    started = []
    for number in range(processes):
        command = [sys.executable, "-m", "tests.eval.test_predict", str(out), *map(str, words)]
        command += ["--distributed", f"127.0.0.1:{port},{processes},{number}"] if processes > 1 else []
        with out.with_name(f"{out.name}.{number}.log").open("ab") as log:
            environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    return started


def end(children, out, seconds=500):
    """Waits for all; on a failure shows what they said."""
    try:
        codes = [child.wait(timeout=seconds) for child in children]
    finally:
        kill(children)
    said = "\n".join(path.read_text()[-3000:] for path in sorted(out.parent.glob(f"{out.name}.*.log")))
    assert codes == [0] * len(codes), said


def kill(children):
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGKILL)
    for child in children:
        child.wait()


def size(path):
    return path.stat().st_size if path.exists() else 0


def killed(out, kills, seed, *words, processes=1):
    """Kills at random moments after a few more bytes are there, then lets the run end.

    Returns:
        How many bytes of answers each kill left.
    """
    draw, left, path = random.Random(seed), [], out / ".answers.jsonl"
    while len(left) < kills:
        before = size(path)
        children = start(out, "--pause", 0.02, *words, processes=processes)
        until = time.monotonic() + 200
        wanted = before + draw.randint(1, 900)
        while time.monotonic() < until and size(path) < wanted and all(child.poll() is None for child in children):
            time.sleep(0.002)
        time.sleep(draw.random() * 0.06)
        alive = children[0].poll() is None
        kill(children)
        assert alive, out.with_name(f"{out.name}.0.log").read_text()[-3000:]
        left.append(size(path))
    assert not (out / "predictions.jsonl").exists()
    end(start(out, *words, processes=processes), out)
    return left


def test_a_kill_changes_nothing(tmp_path):
    run(tmp_path / "whole", many(PICTURES))
    killed(tmp_path / "cut", 1, 7)
    assert same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_twelve_kills_change_nothing(tmp_path):
    run(tmp_path / "whole", many(PICTURES))
    for seed in range(3):
        killed(tmp_path / f"cut{seed}", 4, seed)
        assert same(tmp_path / f"cut{seed}", tmp_path / "whole")


def alike(one, other):
    """The same answers; chances may differ in the last digit, for rows are computed in other company."""
    mine, theirs = rows(one / "predictions.jsonl"), rows(other / "predictions.jsonl")
    chances = [[row["metadata"].pop("yes", 0.0) for row in some] for some in (mine, theirs)]
    assert chances[0] == pytest.approx(chances[1], abs=1e-5)
    return mine == theirs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixed", "sure", "reflect"])
def test_two_processes_answer_as_one(tmp_path, kind):
    end(start(tmp_path / "one", "--kind", kind), tmp_path / "one")
    end(start(tmp_path / "two", "--kind", kind, "--mesh", 2, processes=2), tmp_path / "two")
    assert alike(tmp_path / "two", tmp_path / "one")
    assert not list(tmp_path.glob("two/.*.part"))


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on(tmp_path):
    end(start(tmp_path / "one"), tmp_path / "one")
    killed(tmp_path / "two", 3, 3, "--mesh", 2, processes=2)
    assert alike(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_what_stops_the_first_process_stops_all(tmp_path):
    """A folder of another run: neither waits for the other."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text('{"benchmark": "another"}')
    children = start(out, "--mesh", 2, processes=2)
    try:
        assert all(child.wait(timeout=90) for child in children)
    finally:
        kill(children)
    said = [(tmp_path / f"out.{number}.log").read_text() for number in range(2)]
    assert "holds answers of another run" in said[0]
    assert "the first process could not go on" in said[1]


PICTURES = 40
BOUND = 150
"""Megabytes that 90,000 further questions may take."""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_questions(tmp_path):
    """100,000 questions about 10,000 pictures against 10,000 about 1,000: a real tiny model, in processes of their own."""
    found = {}
    for count in (10_000, 100_000):
        out = tmp_path / str(count)
        end(start(out, "--kind", "memory", "--count", count), out)
        told = json.loads(out.with_name(f"{count}.0.log").read_text().splitlines()[-1])
        assert told["answers"] == count
        assert told["opened"] == count // 10
        assert told["alive"] <= 4 * 16
        assert told["ahead"] <= 5 * 16
        found[count] = told
    print(found)
    few, many = found.values()
    assert many["peak"] - few["peak"] < BOUND
    assert many["last"] - few["last"] < BOUND  # the peak may be the compiler's


class _Held(bytes):
    """A picture's file that is counted while it is in memory."""

    alive = most = 0

    def __new__(cls, data):
        cls.alive += 1
        cls.most = max(cls.most, cls.alive)
        return super().__new__(cls, data)

    def __del__(self):
        type(self).alive -= 1


def _memory(out, count):
    """Ten questions a picture, over four tiny files; tells the peak of the resident memory in megabytes."""
    encoded = [shown(f"{n}.png") for n in range(4)]
    opened, ahead = itertools.count(), []
    seen, last = 0, 0.0

    def read(name):
        nonlocal seen
        seen = next(opened) + 1
        return _Held(encoded[int(name[:-4]) % 4])

    def look(stage, done, total):
        nonlocal last
        ahead.append(seen - done // 10)
        last = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    asked = [Question(n, f"{n // 10}.png", f"Is it {n:06}?", f"{n // 10}.png") for n in range(count)]
    made = Engine(model(), processor(), EngineShape(sequence_length=512, questions=32, batch_size=16))
    ask = PredictOptions(Decoding(2))
    path = predict(made, Made(), BenchmarkData(asked, read), out, ask, model="tiny", checksums={}, on_progress=look)
    with path.open() as file:
        answers = sum(1 for _ in file)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    told = {"answers": answers, "opened": seen, "alive": _Held.most, "ahead": max(ahead)}
    told |= {"peak": round(peak), "last": round(last)}
    print(json.dumps(told))


def _main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", default="many")
    parser.add_argument("--mesh", type=int, default=1)
    parser.add_argument("--distributed", default="")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--count", type=int, default=0)
    args = parser.parse_args()
    from reverie_jax.train.distributed import join

    join(args.distributed)
    if args.kind == "memory":
        return _memory(args.out, args.count)
    prediction.RATIONALE_TOKENS = 9
    shape = REFLECTING if args.kind == "reflect" else SHAPE
    made = Engine(model(), processor(), shape, mesh=make_mesh(args.mesh))
    loaded = {"many": many(PICTURES), "mixed": mixed(), "sure": many(7), "reflect": ONE_EACH}[args.kind]
    ask = PredictOptions(Decoding(LONGEST), reflect=args.kind == "reflect")
    benchmark = Sure() if args.kind == "sure" else Made()
    return run(args.out, loaded, benchmark, ask, engine=made, on_progress=lambda *said: time.sleep(args.pause))


if __name__ == "__main__":
    _main()
