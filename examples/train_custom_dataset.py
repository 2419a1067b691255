"""Train on your own data from Python: make records, tune adapters, ask the tuned model.

A record is an image with its conversations. Any sequence of records is a data set: a list, or a class with `__len__` and
`__getitem__` that reads from wherever yours lies. `reverie data build` is only needed for files that it reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
from pathlib import Path

from PIL import Image, ImageDraw

import reverie_jax
from reverie_jax import Conversation, ImageRecord, Turn

COLORS = ("red", "green", "blue", "yellow")


def make_record(index: int) -> ImageRecord:
    """Return an image of one colored square, with a question, its answer and a rationale."""
    color = COLORS[index % len(COLORS)]
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).rectangle((32, 32, 96, 96), fill=color)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    turns = (
        Turn("user", "<image>\nWhich color is the square?"),
        Turn("assistant", f"It is {color}."),
        Turn("user", "Explain why."),
        Turn("assistant", f"The square in the middle of the image is {color}."),
    )
    # kind="positive": the second answer is a rationale; `supervision` in the recipe can switch it on and off.
    return ImageRecord(f"{index:04d}", buffer.getvalue(), (Conversation(turns, dataset="squares", kind="positive"),))


def main() -> None:
    """Tune for a few steps and print an answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="scenes-base")
    parser.add_argument("--out", type=Path, default=Path("runs/squares"))
    parser.add_argument("--records", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    records = [make_record(index) for index in range(args.records)]
    recipe = dataclasses.replace(
        reverie_jax.find_recipe("scenes-rationales"), steps=args.steps, batch_size=8, save_steps=args.steps
    )
    model, processor = reverie_jax.load_model(args.model)
    result = reverie_jax.finetune(model, processor, records, recipe, args.out)
    print(f"{result.steps} steps on {result.stats.records} images in {result.seconds:.0f} s: {args.out}")

    # The run folder is an adapter: load it on the same model.
    tuned, processor = reverie_jax.load_model(args.model, adapter=args.out)
    question = reverie_jax.ask(records[1].image, "Which color is the square?")
    (answer,) = reverie_jax.generate(tuned, processor, [question], max_new_tokens=16)
    print(f"Which color is the square? {answer}")


if __name__ == "__main__":
    main()
