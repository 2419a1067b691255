"""Scenes as folders of files: images, graphs, annotations and POPE questions, as a published dataset has them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reverie_jax.annotate.in_memory import annotate
from reverie_jax.data.mixture import Mixture, MixtureEntry, read_mixture
from reverie_jax.data.reflection import reflection_conversations
from reverie_jax.data.sources import ReadLog, reverie
from reverie_jax.errors import DataError
from reverie_jax.hosted.interface import RequestImage
from reverie_jax.scenes.annotator import SceneAnnotator, existence_question
from reverie_jax.scenes.corpus import make_plain_conversations, render_png
from reverie_jax.scenes.graph import CATEGORIES, Scene, SceneObject, Split, World, count_cooccurrences, take_scenes

ANNOTATIONS, GRAPHS, IMAGES = "reverie.json", "scenes.jsonl", "images"
PLAIN_QUESTIONS, PLAIN_ABSENT, PLAIN_SEED = 2, 0.01, 500_000
"""Of plain conversations in a training set: answers beside the description, the share of absent objects, and the seed."""
POPE_FILES = {split: f"scenes_pope_{split}.json" for split in ("random", "popular", "adversarial")}


def write_images(folder: Path, scenes: Sequence[Scene], size: int) -> list[str]:
    """Write `images/NNNNNN.png` and `scenes.jsonl`; return the image names, one for each scene."""
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    names = [f"{index:06d}.png" for index in range(len(scenes))]
    with (folder / GRAPHS).open("w", encoding="utf-8") as graphs:
        for name, scene in zip(names, scenes, strict=True):
            (folder / IMAGES / name).write_bytes(render_png(scene, size))
            graphs.write(json.dumps({"image": name, "scene": dataclasses.asdict(scene)}) + "\n")
    return names


def read_graphs(folder: Path) -> dict[str, Scene]:
    """Read the scene graphs of a folder, by image name, as `write_images` wrote them.

    Raises:
        DataError: the file is missing, or a line is broken.
    """
    path, scenes = folder / GRAPHS, {}
    if not path.exists():
        raise DataError(f"{path}: missing; `reverie scenes render` writes it")
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            objects = tuple(SceneObject(**obj) for obj in row["scene"].pop("objects"))
            scenes[row["image"]] = Scene(objects=objects, **row["scene"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: line {number} is not a scene graph ({error!r})") from None
    return scenes


@dataclasses.dataclass(frozen=True)
class AnnotationResult:
    """The number of conversations written, and the reasons why annotations were dropped."""

    conversations: int
    dropped: tuple[str, ...]


def write_annotations(
    folder: Path, names: Sequence[str], scenes: Sequence[Scene], questions: int, seed: int, plain: Sequence[Scene] = ()
) -> AnnotationResult:
    """Annotate the images of a folder through the annotation stages, and write `reverie.json`.

    Args:
        folder: as `write_images` wrote it.
        names: image names, one for each scene.
        scenes: what the images show.
        questions: questions for each image.
        seed: fixes the annotator's free choices.
        plain: what further images show, which get plain conversations; their names follow the others'.
    """
    annotator = SceneAnnotator(dict(zip(names, scenes, strict=False)), seed)
    rows, dropped = [], []
    for name in names[: len(scenes)]:
        encoded = (folder / IMAGES / name).read_bytes()
        reflections, reasons = annotate(RequestImage(name, encoded), annotator, questions)
        dropped += reasons
        rows.append((name, name, [item for reflection in reflections for item in reflection_conversations(reflection)]))
    for number, (name, scene) in enumerate(zip(names[len(scenes) :], plain, strict=True)):
        rng = np.random.default_rng([seed, number, 19])
        rows.append((name, name, make_plain_conversations(scene, rng, PLAIN_QUESTIONS, PLAIN_ABSENT)))
    return AnnotationResult(reverie.write_annotations(folder / ANNOTATIONS, rows), tuple(dropped))


def read_records(folder: Path) -> Mixture:
    """Read a folder's annotations as records."""
    return read_mixture([MixtureEntry(file=folder / ANNOTATIONS, images=folder / IMAGES)], ReadLog())


def choose_negatives(scenes: Sequence[Scene], prior: Sequence[Scene], seed: int) -> dict[str, list[list[str]]]:
    """Choose the absent categories that POPE asks about: as many as a scene has present ones, three at most.

    Args:
        scenes: to ask about.
        prior: training scenes; they decide what is popular, and what appears together.
        seed: of the random split.

    Returns:
        The categories of each scene, by split.
    """
    rng = np.random.default_rng([seed, 7])
    table = count_cooccurrences(list(prior))
    frequency = {c: sum(c in scene.categories for scene in prior) for c in CATEGORIES}
    chosen: dict[str, list[list[str]]] = {split: [] for split in POPE_FILES}
    for scene in scenes:
        absent = [c for c in CATEGORIES if c not in scene.categories]
        count = min(3, len(scene.categories))
        cooccurrence = {
            c: max(table[present][c] / max(1, frequency[present]) for present in scene.categories) for c in absent
        }
        chosen["random"].append([str(c) for c in rng.permutation(absent)[:count]])
        chosen["popular"].append(sorted(absent, key=lambda c: -frequency[c])[:count])
        chosen["adversarial"].append(sorted(absent, key=lambda c: -cooccurrence[c])[:count])
    return chosen


def write_pope_files(
    folder: Path, names: Sequence[str], scenes: Sequence[Scene], prior: Sequence[Scene], seed: int
) -> None:
    """Write POPE's question files: all splits ask about the same present objects, each about absent ones of its own.

    Args:
        folder: to write to.
        names: image names, one for each scene.
        scenes: what the images show.
        prior: training scenes, see `choose_negatives`.
        seed: of the random choices.
    """
    negatives = choose_negatives(scenes, prior, seed)
    rng = np.random.default_rng([seed, 8])
    present = [[str(c) for c in rng.permutation(scene.categories)[:3]] for scene in scenes]
    for split, file in POPE_FILES.items():
        lines, number = [], 0
        for name, positive, negative in zip(names, present, negatives[split], strict=True):
            for category, label in [(c, "yes") for c in positive] + [(c, "no") for c in negative]:
                number += 1
                row = {"question_id": number, "image": name, "text": existence_question(category), "label": label}
                lines.append(json.dumps(row))
        (folder / file).write_text("\n".join(lines) + "\n", "utf-8")


def make_training_set(
    folder: Path, count: int, *, size: int, questions: int, seed: int, plain: int = 0
) -> AnnotationResult:
    """Write training scenes to a folder: images, graphs and annotations.

    Args:
        folder: to write to.
        count: number of annotated scenes.
        size: side of an image, in pixels.
        questions: annotated questions for each scene.
        seed: of the scenes and annotations.
        plain: number of further scenes, behind the others, with a description and a few plain answers each, as the small
            model was pretrained on. REVERIE too is mixed with the instruction data that its models were trained on before.
    """
    scenes = take_scenes(World.annotated(), "train", seed, count)
    more = take_scenes(World.skewed(), "train", PLAIN_SEED + seed, plain)
    names = write_images(folder, [*scenes, *more], size)
    return write_annotations(folder, names, scenes, questions, seed, more)


def make_test_set(
    folder: Path, count: int, *, size: int, seed: int, world: World | None = None, split: Split = "test"
) -> list[Scene]:
    """Write held-out scenes to a folder: images, graphs and POPE files. Return the scenes.

    Args:
        folder: to write to.
        count: number of scenes.
        size: side of an image, in pixels.
        seed: of the scenes and questions.
        world: distribution of the scenes; `World.broken()` if omitted.
        split: validation or test.
    """
    scenes = take_scenes(world or World.broken(), split, seed, count)
    names = write_images(folder, scenes, size)
    write_pope_files(folder, names, scenes, take_scenes(World.skewed(), "train", seed, 3000), seed)
    return scenes
