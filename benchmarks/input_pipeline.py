"""Input rate on one core: JPEG files to normalized 336-pixel arrays with tokens, ours against a torch DataLoader.

    python -m benchmarks.input_pipeline [--images 1024] [--rounds 3] [--tokenizer FOLDER]

Both read the same images (640 x 480) and all conversations about them, alternating in one run on one core, and both end
with normalized float32 pixels. Ours: records, tokens with spans, trees, packed sequences, bytes normalized by the jitted
function of training. The peer: torch.utils.data.DataLoader in its own process over the files, transformers'
CLIPImageProcessor (with center crop) and the same tokenizer, a conversation at a time. The peer reads an image once for all
its conversations; LLaVA's loader reads it for each, which `by_conversations` accounts for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from benchmarks import mixture_scale


@dataclasses.dataclass(frozen=True)
class Args:
    images: int = 1024
    """Images per round: as many as are packed together, so that each round includes one packing."""
    side: int = 640
    """Width of the images."""
    rounds: int = 3
    """Timed rounds of each way."""
    batch_size: int = 4
    """Sequences in a batch of ours; the peer's batches have as many images as such a batch holds."""
    tokenizer: Path | None = None
    """Folder of a checkpoint's tokenizer; a small one by default."""


def ours(folder: Path, args: Args) -> tuple[Callable[[], int], int]:
    """Return (a function that runs a round and returns its number of images, images in a batch)."""
    import jax
    import jax.numpy as jnp

    from reverie_jax.data.packing import SequenceShape
    from reverie_jax.data.pipeline import TreeBuilder, training_batches
    from reverie_jax.data.records import RecordSource
    from reverie_jax.data.supervision import Supervision
    from reverie_jax.models.architectures import TOWERS
    from reverie_jax.models.vision import normalize

    source = RecordSource(folder / "records")
    processor = mixture_scale.processor(mixture_scale.Args(folder, tokenizer=args.tokenizer))
    processor = dataclasses.replace(processor, image_aspect_ratio="square")
    shape = SequenceShape(length=4096, images=6, edges=4096)
    batches = training_batches(
        source, TreeBuilder(processor, shape, Supervision()), batch_size=args.batch_size, seed=0, threads=1
    )
    ready = iter(batches)
    tower = TOWERS["openai/clip-vit-large-patch14-336"]
    on_device = jax.jit(lambda pixels: normalize(pixels, tower, jnp.float32))

    def one_round() -> int:
        count = 0
        while count < args.images:
            batch = next(ready)
            jax.block_until_ready(on_device(batch.images))
            count += int((batch.flat_tokens > 0).sum())
        return count

    return one_round, 4 * args.batch_size


def peer(folder: Path, args: Args, batch: int) -> Callable[[], int]:
    import torch
    from PIL import Image
    from transformers import CLIPImageProcessor

    side = {"shortest_edge": 336}
    images = CLIPImageProcessor(size=side, crop_size={"height": 336, "width": 336})
    encoder = mixture_scale.processor(mixture_scale.Args(folder, tokenizer=args.tokenizer)).encoder
    texts: dict[str, list[str]] = {}
    for row in json.loads((folder / "reverie.json").read_text("utf-8")):
        text = " ".join(turn["value"] for turn in row["conversations"])
        texts.setdefault(row["image"], []).append(text)

    class Files(torch.utils.data.Dataset):  # type: ignore[type-arg]
        names = sorted(texts)

        def __len__(self) -> int:
            return len(self.names)

        def __getitem__(self, number: int) -> Any:
            name = self.names[number]
            image = Image.open(folder / "images" / name).convert("RGB")
            pixels = images(image, return_tensors="pt")["pixel_values"][0]
            return pixels, [torch.tensor(encoder.tokenizer(text)["input_ids"]) for text in texts[name]]

    def collate(items: list[Any]) -> Any:
        flat = [ids for _, tokens in items for ids in tokens]
        padded = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True)
        return torch.stack([pixels for pixels, _ in items]), padded

    loader = torch.utils.data.DataLoader(Files(), batch_size=batch, shuffle=True, collate_fn=collate)

    def one_round() -> int:
        count = 0
        while count < args.images:
            for pixels, _ in loader:
                count += len(pixels)
                if count >= args.images:
                    break
        return count

    return one_round


def run(args: Args) -> dict[str, Any]:
    """Run the benchmark and return what is printed."""
    from reverie_jax.cli.data import Build

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mixture_scale.make(folder, args.images / mixture_scale.IMAGES, side=args.side)
        with contextlib.redirect_stdout(sys.stderr):
            Build(sources=(str(folder / "reverie.json"),), out=folder / "records").run()
        our_round, batch = ours(folder, args)
        ways = {"ours": our_round, "torch": peer(folder, args, batch)}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for way in ways.values():
            way()
        for _ in range(args.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                count = way()
                rates[name].append(count / (time.perf_counter() - started))
    medians = {way: statistics.median(values) for way, values in rates.items()}
    ratio = medians["ours"] / medians["torch"]
    conversations = mixture_scale.QUESTIONS + mixture_scale.WRONG
    return {
        "images_per_second": {way: round(rate, 1) for way, rate in medians.items()},
        "spread": {way: [round(min(values), 1), round(max(values), 1)] for way, values in rates.items()},
        "ours_over_torch": round(ratio, 2),
        "by_conversations": round(ratio * conversations / mixture_scale.IMAGES, 2),
    }


def main(args: Args) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch

    torch.set_num_threads(1)
    print(json.dumps(run(args)))


if __name__ == "__main__":
    main(tyro.cli(Args))
