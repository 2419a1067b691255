"""Small files in the benchmarks' published schemas, answer files as LLaVA writes them, and checks for any score."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reverie_jax.eval.benchmarks import benchmark
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData
from reverie_jax.eval.benchmarks.scoring import Scored
from reverie_jax.eval.statistics import resamples

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def encoded(shade: int = 0, form: str = "PNG") -> bytes:
    """A picture's file, another one for each shade."""
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (shade % 256, 90, 200)).save(file, form)
    return file.getvalue()


def picture(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(shade, "PNG" if path.suffix == ".png" else "JPEG"))
    return path


def shade(data: bytes) -> int:
    """What `encoded` was given, about."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB").getpixel((3, 3))[0]


def dump(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return path


def lines(path: Path, rows: Iterable[Any]) -> Path:
    """JSON lines; a row that is text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in text), "utf-8")
    return path


def said(question_id: Any, prompt: str, text: Any, **more: Any) -> dict[str, Any]:
    """A row as LLaVA's answer files have it."""
    row = {
        "question_id": question_id,
        "prompt": prompt,
        "text": text,
        "answer_id": "kSg7Lq",
        "model_id": "llava-v1.5-7b",
    }
    return {**row, "metadata": {}, **more}


def pope(folder: Path, **splits: Sequence[tuple[str, str, str]]) -> Path:
    """POPE's question files: of each split, (image, question, label)."""
    for split, rows in splits.items():
        made = [
            {"question_id": number, "image": image, "text": text, "label": label}
            for number, (image, text, label) in enumerate(rows, 1)
        ]
        lines(folder / f"coco_pope_{split}.json", made)
        for image, _, _ in rows:
            picture(folder / "val2014" / image)
    return folder


def mme(folder: Path, tasks: Mapping[str, Mapping[str, Sequence[tuple[str, str]]]]) -> Path:
    """MME's folders: of each task and picture, (question, Yes or No). Five tasks keep pictures and texts apart."""
    for task, images in tasks.items():
        apart = task in ("artwork", "celebrity", "landmark", "posters", "scene")
        for number, (image, asked) in enumerate(images.items()):
            picture(folder / task / ("images" if apart else "") / image, number)
            path = folder / task / ("questions_answers_YN" if apart else "") / f"{Path(image).stem}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{question}\t{label}\n" for question, label in asked), "utf-8")
    return folder


MMBENCH = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source")
MMBENCH += ("l2-category", "comment", "split")  # the released order


def mmbench(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = MMBENCH) -> Path:
    """MMBench's table; what a row leaves out is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = ["\t".join(columns)] + ["\t".join(str(row.get(column, "")) for column in columns) for row in rows]
    path.write_text("\n".join(table) + "\n", "utf-8")
    return path


def rotations(
    index: int,
    question: str,
    options: Sequence[str],
    answer: str,
    *,
    hint: str = "",
    category: str = "object_localization",
    level: str = "finegrained_perception (instance-level)",
    split: str = "dev",
    passes: int | None = None,
) -> list[dict[str, Any]]:
    """A question's passes, each a row of its own: options moved up by one, the answer's letter with them."""
    rows = []
    right = "ABCD".index(answer)
    image = base64.b64encode(encoded(index, "JPEG")).decode()
    for turn in range(len(options) if passes is None else passes):
        turned = [*options[turn:], *options[:turn]]
        row = {
            "index": index + turn * 1_000_000,
            "question": question,
            "hint": hint,
            "answer": "ABCD"[(right - turn) % len(options)],
            "category": category,
            "image": image,
            "source": "made",
            "l2-category": level,
            "split": split,
        }
        rows.append(row | dict(zip("ABCD", turned, strict=False)))
    return rows


def problem(
    question: str,
    choices: Sequence[str],
    answer: int,
    *,
    hint: str = "",
    image: str | None = "image.png",
    subject: str = "natural science",
    grade: str = "grade4",
    split: str = "test",
) -> dict[str, Any]:
    """One of ScienceQA's problems."""
    return {
        "question": question,
        "choices": list(choices),
        "answer": answer,
        "hint": hint,
        "image": image,
        "task": "closed choice",
        "grade": grade,
        "subject": subject,
        "topic": "physics",
        "category": "Materials",
        "skill": "Compare",
        "lecture": "",
        "solution": "",
        "split": split,
    }


def scienceqa(folder: Path, problems: Mapping[str, Mapping[str, Any]], **splits: Sequence[str]) -> Path:
    """ScienceQA's files; without splits, all problems are in `test`."""
    dump(folder / "problems.json", problems)
    dump(folder / "pid_splits.json", splits or {"train": [], "val": [], "test": list(problems)})
    for id, row in problems.items():
        if row["image"]:
            picture(folder / "images" / "test" / id / row["image"], int(id))
    return folder


SEED_TYPES = {
    "Scene Understanding": 1,
    "Instance Identity": 2,
    "Instance Attributes": 3,
    "Instance Location": 4,
    "Instance Counting": 5,
    "Spatial Relation": 6,
    "Instance Interaction": 7,
    "Visual Reasoning": 8,
    "Text Recognition": 9,
    "Action Recognition": 10,
    "Action Prediction": 11,
    "Procedure Understanding": 12,
}


def seed_question(
    id: str, kind: int, answer: str, *, text: str = "What is it?", data: str | None = None
) -> dict[str, Any]:
    """One of SEED-Bench's questions: of an image for kinds 1 to 9, of a video from 10."""
    row = {
        "answer": answer,
        "choice_a": "One",
        "choice_b": "Two",
        "choice_c": "Three",
        "choice_d": "Four",
        "data_id": data or (f"{id}_img" if kind < 10 else f"{id}.webm"),
        "data_type": "image" if kind < 10 else "video",
        "question": text,
        "question_id": id,
        "question_type_id": kind,
    }
    return row if kind < 10 else {**row, "segment": [0.0, 4.0]}


def seed(folder: Path, questions: Sequence[Mapping[str, Any]]) -> Path:
    """SEED-Bench's file, with pictures where LLaVA keeps them."""
    dump(folder / "SEED-Bench.json", {"questions": list(questions), "question_type": SEED_TYPES})
    for number, row in enumerate(questions):
        if row["data_type"] == "image":
            path = folder / "SEED-Bench-image" / row["data_id"]
        else:
            path = folder / "SEED-Bench-video-image" / f"{row['question_type_id']}_{row['question_id']}.png"
        picture(path, number)
    return folder


def opened(name: str, data: Path) -> tuple[Benchmark, BenchmarkData]:
    bench = benchmark(name)
    return bench, bench.load(data)


def ids(loaded: BenchmarkData) -> list[str]:
    return [str(question.id) for question in loaded.questions]


def asked(loaded: BenchmarkData, *texts: str) -> Any:
    """The one question whose text holds all of these."""
    found = [question for question in loaded.questions if all(text in question.text for text in texts)]
    assert len(found) == 1, [question.text for question in loaded.questions]
    return found[0]


def headline(scored: Scored) -> float:
    """The first metric."""
    return next(iter(scored.values().values()))


def check(
    bench: Benchmark, loaded: BenchmarkData, answers: Mapping[str, str], rule: str = "official", **more: Any
) -> Scored:
    """Scores, and sees to what holds for any score: shapes, metrics of many sums at once, units that share no group."""
    scored = bench.score(loaded, answers, rule, **more)
    assert [reading.id for reading in scored.parsed_answers] == [question.id for question in loaded.questions]
    assert all(reading.right is None or 0 <= reading.right <= 1 for reading in scored.parsed_answers)
    assert scored.counts.shape[0] == len(scored.clusters) == len(set(scored.clusters))
    assert np.isfinite(scored.counts).all()
    sums = scored.counts.sum(0)
    for name, metric in scored.metrics.items():
        many = metric(np.stack([sums] * 3))
        assert many.shape == (3,), name
        assert many == pytest.approx([float(metric(sums))] * 3), name
        assert metric(np.stack([[sums] * 3] * 2)).shape == (2, 3), name
        assert np.isfinite(metric(np.zeros_like(sums))), name
        assert metric(resamples(len(scored.clusters), draws=5) @ scored.counts).shape == (5,), name
    _units_stand_alone(bench, loaded, answers, rule, scored, **more)
    return scored


def _units_stand_alone(
    bench: Benchmark, loaded: BenchmarkData, answers: Mapping[str, str], rule: str, scored: Scored, **more: Any
) -> None:
    """Some units' counts are what scoring their questions alone gives: no group of questions is in two units."""
    units = list(dict.fromkeys(question.cluster for question in loaded.questions))
    if not set(scored.clusters) <= set(units):
        return  # the rule groups further than questions' units do
    units = [unit for unit in units if unit in set(scored.clusters)]
    for start in (0, 1):
        kept = set(units[start::2])
        if not kept or len(kept) == len(units):
            continue  # nothing is left out, or nothing is left
        part = dataclasses.replace(loaded, questions=[q for q in loaded.questions if q.cluster in kept])
        there = {id: answers[id] for id in ids(part) if id in answers}
        alone = bench.score(part, there, rule, **more)
        sums = np.sum([row for unit, row in zip(scored.clusters, scored.counts, strict=True) if unit in kept], axis=0)
        if list(alone.metrics) == list(scored.metrics):
            for name, value in alone.values().items():
                assert float(scored.metrics[name](sums)) == pytest.approx(value), name


def everyone(loaded: BenchmarkData, answer: str | Callable[[Any], str]) -> dict[str, str]:
    """The same answer to all, or what a function of the question says."""
    say = answer if callable(answer) else lambda question: answer
    return {str(question.id): say(question) for question in loaded.questions}
