"""Records on disk, REVERIE's annotation files, and the batches of training: nothing is changed on the way."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.data.conversation import IMAGE, Conversation, ImageRecord, Turn
from reverie_jax.data.mixture import MixtureEntry, mixture
from reverie_jax.data.packing import Batch, SequenceShape
from reverie_jax.data.pipeline import ImageQuestions, dataset_stats, question_batches, training_batches, trees
from reverie_jax.data.processor import Processor
from reverie_jax.data.records import RecordSource, write_records
from reverie_jax.data.sources import ReadLog, llava, reverie
from reverie_jax.data.supervision import Supervision
from reverie_jax.data.tokenization import Encoder
from reverie_jax.errors import DataError, UserError
from tests.data.fakes import IMAGE_ID, WordTokenizer, png, records, talk

PATCHES, SIDE = 4, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("records"), {"train": records(5), "test": records(2, seed=1)})


def by_id(source: RecordSource) -> list[ImageRecord]:
    """All records in the order of their ids."""
    return sorted((source[index] for index in range(len(source))), key=lambda record: record.id)


def test_what_is_written_is_read(folder):
    assert by_id(RecordSource(folder)) == records(5)
    assert by_id(RecordSource(folder, "test")) == records(2, seed=1)


def test_source_is_a_sequence(folder):
    source = RecordSource(folder)
    assert list(source) == [source[index] for index in range(5)]
    assert source[-1] == source[4]
    with pytest.raises(IndexError):
        source[5]


def test_pictures_keep_every_byte_and_talk_every_letter(tmp_path):
    spoken = 'Ist das ein Törtchen? 茶 🍵\u2028 "quoted" \\n'
    record = ImageRecord("ünï/茶.png", png(), (talk(spoken, "Nein, 猫."), talk("x", " ")))
    found = RecordSource(write_records(tmp_path, {"train": [record]}))[0]
    assert found == record
    assert found.image == png()


def test_records_are_found_below_a_folder(folder, tmp_path):
    written = write_records(tmp_path, {"train": records(1)})
    assert written != tmp_path
    assert by_id(RecordSource(tmp_path)) == by_id(RecordSource(written)) == records(1)


def test_writing_twice_leaves_the_second(tmp_path):
    write_records(tmp_path, {"train": records(3), "test": records(1)})
    source = RecordSource(write_records(tmp_path, {"train": records(2, seed=5)}))
    assert by_id(source) == records(2, seed=5)
    with pytest.raises(DataError, match="no split 'test'"):
        RecordSource(tmp_path, "test")


def test_source_has_a_stable_name(folder):
    assert repr(RecordSource(folder)) == repr(RecordSource(folder))
    assert "0x" not in repr(RecordSource(folder))


def one_line(error: pytest.ExceptionInfo[DataError], *names: object) -> None:
    text = str(error.value)
    assert "\n" not in text
    for name in names:
        assert str(name) in text


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError) as error:
        RecordSource(tmp_path / "nowhere")
    one_line(error, tmp_path / "nowhere")
    with pytest.raises(DataError) as error:
        RecordSource(tmp_path)
    one_line(error, tmp_path)


def test_missing_split_is_named_with_those_that_are_there(folder):
    with pytest.raises(DataError) as error:
        RecordSource(folder, "validation")
    one_line(error, folder, "validation", "train", "test")


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_damaged_records_are_named(tmp_path, file):
    written = write_records(tmp_path, {"train": records(1)})
    (written / file).write_text("{broken")
    with pytest.raises(DataError) as error:
        RecordSource(written)
    one_line(error, written)


def test_missing_shards_are_named(tmp_path):
    written = write_records(tmp_path, {"train": records(1)})
    for shard in written.glob("*.array_record*"):
        shard.unlink()
    with pytest.raises(DataError) as error:
        RecordSource(written)[0]
    one_line(error, written)


class Broken:
    """Records of which the second cannot be had."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> ImageRecord:
        if index == 1:
            raise DataError("a.json: row 3: bad")
        return records(1)[0]


def test_bad_data_while_writing_stays_a_data_error(tmp_path):
    with pytest.raises(DataError) as error:
        write_records(tmp_path / "records", {"train": Broken()})
    one_line(error, "a.json: row 3: bad")
    assert not (tmp_path / "records").exists()
    assert list(tmp_path.glob(".*/*")) == []


# REVERIE's annotation files.


@pytest.fixture
def pictures(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes(png())
    (tmp_path / "outside.png").write_bytes(png())
    return tmp_path / "images"


def row(image: str = "a.png", first: str = "Is it red?", answer: str = "No", why: str = "It is green.") -> dict:
    said = [("human", first), ("gpt", answer), ("human", "Explain why."), ("gpt", why)]
    return {"id": image, "image": image, "conversations": [{"from": who, "value": text} for who, text in said]}


def annotations(pictures: Path, rows: object) -> Path:
    path = pictures.parent / "rows.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), "utf-8")
    return path


def read(pictures: Path, rows: object) -> list[ImageRecord]:
    with mixture([MixtureEntry(file=annotations(pictures, rows), pictures=pictures)], ReadLog()) as found:
        return list(found)


def test_marker_is_added_once_where_there_is_none(pictures):
    firsts = ("Is it red?", f"{IMAGE}\nIs it red?", f"Is it red?\n{IMAGE}")
    (record,) = read(pictures, [row(first=first, answer=str(n)) for n, first in enumerate(firsts)])
    assert [t.turns[0].text for t in record.conversations] == [firsts[1], firsts[1], firsts[2]]
    assert all(t.images == (0,) for t in record.conversations)


def test_rows_of_one_picture_become_one_record(pictures):
    found = read(pictures, [row("b.png"), row("a.png"), row("b.png", first="Other?")])
    assert [(record.id, len(record.conversations)) for record in found] == [("b.png", 2), ("a.png", 1)]
    assert all(record.image == png() for record in found)
    assert {t.dataset for record in found for t in record.conversations} == {"reverie"}


def test_repeated_answers_are_taught_once_where_rationales_repeat_them(pictures):
    rows = [row(why="One."), row(why="Two."), row(answer="Yes"), row("b.png"), row(first=f"{IMAGE}\nIs it red?")]
    first, second = read(pictures, rows)
    taught = [Supervision()(record.conversations) for record in (first, second)]
    assert [t.turns[1].weight for t in taught[0]] == [1, 0, 1, 0]
    assert [t.turns[3].weight for t in taught[0]] == [1, 1, 1, 1]
    assert [t.turns[1].weight for t in taught[1]] == [1]
    published = Supervision(answers="as-published")(first.conversations)
    assert [t.turns[1].weight for t in published] == [1, 1, 1, 1]


words = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(lambda t: IMAGE not in t)


@settings(max_examples=20)
@given(st.lists(st.tuples(words, words, words), min_size=1, max_size=4, unique=True))
def test_written_rows_are_read_back(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "ü.png").write_bytes(png())
    talks = [talk(asked, said, ("Explain why.", why)) for asked, said, why in texts]
    assert reverie.write(folder / "rows.json", [("7", "ü.png", talks)]) == len(talks)
    with mixture([MixtureEntry(file=folder / "rows.json", pictures=folder)], ReadLog()) as found:
        (record,) = found
    assert record.id == "ü.png"
    assert [t.turns for t in record.conversations] == [t.turns for t in talks]


def without(key: str) -> dict:
    return {name: value for name, value in row().items() if name != key}


def said(*turns: object) -> dict:
    return {**row(), "conversations": list(turns)}


HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
BAD_ROWS = {
    "no object": [row(), "x"],
    "no image": [row(), without("image")],
    "image no text": [{**row(), "image": 3}],
    "image no name": [row(), row("")],
    "no conversations": [row(), row(), without("conversations")],
    "conversations no list": [{**row(), "conversations": "hello"}],
    "one turn": [said(HUMAN)],
    "no value": [said({"from": "human"}, GPT)],
    "turn no object": [said("hello", GPT)],
    "unknown role": [said({"from": "system", "value": "x"}, GPT)],
    "role no text": [said({"from": ["human"], "value": "x"}, GPT)],
    "two users": [row(), said(HUMAN, HUMAN)],
    "assistant first": [said(GPT, HUMAN)],
    "marker in the answer": [row(first=IMAGE, answer=IMAGE)],
}


@pytest.mark.parametrize("rows", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_is_named_with_its_file(pictures, rows):
    with pytest.raises(DataError) as error:
        read(pictures, rows)
    one_line(error, pictures.parent / "rows.json", f"row {len(rows) - 1}")


class UncheckedTurn(Turn):
    """`Turn` as users have it, without the type checks that the tests put on the package."""

    def __init__(self, role: str, text: str, weight: float = 1.0):
        for name, value in (("role", role), ("text", text), ("weight", weight)):
            object.__setattr__(self, name, value)


@pytest.mark.parametrize("turn", [0, 1], ids=["question", "answer"])
@pytest.mark.parametrize("value", [5, None, ["a"]], ids=repr)
def test_words_that_are_no_text_are_named(pictures, monkeypatch, turn, value):
    turns = [dict(HUMAN), dict(GPT)]
    turns[turn]["value"] = value
    monkeypatch.setattr(llava, "Turn", UncheckedTurn)
    with pytest.raises(DataError) as error:
        read(pictures, [said(*turns)])
    one_line(error, pictures.parent / "rows.json", "row 0")


@pytest.mark.parametrize("text", ["{", "[]", "{}", "3", ""], ids=repr)
def test_file_that_is_no_list_of_rows_is_named(pictures, text):
    with pytest.raises(DataError) as error:
        read(pictures, text)
    one_line(error, pictures.parent / "rows.json")


def test_file_that_is_no_unicode_is_named(pictures):
    path = pictures.parent / "rows.json"
    path.write_bytes(b'["\xff"]')
    with pytest.raises(DataError) as error:
        mixture([MixtureEntry(file=path, pictures=pictures)], ReadLog())
    one_line(error, path)


def test_missing_annotations_and_pictures_are_named(pictures):
    with pytest.raises(DataError, match=r"none\.json"):
        mixture([MixtureEntry(file=pictures / "none.json", pictures=pictures)], ReadLog())
    with pytest.raises(DataError, match="nowhere"):
        list(mixture([MixtureEntry(file=annotations(pictures, [row()]), pictures=pictures / "nowhere")], ReadLog()))


def test_a_folder_is_no_annotation_file(pictures):
    with pytest.raises(DataError) as error:
        mixture([MixtureEntry(file=pictures, pictures=pictures)], ReadLog())
    one_line(error, pictures)


@pytest.mark.parametrize("name", ["../outside.png", "/etc/hostname", "x/../../outside.png", "link.png"])
def test_pictures_cannot_leave_their_folder(pictures, name):
    (pictures / "link.png").symlink_to(pictures.parent / "outside.png")
    with pytest.raises(DataError) as error:
        read(pictures, [row(name)])
    one_line(error, name, "leaves")


@pytest.mark.parametrize("name", ["none.png", ".", "nul\0.png"], ids=repr)
def test_picture_that_is_no_file_is_named(pictures, name):
    with pytest.raises(DataError) as error:
        read(pictures, [row(name)])
    one_line(error, pictures)


def test_broken_picture_is_named(pictures):
    (pictures / "b.png").write_bytes(png()[:40])
    with pytest.raises(DataError) as error:
        read(pictures, [row("a.png"), row("b.png")])
    one_line(error, pictures / "b.png")


# Training batches.


def encoder() -> Encoder:
    return Encoder(WordTokenizer(), "llava-hf", PATCHES, IMAGE_ID)


def arm(kinds: str) -> Supervision:
    return Supervision(kinds, answers="as-published")


def processor() -> Processor:
    return Processor(encoder(), SIDE)


def batches(source: list[ImageRecord], *, images: int = 1, seed: int = 0, teach: str = "rationales", length: int = 90):
    shape = SequenceShape(length=length, images=images, edges=60)
    return training_batches(source, processor(), shape, rows=2, supervision=arm(teach), seed=seed)


def equal(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def take(data: object, count: int) -> list[Batch]:
    return list(itertools.islice(iter(data), count))


@pytest.mark.parametrize("images", [1, 3])
def test_restored_batches_are_the_same_bit_for_bit(folder, images):
    def fresh() -> object:
        return batches(RecordSource(folder), images=images, length=70 * images)

    wanted = take(fresh(), 5)
    for stop in (0, 3):
        running = iter(fresh())
        for _ in range(stop):
            next(running)
        state = json.loads(json.dumps(running.get_state()))
        again = iter(fresh())
        again.set_state(state)
        assert all(equal(next(again), batch) for batch in wanted[stop:])


def test_seed_fixes_the_order():
    source = records(12)
    first, again, other = (take(batches(source, seed=seed), 4) for seed in (3, 3, 4))
    assert all(map(equal, first, again))
    assert not all(map(equal, first, other))


def test_an_epoch_shows_every_record_once_and_epochs_differ():
    source = records(6)
    rows = [batch.pixels[n, 0, 0, 0].tolist() for batch in take(batches(source), 6) for n in range(2)]
    epochs = [tuple(map(tuple, rows[start : start + 6])) for start in (0, 6)]
    colours = {tuple(np.asarray(p)) for p in epochs[0]}
    assert len(colours) == 6
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]


def test_responses_are_the_first_exchanges_that_teach():
    record = records(1)[0]
    assert arm("rationales")(record.conversations) == list(record.conversations)
    short = arm("responses")(record.conversations)
    assert short == [dataclasses.replace(t, turns=t.turns[:2]) for t in record.conversations[::2]]
    assert all(t.turns[1].weight > 0 for t in short)


@pytest.mark.parametrize("teach", ["responses", "rationales"])
def test_arms_teach_their_own_words(teach):
    source, words = records(4), encoder()
    (batch,) = take(batches(source, teach=teach), 1)
    spoken = {t for record in source for talk in arm(teach)(record.conversations) for t in words(talk).ids.tolist()}
    rationale = {
        t
        for record in source
        for talk in record.conversations
        for t in words.tokenizer.encode(" " + talk.turns[3].text)
    }
    targets = set(batch.target[batch.weight > 0].tolist())
    assert targets <= spoken
    assert bool(
        targets & (rationale - {t for r in source for k in arm("responses")(r.conversations) for t in words(k).ids})
    ) == (teach == "rationales")


@pytest.mark.parametrize("teach", ["responses", "rationales"])
def test_edge_weights_are_the_conversations_weights(teach):
    source = records(3)
    shape = SequenceShape(length=90, images=1, edges=60)
    wanted = sum(float(encoder()(t).weights.sum()) for record in source for t in arm(teach)(record.conversations))
    grown = [tree for record in source for tree in trees(record, processor(), shape, arm(teach))]
    assert sum(float(tree.weight.sum()) for tree in grown) == wanted
    counted = dataset_stats(source, processor(), shape, arm(teach))
    assert (counted.records, counted.trees) == (3, len(grown))
    assert counted.tokens == sum(map(len, grown))
    assert counted.flat_tokens == sum(len(encoder()(t)) for record in source for t in arm(teach)(record.conversations))
    assert counted.edges == sum(len(tree.parent) for tree in grown)
    assert counted.longest == max(map(len, grown))


def test_too_long_conversation_names_its_record():
    with pytest.raises(DataError, match="record r1: conversation 0 has") as error:
        dataset_stats(records(2)[1:], processor(), SequenceShape(length=10, images=1, edges=60), arm("rationales"))
    one_line(error, "r1")


def test_conversation_beyond_the_decoders_context_names_its_record():
    short = dataclasses.replace(processor(), context=12)
    with pytest.raises(UserError, match=r"record r0: conversation 0 has .* exact up to 12") as error:
        dataset_stats(records(2), short, SequenceShape(length=90, images=1, edges=60), arm("rationales"))
    one_line(error, "r0")


def test_data_that_teaches_nothing_is_refused():
    record = ImageRecord("a", png(), (talk("What?", "A cup.", weight=0.0),))
    for teach in ("responses", "rationales"):
        with pytest.raises(DataError, match="teaches nothing"):
            dataset_stats([record], processor(), SequenceShape(length=90, edges=60), arm(teach))


def test_record_without_responses_is_passed_over():
    silent = ImageRecord("s", png((255, 0, 0)), (talk("What?", "A cup.", ("Why?", "So."), weight=0.0),))
    found = take(batches([silent, *records(3)], teach="responses"), 4)
    assert len(found) == 4
    assert all((batch.weight > 0).any(1).all() for batch in found)


def test_every_question_is_asked_once():
    def open_talk(text: str) -> Conversation:
        return Conversation((Turn("user", f"{IMAGE}\n{text}"),))

    pictures, number = [], itertools.count()
    for index, count in enumerate((5, 1, 3)):
        asked = [(next(number), open_talk(f"Is there x{n} here?")) for n in range(count)]
        pictures.append(ImageQuestions(f"p{index}", png((index, 0, 0)), asked))
    shape, words = SequenceShape(length=40, images=1, questions=2), processor()
    found = {}
    for batch in question_batches(pictures, words, shape, rows=4):
        assert len(batch.tokens) == 4
        for b, q in np.argwhere(batch.questions >= 0):
            leaf, ends = batch.leaves[b, q], batch.ends[b]
            path = [int(batch.tokens[b, j]) for j in range(leaf + 1) if leaf < ends[j]]
            assert int(batch.questions[b, q]) not in found
            middle = batch.pixels[b, 0, SIDE // 2, SIDE // 2]
            found[int(batch.questions[b, q])] = (path, tuple(middle.tolist()))
    wanted = {
        n: (words.encoder(t).ids.tolist(), (index, 0, 0)) for index, p in enumerate(pictures) for n, t in p.questions
    }
    assert found == wanted


def test_too_long_question_names_its_picture():
    asked = [(0, Conversation((Turn("user", f"{IMAGE}\n" + "word " * 60),)))]
    shape = SequenceShape(length=40, images=1, questions=2)
    with pytest.raises(DataError) as error:
        list(question_batches([ImageQuestions("p0", png(), asked)], processor(), shape, rows=1))
    one_line(error, "p0")
