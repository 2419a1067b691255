"""Annotation files on the hub, and records as a dataset: what is read is what was meant, and comes back as it was."""

from __future__ import annotations

import json
import re

import pytest

from reverie_jax.cli.data import mixture_entries
from reverie_jax.data import sources
from reverie_jax.data.conversation import Conversation, ImageRecord, Turn
from reverie_jax.data.records import RecordSource, write_records
from reverie_jax.data.sources import ReadLog
from reverie_jax.hub import datasets
from reverie_jax.hub.repository import HubError
from tests.data.fakes import STORED_IMAGE, llava_row, png, write_json_rows, write_parquet

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub's use of its client
COMMIT = "c" * 40
SHARDS = ["data/train-00000-of-00002-ab12.parquet", "data/train-00001-of-00002-cd34.parquet"]


@pytest.mark.parametrize(
    ("names", "file", "expected"),
    [
        (["README.md", "talks.json"], None, ["talks.json"]),
        (["talks.jsonl", ".hidden/x.json", "dataset_infos.json", "config.json"], None, ["talks.jsonl"]),
        (SHARDS, None, SHARDS),
        ([*SHARDS, "data/test-00000-of-00001.parquet", "validation.json"], None, SHARDS),
        (["a.json", "b.json"], "b.json", ["b.json"]),
        (["a.json", "b.json"], "*.json", ["a.json", "b.json"]),
        (["x/train.json", "x/other.json", "x/dev.json"], None, ["x/train.json"]),
        (["test.json"], "test.json", ["test.json"]),
        (["data/train-[1].json"], "data/train-[1].json", ["data/train-[1].json"]),
        (["a.json", "b.json"], None, "a.json, b.json"),  # which of them?
        (["x/train.json", "y/train.json"], None, "x/train.json, y/train.json"),
        (["data/test-00000-of-00001.parquet"], None, "data/test-*.parquet"),  # never unasked
        (SHARDS[:1], None, "1 of the 2 files"),
        (["README.md", "images/1.png"], None, "no annotation file"),
        (["a.json"], "b.json", "a.json"),
    ],
)
def test_the_file_that_was_meant(names, file, expected):
    if isinstance(expected, list):
        assert datasets._choose("hub:o/n", names, file) == expected
    else:
        with pytest.raises(HubError, match=rf"hub:o/n.*{re.escape(expected)}"):
            datasets._choose("hub:o/n", names, file)


@pytest.mark.parametrize("source", ["hub:", "hub:name", "hub:o/n@", "hub:o/n/"])
def test_what_is_no_repository(source, hub):
    with pytest.raises(HubError, match="hub:"):
        datasets.fetch_annotations(source)


def rows(count=5):
    return [llava_row(f"{number}.png") for number in range(count)]


@pytest.fixture
def repository(tmp_path, hub):
    """A dataset with two annotation files and their images, and the folder of the same files."""
    folder = tmp_path / "lab" / "talks"
    (folder / "images").mkdir(parents=True)
    for number in range(5):
        (folder / "images" / f"{number}.png").write_bytes(png((number, 3, 4)))
    write_json_rows(folder / "train.jsonl", rows())
    write_json_rows(folder / "more.json", rows(2))
    hub.repositories["lab/talks"] = COMMIT, "cc-by-4.0", folder
    return folder


def content(source):
    return sorted((r.id, r.image, r.conversations_json()) for r in (source[n] for n in range(len(source))))


def built(reverie, *words):
    code, out, err = reverie("data", "build", *words)
    assert code == 0, err
    return content(RecordSource(words[words.index("--out") + 1])), out, err


def test_records_are_those_of_the_same_files(reverie, repository, hub, tmp_path, caplog):
    here, _, _ = built(reverie, repository / "train.jsonl", "--out", tmp_path / "here")
    there, _, _ = built(reverie, "hub:lab/talks", "--out", tmp_path / "there")
    assert there == here
    (line,) = [record.getMessage() for record in caplog.records if "licence" in record.getMessage()]
    assert all(fact in line for fact in (f"lab/talks at {COMMIT}", "6 files", "cc-by-4.0", "none is pinned"))
    pinned = f"hub:lab/talks@{COMMIT}/more.json"
    assert len(built(reverie, pinned, "--out", tmp_path / "two")[0]) == 2
    assert datasets.read_sources(tmp_path / "two") == {"sources": [pinned], "datasets": ["lab/talks"]}
    assert max(hub.served.values()) == 1
    code, out, _ = reverie("data", "stats", "hub:lab/talks", "--json")
    assert (code, json.loads(out)["conversations"]) == (0, 5)


def test_a_folder_of_images_is_not_downloaded(reverie, repository, hub, tmp_path):
    source = f"hub:lab/talks/train.jsonl={repository / 'images'}"
    assert len(built(reverie, source, "--out", tmp_path / "out")[0]) == 5
    assert list(hub.served) == ["lab/talks/train.jsonl"]


def test_images_in_parquet(reverie, hub, tmp_path):
    folder = tmp_path / "lab" / "parquet"
    (folder / "data").mkdir(parents=True)
    stored = [row | {"image": {"bytes": png((number, 3, 4)), "path": None}} for number, row in enumerate(rows(4))]
    import pyarrow as pa

    schema = pa.Table.from_pylist(rows(1)).schema
    schema = schema.set(schema.get_field_index("image"), pa.field("image", STORED_IMAGE))
    for number, name in enumerate(SHARDS):
        write_parquet(folder / name, stored[2 * number : 2 * number + 2], schema)
    hub.repositories["lab/parquet"] = COMMIT, None, folder
    found, _, _ = built(reverie, "hub:lab/parquet", "--out", tmp_path / "out")
    assert sorted(image for _, image, _ in found) == sorted(row["image"]["bytes"] for row in stored)


def test_failures_are_one_line_and_leave_nothing(reverie, repository, hub, tmp_path):
    hub.broken = {"train.jsonl"}
    for source in ("hub:lab/talks", "hub:lab/gone", "hub:lab/talks@wrong"):
        code, out, err = reverie("data", "build", source, "--out", tmp_path / "out")
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith("reverie: error: datasets/lab/")
        assert not (tmp_path / "out").exists()


TALKS = (
    Conversation((Turn("user", "<image>\nWhat?"), Turn("assistant", "A cup.", 0.5)), dataset="mine"),
    Conversation(
        (Turn("user", "<image>\nWhy?"), Turn("assistant", "So.", 1.0, "It is ", ended=False)), kind="negative"
    ),
)
PAIR = tuple(
    Conversation((Turn("user", "<image>\nWhich?"), Turn("assistant", side)), kind=side, pair="p1", dataset="d")
    for side in ("chosen", "rejected")
)
RECORDS = [
    *(ImageRecord(f"{n}.png", png((n, 3, 4)), (TALKS, PAIR, TALKS[:1])[n % 3]) for n in range(7)),
    ImageRecord("", b"", (Conversation((Turn("user", "Hi ünï"), Turn("assistant", "Yes.")), images=()),)),
]


def test_records_come_back_as_they_were(reverie, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_GROUP", 2)
    monkeypatch.setattr(datasets, "_SHARD_BYTES", 3 * len(RECORDS[0].image))
    write_records(tmp_path / "records", {"train": RECORDS})
    code, out, err = reverie("push", tmp_path / "records", "lab/records", "--card", "license=mit")
    assert code == 0, err
    assert out.strip() == f"{hub.url}/datasets/lab/records/commit/{1:040x}"
    assert hub.created == {("dataset", "lab/records"): "private"}
    names = sorted(path.name for path in (hub.folder("dataset", "lab/records") / "data").iterdir())
    assert names == [f"train-0000{n}-of-00002.parquet" for n in range(2)]
    found, _, _ = built(reverie, "hub:lab/records", "--out", tmp_path / "again")
    known = [(r.id, r.image, r.conversations_json()) for r in RECORDS]
    assert [each[1:] for each in found] == [each[1:] for each in sorted(known)]
    assert [name for name, image, _ in found if image] == [name for name, image, _ in sorted(known) if image]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".records")]


def test_the_card_of_a_dataset(reverie, repository, hub, tmp_path):
    import huggingface_hub

    built(reverie, "hub:lab/talks", "--out", tmp_path / "out", "--push-to-hub", "lab/mine", "--public")
    assert hub.created == {("dataset", "lab/mine"): "public"}
    card = huggingface_hub.DatasetCard.load(hub.folder("dataset", "lab/mine") / "README.md")
    assert card.data.task_categories == ["image-text-to-text"]
    assert (card.data.size_categories, card.data.source_datasets) == ("n<1K", ["lab/talks"])
    assert "| conversations | 5 |" in card.text
    # Models that are trained on these records name them.
    assert datasets.read_sources(tmp_path / "out")["datasets"] == ["lab/talks", "lab/mine"]
    assert mixture_entries(["hub:lab/mine"])[0].file.name == "train-00000-of-00001.parquet"


@pytest.mark.slow
def test_the_library_datasets_reads_it(tmp_path):
    load = pytest.importorskip("datasets").load_dataset
    (folder := tmp_path / "set").mkdir()
    datasets.write_parquet(RECORDS, folder)
    found = load("parquet", data_files=str(folder / "data" / "*.parquet"), cache_dir=str(tmp_path / "cache"))["train"]
    assert found[1]["image"].getpixel((0, 0)) == (1, 3, 4)
    assert found[-1]["image"] is None
    assert [turn["text"] for turn in found[0]["conversations"][0]["turns"]] == [turn.text for turn in TALKS[0].turns]


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"image": None}, "the row has none"),
        ({"conversations": [{"turns": [{"role": "user"}], "images": [], "dataset": ""}]}, "not those of a record"),
        (
            {"conversations": [{"turns": [{"role": "x", "text": ""}], "images": [], "dataset": ""}]},
            "not those of a record",
        ),
        ({"conversations": [{"turns": 1, "images": [], "dataset": ""}]}, "not those of a record"),
    ],
)
def test_rows_that_are_no_records(tmp_path, change, fact):
    row = {"id": "a", "image": "a.png", "conversations": [talk.to_json() for talk in TALKS]}
    path, log = write_json_rows(tmp_path / "rows.json", [row, row | change, row]), ReadLog()
    assert [example.conversation for example in sources.read(path, log)] == [*TALKS, *TALKS]
    ((where, reason),) = log.problems
    assert where.endswith("row 1")
    assert fact in reason
