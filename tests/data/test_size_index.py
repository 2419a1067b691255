"""The index of sizes: equal to the survey, found by its content alone; where it does not match its records, an error."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reverie_jax.data import records as records_module
from reverie_jax.data import survey as survey_module
from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.packing import SequenceShape
from reverie_jax.data.pipeline import TreeBuilder, training_batches
from reverie_jax.data.preferences import DPOConfig
from reverie_jax.data.processor import Processor
from reverie_jax.data.records import RecordSource, write_records
from reverie_jax.data.size_index import index_path, read_index, records_digest, write_index
from reverie_jax.data.supervision import Supervision
from reverie_jax.data.survey import find_sizes, survey
from reverie_jax.data.tokenization import Encoder
from reverie_jax.data.tree_sizes import TreeSizes
from reverie_jax.errors import DataError
from tests.data.fakes import IMAGE_ID, WordTokenizer, assert_one_line, byte_level_tokenizer, records

SHAPE = SequenceShape(length=90, images=3, edges=60, questions=4)


def processor(patches: int = 4, tokenizer: Any = None) -> Processor:
    return Processor(Encoder(tokenizer or WordTokenizer(), "llava-hf", patches, IMAGE_ID), 8)


BUILDER = TreeBuilder(processor(), SHAPE, Supervision())
RECORDS = records(9)


@pytest.fixture
def source(tmp_path, monkeypatch) -> RecordSource:
    monkeypatch.setattr(records_module, "RECORDS_PER_SHARD", 4)
    return RecordSource(write_records(tmp_path / "records", {"train": RECORDS}))


def batches(source: RecordSource, sizes: TreeSizes | None, count: int = 6) -> list[Any]:
    running = iter(training_batches(source, BUILDER, batch_size=2, seed=0, sizes=sizes, threads=1))
    try:
        return list(itertools.islice(running, count))
    finally:
        running.close()


def test_an_index_is_the_survey_and_digest_of_its_records(source, monkeypatch):
    sizes = survey(source, BUILDER)
    path = write_index(source, sizes, BUILDER)
    with monkeypatch.context() as patch:
        patch.setattr(survey_module, "survey", None)
        found = find_sizes(source, source, BUILDER)
        patch.setattr(ImageRecord, "conversations_json", None)  # no record is read
        digest = records_digest(source)
    assert digest == records_digest(RECORDS)
    assert (found.stats, found.index) == (sizes.stats, path)
    assert np.array_equal(found.trees, sizes.trees)
    assert isinstance(found.trees, np.memmap)
    assert found.trees.dtype == np.int32
    built = [[tree.tree for tree in BUILDER.build(record)] for record in RECORDS]
    assert [[sizes[0] for sizes in found.of(n)] for n in range(9)] == [[len(tree) for tree in trees] for trees in built]
    for one, other in zip(batches(source, found), batches(source, None), strict=True):
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"shape": dataclasses.replace(SHAPE, length=91)}, False),
        ({"shape": dataclasses.replace(SHAPE, branches=2)}, False),
        ({"supervision": Supervision(kinds="responses")}, False),
        ({"supervision": DPOConfig()}, False),
        ({"prefix_sharing": False}, False),
        ({"processor": processor(5)}, False),
        ({"processor": processor(tokenizer=byte_level_tokenizer())}, False),
        ({"processor": BUILDER.processor.override("vicuna_v1")}, False),
        ({"processor": dataclasses.replace(BUILDER.processor, context=80)}, False),
        ({"processor": dataclasses.replace(BUILDER.processor, image_size=16, image_aspect_ratio="stretch")}, True),
        ({"datasets": ("a", "b")}, True),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_an_index_is_found_for_what_gives_the_same_trees(source, changes, same):
    write_index(source, survey(source, BUILDER), BUILDER)
    assert (read_index(source, 9, dataclasses.replace(BUILDER, **changes)) is not None) == same
    assert read_index(source, 8, BUILDER) is None


def test_of_a_tokenizer_the_content_counts_and_of_preferences_what_changes_sizes(source):
    def path(**changes: Any) -> Path:
        return index_path(source, 9, dataclasses.replace(BUILDER, **changes))

    one, other, third = byte_level_tokenizer(), byte_level_tokenizer(), byte_level_tokenizer("<x>")
    other.name_or_path = "elsewhere"
    paths = [path(processor=processor(tokenizer=tokenizer)) for tokenizer in (one, other, third)]
    assert paths[0] == paths[1] != paths[2]
    pairs = [path(supervision=DPOConfig(**fields)) for fields in ({}, {"beta": 0.5, "average": True}, {"gamma": 0.0})]
    assert pairs[0] == pairs[1] != pairs[2]


def test_an_index_moves_with_its_records_and_never_to_others(source, tmp_path):
    write_index(source, survey(source, BUILDER), BUILDER)
    copy = RecordSource(shutil.copytree(tmp_path / "records", tmp_path / "elsewhere"))
    assert read_index(copy, 9, BUILDER) is not None
    other = write_records(tmp_path / "other", {"train": records(9, seed=1)})
    shutil.copytree(source.folder / "index", other / "index")
    assert read_index(RecordSource(other), 9, BUILDER) is None
    assert records_digest(RecordSource(other)) == records_digest(records(9, seed=1)) != records_digest(RECORDS)
    write_records(tmp_path / "records", {"train": RECORDS})  # replaces them
    assert read_index(RecordSource(tmp_path / "records"), 9, BUILDER) is None


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.with_suffix(".npy").write_bytes(path.with_suffix(".npy").read_bytes()[:-4]),
    "other bytes": lambda path: path.with_suffix(".npy").write_bytes(path.with_suffix(".npy").read_bytes()[:-1] + b"x"),
    "no array": lambda path: path.with_suffix(".npy").unlink(),
    "other type": lambda path: np.save(path.with_suffix(".npy"), np.load(path.with_suffix(".npy")).astype(np.int64)),
    "no JSON": lambda path: path.write_text("{"),
    "no stats": lambda path: change(path, lambda content: content.pop("stats")),
    "unknown stats": lambda path: change(path, lambda content: content["stats"].update(more=1)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_index_is_an_error_that_names_its_file(source, damage):
    path = write_index(source, survey(source, BUILDER), BUILDER)
    damage(path)
    with pytest.raises(DataError) as error:
        find_sizes(source, source, BUILDER)
    assert_one_line(error, path)


def changed(record: ImageRecord) -> ImageRecord:
    """The record with an image of as many bytes."""
    return dataclasses.replace(record, image=record.image[:-1] + b"x")


@pytest.mark.parametrize(
    ("others", "builder"),
    [
        (RECORDS, dataclasses.replace(BUILDER, processor=processor(5))),
        (RECORDS, dataclasses.replace(BUILDER, prefix_sharing=False)),
        ([*map(changed, RECORDS)], BUILDER),
        ([dataclasses.replace(record, id=f"{record.id}*") for record in RECORDS], BUILDER),
    ],
    ids=["tokens", "trees", "images", "ids"],
)
def test_an_index_that_does_not_match_a_record_is_an_error_that_names_both(source, others, builder):
    """As if a release of the tokenizer gave other tokens, or records had changed behind their index."""
    path = write_index(source, survey(others, builder), BUILDER)
    with pytest.raises(DataError, match=r"record r\d: ") as error:
        batches(source, find_sizes(source, source, BUILDER))
    assert_one_line(error, path, "reverie data index")


def test_without_an_index_one_line_names_the_command(source, caplog, monkeypatch):
    caplog.set_level("INFO", "reverie_jax")
    find_sizes(source, source, BUILDER)
    assert caplog.messages == []  # it took no time
    monkeypatch.setattr(survey_module, "_WORTH_AN_INDEX", 9)
    sizes = find_sizes(source, source, BUILDER)
    (line,) = caplog.messages
    assert f"reverie data index {source.folder} --model" in line
    caplog.clear()
    write_index(source, dataclasses.replace(sizes, warning="2 of 9 teach nothing"), BUILDER)
    find_sizes(source, source, BUILDER)
    assert caplog.messages == ["2 of 9 teach nothing"]


def test_an_index_that_cannot_be_written_is_an_error(source):
    (source.folder / "index").write_text("mine")
    with pytest.raises(DataError) as error:
        write_index(source, survey(source, BUILDER), BUILDER)
    assert_one_line(error, source.folder / "index")
