"""Check an annotation file before training: what it contains, and which rows cannot be used."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table
from rich.text import Text

from reverie_jax.data import sources
from reverie_jax.data.images import decode
from reverie_jax.data.processor import Processor
from reverie_jax.data.row_files import Rows, write_rows
from reverie_jax.data.sources import Example, ImageFolder, ReadLog
from reverie_jax.data.sources.common import content_digest
from reverie_jax.errors import DataError, UserError
from reverie_jax.files import atomic_write

_SUFFIXES = {
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"},
    "PNG": {".png"},
    "WEBP": {".webp"},
    "GIF": {".gif"},
    "BMP": {".bmp"},
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A conversation that cannot be used, or that should be looked at.

    Attributes:
        where: file and row.
        image: name of its image.
        kind: the kind of problem, in two or three words.
        reason: what is wrong.
        fatal: whether it cannot be trained on.
    """

    where: str
    image: str
    kind: str
    reason: str
    fatal: bool = True


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What an annotation file contains.

    Attributes:
        rows: number of rows; a row may be several conversations, or none.
        examples: the usable conversations.
        problems: what is wrong with the others, and with usable ones.
        lengths: tokens of each conversation; empty if they were not counted.
        notes: messages for the user.
    """

    rows: int
    examples: list[Example]
    problems: list[Problem]
    lengths: list[int]
    notes: list[str]

    @property
    def has_unusable_rows(self) -> bool:
        """Whether a row cannot be trained on."""
        return any(problem.fatal for problem in self.problems)


def check(path: Path, images: Path | None, processor: Processor | None = None) -> CheckReport:
    """Read every row of an annotation file, and decode every image once.

    Args:
        path: The file.
        images: Folder of its images; images are not checked if it is None.
        processor: Of the checkpoint to be trained: tokens are counted, and conversations beyond its context are reported.

    Raises:
        DataError: The file as a whole cannot be read.
    """
    log = ReadLog()
    checker = _Checker(None if images is None else ImageFolder(images), processor)
    problems: list[Problem] = []
    usable = []
    for example in sources.read(path, log):
        example_problems = checker.check(example)
        problems += example_problems
        if not any(problem.fatal for problem in example_problems):
            usable.append(example)
    invalid = [Problem(where, "", "invalid row", reason) for where, reason in log.problems]
    return CheckReport(sum(1 for _ in Rows(path)), usable, invalid + problems, checker.lengths, log.notes)


class _Checker:
    """Checks conversations one after the other; remembers images and texts."""

    def __init__(self, folder: ImageFolder | None, processor: Processor | None):
        self.folder, self.processor = folder, processor
        self.lengths: list[int] = []
        self._image_problems: dict[str, Problem | None] = {}
        self._seen: set[tuple[Any, ...]] = set()

    def check(self, example: Example) -> list[Problem]:
        """Return the problems of a conversation; the first fatal one is the last."""
        problems = []

        def add(kind: str, reason: str, fatal: bool = True) -> list[Problem]:
            problems.append(Problem(example.where, example.image, kind, reason, fatal))
            return problems

        key = content_digest(example.encoded) if example.encoded else example.image
        if key and key not in self._image_problems:
            self._image_problems[key] = self._check_image(example)
        if (problem := self._image_problems.get(key)) is not None:
            add(problem.kind, problem.reason, problem.fatal)
            if problem.fatal:
                return problems
        turns = example.conversation.turns
        content = (key, *(turn.text for turn in turns))
        if content in self._seen:
            add("duplicate", "same image and texts as an earlier row", False)
        self._seen.add(content)
        if any(not turn.text.strip() for turn in turns if turn.role == "assistant"):
            return add("empty answer", "an answer has no text")
        if self.processor is not None:
            try:
                length = len(self.processor.encoder(example.conversation))
            except UserError as error:
                return add("not tokenizable", str(error))
            self.lengths.append(length)
            if length > self.processor.context:
                return add("too long", f"{length} tokens; the model's context is {self.processor.context}")
        return problems

    def _check_image(self, example: Example) -> Problem | None:
        if example.encoded:
            return _check_content(example, example.encoded, "")
        if self.folder is None:
            return None
        try:
            file = self.folder.find(example.image)
        except DataError as error:
            kind = "image outside folder" if "leaves" in str(error) else "missing image"
            return Problem(example.where, example.image, kind, str(error))
        try:
            encoded = file.read_bytes()
        except OSError as error:
            return Problem(example.where, example.image, "unreadable image", str(error))
        return _check_content(example, encoded, file.suffix.lower())


def _check_content(example: Example, encoded: bytes, suffix: str) -> Problem | None:
    """Decode an image; its content decides its format, not its name."""
    try:
        decode(encoded, example.image)
    except UserError as error:
        kind = "oversized" if "pixels" in str(error) else "unreadable"
        return Problem(example.where, example.image, f"{kind} image", str(error))
    with Image.open(io.BytesIO(encoded)) as image:
        suffixes = _SUFFIXES.get(image.format or "")
    if suffixes is not None and suffix and suffix not in suffixes:
        return Problem(example.where, example.image, "mislabeled image", f"the content is {image.format}", False)
    return None


def write_problems(report: CheckReport, path: Path) -> None:
    """Write one JSON object for each problem, a line each."""
    lines = [json.dumps(dataclasses.asdict(problem), ensure_ascii=False) for problem in report.problems]
    atomic_write(path, "".join(line + "\n" for line in lines))


def write_usable_rows(report: CheckReport, source: Path, path: Path) -> int:
    """Write an annotation file without its unusable rows, otherwise unchanged; return how many rows remain.

    Raises:
        UserError: `path` is the annotation file itself, or the file is Parquet.
    """
    if path.exists() and path.samefile(source):
        raise UserError(f"{path}: is the annotation file itself; choose another name")
    if source.suffix == ".parquet":
        raise UserError(f"{source}: Parquet files cannot be rewritten, only JSON files")
    unusable = {problem.where for problem in report.problems if problem.fatal}
    rows = Rows(source)
    kept = [row for number, row in enumerate(rows) if rows.locate(number, row) not in unusable]
    by_id = {row["pid"]: {key: row[key] for key in row if key != "pid"} for row in kept} if rows.is_object else None
    write_rows(path, kept if by_id is None else by_id)
    return len(kept)


def problems_table(report: CheckReport) -> Table:
    """Return a table of the kinds of problems, with their numbers and an example of each."""
    title = f"{report.rows:,} rows, {len(report.examples):,} usable conversations"
    table = Table("problem", "conversations", "example", title=title)
    groups: dict[tuple[str, bool], list[Problem]] = collections.defaultdict(list)
    for problem in report.problems:
        groups[problem.kind, problem.fatal].append(problem)
    for (kind, fatal), problems in sorted(groups.items(), key=lambda item: (not item[0][1], -len(item[1]))):
        row = re.sub(r"^.*: (row \d+)$", r"\1", problems[0].where)
        example = Text(f"{row}: {problems[0].reason}")
        table.add_row(kind + ("" if fatal else " (usable)"), f"{len(problems):,}", example)
    return table
