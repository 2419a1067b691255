"""What the pages show of samples, and what a reviewer may change."""

from __future__ import annotations

import datetime
import functools
import random
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode

import jinja2
import pydantic

from reverie_jax.data.conversation import IMAGE
from reverie_jax.data.images import thumbnail
from reverie_jax.data.sources.marks import Mark, RowMarks, Text, edit, texts
from reverie_jax.errors import UserError
from reverie_jax.files import well_formed
from reverie_jax.review.agreement import agreements
from reverie_jax.review.index import CHOICES, MARKS, Filters, Index, Sample
from reverie_jax.review.marks_file import MarksFile

PAGE = 10
"""Samples on a page."""
EXPORT_SIDE = 480
"""Longest side of images in an exported page, in pixels."""
LABELS = {
    **dict.fromkeys(("human", "user", "prompt", "question", "instruction"), "question"),
    **dict.fromkeys(("gpt", "assistant", "completion", "answer"), "answer"),
    "correct_answer": "right answer",
    "correct_rationale": "why it is right",
    "confusing_answer": "wrong answer",
    "incorrect_rationale": "why it is wrong",
}
"""What texts are called on the page; others by their key."""
_SIDES = {
    **dict.fromkeys(("correct_answer", "correct_rationale", "chosen"), "right"),
    **dict.fromkeys(("confusing_answer", "incorrect_rationale", "rejected"), "wrong"),
}


class Change(pydantic.BaseModel):
    """What the page sends: fields of a `Mark` that the reviewer changed."""

    model_config = pydantic.ConfigDict(extra="forbid")

    mark: Literal["good", "bad", ""] | None = None
    note: str | None = None
    edits: dict[str, str] = pydantic.Field(default_factory=dict)


class Review:
    """Samples, their marks, and the pages about them.

    Args:
        index: The samples.
        marks: The marks file.
        reviewer: Who marks.

    Raises:
        UserError: The marks file cannot be read.
    """

    def __init__(self, index: Index, marks: MarksFile, reviewer: str):
        self.index, self.marks, self.reviewer = index, marks, well_formed(reviewer)
        self._lock = threading.Lock()
        self.synchronize()

    def synchronize(self) -> None:
        """Take over what others marked meanwhile."""
        with self._lock:
            self.index.set_marks(((digest, self.marks.get(digest)) for digest in self.marks.changed()), self.reviewer)

    def record(self, sample: Sample, change: Change) -> str:
        """Write what a reviewer changed; return the sample as it is shown now.

        Raises:
            UserError: A text does not exist, a usable row would become unusable, or the file cannot be written.
        """
        original = self.index.row(sample)
        known = {text.path: text.text for text in texts(original)}
        if unknown := change.edits.keys() - known:
            raise UserError(f"{sample.where}: has no text {min(unknown)}")
        edits = {path: None if text == known[path] else text for path, text in change.edits.items()}
        problem = self._problem(sample, original, self.marks.get(sample.digest).edits | edits)
        if edits and problem and not sample.problem:
            raise UserError(f"the row could not be used any more: {problem}")
        mark = Mark(
            row=sample.digest,
            reviewer=self.reviewer,
            mark=change.mark,
            note=None if change.note is None else change.note.strip(),
            edits=edits,
            where=well_formed(f"{sample.source}: {sample.where}"),
            image=well_formed(sample.image),
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        self.marks.append(mark)
        self.synchronize()
        return _template("sample.html").render(view=self.view(sample), static=False)

    def _problem(self, sample: Sample, row: Any, edits: Mapping[str, str | None]) -> str:
        """Return why a row cannot be used with these edits, of which None is the original text."""
        known = {text.path for text in texts(row)}
        kept = {path: text for path, text in edits.items() if text is not None and path in known}
        return self.index.examples(sample, edit(row, kept))[1] if kept else sample.problem

    def view(self, sample: Sample, image: str | None = None) -> dict[str, Any]:
        """Return what the template shows of a sample.

        Args:
            sample: The sample.
            image: Address of its image; its route if omitted.
        """
        row, marks = self.index.row(sample), self.marks.get(sample.digest)
        own = marks.marks.get(self.reviewer, "")
        judges = row.get("judges") if isinstance(row, dict) else None
        has_image = sample.embedded or (sample.image and self.index.sources[sample.file].folder is not None)
        return {
            "sample": sample,
            "problem": self._problem(sample, row, marks.edits),
            "image": (f"image/{sample.number}/{sample.digest}" if has_image else "") if image is None else image,
            "texts": [_text_view(text, marks) for text in texts(row)],
            "judges": judges if isinstance(judges, dict) else {},
            "mark": own,
            "note": marks.notes.get(self.reviewer, ""),
            # Not before one's own: reviewers who see each other's marks agree too easily.
            "others": [
                (name, marks.marks.get(name, ""), marks.notes.get(name, ""))
                for name in sorted({*marks.marks, *marks.notes} - {self.reviewer})
                if own
            ],
        }

    def page(self, filters: Filters, *, after: int = 0, before: int | None = None) -> str:
        """Return the page of the samples after a number, or before one."""
        self.synchronize()
        samples = self.index.page(filters, PAGE, after=after, before=before)
        first, last = (samples[0].number, samples[-1].number) if samples else (after + 1, after)
        start, total = self.index.count(filters, first), self.index.count(filters)
        query = {name: value for name, value in filters.model_dump().items() if value not in ("", None)}
        return self._render(
            views=[self.view(sample) for sample in samples],
            filters=filters,
            start=start,
            total=total,
            previous=urlencode(query | {"before": first}) if start else "",
            next=urlencode(query | {"after": last}) if start + len(samples) < total else "",
        )

    def agreement(self) -> str:
        """Return the page of how reviewers agree."""
        self.synchronize()
        return _template("agreement.html").render(agreements=agreements(list(self.marks.rows.values())))

    def export(self, count: int, seed: int) -> str:
        """Return a page by itself: a random sample of at most `count` samples of each verdict, images within it."""
        rng, views = random.Random(seed), []
        for verdict in ("accepted", "dropped", ""):
            numbers = self.index.numbers(verdict)
            for number in sorted(rng.sample(numbers, min(count, len(numbers)))):
                if (sample := self.index.find(number)) is not None:
                    views.append(self.view(sample, self._inline(sample)))
        return self._render(views=views, filters=None, start=0, total=self.index.total, previous="", next="")

    def _inline(self, sample: Sample) -> str:
        try:
            return thumbnail(self.index.image(sample), sample.image, EXPORT_SIDE)
        except UserError:
            return ""

    def _render(self, **values: Any) -> str:
        choices = {name: self.index.choices[name] for name in CHOICES}
        marked = sum(bool(row.marks.get(self.reviewer)) for row in list(self.marks.rows.values()))
        return _template("page.html").render(
            choices=choices, marks=MARKS, all=self.index.total, marked=marked, reviewer=self.reviewer, **values
        )


def _text_view(text: Text, marks: RowMarks) -> dict[str, Any]:
    current = marks.edits.get(text.path, text.text)
    return {
        "path": text.path,
        "label": LABELS.get(text.key, text.key),
        "side": _SIDES.get(text.key, ""),
        "shown": current.replace(IMAGE, "").strip(),
        "text": current,
        "original": text.text if current != text.text else None,
    }


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
