"""Records on disk: one ArrayRecord record per image, written by a TFDS builder, read at random."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from google.protobuf import json_format

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.errors import DataError, UserError


class ReflectiveRecords(tfds.core.GeneratorBasedBuilder):
    """Images with their conversations, which are one JSON text: TFDS writes nested sequences with TensorFlow only."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, splits: Mapping[str, Iterable[ImageRecord]] | None = None, **kwargs: Any):
        self._splits = splits or {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(None, None, 3)),
                "conversations": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        return {name: self._generate_examples(records) for name, records in self._splits.items()}

    def _generate_examples(self, records: Iterable[ImageRecord]) -> Iterator[tuple[str, dict[str, Any]]]:
        for record in records:
            # A file object passes through as it is: an encoded picture is never decoded and encoded again.
            yield (
                record.id,
                {
                    "id": record.id,
                    "image": io.BytesIO(record.image),
                    "conversations": record.talks_json(),
                },
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS writes progress bars to stderr whatever one asks; our callers show their own."""
    tfds.disable_progress_bar()
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        yield


def write_records(folder: Path, splits: Mapping[str, Iterable[ImageRecord]]) -> Path:
    """Writes the splits below `folder`; returns the folder to read.

    Records that are there already stay until the new ones are whole. Pictures pass through one by one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    hidden = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent)
    with hidden as part, _quiet():
        builder = ReflectiveRecords(splits, data_dir=part, file_format="array_record")
        builder.download_and_prepare()
        made = Path(os.fspath(builder.data_dir))
        home = folder / made.relative_to(part)
        if home.exists():
            shutil.rmtree(home)
        home.parent.mkdir(parents=True, exist_ok=True)
        made.rename(home)
    return home


class RecordSource(Sequence[ImageRecord]):
    """Records of one split, by index: what Grain reads from."""

    def __init__(self, folder: str | Path, split: str = "train"):
        self.folder, self.split = Path(folder), split
        if not (self.folder / "dataset_info.json").exists():
            found = sorted(self.folder.glob("**/dataset_info.json")) if self.folder.is_dir() else []
            if len(found) != 1:
                raise DataError(f"{self.folder}: no records here; `reverie build` writes a folder that can be read")
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
