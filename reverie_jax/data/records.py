"""Records on disk: one ArrayRecord record per image, in a TFDS dataset, for random access."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from google.protobuf import json_format
from tensorflow_datasets.core import example_serializer

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.errors import DataError, UserError

_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
NAME, VERSION = "reflective_records", "2.0.0"
PREVIOUS = "previous"
"""Name, in the work folder, of the records that new ones replace."""
RECORDS_PER_SHARD = 1024
_END = 1 << 17
"""Bytes at the end of a shard, two of ArrayRecord's blocks, that hold its list of records."""


def _features() -> tfds.features.FeaturesDict:
    """Return the features. A record's conversations are one JSON text: TFDS writes nested sequences with TensorFlow only."""
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "conversations": tfds.features.Text(),
        }
    )


@runtime_checkable
class Records(Protocol):
    """Records by number. Not a `Sequence`: reading one may be slow, or fail."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageRecord: ...


@runtime_checkable
class DigestedRecords(Records, Protocol):
    """Records that can tell, without reading their images, whether some of them have changed."""

    def digest(self, start: int, stop: int) -> str:
        """Return a digest that changes if the records from `start` to `stop` (exclusive) do."""


class ShardWriter:
    """Writes the shard files of one split, from several threads; skips those that an earlier run has finished."""

    def __init__(self, folder: Path, records: Records):
        self.folder, self.records, self.features = folder, records, _features()
        self.serializer = example_serializer.ExampleSerializer(self.features.get_serialized_info())

    def write_shard(self, start: int) -> tuple[Path, int]:
        """Write the shard that begins at a record; return its file and its number of records."""
        stop = min(start + RECORDS_PER_SHARD, len(self.records))
        digest = self.records.digest(start, stop) if isinstance(self.records, DigestedRecords) else uuid.uuid4().hex
        path = self.folder / f"{digest}.shard"
        if not path.exists():
            part = self.folder / f"{uuid.uuid4().hex}.part"  # two threads may write shards of equal content
            try:
                self._write(part, start, stop)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            part.rename(path)
        return path, stop - start

    def _write(self, path: Path, start: int, stop: int) -> None:
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
        try:
            for number in range(start, stop):
                record = self.records[number]
                # A file object passes through as it is: an encoded image is not decoded and encoded again.
                fields = {
                    "id": record.id,
                    "image": io.BytesIO(record.image),
                    "conversations": record.conversations_json(),
                }
                example = self.serializer.get_tf_example(self.features.encode_example(fields))
                writer.write(
                    example.SerializeToString(deterministic=True)
                )  # else processes order its fields differently
        except BaseException:
            with contextlib.suppress(RuntimeError):
                writer.close()
            raise
        writer.close()


@contextlib.contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `folder` to write records in, locked for this run.

    It is deleted at the end. After an error, finished shards are kept for the next run, and previous records are restored.

    Raises:
        DataError: Another run is using it, or it cannot be created.
    """
    hidden = folder.parent / f".{folder.name}.building"
    try:
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{folder}: is a file, not a folder of records")
        hidden.mkdir(parents=True, exist_ok=True)
        lock = (hidden / "lock").open("w")
    except OSError as error:
        raise DataError(f"{hidden}: cannot be created ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that held the lock before may have deleted the folder.
            locked = (hidden / "lock").stat().st_ino == os.fstat(lock.fileno()).st_ino
        except OSError:
            locked = False
        if not locked:
            raise DataError(f"{folder}: another run is building it; wait for it or stop it")
        _restore_previous(folder, hidden)
        try:
            yield hidden
        except BaseException:
            _restore_previous(folder, hidden)
            for path in hidden.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.suffix != ".shard":
                    path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: it has shards
                hidden.rmdir()
            raise
        shutil.rmtree(hidden, ignore_errors=True)


def write_records(
    folder: str | Path,
    splits: Mapping[str, Records],
    *,
    work: Path | None = None,
    jobs: int = 1,
    on_progress: Callable[[int], object] = lambda count: None,
) -> Path:
    """Write a TFDS dataset below `folder`; return the folder to read.

    Previous records are kept until the new ones are complete. After an interruption, the next run uses the finished shards
    in the work folder if the records are `DigestedRecords`.

    Args:
        folder: The output folder.
        splits: Records of each split.
        work: The folder of `work_folder(folder)`, if the caller holds it.
        jobs: Number of threads that read images and write shards.
        on_progress: Gets the number of records of each finished shard.

    Raises:
        DataError: There are no records, one cannot be read, or the folder cannot be written.
    """
    folder = Path(folder)
    if work is None:
        with work_folder(folder) as work:
            return write_records(folder, splits, work=work, jobs=jobs, on_progress=on_progress)
    with writing(folder):
        shards = {split: _write_split(folder, split, splits[split], work, jobs, on_progress) for split in splits}
        return publish_shards(folder, shards, work)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what fails in the block into a `DataError`: records cannot be written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise DataError(f"{folder}: cannot be written ({' '.join(str(error).split())[:300]})") from None


def publish_shards(folder: Path, shards: Mapping[str, Sequence[tuple[Path, int]]], work: Path) -> Path:
    """Make a TFDS dataset below `folder` of finished shards; return the folder to read.

    Args:
        folder: The output folder.
        shards: (file, number of records) of the shards of each split, in order.
        work: The folder of `work_folder(folder)`.
    """
    dataset = work / uuid.uuid4().hex
    dataset.mkdir()
    template = tfds.core.ShardedFileTemplate(
        data_dir=dataset, dataset_name=NAME, filetype_suffix="array_record", template=_TEMPLATE
    )
    infos = []
    for split, files in shards.items():
        names = template.replace(split=split)
        for number, (file, _) in enumerate(files):
            _link_or_copy(file, Path(names.sharded_filepath(shard_index=number, num_shards=len(files))))
        size = sum(file.stat().st_size for file, _ in files)
        lengths = [count for _, count in files]
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=names))
    tfds.folder_dataset.write_metadata(
        data_dir=dataset,
        features=_features(),
        split_infos=infos,
        version=VERSION,
        filename_template=template,
        check_data=False,
        description="Images with all conversations about them, for reflective instruction tuning.",
    )
    target = folder / NAME / VERSION
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(work / PREVIOUS)
    dataset.rename(target)
    return target


def _write_split(
    folder: Path, split: str, records: Records, work: Path, jobs: int, on_progress: Callable[[int], object]
) -> list[tuple[Path, int]]:
    """Write the shards of a split; return (file, number of records) of each."""
    if not len(records):
        raise DataError(f"{folder}: no records for {split}")
    writer, shards = ShardWriter(work, records), []
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(writer.write_shard, start) for start in range(0, len(records), RECORDS_PER_SHARD)]
        try:
            for future in futures:
                shards.append(future.result())
                on_progress(shards[-1][1])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return shards


def _restore_previous(folder: Path, work: Path) -> None:
    """Move previous records back if the new ones did not replace them."""
    target, previous = folder / NAME / VERSION, work / PREVIOUS
    if previous.exists() and not target.exists():
        os.replace(previous, target)


def _link_or_copy(file: Path, name: Path) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


class RecordSource(Sequence[ImageRecord]):
    """The records of one split, by index, for Grain.

    Args:
        folder: Folder of `write_records`, or one below which there is only one dataset.
        split: Name of the split.

    Raises:
        DataError: There are no records, or they cannot be read.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        self.folder, self.split = Path(folder), split
        if not (self.folder / "dataset_info.json").exists():
            paths = sorted(self.folder.glob("**/dataset_info.json")) if self.folder.is_dir() else []
            paths = [path for path in paths if not any(p[0] == "." for p in path.relative_to(self.folder).parts)]
            if len(paths) != 1:
                raise DataError(f"{self.folder}: not a records folder; `reverie data build` writes one")
            self.folder = paths[0].parent
        try:
            builder = tfds.builder_from_directory(os.fspath(self.folder))
            if split not in builder.info.splits:
                raise DataError(f"{self.folder}: unknown split {split!r}; choose from {', '.join(builder.info.splits)}")
            self._files = builder.info.splits[split].filepaths
            self._source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        except UserError:
            raise
        except (OSError, KeyError, AttributeError, ValueError, json_format.ParseError) as error:
            raise DataError(f"{self.folder}: records cannot be read ({' '.join(str(error).split())})") from error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        try:
            row = self._source[index % len(self)]
        except RuntimeError as error:
            raise DataError(f"{self.folder}: record {index} cannot be read ({error})") from None
        try:
            return ImageRecord.from_parts(row["id"].decode(), row["image"], row["conversations"].decode())
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{self.folder}: record {index} was written by another version ({error}); run `reverie data build` again"
            ) from None

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of the names and sizes of the files, and of their ends, where ArrayRecord lists the size of each record.

        No record is read. A record that changes but keeps its size keeps the fingerprint.
        """
        digest = hashlib.sha256()
        for path in map(Path, self._files):
            with path.open("rb") as file:
                size = file.seek(0, io.SEEK_END)
                file.seek(max(0, size - _END))
                digest.update(f"{path.name} {size} ".encode() + file.read())
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        # Grain stores this in a checkpoint and compares it on restore: it must not hold a memory address.
        return f"RecordSource({self.split}, {len(self)} records)"
