"""Answer files: their content, and that kills, full disks and several processes do not change them.

Run as a module, it answers a small benchmark with a tiny model into the folder it is given.
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
from reverie_jax.eval import predict as predict_module
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, BenchmarkError, Question
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine
from reverie_jax.eval.predict import PREDICTIONS, PredictOptions, dump_prompts, predict
from reverie_jax.eval.schedule import EngineShape
from reverie_jax.models import ModelInputs, VisionLanguageModel
from reverie_jax.models.sharding import make_mesh
from tests.hosted import helpers
from tests.train import tiny

SHAPE = EngineShape(sequence_length=192, questions=4, batch_size=2)
LONGEST = 6
OPTIONS = PredictOptions(Decoding(LONGEST))
REFLECT = PredictOptions(Decoding(LONGEST), reflect=True)
YES, NO = 4 + ord("_"), 4 + ord("p")  # tokens that the model prefers


class Words(tiny.Words):
    """Encodes characters, but " Yes" and " No" are tokens, as in real vocabularies."""

    def __call__(self, text, *, return_offsets_mapping):
        spans = [match.span() for match in re.finditer(r"<image>|</s>| Yes| No|.", text, re.DOTALL)]
        special = {"<image>": 3, "</s>": 2, " Yes": YES, " No": NO}
        ids = [special.get(text[a:b]) or 4 + ord(text[a]) % 190 for a, b in spans]
        return {"input_ids": [1, *ids], "offset_mapping": [(0, 0), *spans]}


@functools.cache
def model(seed=3, dtype=jnp.float32):
    """Return random weights, large enough that answers differ from one another and some end early."""
    model = VisionLanguageModel(tiny.CONFIG, rngs=nnx.Rngs(seed), dtype=dtype)
    head = model.decoder.head.kernel
    head.set_value(head[...] * 3)
    return model


def processor():
    return Processor.from_config(tiny.CONFIG, Words())


class Small(Benchmark):
    name = "small"
    max_new_tokens = LONGEST
    required_files = "nothing"


class YesNo(Small):
    name = "yes-no"
    yes_no = True


@functools.cache
def read_image(name):
    return tiny.record(sum(map(ord, name))).image


def mixed():
    """Return every kind of question, their images in no order."""
    questions = [Question(10 + n, f"{n % 5}.png", f"Is it {'abcdefghij'[n]}?", f"{n % 5}.png") for n in range(10)]
    questions.insert(2, Question("t/1", None, "What is one?", "t/1"))
    questions.insert(5, Question("b/1", "2.png", "Why?", "2.png", {}, (("Is it a?", "no"), ("And b?", "yes"))))
    questions.insert(6, Question("s/1", "3.png", "Short: is it a?", "3.png", {}, (), 3))
    questions.insert(9, Question("t/2", None, "What is two, and what is “trois”?", "t/2"))
    questions.append(Question("s/2", "0.png", "Short: is it b?", "0.png", {}, (), 3))
    questions.append(Question(99, "4.png", "Is it e?", "4.png"))  # as 14: answered once, written twice
    return BenchmarkData(questions, read_image, {"version": "1"})


def many(images):
    """Return two questions for each image."""
    questions = [Question(n, f"{n // 2}.png", f"Is it {n}?", f"{n // 2}.png") for n in range(2 * images)]
    return BenchmarkData(questions, read_image)


ONE_EACH = BenchmarkData(mixed().questions[:5], read_image)
"""One question per image, and one without: alone and in the tree the programs are the same."""


@functools.cache
def engine(shape=SHAPE):
    return Engine(model(), processor(), shape)


def run(out, data=None, benchmark=None, options=OPTIONS, *, engine=None, model="tiny", checksums=None, **more):
    """Call `predict`; what is omitted is as in the uninterrupted run."""
    return predict(
        engine or globals()["engine"](),
        benchmark or Small(),
        data or mixed(),
        out,
        options,
        model=model,
        checksums=checksums or {"decoder": "abc"},
        **more,
    )


def rows(path):
    # Not `splitlines`: an answer may contain other line separators.
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def answered_alone(conversations, limits, shape=SHAPE):
    """Return answers to (image, turns) through the engine alone, each with its own copy of the image."""
    answers = {}
    for limit in sorted(set(limits)):
        images = [
            ImageQuestions(
                f"copy {n}", read_image(name) if name else b"", [(n, Conversation(turns, (0,) if name else ()))]
            )
            for n, ((name, turns), own) in enumerate(zip(conversations, limits, strict=True))
            if own == limit
        ]
        answers |= engine(shape).answer(images, max_new_tokens=limit)
    return [answers[n] for n in range(len(conversations))]


def turns(*texts):
    return tuple(Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(texts))


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The folder of an uninterrupted run of the mixed questions."""
    out = tmp_path_factory.mktemp("complete")
    run(out)
    return out


@pytest.fixture
def unfinished(complete, tmp_path):
    """A folder in which the same run has all its answers, but not its file."""
    folder = tmp_path / "unfinished"
    folder.mkdir()
    for name in (".answers.jsonl", predict_module.RUN):
        (folder / name).write_bytes((complete / name).read_bytes())
    return folder


@pytest.fixture
def batches(monkeypatch):
    """The question numbers of every batch that went through the model."""
    decoded, stream = [], Engine.stream

    def record(self, *args, **more):
        for batch in stream(self, *args, **more):
            decoded.append(sorted(batch))
            yield batch

    monkeypatch.setattr(Engine, "stream", record)
    return decoded


def same(one, other):
    return (one / PREDICTIONS).read_bytes() == (other / PREDICTIONS).read_bytes()


def test_answers_are_in_the_questions_order_and_in_llavas_form(complete):
    questions, written = mixed().questions, rows(complete / PREDICTIONS)
    assert [list(row)[:6] for row in written] == [
        ["question_id", "image", "prompt", "text", "answer_id", "model_id"] for _ in questions
    ]
    assert [(row["question_id"], row["prompt"], row["image"]) for row in written] == [
        (question.id, question.text, question.image) for question in questions
    ]
    assert [row["answer_id"] for row in written] == [str(n) for n in range(len(written))]
    assert all(row["metadata"] == {} and row["model_id"] == "tiny" for row in written)
    assert "“trois”" in (complete / PREDICTIONS).read_text("utf-8")  # not escaped
    texts = [[text for pair in q.history for text in pair] + [q.text] for q in questions]
    conversations = [
        (q.image, turns(f"{IMAGE}\n{own[0]}" if q.image else own[0], *own[1:]))
        for q, own in zip(questions, texts, strict=True)
    ]
    limits = [3 if str(question.id).startswith("s/") else LONGEST for question in questions]
    expected = answered_alone(conversations, limits)
    assert [row["text"] for row in written] == expected
    assert len(set(expected)) > 8, "the answers are too alike to tell the questions apart"
    assert all(len(text) <= limit for text, limit in zip(expected, limits, strict=True))


def test_limits_of_questions_and_of_tokens(complete, tmp_path, batches):
    path = run(tmp_path / "few", options=PredictOptions(Decoding(LONGEST), limit=4))
    assert path == tmp_path / "few" / PREDICTIONS
    assert rows(path) == rows(complete / PREDICTIONS)[:4]
    assert sum(map(len, batches)) == 4
    short = run(tmp_path / "short", ONE_EACH, options=PredictOptions(Decoding(2)))
    assert all(len(row["text"]) <= 2 for row in rows(short))
    record = json.loads((tmp_path / "short" / "run.json").read_text())
    assert record["max_new_tokens"] == record["decoding"]["max_new_tokens"] == 2
    batches.clear()
    assert run(tmp_path / "none", BenchmarkData([], read_image), YesNo()).read_bytes() == b""
    assert batches == []


def test_the_probability_of_yes_is_recorded(tmp_path):
    """Among yes and no as the first token, against a plain forward pass over one conversation."""
    graph, state = nnx.split(model())

    @jax.jit
    def last_logits(tokens, image_slots, pixels, last):
        model, length = nnx.merge(graph, state), tokens.shape[1]
        positions, ends = jnp.arange(length, dtype=jnp.int32)[None], jnp.full((1, length), length, jnp.int32)
        hidden = model.hidden(ModelInputs(tokens, positions, ends, image_slots, pixels))
        return model.decoder.logits(hidden[0, last])

    data = BenchmarkData([*mixed().questions[:2], *mixed().questions[3:5]], read_image)
    written = rows(run(tmp_path, data, YesNo()))
    probabilities = [row["metadata"]["yes"] for row in written]
    expected = []
    for question in data.questions:
        tokens = processor().encoder(Conversation(turns(f"{IMAGE}\n{question.text}")))
        pad = 96 - len(tokens)
        logits = last_logits(
            jnp.asarray([[*tokens.ids.tolist(), *[0] * pad]], jnp.int32),
            jnp.asarray([[*tokens.image_slots.tolist(), *[-1] * pad]], jnp.int32),
            jnp.asarray(preprocess(decode(read_image(question.image), "x"), 24)[None, None]),
            len(tokens) - 1,
        )
        yes, no = (float(np.exp(float(logits[token]))) for token in (YES, NO))
        expected.append(yes / (yes + no))
    assert probabilities == pytest.approx(expected, abs=5e-6)
    assert len({round(value, 2) for value in probabilities}) == 4


REFLECTING = EngineShape(sequence_length=512, questions=4, batch_size=2)


@pytest.fixture
def short_rationales(monkeypatch):
    monkeypatch.setattr(predict_module, "RATIONALE_TOKENS", 9)


def test_reflection_is_one_conversation_and_resumes_after_any_stop(tmp_path, short_rationales, batches):
    written = rows(run(tmp_path / "complete", ONE_EACH, options=REFLECT, engine=engine(REFLECTING)))
    decoded = list(batches)
    conversations = [(q.image, [f"{IMAGE}\n{q.text}" if q.image else q.text]) for q in ONE_EACH.questions]

    def answers(longest):
        opened = [(image, turns(*texts)) for image, texts in conversations]
        return answered_alone(opened, [longest] * len(opened), REFLECTING)

    first = answers(LONGEST)
    for (_, texts), text in zip(conversations, first, strict=True):
        texts += [text, WHY]
    rationales = answers(9)
    for (_, texts), text, question in zip(conversations, rationales, ONE_EACH.questions, strict=True):
        texts += [text, f"With this in mind, answer the question once more. {question.text}"]
    last = answers(LONGEST)
    assert [(row["first_text"], row["rationale"], row["text"]) for row in written] == list(
        zip(first, rationales, last, strict=True)
    )
    assert first != last, "nothing was revised: the stages could not be told apart"
    assert max(map(len, rationales)) > LONGEST
    batches.clear()
    stops = run_with_stops(tmp_path / "cut", ONE_EACH, options=REFLECT, engine=engine(REFLECTING))
    assert len(stops) == 3 + len(decoded)
    assert same(tmp_path / "cut", tmp_path / "complete")
    assert batches == decoded, "a batch was decoded twice, or left out"
    with pytest.raises(UserError, match="small"):  # whose questions are conversations
        run(tmp_path / "out", options=REFLECT)
    assert not (tmp_path / "out").exists()


def test_an_image_marker_in_an_answer_is_text(tmp_path, monkeypatch, short_rationales):
    answers = Engine._answers

    def marked(self, *args):
        return {n: dataclasses.replace(a, text=f"an {IMAGE} of {a.text}") for n, a in answers(self, *args).items()}

    monkeypatch.setattr(Engine, "_answers", marked)
    written = rows(run(tmp_path, ONE_EACH, options=REFLECT, engine=engine(REFLECTING)))
    assert all(row[name].startswith(f"an {IMAGE}") for row in written for name in ("first_text", "rationale", "text"))


def test_complete_prompts_are_written(tmp_path):
    path = tmp_path / "deep" / "prompts.jsonl"
    dump_prompts(processor().encoder, mixed().questions, path)
    written = {row["question_id"]: row for row in rows(path)}
    assert list(written) == [question.id for question in mixed().questions]
    prompt = f"USER: {IMAGE}\nIs it a? ASSISTANT:"
    assert written[10] == {"question_id": 10, "image": "0.png", "text": "Is it a?", "prompt": prompt}
    assert written["t/1"]["prompt"] == "USER: What is one? ASSISTANT:"
    assert written["b/1"]["prompt"] == f"{prompt} no</s>USER: And b? ASSISTANT: yes</s>USER: Why? ASSISTANT:"


class Stop(Exception):
    pass


def stop(*progress):
    raise Stop


def run_with_stops(out, *args, **more):
    """Stop at every progress report that is new, then run to the end; return the exceptions, as a debugger keeps them."""
    raised, seen = [], set()

    def stop_once(*progress):
        if progress not in seen:
            seen.add(progress)
            raise Stop

    while True:
        try:
            run(out, *args, on_progress=stop_once, **more)
            return raised
        except Stop as error:
            raised.append(error)


def test_a_stopped_run_resumes_and_a_finished_one_decodes_nothing(complete, tmp_path, batches):
    progress = []
    run(tmp_path / "whole", on_progress=lambda *report: progress.append(report))
    decoded = list(batches)
    counts = itertools.accumulate([0, *map(len, decoded)])
    assert progress == [("answers", count, 16) for count in counts]
    assert progress[-1] == ("answers", 16, 16)
    batches.clear()
    stops = run_with_stops(tmp_path / "cut")
    assert len(stops) == len(progress)
    assert batches == decoded, "a batch was decoded twice, or left out"
    for _ in range(2):
        assert same(tmp_path / "cut", complete)
        run(tmp_path / "cut")
    assert batches == decoded
    gc.collect()
    assert jax.sharding.get_mesh().empty, "a stopped run leaves its mesh behind"


BROKEN = {
    "nothing": (lambda lines: b"", 0),
    "half a line": (lambda lines: b"".join(lines[:7]) + lines[7][:-9], 6),
    "no end of line": (lambda lines: b"".join(lines)[:-1], 11),
    "half a batch": (lambda lines: b"".join(lines[:4]), 2),
    "a broken line in the middle": (lambda lines: b"".join([*lines[:8], b"{\x00\x00\n", *lines[9:]]), 6),
    "a line of another form": (lambda lines: b"".join([*lines[:3], b'{"number": 3}\n', *lines[3:]]), 2),
    "lines in another order": (lambda lines: b"".join([*lines[:2], *lines[2:][::-1]]), 2),
    "not an object": (lambda lines: b"".join([b"[]\n", *lines]), 0),
    "too many lines": (lambda lines: b"".join([*lines, lines[0]]), 16),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_answer_log_is_cut_behind_its_complete_batches(unfinished, complete, batches, kind):
    change, kept = BROKEN[kind]
    path = unfinished / ".answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 16
    path.write_bytes(change(lines))
    run(unfinished)
    assert same(unfinished, complete)
    assert sum(map(len, batches)) == 16 - kept
    assert path.read_bytes() == b"".join(lines)


def changed_question(**change):
    questions = list(mixed().questions)
    questions[3] = dataclasses.replace(questions[3], **change)
    return {"data": dataclasses.replace(mixed(), questions=questions)}


def options(*args, **more):
    return {"options": PredictOptions(Decoding(*args, **more))}


OTHER_RUNS = {
    "weights": (lambda: {"checksums": {"decoder": "abd"}}, "checksums"),
    "adapter": (lambda: {"checksums": {"decoder": "abc", "adapter": "runs/one"}}, "checksums"),
    "name": (lambda: {"model": "small"}, "model"),
    "benchmark": (lambda: {"benchmark": YesNo()}, "benchmark"),
    "text": (lambda: changed_question(text="Is it z?"), "content"),
    "image": (lambda: changed_question(image="4.png"), "content"),
    "history": (lambda: changed_question(history=(("a", "b"),)), "content"),
    "fewer": (lambda: {"options": PredictOptions(Decoding(LONGEST), limit=3)}, "questions, content"),
    "version": (lambda: {"data": dataclasses.replace(mixed(), protocol={"version": "2"})}, "protocol"),
    "sampled": (lambda: options(LONGEST, temperature=1.0), "decoding"),
    "beams": (lambda: options(LONGEST, beams=3), "decoding"),
    "contrast": (lambda: options(LONGEST, contrast="image"), "decoding"),
    "stop text": (lambda: options(LONGEST, stop="."), "decoding"),
    "penalty": (lambda: options(LONGEST, repetition_penalty=1.1), "decoding"),
    "protocol": (lambda: {"options": PredictOptions(Decoding(LONGEST), protocol="rlhfv-muffin")}, "decoding_protocol"),
    "shorter": (lambda: options(5), "decoding, max_new_tokens"),
    "reflect": (lambda: {"options": REFLECT, "data": ONE_EACH}, "reflect"),
    "template": (lambda: {"engine": Engine(model(), processor().override("plain"), SHAPE)}, "template"),
    "dtype": (lambda: {"engine": Engine(model(dtype=jnp.bfloat16), processor(), SHAPE)}, "dtype"),
}


@pytest.mark.parametrize("kind", OTHER_RUNS)
@pytest.mark.filterwarnings("ignore:template")
def test_the_folder_of_another_run_is_refused(unfinished, batches, kind):
    before = {path.name: path.read_bytes() for path in unfinished.iterdir()}
    build, named = OTHER_RUNS[kind]
    with pytest.raises(UserError, match=rf"{unfinished}.*{named}") as caught:
        run(unfinished, **build())
    assert "\n" not in str(caught.value)
    assert batches == []
    assert {path.name: path.read_bytes() for path in unfinished.iterdir()} == before


def test_a_run_of_an_earlier_release_is_continued(unfinished, complete):
    record = json.loads((unfinished / "run.json").read_text())
    del record["decoding_protocol"], record["decoding"]["top_k"], record["decoding"]["stop"]
    (unfinished / "run.json").write_text(json.dumps(record))
    run(unfinished)
    assert (unfinished / "predictions.jsonl").read_bytes() == (complete / "predictions.jsonl").read_bytes()


def test_a_protocols_length_holds_for_every_benchmark(tmp_path):
    longer = LONGEST + 4
    for protocol, length in [("", LONGEST), ("lrv-minigpt4", longer)]:
        path = run(tmp_path / f"out{protocol}", options=PredictOptions(Decoding(longer), protocol=protocol))
        record = json.loads((path.parent / "run.json").read_text())
        assert (record["max_new_tokens"], record["decoding_protocol"]) == (length, protocol or None)


@pytest.mark.parametrize("content", ['{"benchmark": ', "[]", "", '{"recipe": {}}'])
def test_a_broken_record_is_reported(unfinished, content):
    (unfinished / "run.json").write_text(content)
    with pytest.raises(UserError, match=str(unfinished)):
        run(unfinished)


def test_answers_without_a_record_are_not_used(unfinished, tmp_path, batches):
    """`rm OUT/*` removes the record but not the hidden files: another model must not inherit their answers."""
    (unfinished / "run.json").unlink()
    (unfinished / PREDICTIONS).write_text("somebody's")
    with pytest.raises(UserError, match=str(unfinished)):
        run(unfinished)
    assert (unfinished / PREDICTIONS).read_text() == "somebody's"
    (unfinished / PREDICTIONS).unlink()
    other = {"engine": Engine(model(5), processor(), SHAPE), "checksums": {"decoder": "other"}}
    with pytest.raises(Stop):
        run(unfinished, **other, on_progress=stop)
    run(unfinished, **other)
    run(tmp_path / "fresh", **other)
    assert sum(map(len, batches)) == 32
    assert same(unfinished, tmp_path / "fresh")


class _FullDisk:
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


@pytest.mark.parametrize(
    ("name", "writes"),
    [(".answers.jsonl", 0), (".answers.jsonl", 3), (".predictions.jsonl.part", 0), (".predictions.jsonl.part", 3)],
)
def test_a_full_disk_is_reported_and_the_run_resumes(complete, tmp_path, monkeypatch, name, writes):
    out, real = tmp_path / "out", Path.open

    def limited(self, *args, **more):
        file = real(self, *args, **more)
        return _FullDisk(file, writes) if self.name == name else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", limited)
        with pytest.raises(UserError, match=rf"{out}.*No space left on device") as caught:
            run(out)
    assert "\n" not in str(caught.value)
    assert not (out / PREDICTIONS).exists()
    run(out)
    assert same(out, complete)


def test_an_impossible_folder_and_a_missing_or_broken_image_are_named(tmp_path):
    def missing(name):
        raise BenchmarkError(f"{name}: no such image")

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=str(tmp_path / "file" / "out")):
        run(tmp_path / "file" / "out")
    with pytest.raises(BenchmarkError, match=r"^0\.png"):
        run(tmp_path / "missing", BenchmarkData(many(2).questions, missing))
    with pytest.raises(UserError, match=r"0\.png"):
        run(tmp_path / "broken", BenchmarkData(many(2).questions, lambda name: b"not an image"))


def test_images_are_read_when_they_are_needed(tmp_path):
    """Each once, and only a few batches ahead of the answers; those that are answered are not read again."""
    names, ahead = [], []

    def read(name):
        names.append(name)
        return read_image(name)

    def on_progress(stage, done, total):
        ahead.append(len(names) - done // 2)
        if done >= 80:
            raise Stop

    data = dataclasses.replace(many(60), read_image=read)
    with pytest.raises(Stop):
        run(tmp_path, data, on_progress=on_progress)
    assert ahead[0] == 0
    assert max(ahead) <= 5 * SHAPE.batch_size
    assert sorted(names, key=lambda name: int(name[:-4])) == [f"{n}.png" for n in range(len(names))]
    before = len(names)
    run(tmp_path, data)
    assert names[before:] == [f"{n}.png" for n in range(40, 60)]


def log_of(out, number=0):
    return out.with_name(f"{out.name}.{number}.log")


@contextlib.contextmanager
def processes(out, *words, count=1):
    """Run this module in processes of their own, which are killed at the end of the block."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=1"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    children = []
    for number in range(count):
        command = [sys.executable, "-m", "tests.eval.test_predict", str(out), *map(str, words)]
        command += ["--mesh", str(count), "--distributed", f"127.0.0.1:{port},{count},{number}"] if count > 1 else []
        with log_of(out, number).open("ab") as log:
            children.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait()


def finish(out, *words, count=1):
    """Run to the end; on a failure show the output."""
    with processes(out, *words, count=count) as children:
        codes = [child.wait(timeout=500) for child in children]
    assert codes == [0] * count, "\n".join(log_of(out, number).read_text()[-3000:] for number in range(count))


def alike(one, other):
    """Compare answers; probabilities may differ in the last digit, for sequences are computed in other batches."""
    mine, theirs = rows(one / "predictions.jsonl"), rows(other / "predictions.jsonl")
    chances = [[row["metadata"].pop("yes", 0.0) for row in some] for some in (mine, theirs)]
    assert chances[0] == pytest.approx(chances[1], abs=1e-5)
    return mine == theirs


@pytest.mark.slow
@pytest.mark.parametrize(("count", "seed", "kills"), [(1, 0, 4), (1, 1, 4), (1, 2, 4), (2, 3, 3)])
def test_kills_do_not_change_the_answers(tmp_path, count, seed, kills):
    """At random moments, each after some more bytes of answers; then the run goes on to its end."""
    run(tmp_path / "whole", many(IMAGE_COUNT))
    draw, out = random.Random(seed), tmp_path / "cut"
    path = out / ".answers.jsonl"
    for _ in range(kills):
        wanted = (path.stat().st_size if path.exists() else 0) + draw.randint(1, 900)
        with processes(out, "--pause", 0.02, count=count) as children:
            helpers.until(lambda w=wanted, c=children: any(one.poll() is not None for one in c) or enough(path, w))
            time.sleep(draw.random() * 0.06)
            assert children[0].poll() is None, log_of(out).read_text()[-3000:]
    assert not (out / "predictions.jsonl").exists()
    finish(out, count=count)
    assert alike(out, tmp_path / "whole")


def enough(path, size):
    return path.exists() and path.stat().st_size >= size


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixed", "yes-no", "reflect"])
def test_two_processes_answer_as_one(tmp_path, kind):
    for count in (1, 2):
        finish(tmp_path / str(count), "--kind", kind, count=count)
    assert alike(tmp_path / "2", tmp_path / "1")
    assert not list(tmp_path.glob("2/.*.part"))


@pytest.mark.slow
def test_an_error_of_process_0_ends_all(tmp_path):
    """In the folder of another run, neither process waits for the other."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text('{"benchmark": "another"}')
    with processes(out, count=2) as children:
        assert all(child.wait(timeout=90) for child in children)
    assert str(out) in log_of(out, 0).read_text()
    assert "process 0 failed" in log_of(out, 1).read_text()


IMAGE_COUNT = 40
BOUND = 150
"""Megabytes that 90,000 further questions may take."""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_questions(tmp_path):
    """100,000 questions about 10,000 images against 10,000 about 1,000, in processes of their own."""
    found = {}
    for count in (10_000, 100_000):
        finish(tmp_path / str(count), "--kind", "memory", "--count", count)
        found[count] = json.loads(log_of(tmp_path / str(count)).read_text().splitlines()[-1])
        assert len(rows(tmp_path / str(count) / "predictions.jsonl")) == count
    few, many = found.values()
    assert many["peak"] - few["peak"] < BOUND, found
    assert many["last"] - few["last"] < BOUND, found  # the peak may be the compiler's


def _memory(out, count):
    """Ten questions a picture, over four tiny files; prints the peak and the last resident memory in megabytes."""
    last = 0.0

    def on_progress(stage, done, total):
        nonlocal last
        last = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    questions = [Question(n, f"{n // 10}.png", f"Is it {n:06}?", f"{n // 10}.png") for n in range(count)]
    encoded = [bytes(read_image(f"{n}.png")) for n in range(4)]
    data = BenchmarkData(questions, lambda name: bytes(bytearray(encoded[int(name[:-4]) % 4])))
    big = Engine(model(), processor(), EngineShape(sequence_length=512, questions=32, batch_size=16))
    run(out, data, options=PredictOptions(Decoding(2)), engine=big, on_progress=on_progress)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak": round(peak), "last": round(last)}))


def _main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", default="many")
    parser.add_argument("--distributed", default="")
    for name, default in (("--mesh", 1), ("--pause", 0.0), ("--count", 0)):
        parser.add_argument(name, type=type(default), default=default)
    args = parser.parse_args()
    from reverie_jax.train.distributed import join

    join(args.distributed)
    if args.kind == "memory":
        return _memory(args.out, args.count)
    predict_module.RATIONALE_TOKENS = 9
    shape, options = (REFLECTING, REFLECT) if args.kind == "reflect" else (SHAPE, OPTIONS)
    engine = Engine(model(), processor(), shape, mesh=make_mesh(args.mesh))
    data = {"many": many(IMAGE_COUNT), "mixed": mixed(), "yes-no": many(7), "reflect": ONE_EACH}[args.kind]
    benchmark = YesNo() if args.kind == "yes-no" else Small()
    return run(args.out, data, benchmark, options, engine=engine, on_progress=lambda *report: time.sleep(args.pause))


if __name__ == "__main__":
    _main()
