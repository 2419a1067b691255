"""A model, a processor and records that train in a second. Run as a module, it trains into the folder it is given."""

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
from flax import nnx
from PIL import Image

from reverie_jax.data.conversation import Conversation, ImageRecord, Turn
from reverie_jax.data.packing import SequenceShape
from reverie_jax.data.processor import Processor
from reverie_jax.models import TextConfig, VisionConfig, VisionLanguageModel, VLMConfig
from reverie_jax.train.recipes import Recipe

CONFIG = VLMConfig(
    vision=VisionConfig(hidden=32, layers=3, heads=2, mlp=48, image_size=24, patch_size=8),
    text=TextConfig(vocab=200, hidden=48, layers=2, heads=4, kv_heads=2, head_dim=12, mlp=64),
    image_token_id=3,
)


class Words:
    """A tokenizer of single characters: ids from 4 up."""

    bos_token_id, eos_token_id, eos_token = 1, 2, "</s>"

    def __call__(self, text, *, return_offsets_mapping):
        spans = [match.span() for match in re.finditer(r"<image>|</s>|.", text, re.DOTALL)]
        special = {"<image>": 3, "</s>": 2}
        ids = [special.get(text[a:b]) or 4 + ord(text[a]) % 190 for a, b in spans]
        return {"input_ids": [1, *ids], "offset_mapping": [(0, 0), *spans]}

    def decode(self, ids, *, skip_special_tokens):
        return "".join(chr((id - 4) % 190) for id in ids if id > 3)


def processor():
    return Processor.of(CONFIG, Words())


def model():
    return VisionLanguageModel(CONFIG, rngs=nnx.Rngs(0))


def flat(model):
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        yield ".".join(map(str, path)), np.asarray(leaf.get_value())


def record(seed):
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(buffer, format="PNG")
    talks = []
    for question in range(int(rng.integers(2, 4))):
        opening = (Turn("user", f"<image>\nq{question}?"), Turn("assistant", "abc"[int(rng.integers(3))]))
        talks.append(
            Conversation((*opening, Turn("user", "why?"), Turn("assistant", "as it is " + "xyz"[question % 3])))
        )
    return ImageRecord(f"r{seed}", buffer.getvalue(), tuple(talks))


class Records(tuple):
    """Records with a name that does not change between processes."""

    def __repr__(self):
        return f"Records({len(self)})"


def records():
    return Records(record(seed) for seed in range(12))


def recipe(**changes):
    base = Recipe(
        name="tiny",
        steps=6,
        batch_size=2,
        sequence=SequenceShape(length=160, images=2, edges=80),
        rank=4,
        alpha=8.0,
        learning_rate=5e-3,
        projector_learning_rate=1e-3,
        save_steps=100,
    )
    return dataclasses.replace(base, **changes)


KILL_RECIPE = recipe(steps=40, save_steps=4)

if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mesh", type=int, nargs=3, default=(1, 1, 1))
    parser.add_argument("--distributed", default="")
    parser.add_argument("--set", nargs="*", default=())
    args = parser.parse_args()

    from reverie_jax.models.sharding import make_mesh
    from reverie_jax.train.distributed import join
    from reverie_jax.train.loop import train
    from reverie_jax.train.recipes import override

    join(args.distributed)
    train(model(), processor(), records(), override(KILL_RECIPE, args.set), args.folder, mesh=make_mesh(*args.mesh))
