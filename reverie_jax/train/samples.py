"""Samples of a run: pictures, questions, answers before and now, in samples.jsonl and samples/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.data.images import decode
from reverie_jax.files import atomic_path, atomic_write
from reverie_jax.train.evaluator import Sample
from reverie_jax.train.trackers import SampleRow

_FILE, _PICTURES = "samples.jsonl", "samples"
_SIDE = 512
"""Longest side of a picture, in pixels."""


def cut_samples(folder: Path, step: int) -> None:
    """Remove the samples of steps after this one; for 0 all of them, also of an ended run that left no checkpoint."""
    rows = [row for row in read_samples(folder) if 0 < step >= row["step"]]
    if (folder / _FILE).exists():
        _write(folder, rows)


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's samples.jsonl; none where there is no such file."""
    path = folder / _FILE
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def write_samples(folder: Path, step: int, samples: Sequence[Sample]) -> list[SampleRow]:
    """Add a step's samples to samples.jsonl, and write their pictures.

    Returns:
        The samples with the answers of the first sampled step.

    Raises:
        UserError: a file cannot be written.
        BrokenImage: an image cannot be decoded.
    """
    rows = [row for row in read_samples(folder) if row["step"] != step]
    first = {(row["id"], row["question"]): str(row["now"]) for row in reversed(rows)}
    logged = []
    for number, sample in enumerate(samples):
        picture, name = None, None
        if sample.image:
            picture, name = decode(sample.image, sample.id, warn=False), f"{_PICTURES}/{number}.png"
            picture.thumbnail((_SIDE, _SIDE))
            with atomic_path(folder / name) as part:
                picture.save(part, format="PNG")
        before = first.get((sample.id, sample.question), sample.answer)
        logged.append(SampleRow(sample.id, picture, sample.question, before, sample.answer))
        rows.append({"step": step, **logged[-1]._asdict(), "picture": name})
    _write(folder, rows)
    return logged


def _write(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    atomic_write(folder / _FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
