"""Records on disk: one ArrayRecord record per image, in shards that TFDS knows, read at random."""

from __future__ import annotations

import contextlib
import fcntl
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

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.errors import DataError, UserError

_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
NAME, VERSION = "reflective_records", "1.0.0"
ASIDE = "old"
SHARD = 1024
"""Records of a shard file."""


def _features() -> tfds.features.FeaturesDict:
    """A record's conversations are one JSON text: TFDS writes nested sequences with TensorFlow only."""
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "conversations": tfds.features.Text(),
        }
    )


@runtime_checkable
class Records(Protocol):
    """Records by number. Not a `Sequence`: reading one may take a while, or fail."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageRecord: ...


@runtime_checkable
class Digested(Records, Protocol):
    """Records that know, without reading their pictures, whether a part of them is still the same."""

    def digest(self, start: int, stop: int) -> str:
        """Changes when anything about the records from `start` up to `stop` does."""


class _Shards:
    """The shard files of one split, made side by side; one that an earlier run has finished is not made again."""

    def __init__(self, folder: Path, records: Records):
        self.folder, self.records, self.features = folder, records, _features()

    def make(self, start: int) -> tuple[Path, int]:
        """(file, records in it) of the shard that begins at a record."""
        stop = min(start + SHARD, len(self.records))
        known = self.records.digest(start, stop) if isinstance(self.records, Digested) else uuid.uuid4().hex
        path = self.folder / f"{known}.shard"
        if not path.exists():
            part = self.folder / f"{uuid.uuid4().hex}.part"
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
                # A file object passes through as it is: an encoded picture is never decoded and encoded again.
                fields = {"id": record.id, "image": io.BytesIO(record.image), "conversations": record.talks_json()}
                writer.write(self.features.serialize_example(self.features.encode_example(fields)))
        except BaseException:
            with contextlib.suppress(RuntimeError):
                writer.close()
            raise
        writer.close()


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """The hidden folder beside `folder` in which records are made, for one run at a time. It is deleted at the end; after an
    error, finished shards stay.

    Raises:
        DataError: another run is using it, or it cannot be made.
    """
    hidden = folder.parent / f".{folder.name}.building"
    try:
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{folder}: is a file; records are a folder")
        hidden.mkdir(parents=True, exist_ok=True)
        lock = (hidden / "lock").open("w")
    except OSError as error:
        raise DataError(f"{hidden}: cannot be made ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = (hidden / "lock").stat().st_ino == os.fstat(lock.fileno()).st_ino
        except OSError:
            mine = False
        if not mine:
            raise DataError(f"{folder}: another run is building it; wait for it or stop it")
        _put_back(folder, hidden)
        try:
            yield hidden
        except BaseException:
            _put_back(folder, hidden)
            for path in hidden.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.suffix != ".shard":
                    path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # shards are in it
                hidden.rmdir()
            raise
        shutil.rmtree(hidden, ignore_errors=True)


def write_records(
    folder: Path,
    splits: Mapping[str, Records],
    *,
    hidden: Path | None = None,
    jobs: int = 1,
    on_progress: Callable[[int], object] = lambda count: None,
) -> Path:
    """Writes the splits below `folder` as TFDS does; returns the folder to read.

    Records that are there already stay until the new ones are whole. Finished shards of an interrupted run lie in a hidden
    folder beside `folder`, and are taken from there by the next one where the records are `Digested`.

    Args:
        hidden: what `building` gave; records are made in one of their own by default.
        jobs: threads that read pictures and write shards.
        told: gets the number of records of each shard as it is done.

    Raises:
        DataError: there are no records, or one cannot be had.
    """
    if hidden is None:
        with building(folder) as hidden:
            return write_records(folder, splits, hidden=hidden, jobs=jobs, on_progress=on_progress)
    try:
        return _write_records(folder, splits, hidden, jobs, on_progress)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{folder}: cannot be written ({' '.join(str(error).split())[:300]})") from None


def _write_records(
    folder: Path, splits: Mapping[str, Records], hidden: Path, jobs: int, on_progress: Callable[[int], object]
) -> Path:
    made: dict[str, list[tuple[Path, int]]] = {}
    for split, records in splits.items():
        if not len(records):
            raise DataError(f"{folder}: no records for {split}")
        shards = _Shards(hidden, records)
        with ThreadPoolExecutor(jobs) as pool:
            done = [pool.submit(shards.make, start) for start in range(0, len(records), SHARD)]
            made[split] = []
            try:
                for future in done:
                    made[split].append(future.result())
                    on_progress(made[split][-1][1])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    whole = hidden / uuid.uuid4().hex
    whole.mkdir()
    template = tfds.core.ShardedFileTemplate(
        data_dir=whole, dataset_name=NAME, filetype_suffix="array_record", template=_TEMPLATE
    )
    infos = []
    for split, files in made.items():
        named = template.replace(split=split)
        for number, (file, _) in enumerate(files):
            _also(file, Path(named.sharded_filepath(shard_index=number, num_shards=len(files))))
        size = sum(file.stat().st_size for file, _ in files)
        lengths = [count for _, count in files]
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=named))
    tfds.folder_dataset.write_metadata(
        data_dir=whole,
        features=_features(),
        split_infos=infos,
        version=VERSION,
        filename_template=template,
        check_data=False,
        description="Pictures with all that is said about them, for reflective instruction tuning.",
    )
    home = folder / NAME / VERSION
    home.parent.mkdir(parents=True, exist_ok=True)
    if home.exists():
        home.rename(hidden / ASIDE)
    whole.rename(home)
    return home


def _put_back(folder: Path, hidden: Path) -> None:
    """Old records that were set aside for new ones that then did not come."""
    home, aside = folder / NAME / VERSION, hidden / ASIDE
    if aside.exists() and not home.exists():
        os.replace(aside, home)


def _also(file: Path, name: Path) -> None:
    """A second name for a file, or a copy where the file system has no second names."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


class RecordSource(Sequence[ImageRecord]):
    """Records of one split, by index: what Grain reads from."""

    def __init__(self, folder: str | Path, split: str = "train"):
        self.folder, self.split = Path(folder), split
        if not (self.folder / "dataset_info.json").exists():
            found = sorted(self.folder.glob("**/dataset_info.json")) if self.folder.is_dir() else []
            found = [path for path in found if not any(p[0] == "." for p in path.relative_to(self.folder).parts)]
            if len(found) != 1:
                raise DataError(
                    f"{self.folder}: no records here; `reverie data build` writes a folder that can be read"
                )
            self.folder = found[0].parent
        try:
            builder = tfds.builder_from_directory(os.fspath(self.folder))
            if split not in builder.info.splits:
                raise DataError(f"{self.folder}: no split {split!r}; there is {', '.join(builder.info.splits)}")
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
        return ImageRecord.from_parts(row["id"].decode(), row["image"], row["conversations"].decode())

    def __repr__(self) -> str:
        # Grain stores this in a checkpoint and compares it on restore: it must not hold a memory address.
        return f"RecordSource({self.split}, {len(self)} records)"
