"""Tree against flat: the same conversations through the same step, as trees and one by one, alternating.

    python -m benchmarks.tree_step [--images 64] [--rounds 5]

Prints one JSON object: seconds for all conversations about the images by each way, and their ratio. Both ways run the same
jitted step on sequences that hold whole trees or as many single conversations as fit, so only prefix sharing differs.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from reverie_jax.annotate.in_memory import annotate
from reverie_jax.data.packing import Batch, SequenceShape, make_element, pack, stack
from reverie_jax.data.reflection import reflection_conversations
from reverie_jax.data.tree import build_tree
from reverie_jax.hosted.interface import RequestImage
from reverie_jax.loading import load_model
from reverie_jax.scenes.annotator import SceneAnnotator
from reverie_jax.scenes.corpus import render_png
from reverie_jax.scenes.graph import World, take_scenes
from reverie_jax.train.objective import Loss, edge_loss
from reverie_jax.train.recipes import RECIPES
from reverie_jax.train.step import accumulate_gradients, is_lora_or_projector, make_trainable


@dataclasses.dataclass(frozen=True)
class Args:
    images: int = 64
    """Images, with four questions and their rationales each."""
    rounds: int = 5
    """Timed rounds of each way, alternating."""
    batch_size: int = 8
    """Sequences in a batch."""
    length: int = 512
    """Tokens of a sequence."""


def run(args: Args) -> dict[str, Any]:
    """Run the benchmark and return what is printed."""
    import grain

    model, processor = load_model("scenes-base", dtype=jnp.float32)
    make_trainable(model, dataclasses.replace(RECIPES["scenes-rationales"], dropout=0.0))
    graph, params, frozen = nnx.split(model, is_lora_or_projector, ...)

    @jax.jit
    def step(batch: Batch) -> Any:
        """Return the gradients too: without them XLA would drop the backward pass."""

        def loss(params: Any, part: Batch, key: None) -> tuple[Loss, dict[str, Any]]:
            return edge_loss(nnx.merge(graph, params, frozen), part), {}

        return accumulate_gradients(loss, params, batch, None)

    scenes = take_scenes(World.annotated(), "train", 0, args.images)
    annotator = SceneAnnotator({str(index): scene for index, scene in enumerate(scenes)})
    trees, flat = [], []
    for index, scene in enumerate(scenes):
        encoded = render_png(scene, model.config.vision.image_size)
        pixels = processor.preprocess(encoded, str(index))
        reflections, _ = annotate(RequestImage(str(index), encoded), annotator, 4)
        conversations = [one for reflection in reflections for one in reflection_conversations(reflection)]
        tokens = [processor.encoder(one) for one in conversations]
        trees.append(make_element(build_tree(tokens), pixels))
        flat += [make_element(build_tree([one]), pixels) for one in tokens if (one.weights > 0).any()]

    def batches(elements: list[dict[str, np.ndarray]], images: int) -> list[Batch]:
        shape = SequenceShape(length=args.length, images=images, edges=args.length)
        sequences = list(pack(grain.MapDataset.source(elements).to_iter_dataset(), shape, processor.encoder.patches))
        groups = [sequences[i : i + args.batch_size] for i in range(0, len(sequences), args.batch_size)]
        return [Batch(*map(jnp.asarray, stack(group, args.batch_size))) for group in groups]

    ways = {"tree": batches(trees, 1), "flat": batches(flat, 4)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways:
        jax.block_until_ready(step(ways[way][0]))
    for _ in range(args.rounds):
        for way, work in ways.items():
            started = time.perf_counter()
            for batch in work:
                jax.block_until_ready(step(batch))
            seconds[way].append(time.perf_counter() - started)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        "device": jax.devices()[0].device_kind,
        "images": args.images,
        "conversations": len(flat),
        "sequences": {way: len(work) * args.batch_size for way, work in ways.items()},
        "seconds": {way: round(value, 3) for way, value in medians.items()},
        "flat_over_tree": round(medians["flat"] / medians["tree"], 2),
    }


if __name__ == "__main__":
    print(json.dumps(run(tyro.cli(Args))))
