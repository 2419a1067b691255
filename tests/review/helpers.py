"""Annotation files to review, and their review."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reverie_jax.data.sources.annotated import KEYS, VERDICT
from reverie_jax.data.sources.marks import row_digest
from reverie_jax.review.index import Index
from reverie_jax.review.marks_file import MarksFile
from reverie_jax.review.pages import Review
from tests.data.fakes import llava_row, png, write_json_rows

EVIL = "<script>alert('a & b')</script>\"'<img src=x onerror=alert(1)>"


def judged_row(number: int, verdict: str = "no") -> dict[str, Any]:
    texts = {key: f"{key} {number} {EVIL}" for key in KEYS} | {"correct_answer": "Yes", "image": f"{number % 3}.png"}
    return texts | {VERDICT: verdict, "judges": {"openai:m": verdict}, "question_type": "yes/no"}


class World:
    """Two files, 12 judged rows and 15 of LLaVA's, with three images; one row names a picture that is not there."""

    def __init__(self, folder: Path):
        self.folder, self.marks = folder, folder / "marks.jsonl"
        self.judged = [judged_row(number, "yes" if number % 4 == 3 else "no") for number in range(12)]
        self.rows = [
            llava_row(f"{n % 3}.png", f"<image>\nQ{n}?", f"A{n} " + "word " * n, "why?", "So.") for n in range(14)
        ]
        self.rows.append(llava_row("none.png", "Q?", "A."))
        self.files = [
            write_json_rows(folder / "judged.json", self.judged),
            write_json_rows(folder / "llava.json", self.rows),
        ]
        (folder / "images").mkdir()
        for number in range(3):
            (folder / "images" / f"{number}.png").write_bytes(png((number, 99, 7)))

    @property
    def digests(self) -> list[str]:
        return [row_digest(row) for row in self.judged + self.rows]

    def review(self, reviewer: str = "ana") -> Review:
        index = Index([(file, self.folder / "images") for file in self.files])
        return Review(index, MarksFile(self.marks), reviewer)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.marks.read_text("utf-8").splitlines()]
