"""Read annotation files and records on workers; group conversations by image, in the order of one machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.pvalue import TaggedOutput

from reverie_jax.beam.pipeline import Attempt, write_whole
from reverie_jax.data.mixture import Mixture, MixtureEntry, StoredRecord, StoredRecords
from reverie_jax.data.records import RECORDS_PER_SHARD, RecordSource
from reverie_jax.data.sources import ReadLog
from reverie_jax.data.sources.common import content_digest
from reverie_jax.data.sources.marks import Marks
from reverie_jax.errors import DataError, UserError

Place = tuple[int, ...]
"""Where something is in the order of one machine, as file and number in it."""


class Group(NamedTuple):
    """An image and all conversations about it, or a conversation without an image.

    Attributes:
        place: among the records: (1 without an image, file, number of the first row).
        image: place of the image among all images.
        name: name of the image, or of the row without one.
        key: what identifies the image; empty without one.
        version: see `StoredRecord`.
        picture: file that holds the image, if an annotation file does; else empty.
        texts: (place, conversation as JSON text) of each.
    """

    place: Place
    image: Place
    name: str
    key: str
    version: str
    picture: str
    texts: tuple[tuple[Place, str], ...]


class Groups(StoredRecords):
    """Records of groups.

    Args:
        groups: In their order.
        max_side: Larger images are scaled down.
    """

    def __init__(self, groups: Sequence[Group], max_side: int | None = None):
        super().__init__(max_side)
        self._groups = groups

    def __len__(self) -> int:
        return len(self._groups)

    def stored(self, index: int) -> StoredRecord:
        """Return a record before its image is read; an image of an annotation file is read."""
        group = self._groups[index]
        texts = ",".join(text for _, text in group.texts)
        encoded = Path(group.picture).read_bytes() if group.picture else b""
        return StoredRecord(group.name, "" if group.picture else group.key, encoded, group.version, f"[{texts}]")


def keep_picture(encoded: bytes, work: Path) -> str:
    """Write an image to a file named by its content, so that it does not travel between workers; return the file."""
    file = work / "pictures" / content_digest(encoded)
    if not file.exists():
        write_whole(file, encoded)
    return str(file)


class _Read(beam.DoFn):
    """Reads (number, annotation file): rows by image, `texts` without one, and `logs` of what was noted."""

    def __init__(self, work: Path, seed: int, marks: Marks | None):
        self._work, self._seed, self._marks = work, seed, marks

    def process(self, element: tuple[int, MixtureEntry]) -> Iterator[Any]:
        """Yield (key, (whether it is a row, place, …)) of images and rows; see `_group`."""
        number, entry = element
        log = ReadLog()
        file = (entry.read(log, self._marks), entry.open_folder(), entry.cap, entry.weight)
        try:
            mixture = Mixture([file], seed=self._seed)
        except UserError as error:
            yield TaggedOutput("logs", (number, [], [], str(error)))
            return
        with mixture:
            for id, key, name, encoded, version in mixture.images():
                yield key, (False, (number, id), name, version, keep_picture(encoded, self._work) if encoded else "")
            for id, image, location, text in mixture.examples():
                place = (number, id)
                if image is not None:
                    yield image, (True, place, text)
                else:
                    yield TaggedOutput("texts", Group((1, *place), place, location, "", "", "", ((place, text),)))
        yield TaggedOutput("logs", (number, log.notes, sorted(self._marks.found) if self._marks else [], ""))


def _group(element: tuple[str, Iterable[Any]]) -> Iterator[Group]:
    """Yield the group of an image: its first mention names it, even if a cap drops that row; nothing if all are dropped."""
    key, values = element
    _, image, name, version, picture = min(value for value in values if not value[0])
    texts = tuple(sorted(value[1:] for value in values if value[0]))
    if texts:
        yield Group((0, *texts[0][0]), image, name, key, version, picture, texts)


def read(
    pipeline: beam.Pipeline, entries: Sequence[MixtureEntry], work: Path, *, seed: int = 0, marks: Marks | None = None
) -> tuple[beam.PCollection, beam.PCollection]:
    """Read annotation files, each on one worker.

    Args:
        pipeline: The pipeline.
        entries: The files.
        work: Folder that all workers can write to.
        seed: For caps.
        marks: Of reviewers.

    Returns:
        Groups, and logs for `merge_logs`.

    Raises:
        DataError: A folder of images does not exist.
    """
    for entry in entries:
        entry.open_folder()
    rows = (
        pipeline
        | "Files" >> beam.Create(list(enumerate(entries)))
        | "Spread files" >> beam.Reshuffle()
        | "Read" >> beam.ParDo(_Read(work, seed, marks)).with_outputs("texts", "logs", main="rows")
    )
    images = rows.rows | "By image" >> beam.GroupByKey() | "Group" >> beam.FlatMap(_group)
    return (images, rows.texts) | "All groups" >> beam.Flatten(), rows.logs


def merge_logs(logs: Sequence[Any], log: ReadLog, marks: Marks | None = None) -> None:
    """Take over what `read` noted, in the order of the files.

    Raises:
        DataError: A file, a row or an image's name cannot be used; the message names the first.
    """
    for *_, error in sorted(logs):
        if error:
            raise DataError(error)
    for _, notes, found, _ in sorted(logs):
        log.merge(notes)
        if marks is not None:
            marks.found.update(found)
    if marks is not None:
        log.notes += marks.notes()


def name_records(groups: beam.PCollection) -> beam.PCollection:
    """Return groups with the names of records: the first of two images of one name keeps it, the path names the other."""
    return (
        groups
        | "With name" >> beam.Map(lambda group: (group.name, group))
        | "By name" >> beam.GroupByKey()
        | "Name" >> beam.FlatMap(_name)
    )


def _name(element: tuple[str, Iterable[Group]]) -> Iterator[Group]:
    _, groups = element
    first = min((group.image for group in groups if group.key), default=None)
    for group in groups:
        yield group if not group.key or group.image == first else group._replace(name=group.key)


def number_records(groups: beam.PCollection) -> beam.PCollection:
    """Return (number of its shard, (number, group)) of each record, in the order of one machine.

    No worker sees all places: those of a stretch of rows are counted, so the first number of each stretch is known.
    """
    keyed = groups | "With stretch" >> beam.Map(lambda group: (_stretch(group.place), group))
    starts = (
        keyed
        | "Count stretches" >> beam.combiners.Count.PerKey()
        | "All stretches" >> beam.combiners.ToList()
        | "Starts" >> beam.Map(_starts)
    )
    return (
        keyed | "By stretch" >> beam.GroupByKey() | "Number" >> beam.FlatMap(_number, beam.pvalue.AsSingleton(starts))
    )


def _stretch(place: Place) -> Place:
    return *place[:-1], place[-1] // RECORDS_PER_SHARD


def _starts(counts: Sequence[tuple[Place, int]]) -> dict[Place, int]:
    starts, total = {}, 0
    for stretch, count in sorted(counts):
        starts[stretch] = total
        total += count
    return starts


def _number(element: tuple[Place, Iterable[Group]], starts: dict[Place, int]) -> Iterator[Any]:
    stretch, groups = element
    for number, group in enumerate(sorted(groups), starts[stretch]):
        yield number // RECORDS_PER_SHARD, (number, group)


class _ReadStored(Attempt):
    """Reads records by (place, folder, stop)."""

    def attempt(self, element: Any) -> Iterator[Any]:
        """Yield (place, record) of each."""
        (number, start), folder, stop = element
        source = RecordSource(folder)
        for index in range(start, stop):
            yield (number, index), source[index]


def read_stored(pipeline: beam.Pipeline, folders: Sequence[str]) -> tuple[beam.PCollection, beam.PCollection]:
    """Return (place, record) of each record in some folders, and errors."""
    parts = [
        ((number, start), folder, min(start + RECORDS_PER_SHARD, length))
        for number, folder in enumerate(folders)
        for length in [len(RecordSource(folder))]
        for start in range(0, length, RECORDS_PER_SHARD)
    ]
    spread = pipeline | "Parts" >> beam.Create(parts) | "Spread parts" >> beam.Reshuffle()
    outputs = _ReadStored().apply(spread, "Read records")
    return outputs.found, outputs.errors
