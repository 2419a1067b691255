"""What is in an annotation file, and what is wrong with it, before anything is trained on it."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table
from rich.text import Text

from reverie_jax.data import sources
from reverie_jax.data.annotate.replies import kind_of
from reverie_jax.data.conversation import IMAGE
from reverie_jax.data.files import read_list
from reverie_jax.data.images import decode
from reverie_jax.data.processor import Processor
from reverie_jax.data.sources import Pictures, Reading, Talk
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
    talks: list[Talk]
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
    reading = Reading()
    talks = sources.read(path, reading, answers="as-published")
    offenders = [Offender(where, "", "bad row", why) for where, why in reading.problems]
    folder = None if pictures is None else Pictures(pictures)
    judged: dict[str, Offender | None] = {}
    seen: set[tuple[Any, ...]] = set()
    kept, lengths = [], []
    for talk in talks:
        problem = None
        if talk.image and folder is not None:
            if talk.image not in judged:
                judged[talk.image] = _picture(folder, talk)
            problem = judged[talk.image]
        if problem is not None:
            offenders.append(dataclasses.replace(problem, where=talk.where))
            if problem.fatal:
                continue
        said = (talk.image, *(turn.text for turn in talk.conversation.turns))
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
    rows = len(read_list(path))
    return Found(rows, kept, offenders, lengths, reading.notes)


def _picture(folder: Pictures, talk: Talk) -> Offender | None:
    """What is wrong with a picture; its content says what it is, not its name."""
    try:
        file = folder.find(talk.image)
    except DataError as error:
        kind = "outside" if "leaves" in str(error) else "missing"
        return Offender(talk.where, talk.image, f"{kind} picture", str(error))
    try:
        encoded = file.read_bytes()
        decode(encoded, talk.image)
    except (UserError, OSError) as error:
        kind = "oversized" if "pixels" in str(error) else "unreadable"
        return Offender(talk.where, talk.image, f"{kind} picture", str(error))
    with Image.open(io.BytesIO(encoded)) as image:
        known = _SUFFIXES.get(image.format or "")
    if known is not None and file.suffix.lower() not in known:
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
    fatal = {offender.where for offender in found.offenders if offender.fatal}
    kept = [row for number, row in enumerate(read_list(source)) if f"{source}: row {number}" not in fatal]
    path.write_text(json.dumps(kept, ensure_ascii=False, indent=1), "utf-8")
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


def statistics_of(talks: Sequence[Talk]) -> dict[str, Any]:
    """The numbers of a dataset card.

    Returns:
        images, instructions (questions of a picture with one answer), conversations by source and kind, negatives an
        instruction, shares of question types, words of rationales.
    """
    instructions: dict[tuple[str, str], str] = {}
    kinds, by_source, words = collections.Counter[str](), collections.Counter[str](), []
    for talk in talks:
        said = talk.conversation
        question = said.turns[0].text.replace(IMAGE, "").strip()
        instructions.setdefault((talk.image, question), said.turns[1].text)
        kinds[said.kind or "no rationale"] += 1
        by_source[said.source] += 1
        if said.kind and len(said.turns) > 3:
            words.append(len(said.turns[3].text.split()))
    types = collections.Counter(kind_of(question, answer) for (_, question), answer in instructions.items())
    return {
        "images": len({talk.image for talk in talks if talk.image}),
        "without picture": sum(not talk.image for talk in talks),
        "conversations": len(talks),
        "by source": dict(by_source.most_common()),
        "by kind": dict(kinds.most_common()),
        "instructions": len(instructions),
        "negatives an instruction": round(kinds["negative"] / max(1, len(instructions)), 3),
        "question types": {kind: round(count / max(1, len(instructions)), 3) for kind, count in types.most_common()},
        "words a rationale": _spread(words),
    }


def _spread(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "mean": round(statistics.fmean(ordered), 1),
        "median": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "most": ordered[-1],
    }


def statistics_table(numbers: dict[str, Any], lengths: Sequence[int] = ()) -> Table:
    """The same to look at."""
    table = Table("", "", show_header=False)
    shown = numbers | ({"tokens a conversation": _spread(lengths)} if lengths else {})
    for name, value in shown.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number:,}" for key, number in value.items())
        table.add_row(name, f"{value:,}" if isinstance(value, int | float) else value)
    return table
