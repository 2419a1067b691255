"""Folders of scenes: graphs, POPE files, annotations."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reverie_jax.errors import DataError
from reverie_jax.hosted.interface import Request, RequestImage, RequestSettings
from reverie_jax.scenes import dataset, provider
from reverie_jax.scenes.graph import CATEGORIES, PARTNER, World, take_scenes
from tests.scenes.makers import TEST, TRAIN, is_right

SPLITS = ("random", "popular", "adversarial")


@pytest.fixture(scope="module")
def test_set(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("test_set")
    names = dataset.write_images(folder, TEST[:12], 16)
    dataset.write_pope_files(folder, names, TEST[:12], TRAIN, seed=0)
    return folder


def pope_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"scenes_pope_{split}.json").read_text().splitlines()]


def test_graphs_are_read_as_written(test_set):
    graphs = dataset.read_graphs(test_set)
    assert list(graphs.values()) == TEST[:12]
    assert all((test_set / "images" / name).read_bytes().startswith(b"\x89PNG") for name in graphs)


def test_missing_and_broken_graphs_are_named(tmp_path):
    with pytest.raises(DataError, match=dataset.GRAPHS):
        dataset.read_graphs(tmp_path)
    (tmp_path / dataset.GRAPHS).write_text('{"image": "a.png"}\n')
    with pytest.raises(DataError, match=f"{dataset.GRAPHS}.* 1 "):
        dataset.read_graphs(tmp_path)


def test_the_provider_replies_from_the_graphs_of_a_folder(test_set):
    opened = provider.provider(str(test_set), None, RequestSettings(), {})
    name, scene = next(iter(dataset.read_graphs(test_set).items()))
    request = Request("questions", RequestImage(name, b""), {"count": "3", "confusing": "1"})
    rows = json.loads(asyncio.run(opened.ask(request)).text)["questions"]
    assert len(rows) == 3
    assert all(is_right(scene, row["question"], row["correct_answer"]) for row in rows)


def test_pope_files_agree_with_the_graphs_and_share_their_positives(test_set):
    graphs = dataset.read_graphs(test_set)
    positives = []
    for split in SPLITS:
        rows = pope_rows(test_set, split)
        assert all(is_right(graphs[row["image"]], row["text"], row["label"].capitalize()) for row in rows)
        assert [row["question_id"] for row in rows] == list(range(1, len(rows) + 1))
        for name, scene in graphs.items():
            about = [row for row in rows if row["image"] == name]
            labels = [row["label"] for row in about]
            assert labels.count("yes") == labels.count("no") == min(3, len(scene.categories))
            assert len({row["text"] for row in about}) == len(about)
        positives.append([(row["image"], row["text"]) for row in rows if row["label"] == "yes"])
    assert positives[0] == positives[1] == positives[2]


def test_negatives_are_absent_and_as_tempting_as_the_split_says():
    chosen = dataset.choose_negatives(TEST, TRAIN, seed=0)
    seen = [{item.category for item in scene.objects} for scene in TRAIN]
    frequency = {c: sum(c in s for s in seen) for c in CATEGORIES}
    both = {(a, b): sum(a in s and b in s for s in seen) for a in CATEGORIES for b in CATEGORIES}
    tempting = []
    for number, scene in enumerate(TEST):
        present = {item.category for item in scene.objects}
        absent = [c for c in CATEGORIES if c not in present]
        # How often each absent object stood beside the present one that it goes with most.
        together = {c: max(both[p, c] / frequency[p] for p in present) for c in absent}
        negatives = {split: names[number] for split, names in chosen.items()}
        for names in negatives.values():
            assert len(set(names)) == len(names) == min(3, len(present))
            assert not set(names) & present
        for split, score in (("popular", frequency), ("adversarial", together)):
            best = sorted((score[c] for c in absent), reverse=True)[: len(negatives[split])]
            assert [score[c] for c in negatives[split]] == best
        if partners := {PARTNER[c] for c in present} - present:
            names = set(negatives["adversarial"])
            tempting.append(len(names & partners) / min(len(names), len(partners)))
    assert np.mean(tempting) > 0.95


def test_a_training_folder_becomes_records(tmp_path):
    result = dataset.make_training_set(tmp_path, 4, size=16, questions=3, seed=0)
    records = list(dataset.read_records(tmp_path))
    assert (len(records), result.dropped) == (4, ())
    assert sum(len(record.conversations) for record in records) == result.conversations
    graphs = dataset.read_graphs(tmp_path)
    assert list(graphs.values()) == take_scenes(World.annotated(), "train", 0, 4)
    for record in records:
        assert record.image == (tmp_path / "images" / record.id).read_bytes()
        for conversation in record.conversations:
            question, answer, *rationale = conversation.turns
            assert is_right(graphs[record.id], question.text.removeprefix("<image>\n"), answer.text)
            assert len(rationale) == 2
