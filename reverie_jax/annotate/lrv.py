"""LRV-Instruction's generation: positive and misleading instructions from the captions of a picture's parts.

Source: LRV-Instruction (arXiv 2306.14565). Input: Visual Genome's `region_descriptions.json`, or a list of
`{"image_id", "captions": [{"caption", "x", "y", "width", "height"}, …]}`. Output: LRV's records.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reverie_jax.annotate import parsing
from reverie_jax.annotate.prompts import Prompts
from reverie_jax.annotate.schemas import INSTRUCTIONS_SCHEMA
from reverie_jax.data.row_files import read_rows, write_rows
from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import Request, RequestImage, RequestSettings, Stage, digest
from reverie_jax.hosted.providers import parse
from reverie_jax.hosted.request_key import content_of
from reverie_jax.hosted.runner import Limits, Outcome, RequestTask
from reverie_jax.hosted.session import CostEstimate, ProgressCallback, RequestConfig, Session

INSTRUCTIONS = "lrv_instruct_data.json"
NEGATIVE = "negative"
"""LRV's task name of a misleading instruction."""
KINDS: tuple[Stage, ...] = ("lrv_positive", "lrv_nonexistent", "lrv_existent", "lrv_knowledge")
MOST_CAPTIONS = 50
"""As many as LRV's prompts hold."""


@dataclasses.dataclass(frozen=True)
class LrvJob:
    """What to generate.

    Attributes:
        folder: outputs and journal.
        captions: the file.
        model: who writes, as "provider:model".
        counts: instructions a picture: positive, about nonexistent things, about existent things, about false knowledge;
            0 leaves a kind out.
        balance: misleading instructions kept for each positive one, over the whole file; None keeps all.
    """

    folder: Path
    captions: Path
    model: str
    counts: tuple[int, int, int, int] = (20, 6, 6, 0)
    balance: float | None = None
    prompts: Path | None = None
    settings: RequestSettings = dataclasses.field(default_factory=RequestSettings)
    limits: Limits = dataclasses.field(default_factory=Limits)


@dataclasses.dataclass(frozen=True)
class Described:
    """A picture in words: `text` has a line a caption."""

    image_id: Any
    text: str


def read_captions(path: Path) -> list[Described]:
    """The pictures of a file that have captions, in its order; of each picture, the first `MOST_CAPTIONS`.

    Raises:
        UserError: the file is not of either form; the row is named.
    """
    rows = read_rows(path)
    found = []
    for number, row in enumerate(rows):
        try:
            parts = row["regions"] if "regions" in row else row["captions"]
            image_id = row["image_id"] if "image_id" in row else row["id"]
            lines = [_line(part) for part in parts[:MOST_CAPTIONS]]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: row {number} is neither Visual Genome's nor ours ({error!r})") from None
        if lines:
            found.append(Described(image_id, "\n".join(lines)))
    if not found:
        raise UserError(f"{path}: no captions")
    return found


def _line(part: Mapping[str, Any]) -> str:
    caption = " ".join(str(part["phrase"] if "phrase" in part else part["caption"]).split())
    box = [int(part[name]) for name in ("x", "y", "width", "height")]
    return f"{caption} ({box[0]}, {box[1]}, {box[2]}, {box[3]})"


class Generation:
    """A job over its journal. Close it, or use it as a context.

    Raises:
        UserError: the job cannot be right; nothing has been asked.
    """

    def __init__(self, job: LrvJob, environment: Mapping[str, str], on_progress: ProgressCallback | None = None):
        if min(job.counts) < 0 or not any(job.counts):
            raise UserError("--counts: four numbers of instructions, and not all of them 0")
        if job.balance is not None and job.balance < 0:
            raise UserError(f"--balance {job.balance}: must not be negative")
        parse(job.model)
        self.job, self.described = job, read_captions(job.captions)
        self.prompts = Prompts(job.prompts)
        how = RequestConfig(job.settings, job.limits)
        self.session = Session(job.folder, how, environment, on_progress, self.prompts.versions)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()

    def _task(self, kind: Stage, count: int, picture: Described) -> RequestTask:
        each = str(max(2, count // 7))
        fields = {"captions": picture.text, "count": str(count), "each": each}

        def request() -> Request:
            prompt = self.prompts(kind, fields, shown=False)
            return Request(kind, RequestImage(str(picture.image_id), b""), fields, prompt, False, INSTRUCTIONS_SCHEMA)

        content = content_of(kind, digest(picture.text), fields)
        return RequestTask(
            self.session.item(kind, self.job.model, content, False),
            str(picture.image_id),
            request,
            parsing.instructions,
        )

    def _tasks(self) -> list[tuple[Described, Stage, RequestTask]]:
        kinds = [(kind, count) for kind, count in zip(KINDS, self.job.counts, strict=True) if count]
        return [(one, kind, self._task(kind, count, one)) for one in self.described for kind, count in kinds]

    def generate(self) -> Outcome:
        """Asks what is missing, and writes LRV's records: `image_id`, `question`, `answer`, `task`, and the `kind`."""
        tasks = self._tasks()
        outcome = self.session.ask("lrv", (task for _, _, task in tasks), [self.job.model])
        rows = []
        for picture, kind, task in tasks:
            text = self.session.had(task)
            label = None if kind == "lrv_positive" else NEGATIVE
            for made in [] if text is None else parsing.instructions(text, task=label):
                rows.append(
                    {
                        "image_id": picture.image_id,
                        "question": made.instruction,
                        "answer": made.answer,
                        "task": made.task,
                        "kind": kind.removeprefix("lrv_"),
                    }
                )
        write_rows(self.job.folder / INSTRUCTIONS, balanced(rows, self.job.balance))
        return outcome

    def estimate(self) -> list[CostEstimate]:
        """What it would take."""
        tasks = self._tasks()
        kinds = [kind for kind, count in zip(KINDS, self.job.counts, strict=True) if count]
        return [self.session.estimate(kind, [a for _, k, a in tasks if k == kind]) for kind in kinds]


def balanced(rows: list[dict[str, Any]], ratio: float | None, seed: int = 0) -> list[dict[str, Any]]:
    """Leaves out rows at random of the side that has too many: `ratio` misleading ones for each positive one.

    What stays keeps its order; the same rows and seed leave out the same.
    """
    if ratio is None:
        return rows
    sides: dict[bool, list[int]] = {True: [], False: []}
    for place, row in enumerate(rows):
        sides[row["task"] == NEGATIVE].append(place)
    negative, positive = len(sides[True]), len(sides[False])
    keep = {True: min(negative, round(positive * ratio)), False: positive}
    if ratio > 0:
        keep[False] = min(positive, round(negative / ratio))
    draw = random.Random(seed)
    chosen = {place for side, places in sides.items() for place in draw.sample(places, keep[side])}
    return [row for place, row in enumerate(rows) if place in chosen]
