"""Feeding rate on one core: JPEG files to normalised 336-pixel arrays with tokens, ours against a torch DataLoader.

    python -m benchmarks.input_pipeline [--pictures 1024] [--rounds 3] [--tokenizer FOLDER]

Both read the same pictures (640 x 480) and all conversations about them, alternating in one run on one core, and both end
with normalised float32 pixels. Ours: records, tokens with spans, trees, packed rows, bytes normalised by the jitted function
that training uses. The peer: torch.utils.data.DataLoader in its own process over the files, transformers' CLIPImageProcessor
(crop, as it does) and the same tokenizer, a conversation at a time. The peer is given one pass over the picture for all its
conversations; LLaVA's loader makes one for each, which the last number counts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from benchmarks import mixture_scale


@dataclasses.dataclass(frozen=True)
class Args:
    pictures: int = 1024
    """Pictures a round: as many as are packed together, so that each round pays for one packing."""
    rounds: int = 3
    """Timed rounds of each way."""
    rows: int = 4
    """Rows in a batch of ours; the peer's batches have as many pictures as such a batch holds."""
    tokenizer: Path | None = None
    """Folder of a checkpoint's tokenizer; a small one by default."""


def ours(folder: Path, args: Args) -> tuple[Callable[[], int], int]:
    """(a round that returns how many pictures it fed, pictures of a batch)."""
    import jax
    import jax.numpy as jnp

    from reverie_jax.data.packing import SequenceShape
    from reverie_jax.data.pipeline import training_batches
    from reverie_jax.data.records import RecordSource
    from reverie_jax.data.supervision import Supervision
    from reverie_jax.models.vision import normalize

    source = RecordSource(folder / "records")
    processor = mixture_scale.processor(mixture_scale.Args(folder, tokenizer=args.tokenizer))
    processor = dataclasses.replace(processor, aspect="square")
    shape = SequenceShape(length=4096, images=6, edges=4096)
    batches = training_batches(source, processor, shape, rows=args.rows, supervision=Supervision(), seed=0, threads=1)
    ready = iter(batches)
    on_device = jax.jit(lambda pixels: normalize(pixels, jnp.float32))

    def one_round() -> int:
        fed = 0
        while fed < args.pictures:
            batch = next(ready)
            jax.block_until_ready(on_device(batch.pixels))
            fed += int((batch.flat_tokens > 0).sum())
        return fed

    return one_round, 4 * args.rows


def peer(folder: Path, args: Args, batch: int) -> Callable[[], int]:
    import torch
    from PIL import Image
    from transformers import CLIPImageProcessor

    side = {"shortest_edge": 336}
    images = CLIPImageProcessor(size=side, crop_size={"height": 336, "width": 336})
    encoder = mixture_scale.processor(mixture_scale.Args(folder, tokenizer=args.tokenizer)).encoder
    talks: dict[str, list[str]] = {}
    for row in json.loads((folder / "reverie.json").read_text("utf-8")):
        said = " ".join(turn["value"] for turn in row["conversations"])
        talks.setdefault(row["image"], []).append(said)

    class Files(torch.utils.data.Dataset):  # type: ignore[type-arg]
        names = sorted(talks)

        def __len__(self) -> int:
            return len(self.names)

        def __getitem__(self, number: int) -> Any:
            name = self.names[number]
            image = Image.open(folder / "images" / name).convert("RGB")
            pixels = images(image, return_tensors="pt")["pixel_values"][0]
            return pixels, [torch.tensor(encoder.tokenizer(said)["input_ids"]) for said in talks[name]]

    def collate(items: list[Any]) -> Any:
        flat = [ids for _, talk in items for ids in talk]
        padded = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True)
        return torch.stack([pixels for pixels, _ in items]), padded

    loader = torch.utils.data.DataLoader(Files(), batch_size=batch, shuffle=True, collate_fn=collate)

    def one_round() -> int:
        fed = 0
        while fed < args.pictures:
            for pixels, _ in loader:
                fed += len(pixels)
                if fed >= args.pictures:
                    break
        return fed

    return one_round


def main(args: Args) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        mixture_scale.make(folder, args.pictures / mixture_scale.IMAGES, side=640)
        from reverie_jax.cli import data_options

        data_options.Build((str(folder / "reverie.json"),), folder / "records").run()
        our_round, batch = ours(folder, args)
        ways = {"ours": our_round, "torch": peer(folder, args, batch)}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for way in ways.values():
            way()
        for _ in range(args.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                fed = way()
                rates[name].append(fed / (time.perf_counter() - started))
    medians = {way: statistics.median(found) for way, found in rates.items()}
    ratio = medians["ours"] / medians["torch"]
    talks = mixture_scale.QUESTIONS + mixture_scale.WRONG
    print(
        json.dumps(
            {
                "pictures_per_second": {way: round(rate, 1) for way, rate in medians.items()},
                "spread": {way: [round(min(found), 1), round(max(found), 1)] for way, found in rates.items()},
                "ours_over_torch": round(ratio, 2),
                "by_conversations": round(ratio * talks / mixture_scale.IMAGES, 2),
            }
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
