"""A model, a processor and records that train in a second. Run as a module, it trains into the folder it is given."""

import argparse
import dataclasses
import functools
import io
import re
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from reverie_jax.data.conversation import Conversation, ImageRecord, Turn
from reverie_jax.data.packing import SequenceShape
from reverie_jax.data.processor import Processor
from reverie_jax.eval.benchmarks.pope import Pope
from reverie_jax.evaluators import BenchmarkEvaluator, SampleEvaluator
from reverie_jax.models import TextConfig, VisionConfig, VisionLanguageModel, VLMConfig
from reverie_jax.models.config import ResamplerConfig
from reverie_jax.models.sharding import make_mesh
from reverie_jax.train import loop
from reverie_jax.train.distributed import join
from reverie_jax.train.loop import TrainResult, finetune
from reverie_jax.train.metrics import MetricsLog, read_metrics
from reverie_jax.train.objective import edge_loss
from reverie_jax.train.recipe import Recipe
from reverie_jax.train.recipes import override
from reverie_jax.train.step import accumulate_gradients, make_step, trainable_filter

CONFIG = VLMConfig(
    vision=VisionConfig(hidden=32, layers=3, heads=2, mlp=48, image_size=24, patch_size=8),
    text=TextConfig(vocab=200, hidden=48, layers=2, heads=4, kv_heads=2, head_dim=12, mlp=64),
    image_token_id=3,
)

_VISION, _BRIDGE = CONFIG.vision, {"queries": 4, "hidden": 32, "layers": 2, "heads": 2, "mlp": 40, "norm_eps": 1e-5}
_SISTER = {"projector": "linear", "feature_layers": (-1,), "feature_select": "full"}
SYSTEMS = {
    "llava": CONFIG,
    "minigpt4": dataclasses.replace(
        CONFIG,
        vision=dataclasses.replace(
            _VISION,
            qkv="fused",
            key_bias=False,
            output_norm=True,
            resampler=ResamplerConfig("qformer", **_BRIDGE),
        ),
        **_SISTER,
    ),
    "mplug-owl": dataclasses.replace(
        CONFIG,
        vision=dataclasses.replace(
            _VISION, qkv="interleaved", output_norm=True, resampler=ResamplerConfig("abstractor", **_BRIDGE)
        ),
        projector_token=True,
        **_SISTER,
    ),
    "muffin": dataclasses.replace(
        CONFIG,
        vision=dataclasses.replace(_VISION, output_norm=True, queries=4, query_positions=9, position_offset=2),
        **_SISTER,
    ),
}


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


def processor(config=CONFIG):
    return Processor.from_config(config, Words())


@functools.cache
def _initial(config):
    return nnx.split(VisionLanguageModel(config, rngs=nnx.Rngs(0)))


def model(config=CONFIG):
    graph, state = _initial(config)
    return nnx.merge(graph, jax.tree.map(jnp.copy, state))


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
    """The recipe of most tests. Runs that change no field of the step share one compiled program."""
    default = Recipe(
        name="tiny",
        steps=8,
        batch_size=4,
        sequence=SequenceShape(length=160, images=2, edges=80),
        rank=4,
        alpha=8.0,
        learning_rate=1e-2,
        projector_learning_rate=1e-3,
        save_steps=3,
    )
    return dataclasses.replace(default, **changes)


class Run(NamedTuple):
    """A finished training run."""

    folder: Path
    model: VisionLanguageModel
    result: TrainResult

    @property
    def losses(self):
        return read_losses(self.folder)


def read_losses(folder):
    """Return the loss of each step; every step must have one line."""
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


_STEPS = {}


def shared_step(graph, optimizer, recipe, *, shardings, **options):
    """`make_step`, traced and compiled once for all runs whose step is the same."""
    same = dataclasses.replace(recipe, name="", epochs=1.0, save_steps=1, keep_checkpoints=1, holdout=0)
    same = dataclasses.replace(same, crop_scale=None, flip=False)
    key = graph, same, *jax.tree.leaves(shardings), *options.items()
    if key not in _STEPS:
        _STEPS[key] = make_step(graph, optimizer, recipe, shardings=shardings, **options)
    return _STEPS[key]


def run(folder, *, on=None, data=None, make_step=shared_step, **changes):
    """Train a model (a new one if none is given) by `recipe(**changes)`; `finetune` gets its own options."""
    net, texts = on or model(), changes.pop("processor", None) or processor()
    names = ("mesh", "resume", "profile", "vision_cache", "evaluators", "tracking")
    options = {name: changes.pop(name) for name in names if name in changes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_step", make_step)
        result = finetune(net, texts, data or records(), recipe(**changes), folder, **options)
    return Run(folder, net, result)


def wait_for(condition, *children, seconds=300):
    """Wait until the condition holds; fail if a child process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened within {seconds} s"
        assert all(child.poll() is None for child in children) or condition(), "a child process ended"
        time.sleep(0.02)


def after_step(patch, number, action):
    """Call `action` in the training loop after a step's metrics are written."""
    write = MetricsLog.write

    def write_and_act(self, step, values):
        write(self, step, values)
        if step == number:
            action()

    patch.setattr(MetricsLog, "write", write_and_act)


def trained(model, trainable="lora"):
    """Return the (trained, frozen) arrays of a model."""
    _, params, rest = nnx.split(model, trainable_filter(recipe(trainable=trainable)), ...)
    return [np.asarray(x) for x in jax.tree.leaves(params)], [np.asarray(x) for x in jax.tree.leaves(rest)]


def assert_equal(arrays, others):
    """Check bit equality."""
    assert len(arrays) == len(others) > 0
    for a, b in zip(arrays, others, strict=True):
        np.testing.assert_array_equal(a, b)


def loss_and_grads(graph, params, frozen, batch, *, steps=1, loss_reduction="tokens"):
    """Return the mean cross-entropy of a batch and its gradients."""

    def loss_of(params, part, key):
        return edge_loss(nnx.merge(graph, params, frozen), part, key=key), {}

    return accumulate_gradients(loss_of, params, batch, None, steps=steps, loss_reduction=loss_reduction)[:2]


def evaluators(pope):
    """POPE every three steps, two samples every four."""
    data = Pope().load(pope)
    return BenchmarkEvaluator([(Pope(), data)], 3, "pope/random/accuracy"), SampleEvaluator(records(), 4, 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mesh", type=int, nargs=3, default=(1, 1, 1))
    parser.add_argument("--distributed", default="")
    parser.add_argument("--set", nargs="*", default=())
    parser.add_argument("--pope", type=Path, help="evaluate during training on the benchmark in this folder")
    parser.add_argument(
        "--hang-after", type=int, default=0, help="step after which the process only waits to be killed"
    )
    args = parser.parse_args()
    join(args.distributed)
    if args.hang_after:
        after_step(pytest.MonkeyPatch(), args.hang_after, lambda: time.sleep(3600))
    options = {"mesh": make_mesh(*args.mesh), "evaluators": evaluators(args.pope) if args.pope else ()}
    finetune(model(), processor(), records(), override(recipe(), args.set), args.folder, **options)
