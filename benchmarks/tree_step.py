"""Tree against flat: the same conversations taught by the same step, as trees and one by one, alternating in one run.

    python -m benchmarks.tree_step [--images 64] [--rounds 5]

Prints one JSON object: seconds for all conversations of the images by each way, and their ratio. Both ways run the same
jitted step on rows that hold whole images' trees or as many single conversations as fit, so only sharing differs.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from reverie_jax.annotate.stages import annotate
from reverie_jax.data.packing import Batch, SequenceShape, make_element, pack, stack
from reverie_jax.data.reflection import reflection_conversations
from reverie_jax.data.tree import build_tree
from reverie_jax.hosted.interface import ImageQuestions
from reverie_jax.loading import load_model
from reverie_jax.scenes.annotator import SceneAnnotator
from reverie_jax.scenes.corpus import render_png
from reverie_jax.scenes.graph import World, take_scenes
from reverie_jax.train.recipes import RECIPES
from reverie_jax.train.step import is_lora_or_projector, loss_and_grads, make_trainable


@dataclasses.dataclass(frozen=True)
class Args:
    images: int = 64
    """Pictures, four questions and their rationales each."""
    rounds: int = 5
    """Timed rounds of each way, alternating."""
    rows: int = 8
    """Rows in a batch."""
    tokens: int = 512
    """Row length of both ways."""


def main(args: Args) -> None:
    import grain

    model, processor = load_model("scenes-base", dtype=jnp.float32)
    make_trainable(model, dataclasses.replace(RECIPES["scenes-rationales"], dropout=0.0))
    graph, params, frozen = nnx.split(model, is_lora_or_projector, ...)
    step = jax.jit(lambda batch: loss_and_grads(graph, params, frozen, batch, None)[0])
    scenes = take_scenes(World.annotated(), "train", 0, args.images)
    annotator = SceneAnnotator({str(index): scene for index, scene in enumerate(scenes)})
    trees, flat = [], []
    for index, scene in enumerate(scenes):
        encoded = render_png(scene, model.config.vision.image_size)
        pixels = processor.preprocess(encoded, str(index))
        kept, _ = annotate(ImageQuestions(str(index), encoded), annotator, 4)
        talks = [processor.encoder(talk) for reflection in kept for talk in reflection_conversations(reflection)]
        trees.append(make_element(build_tree(talks), pixels))
        flat += [make_element(build_tree([talk]), pixels) for talk in talks if (talk.weights > 0).any()]

    def batches(elements: list[dict[str, np.ndarray]], images: int) -> list[Batch]:
        shape = SequenceShape(length=args.tokens, images=images, edges=args.tokens)
        rows = list(pack(grain.MapDataset.source(elements).to_iter_dataset(), shape, processor.encoder.patches))
        groups = [rows[i : i + args.rows] for i in range(0, len(rows), args.rows)]
        return [Batch(*map(jnp.asarray, stack(group, args.rows))) for group in groups]

    ways = {"tree": batches(trees, 1), "flat": batches(flat, 4)}
    spent: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways:
        jax.block_until_ready(step(ways[way][0]))
    for _ in range(args.rounds):
        for way, work in ways.items():
            started = time.perf_counter()
            for batch in work:
                jax.block_until_ready(step(batch))
            spent[way].append(time.perf_counter() - started)
    medians = {way: statistics.median(times) for way, times in spent.items()}
    result = {
        "device": jax.devices()[0].device_kind,
        "images": args.images,
        "conversations": len(flat),
        "rows": {way: len(work) * args.rows for way, work in ways.items()},
        "seconds": {way: round(value, 3) for way, value in medians.items()},
        "flat_over_tree": round(medians["flat"] / medians["tree"], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Args))
