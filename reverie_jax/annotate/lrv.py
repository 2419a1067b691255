"""LRV-Instruction's generation: positive and misleading instructions from the captions of an image's regions.

Source: LRV-Instruction (arXiv 2306.14565). Input: Visual Genome's `region_descriptions.json`, or a list of
`{"image_id", "captions": [{"caption", "x", "y", "width", "height"}, ...]}`. Output: LRV's records.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reverie_jax.annotate import parsing
from reverie_jax.annotate.job import Job, JobRunner
from reverie_jax.annotate.schemas import INSTRUCTIONS_SCHEMA
from reverie_jax.data.row_files import read_rows, write_rows
from reverie_jax.errors import UserError
from reverie_jax.files import well_formed
from reverie_jax.hosted.identity import content_digest
from reverie_jax.hosted.interface import Request, RequestImage, Stage, digest
from reverie_jax.hosted.runner import Outcome, RequestTask
from reverie_jax.hosted.session import CostEstimate, ProgressCallback

INSTRUCTIONS = "lrv_instruct_data.json"
NEGATIVE = "negative"
"""LRV's task name of a misleading instruction."""
KINDS: tuple[Stage, ...] = ("lrv_positive", "lrv_nonexistent", "lrv_existent", "lrv_knowledge")
MAX_CAPTIONS = 50
"""Captions in LRV's prompts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LrvJob(Job):
    """What to generate.

    Attributes:
        captions: File of captions.
        counts: Instructions for each image: positive, and misleading about nonexistent objects, wrong attributes, false
            knowledge; a kind with 0 is left out.
        balance: Misleading instructions kept for each positive one, over the whole file; None keeps all.
    """

    captions: Path
    counts: tuple[int, int, int, int] = (20, 6, 6, 0)
    balance: float | None = None


@dataclasses.dataclass(frozen=True)
class CaptionedImage:
    """An image as text: `text` has one line for each caption."""

    image_id: Any
    text: str


def read_captions(path: Path) -> list[CaptionedImage]:
    """Return the images of a file that have captions, in its order, each with its first `MAX_CAPTIONS` captions.

    Raises:
        UserError: The file has neither form; the row is named.
    """
    images = []
    for number, row in enumerate(read_rows(path)):
        try:
            captions = row["regions"] if "regions" in row else row["captions"]
            image_id = row["image_id"] if "image_id" in row else row["id"]
            image_id = well_formed(image_id)
            lines = [_format_caption(caption) for caption in captions[:MAX_CAPTIONS]]
        except (KeyError, TypeError, ValueError) as error:
            expected = "Visual Genome's regions, or captions with x, y, width, height"
            raise UserError(f"{path}: row {number}: must have {expected} ({error!r})") from None
        if lines:
            images.append(CaptionedImage(image_id, "\n".join(lines)))
    if not images:
        raise UserError(f"{path}: no captions")
    return images


def _format_caption(caption: Mapping[str, Any]) -> str:
    text = " ".join(well_formed(str(caption["phrase"] if "phrase" in caption else caption["caption"])).split())
    x, y, width, height = (int(caption[name]) for name in ("x", "y", "width", "height"))
    return f"{text} ({x}, {y}, {width}, {height})"


class Generation(JobRunner):
    """The run of an LRV job. Close it, or use it as a context manager.

    Raises:
        UserError: The job is invalid; nothing was sent.
    """

    def __init__(self, job: LrvJob, environment: Mapping[str, str], on_progress: ProgressCallback | None = None):
        if min(job.counts) < 0 or not any(job.counts):
            raise UserError("--counts: must be four numbers of at least 0, and not all 0")
        if job.balance is not None and job.balance < 0:
            raise UserError(f"--balance {job.balance}: must be at least 0")
        self.job, self.images = job, read_captions(job.captions)
        super().__init__(job, environment, on_progress)

    def _task(self, kind: Stage, count: int, image: CaptionedImage) -> RequestTask:
        fields = {"captions": image.text, "count": str(count), "each": str(max(2, count // 7))}

        def build() -> Request:
            prompt = self.prompts(kind, fields, send_image=False)
            return Request(kind, RequestImage(str(image.image_id), b""), fields, prompt, False, INSTRUCTIONS_SCHEMA)

        content = content_digest(kind, digest(image.text), fields)
        identity = self.session.identify(kind, self.job.writer, content, False)
        return RequestTask(identity, str(image.image_id), build, parsing.parse_instructions)

    def _tasks(self) -> list[tuple[CaptionedImage, Stage, RequestTask]]:
        kinds = [(kind, count) for kind, count in zip(KINDS, self.job.counts, strict=True) if count]
        return [(image, kind, self._task(kind, count, image)) for image in self.images for kind, count in kinds]

    def generate(self) -> Outcome:
        """Send the missing requests; write LRV's records: `image_id`, `question`, `answer`, `task`, and the `kind`."""
        tasks = self._tasks()
        outcome = self.session.run("lrv", (task for _, _, task in tasks), [self.job.writer])
        rows = []
        for image, kind, task in tasks:
            text = self.session.get_reply(task)
            label = None if kind == "lrv_positive" else NEGATIVE
            for instruction in [] if text is None else parsing.parse_instructions(text, task=label):
                rows.append(
                    {
                        "image_id": image.image_id,
                        "question": instruction.instruction,
                        "answer": instruction.answer,
                        "task": instruction.task,
                        "kind": kind.removeprefix("lrv_"),
                    }
                )
        write_rows(self.job.folder / INSTRUCTIONS, balance_rows(rows, self.job.balance))
        return outcome

    def estimate(self) -> list[CostEstimate]:
        """Estimate the requests, tokens and price of each kind."""
        tasks = self._tasks()
        kinds = [kind for kind, count in zip(KINDS, self.job.counts, strict=True) if count]
        return [self.session.estimate(kind, [task for _, k, task in tasks if k == kind]) for kind in kinds]


def balance_rows(rows: list[dict[str, Any]], ratio: float | None, seed: int = 0) -> list[dict[str, Any]]:
    """Leave out random rows of the side that has too many, to keep `ratio` misleading ones for each positive one.

    The rows that stay keep their order. The result is a function of the rows and the seed.
    """
    if ratio is None:
        return rows
    sides: dict[bool, list[int]] = {True: [], False: []}
    for index, row in enumerate(rows):
        sides[row["task"] == NEGATIVE].append(index)
    negative, positive = len(sides[True]), len(sides[False])
    keep = {True: min(negative, round(positive * ratio)), False: positive}
    if ratio > 0:
        keep[False] = min(positive, round(negative / ratio))
    rng = random.Random(seed)
    chosen = {index for side, indices in sides.items() for index in rng.sample(indices, keep[side])}
    return [row for index, row in enumerate(rows) if index in chosen]
