"""Scenes as folders of files: pictures, graphs, annotations and POPE questions, as a real data set would come."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reverie_jax.annotate.stages import annotate
from reverie_jax.data.mixture import Mixture, MixtureEntry, read_mixture
from reverie_jax.data.reflection import reflection_conversations
from reverie_jax.data.sources import ReadLog, reverie
from reverie_jax.errors import DataError
from reverie_jax.hosted.interface import RequestImage
from reverie_jax.scenes.annotator import SceneAnnotator, existence
from reverie_jax.scenes.corpus import picture
from reverie_jax.scenes.graph import CATEGORIES, Scene, SceneObject, World, cooccurrence, take

ANNOTATIONS, GRAPHS, PICTURES = "reverie.json", "scenes.jsonl", "images"
POPE_FILES = {split: f"scenes_pope_{split}.json" for split in ("random", "popular", "adversarial")}


def write_pictures(folder: Path, scenes: Sequence[Scene], size: int) -> list[str]:
    """Writes `pictures/NNNNNN.png` and `scenes.jsonl`; returns the file names, one a scene."""
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    names = [f"{index:06d}.png" for index in range(len(scenes))]
    with (folder / GRAPHS).open("w", encoding="utf-8") as graphs:
        for name, scene in zip(names, scenes, strict=True):
            (folder / PICTURES / name).write_bytes(picture(scene, size))
            graphs.write(json.dumps({"image": name, "scene": dataclasses.asdict(scene)}) + "\n")
    return names


def read_graphs(folder: Path) -> dict[str, Scene]:
    """Scene graphs by picture name, as `write_pictures` left them.

    Raises:
        DataError: there are none, or a line is broken.
    """
    path, found = folder / GRAPHS, {}
    if not path.exists():
        raise DataError(f"{path}: no such file; `reverie scenes render` writes one")
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            objects = tuple(SceneObject(**obj) for obj in row["scene"].pop("things"))
            found[row["image"]] = Scene(objects=objects, **row["scene"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: line {number} is no scene graph ({error!r})") from None
    return found


@dataclasses.dataclass(frozen=True)
class Annotated:
    """What annotation made, and what it dropped and why."""

    conversations: int
    dropped: tuple[str, ...]


def write_annotations(
    folder: Path, names: Sequence[str], scenes: Sequence[Scene], questions: int, seed: int
) -> Annotated:
    """Annotates the pictures of a folder through the annotation stages, and writes `reverie.json`."""
    annotator = SceneAnnotator(dict(zip(names, scenes, strict=True)), seed)
    rows, dropped = [], []
    for name in names:
        encoded = (folder / PICTURES / name).read_bytes()
        kept, lost = annotate(RequestImage(name, encoded), annotator, questions)
        dropped += lost
        rows.append((name, name, [talk for reflection in kept for talk in reflection_conversations(reflection)]))
    return Annotated(reverie.write_annotations(folder / ANNOTATIONS, rows), tuple(dropped))


def records(folder: Path) -> Mixture:
    """A folder's annotations as records."""
    return read_mixture([MixtureEntry(file=folder / ANNOTATIONS, images=folder / PICTURES)], ReadLog())


def pope_negatives(scenes: Sequence[Scene], prior: Sequence[Scene], seed: int) -> dict[str, list[list[str]]]:
    """For each split and scene, as many absent categories as the scene has present ones, three at most.

    Args:
        prior: training scenes: they say what is popular, and what appears with what.
    """
    rng = np.random.default_rng([seed, 7])
    table = cooccurrence(list(prior))
    frequency = {c: sum(c in scene.categories for scene in prior) for c in CATEGORIES}
    chosen: dict[str, list[list[str]]] = {split: [] for split in POPE_FILES}
    for scene in scenes:
        absent = [c for c in CATEGORIES if c not in scene.categories]
        count = min(3, len(scene.categories))
        company = {
            c: max(table[present][c] / max(1, frequency[present]) for present in scene.categories) for c in absent
        }
        chosen["random"].append([str(c) for c in rng.permutation(absent)[:count]])
        chosen["popular"].append(sorted(absent, key=lambda c: -frequency[c])[:count])
        chosen["adversarial"].append(sorted(absent, key=lambda c: -company[c])[:count])
    return chosen


def write_pope(folder: Path, names: Sequence[str], scenes: Sequence[Scene], prior: Sequence[Scene], seed: int) -> None:
    """POPE question files for the three splits: the same present things, and the split's absent ones."""
    negatives = pope_negatives(scenes, prior, seed)
    rng = np.random.default_rng([seed, 8])
    present = [[str(c) for c in rng.permutation(scene.categories)[:3]] for scene in scenes]
    for split, file in POPE_FILES.items():
        lines, number = [], 0
        for name, there, missing in zip(names, present, negatives[split], strict=True):
            for category, label in [(c, "yes") for c in there] + [(c, "no") for c in missing]:
                number += 1
                row = {"question_id": number, "image": name, "text": existence(category), "label": label}
                lines.append(json.dumps(row))
        (folder / file).write_text("\n".join(lines) + "\n", "utf-8")


def make_training_set(folder: Path, count: int, *, size: int, questions: int, seed: int) -> Annotated:
    """Training scenes with pictures, graphs and annotations in `folder`."""
    scenes = take(World.annotated(), "train", seed, count)
    names = write_pictures(folder, scenes, size)
    return write_annotations(folder, names, scenes, questions, seed)


def make_test_set(folder: Path, count: int, *, size: int, seed: int) -> list[Scene]:
    """Held-out scenes that break the prior, with pictures, graphs and POPE files in `folder`."""
    scenes = take(World.broken(), "test", seed, count)
    names = write_pictures(folder, scenes, size)
    write_pope(folder, names, scenes, take(World.skewed(), "train", seed, 3000), seed)
    return scenes
