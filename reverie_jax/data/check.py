"""Check an annotation file before training: what it contains, and which rows cannot be used."""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table
from rich.text import Text

from reverie_jax.data import sources, stats
from reverie_jax.data.conversation import IMAGE, ImageRecord, Turn
from reverie_jax.data.images import decode, describe_conversion
from reverie_jax.data.pipeline import TreeBuilder
from reverie_jax.data.preferences import DPOConfig
from reverie_jax.data.processor import Processor
from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources import Example, ImageFolder, ReadLog
from reverie_jax.data.sources.common import content_digest
from reverie_jax.data.sources.llava import EMPTY_ANSWER
from reverie_jax.data.tokenization import UNTAUGHT, is_untaught, untaught_turns
from reverie_jax.errors import DataError, UserError
from reverie_jax.files import atomic_write

_NOTHING = "nothing to train on"
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
        stats: numbers of the usable conversations, as `compute_stats` returns them.
        problems: what is wrong with the others, and with usable ones.
        lengths: tokens of each conversation; empty if they were not counted.
        notes: messages for the user.
    """

    rows: int
    stats: dict[str, Any]
    problems: list[Problem]
    lengths: list[int]
    notes: list[str]

    @property
    def usable(self) -> int:
        """Number of usable conversations."""
        return int(self.stats["conversations"])

    @property
    def has_unusable_rows(self) -> bool:
        """Whether a row cannot be trained on."""
        return any(problem.fatal for problem in self.problems)


def check(
    path: Path, images: Path | None, processor: Processor | None = None, builder: TreeBuilder | None = None
) -> CheckReport:
    """Read every row of an annotation file, and decode every image once.

    Args:
        path: The file.
        images: Folder of its images; images are not checked if it is None.
        processor: Of the checkpoint to be trained: tokens are counted, and conversations are reported that are beyond its
            context or that its tokenization does not supervise.
        builder: Of the training run, with the same processor: rows that do not fit a sequence are reported.

    Raises:
        DataError: The file as a whole cannot be read.
    """
    log = ReadLog()
    checker = Checker(None if images is None else ImageFolder(images), processor)
    problems: list[Problem] = []
    usable = []
    for _, row in itertools.groupby(sources.read(path, log), key=lambda example: example.where):
        examples = list(row)
        found = [checker.check(example) for example in examples]
        if builder is not None and not any(problem.fatal for part in found for problem in part):
            found.append(_check_fit(examples, builder))
        problems += itertools.chain.from_iterable(found)
        if not any(problem.fatal for part in found for problem in part):
            usable += examples
    if builder is not None:
        problems += _check_images(usable, builder, checker.identify)
        unusable = {problem.where for problem in problems if problem.fatal}
        usable = [example for example in usable if example.where not in unusable]
        problems += _check_supervised(path, usable, builder) if usable else []
    numbers = stats.compute_stats((example.image, example.conversation) for example in usable)
    problems = complete(path, problems, numbers, log)
    return CheckReport(sum(1 for _ in Rows(path)), numbers, problems, checker.lengths, log.notes)


def complete(path: Path, problems: Sequence[Problem], numbers: dict[str, Any], log: ReadLog) -> list[Problem]:
    """Return all problems of a file: of rows without a conversation, of conversations, and of a file with nothing to train.

    Args:
        path: The file.
        problems: Of conversations.
        numbers: Of the usable conversations.
        log: What was noted while it was read.
    """
    invalid = [
        Problem(where, "", EMPTY_ANSWER if reason.startswith(EMPTY_ANSWER) else "invalid row", reason)
        for where, reason in log.problems
    ]
    nothing = Problem(str(path), "", _NOTHING, sources.NO_CONVERSATION)
    return [*invalid, *problems] or ([] if numbers["conversations"] else [nothing])


class Checker:
    """Checks conversations one after the other; remembers images and texts.

    Args:
        folder: Folder of images; they are not checked if it is None.
        processor: Of the checkpoint to be trained; tokens are not counted if it is None.
    """

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

        key = self.identify(example)
        if key and key not in self._image_problems:
            self._image_problems[key] = self._check_image(example)
        if (problem := self._image_problems.get(key)) is not None:
            add(problem.kind, problem.reason, problem.fatal)
            if problem.fatal:
                return problems
        turns = example.conversation.turns
        content = (key, *(turn.message for turn in turns))
        if content in self._seen:
            add("duplicate", "same image and texts as an earlier row", False)
        self._seen.add(content)
        if self.processor is not None:
            try:
                tokens = self.processor.encoder(example.conversation)
            except UserError as error:
                return add("not tokenizable", str(error))
            length = len(tokens)
            self.lengths.append(length)
            if length > self.processor.context:
                return add("too long", f"{length} tokens; the model's context is {self.processor.context}")
            if is_untaught(example.conversation, tokens):
                return add("untaught", UNTAUGHT)
            if special := self._special_token(turns):
                add("special token", f"a text holds {special}, which the tokenizer takes for the mark itself", False)
            if missing := untaught_turns(example.conversation, self.processor.encoder):
                add("partly untaught", f"nothing is supervised of turns {', '.join(map(str, missing))}", False)
        return problems

    def identify(self, example: Example) -> str:
        """Return what identifies an image, whatever rows call it; its name if its file is not found."""
        if example.encoded:
            return content_digest(example.encoded)
        try:
            return str(self.folder.find(example.image)) if self.folder and example.image else example.image
        except DataError:
            return example.image

    def _special_token(self, turns: Sequence[Turn]) -> str | None:
        """Return a special token of the tokenizer, as </s>, that a text holds."""
        tokens = getattr(self.processor and self.processor.encoder.tokenizer, "all_special_tokens", ())
        return next(
            (token for token in tokens if token != IMAGE and any(token in turn.message for turn in turns)), None
        )

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


def _record(examples: Sequence[Example]) -> ImageRecord:
    return ImageRecord(examples[0].where, b"", tuple(example.conversation for example in examples))


def _check_fit(examples: Sequence[Example], builder: TreeBuilder) -> list[Problem]:
    """Return the problem of conversations that a training run refuses."""
    try:
        builder.build(_record(examples))
    except UserError as error:
        reason = str(error).removeprefix(f"record {examples[0].where}: ").partition("; raise ")[0]
        return [Problem(examples[0].where, examples[0].image, "too long", reason)]
    return []


def _check_supervised(path: Path, examples: Sequence[Example], builder: TreeBuilder) -> list[Problem]:
    """Return the problem of a file of which the recipe trains nothing, as preference tuning without pairs."""
    rows = itertools.groupby(examples, key=lambda example: example.where)
    if any(len(built.tree.parent) for _, row in rows for built in builder.build(_record(list(row)))):
        return []
    what = "pairs of answers" if isinstance(builder.supervision, DPOConfig) else "what `supervision` selects"
    return [Problem(str(path), "", _NOTHING, f"the recipe trains {what}; no usable row has any")]


def _check_images(
    examples: Sequence[Example], builder: TreeBuilder, identify: Callable[[Example], str]
) -> list[Problem]:
    """Return the problems of rows that fit by themselves, but not with the others about their image."""
    by_image: dict[str, list[Example]] = collections.defaultdict(list)
    for example in examples:
        if example.image:
            by_image[identify(example)].append(example)
    problems = []
    for together in by_image.values():
        while problem := _check_fit(together, builder):
            longest = max(together, key=lambda example: sum(len(turn.message) for turn in example.conversation.turns))
            problems.append(dataclasses.replace(problem[0], where=longest.where))
            together = [example for example in together if example.where != longest.where]
    return problems


def _check_content(example: Example, encoded: bytes, suffix: str) -> Problem | None:
    """Decode an image; its content decides its format, not its name."""
    try:
        decode(encoded, example.image, warn=False)  # they are problems of their own
    except UserError as error:
        kind = "oversized" if "pixels" in str(error) else "unreadable"
        return Problem(example.where, example.image, f"{kind} image", str(error))
    with Image.open(io.BytesIO(encoded)) as image:
        suffixes = _SUFFIXES.get(image.format or "")
        if suffixes is not None and suffix and suffix not in suffixes:
            return Problem(example.where, example.image, "mislabeled image", f"the content is {image.format}", False)
        if (found := describe_conversion(image)) is not None:
            return Problem(example.where, example.image, *found, False)
    return None


def write_problems(report: CheckReport, path: Path) -> None:
    """Write one JSON object for each problem, a line each."""
    lines = [json.dumps(dataclasses.asdict(problem), ensure_ascii=False) for problem in report.problems]
    atomic_write(path, "".join(line + "\n" for line in lines))


def write_usable_rows(report: CheckReport, source: Path, path: Path) -> int:
    """Write an annotation file without its unusable rows, in its own form and otherwise unchanged; return how many remain.

    Raises:
        UserError: `path` is the annotation file itself, or its suffix promises another form; or no row remains.
    """
    if path.exists() and path.samefile(source):
        raise UserError(f"{path}: is the annotation file itself; choose another name")
    if not report.usable:
        raise UserError(f"{source}: none of its {report.rows:,} rows can be used; {path} is not written")
    return Rows(source).write_some(path, {problem.where for problem in report.problems if problem.fatal})


def problems_table(report: CheckReport) -> Table:
    """Return a table of the kinds of problems, with their numbers and an example of each."""
    title = f"{report.rows:,} rows, {report.usable:,} usable conversations"
    table = Table("problem", "conversations", "example", title=title)
    groups: dict[tuple[str, bool], list[Problem]] = collections.defaultdict(list)
    for problem in report.problems:
        groups[problem.kind, problem.fatal].append(problem)
    for (kind, fatal), problems in sorted(groups.items(), key=lambda item: (not item[0][1], -len(item[1]))):
        row = re.sub(r"^.*: (row \d+)$", r"\1", problems[0].where)
        example = Text(f"{row}: {problems[0].reason}")
        table.add_row(kind + ("" if fatal else " (usable)"), f"{len(problems):,}", example)
    return table
