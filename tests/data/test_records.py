"""Records on disk: what is written is read, byte for byte, and damaged records are named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.records import RecordSource, write_records
from reverie_jax.errors import DataError
from tests.data.fakes import assert_one_line, png, records, talk


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("records"), {"train": records(5), "test": records(2, seed=1)})


def test_a_source_is_a_sequence_of_what_was_written(folder):
    source = RecordSource(folder)
    assert list(source) == [source[index] for index in range(5)] == records(5)
    assert source[-1] == source[4]
    assert list(RecordSource(folder, "test")) == records(2, seed=1)
    with pytest.raises(IndexError):
        source[5]
    assert repr(source) == repr(RecordSource(folder))  # Grain compares it when a state is restored
    assert "0x" not in repr(source)


def test_images_keep_every_byte_and_texts_every_letter(tmp_path):
    text = 'Ist das ein Törtchen? 茶 🍵\u2028 "quoted" \\n'
    record = ImageRecord("ünï/茶.png", png(), (talk(text, "Nein, 猫."), talk("x", " ")))
    (found,) = RecordSource(write_records(tmp_path, {"train": [record]}))
    assert found == record
    assert found.image == png()


@pytest.mark.parametrize("case", ["missing", "empty", "dataset_info.json", "features.json", "split", "shards"])
def test_damaged_records_are_named(folder, tmp_path, case):
    copy = tmp_path / "copy"
    if case == "empty":
        copy.mkdir()
    elif case != "missing":
        shutil.copytree(folder, copy)
    if case.endswith(".json"):
        (copy / case).write_text("{broken")
    if case == "shards":
        for shard in copy.glob("*.array_record*"):
            shard.unlink()
    with pytest.raises(DataError) as error:
        _ = RecordSource(copy, "validation" if case == "split" else "train")[0]
    assert_one_line(error, copy, *(("validation", "train", "test") if case == "split" else ()))
