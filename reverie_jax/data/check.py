"""What is in an annotation file, and what is wrong with it, before anything is trained on it."""

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
from reverie_jax.data.sources import Example, Pictures, ReadLog
from reverie_jax.data.sources.common import content_name
from reverie_jax.errors import DataError, UserError

_SUFFIXES = {
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"},
    "PNG": {".png"},
    "WEBP": {".webp"},
    "GIF": {".gif"},
    "BMP": {".bmp"},
}


@dataclasses.dataclass(frozen=True)
class Offender:
    """A row that cannot be used, or should be looked at.

    Attributes:
        where: file and row.
        fatal: it cannot be trained on.
    """

    where: str
    image: str
    kind: str
    reason: str
    fatal: bool = True


@dataclasses.dataclass(frozen=True)
class Found:
    """What a file holds.

    Attributes:
        rows: in the file; a row may be several conversations, or none.
        lengths: tokens of each usable conversation; empty where no checkpoint was named.
    """

    rows: int
    talks: list[Example]
    offenders: list[Offender]
    lengths: list[int]
    notes: list[str]

    @property
    def broken(self) -> bool:
        return any(offender.fatal for offender in self.offenders)


def check(path: Path, pictures: Path | None, processor: Processor | None = None) -> Found:
    """Reads every row and opens every picture, once.

    Args:
        pictures: the rows' folder; pictures are not looked at where it is None.
        processor: of the checkpoint to be trained: tokens are counted, and conversations beyond its context named.

    Raises:
        DataError: the file cannot be read at all.
    """
    log = ReadLog()
    talks = sources.read(path, log)
    offenders: list[Offender] = []
    folder = None if pictures is None else Pictures(pictures)
    judged: dict[str, Offender | None] = {}
    seen: set[tuple[Any, ...]] = set()
    kept, lengths = [], []
    for talk in talks:
        key = content_name(talk.encoded) if talk.encoded else talk.image
        if key and key not in judged:
            if talk.encoded:
                judged[key] = _content(talk, talk.encoded, "")
            elif folder is not None:
                judged[key] = _picture(folder, talk)
        problem = judged.get(key)
        if problem is not None:
            offenders.append(dataclasses.replace(problem, where=talk.where))
            if problem.fatal:
                continue
        said = (key, *(turn.text for turn in talk.conversation.turns))
        if said in seen:
            offenders.append(
                Offender(talk.where, talk.image, "repeated", "the same words about the same picture", False)
            )
        seen.add(said)
        if any(not turn.text.strip() for turn in talk.conversation.turns if turn.role == "assistant"):
            offenders.append(
                Offender(talk.where, talk.image, "empty answer", "an answer without words teaches nothing")
            )
            continue
        if processor is not None:
            try:
                length = len(processor.encoder(talk.conversation))
            except UserError as error:
                offenders.append(Offender(talk.where, talk.image, "no tokens", str(error)))
                continue
            lengths.append(length)
            if length > processor.context:
                why = f"{length} tokens; the model is exact up to {processor.context}"
                offenders.append(Offender(talk.where, talk.image, "too long", why))
                continue
        kept.append(talk)
    offenders = [Offender(where, "", "bad row", why) for where, why in log.problems] + offenders
    return Found(sum(1 for _ in Rows(path)), kept, offenders, lengths, log.notes)


def _picture(folder: Pictures, talk: Example) -> Offender | None:
    """What is wrong with a picture; its content says what it is, not its name."""
    try:
        file = folder.find(talk.image)
    except DataError as error:
        kind = "outside" if "leaves" in str(error) else "missing"
        return Offender(talk.where, talk.image, f"{kind} picture", str(error))
    try:
        encoded = file.read_bytes()
    except OSError as error:
        return Offender(talk.where, talk.image, "unreadable picture", str(error))
    return _content(talk, encoded, file.suffix.lower())


def _content(talk: Example, encoded: bytes, suffix: str) -> Offender | None:
    try:
        decode(encoded, talk.image)
    except UserError as error:
        kind = "oversized" if "pixels" in str(error) else "unreadable"
        return Offender(talk.where, talk.image, f"{kind} picture", str(error))
    with Image.open(io.BytesIO(encoded)) as image:
        known = _SUFFIXES.get(image.format or "")
    if known is not None and suffix and suffix not in known:
        return Offender(talk.where, talk.image, "mislabelled picture", f"it is a {image.format}", False)
    return None


def write_offenders(found: Found, path: Path) -> None:
    """One JSON object a line."""
    lines = [json.dumps(dataclasses.asdict(offender), ensure_ascii=False) for offender in found.offenders]
    path.write_text("".join(line + "\n" for line in lines), "utf-8")


def write_clean(found: Found, source: Path, path: Path) -> int:
    """The file without the rows that cannot be used, otherwise as it was; returns how many rows stay.

    Raises:
        UserError: it would overwrite the source.
    """
    if path.exists() and path.samefile(source):
        raise UserError(f"{path}: is the file itself; give another name")
    if source.suffix == ".parquet":
        raise UserError(f"{source}: Parquet cannot be written anew; only JSON files can")
    fatal = {offender.where for offender in found.offenders if offender.fatal}
    rows = Rows(source)
    kept = [row for number, row in enumerate(rows) if rows.locate(number, row) not in fatal]
    by_id = (
        {row["pid"]: {key: value for key, value in row.items() if key != "pid"} for row in kept}
        if rows.is_object
        else None
    )
    write_rows(path, kept if by_id is None else by_id)
    return len(kept)


def problems_table(found: Found) -> Table:
    """Kinds of offenders with their numbers and an example each."""
    table = Table(
        "problem", "conversations", "example", title=f"{found.rows:,} rows, {len(found.talks):,} usable conversations"
    )
    groups: dict[tuple[str, bool], list[Offender]] = collections.defaultdict(list)
    for offender in found.offenders:
        groups[offender.kind, offender.fatal].append(offender)
    for (kind, fatal), those in sorted(groups.items(), key=lambda item: (not item[0][1], -len(item[1]))):
        example = those[0]
        place = re.sub(r"^.*: (row \d+)$", r"\1", example.where)
        table.add_row(kind + ("" if fatal else " (usable)"), f"{len(those):,}", Text(f"{place}: {example.reason}"))
    return table
