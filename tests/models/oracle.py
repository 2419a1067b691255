"""References of the model tests (transformers at a tiny size, plain numpy), and the model run on the same inputs."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from transformers import LlavaConfig, LlavaForConditionalGeneration

from reverie_jax.models import ModelInputs, TextConfig, VisionConfig, VisionLanguageModel, VLMConfig
from reverie_jax.models.config import CLIP_MEAN, CLIP_STD
from reverie_jax.models.decoder import KV
from reverie_jax.models.sharding import partition_spec

IMAGE = 7  # the placeholder's id in every tiny model here


@dataclasses.dataclass(frozen=True)
class Sizes:
    """No size follows from another: head_dim is not hidden / heads, key heads are fewer, the vocabulary is odd."""

    vision: VisionConfig
    text: TextConfig
    feature_layer: int = -2

    @property
    def ours(self) -> VLMConfig:
        return VLMConfig(
            self.vision,
            self.text,
            feature_layers=(self.feature_layer,),
            image_token_id=IMAGE,
            image_aspect_ratio="square",
        )


GROUPED = Sizes(
    VisionConfig(hidden=30, layers=3, heads=3, mlp=44, image_size=24, patch_size=8),
    TextConfig(101, 36, 2, 6, 2, 10, 52, norm_eps=1e-3, rope_theta=500.0, max_positions=77),
)
SINGLE_KEY = Sizes(
    VisionConfig(hidden=26, layers=2, heads=2, mlp=38, image_size=18, patch_size=6, norm_eps=1e-3, activation="gelu"),
    TextConfig(53, 27, 3, 3, 1, 6, 46, norm_eps=1e-5, rope_theta=1e6),
    feature_layer=-1,
)


def randomize(module: torch.nn.Module, seed: int, *, half: bool = False) -> torch.nn.Module:
    """Make every parameter random, norms and biases too, so that none can be ignored.

    Args:
        half: Round to values that float16 and bfloat16 represent exactly, so that a file's dtype loses nothing.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            noise = torch.randn(tensor.shape, generator=random)
            if tensor.ndim > 1:
                noise *= 1.2 / tensor[0].numel() ** 0.5
            else:
                noise = 1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise
            tensor.copy_(torch.where(noise.abs() < 1e-4, 0, noise).bfloat16() if half else noise)
    return module.eval()


def llava(sizes: Sizes = GROUPED, seed: int = 0, **config: object) -> LlavaForConditionalGeneration:
    """Return transformers' own model, randomly initialized."""
    v, t = sizes.vision, sizes.text
    vision = {"hidden_size": v.hidden, "num_hidden_layers": v.layers, "num_attention_heads": v.heads}
    vision |= {"intermediate_size": v.mlp, "image_size": v.image_size, "patch_size": v.patch_size}
    vision |= {"layer_norm_eps": v.norm_eps, "hidden_act": v.activation}
    text = {"model_type": "llama", "hidden_size": t.hidden, "num_hidden_layers": t.layers, "intermediate_size": t.mlp}
    text |= {"num_attention_heads": t.heads, "num_key_value_heads": t.kv_heads, "head_dim": t.head_dim}
    text |= {"vocab_size": t.vocab, "rms_norm_eps": t.norm_eps, "max_position_embeddings": t.max_positions}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": t.rope_theta}}
    options = {"image_token_index": IMAGE, "vision_feature_layer": sizes.feature_layer} | config
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **options)).eval()
    return randomize(model, seed)


def saved(model: torch.nn.Module, folder: Path, **options: object) -> Path:
    """Save a model as transformers does."""
    model.save_pretrained(folder, **options)
    return folder


def normalized(images: np.ndarray, *, siglip: bool = False) -> torch.Tensor:
    """Return [..., S, S, 3] bytes as CLIP's or SigLIP's input in torch: one axis of images, channels second."""
    mean, std = (np.full(3, 0.5),) * 2 if siglip else (np.array(CLIP_MEAN), np.array(CLIP_STD))
    floats = (images.astype(np.float64) / 255 - mean) / std
    return torch.tensor(np.moveaxis(floats.reshape(-1, *images.shape[-3:]), -1, 1), dtype=torch.float32)


def image_inputs(
    sizes: Sizes = GROUPED,
    seed: int = 0,
    images: tuple[int, ...] = (2, 2),
    words: int = 9,
    image: int = IMAGE,
    tokens: int | None = None,
) -> ModelInputs:
    """Return causal sequences of equal length with random words.

    Args:
        images: Number of images in each sequence.
        words: Number of words in the sequence with most images.
        image: Placeholder id.
        tokens: Of an image; the tower's patches by default.
    """
    random = np.random.default_rng(seed)
    patches, side = tokens or sizes.vision.patches, sizes.vision.image_size
    count, most = len(images), max(images)
    length = most * patches + words
    words_and_images = random.integers(IMAGE + 1, sizes.text.vocab, (count, length), dtype=np.int32)
    slots = np.full((count, length), -1, np.int32)
    for row, shown in enumerate(images):
        start = 0
        for n in range(shown):
            start += int(random.integers(1, 4))
            slots[row, start : start + patches] = np.arange(n * patches, (n + 1) * patches)
            start += patches
    words_and_images[slots >= 0] = image
    pixels = random.integers(0, 256, (count, most, side, side, 3), dtype=np.uint8)
    positions = np.tile(np.arange(length, dtype=np.int32), (count, 1))
    return ModelInputs(words_and_images, positions, np.full((count, length), length, np.int32), slots, pixels)


@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def _logits(graph, state, inputs, key):
    model = nnx.merge(graph, state)
    return model.decoder.logits(model.hidden(inputs, key=key))


def logits(model: VisionLanguageModel, inputs: ModelInputs, key: jax.Array | None = None) -> np.ndarray:
    """Return the model's logits at every position. Models of equal sizes share one compilation."""
    config = model.config
    # Nothing else is computed with.
    model.config = dataclasses.replace(
        VLMConfig(
            config.vision, config.text, feature_layers=config.feature_layers, feature_select=config.feature_select
        ),
        **{
            name: getattr(config, name)
            for name in ("projector", "projector_activation", "projector_bias", "projector_norm_eps")
        },
    )
    graph, state = nnx.split(model)
    model.config = config
    # Through the host: an array on a named device compiles the program anew.
    return np.asarray(_logits(graph, jax.tree.map(np.asarray, state), jax.tree.map(jnp.asarray, inputs), key))


STEPS = 24
"""Tokens that `greedy` decodes."""


@functools.partial(jax.jit, static_argnums=(0, 3), compiler_options={"xla_backend_optimization_level": 0})
def greedy(graph, state, inputs, banned=None):
    """Return the logits of causal sequences, and `STEPS` greedy tokens other than the banned one."""
    model: VisionLanguageModel = nnx.merge(graph, state)
    hidden, prefix = model.prefill(inputs)
    logits = model.decoder.logits(hidden)
    rows, length = inputs.tokens.shape
    empty = jnp.zeros((*prefix.k.shape[:2], 1, STEPS, *prefix.k.shape[3:]), prefix.k.dtype)
    leaves = jnp.full((rows, 1), length - 1, jnp.int32)

    def step(carry, number):
        token, suffix = carry
        positions = jnp.broadcast_to(length + number, (rows, 1))
        out, suffix = model.extend(token, positions, leaves, inputs.ends, number, prefix, suffix)
        return (best(out), suffix), token[:, 0]

    def best(logits):
        logits = logits if banned is None else logits.at[..., banned].set(-jnp.inf)
        return logits.argmax(-1).astype(jnp.int32)

    _, tokens = jax.lax.scan(step, (best(logits[:, -1:]), KV(empty, empty)), jnp.arange(STEPS, dtype=jnp.int32))
    return logits, tokens.T


def llava_logits(model: torch.nn.Module, inputs: ModelInputs) -> np.ndarray:
    """Return transformers' logits of the same causal sequences."""
    shown = (inputs.image_slots.max(axis=1) + 1) * inputs.images.shape[1] // (inputs.image_slots.max() + 1)
    images = inputs.images[np.arange(inputs.images.shape[1])[None] < shown[:, None]]
    siglip = model.config.vision_config.model_type.startswith("siglip")
    with torch.no_grad():
        ids = torch.tensor(inputs.tokens, dtype=torch.long)
        return model(input_ids=ids, pixel_values=normalized(images, siglip=siglip)).logits.numpy()


def differing(first: object, second: object) -> set[str]:
    """Return the names of settings in which two configurations of transformers differ, tower and decoder included."""
    a, b, found = first.to_dict(), second.to_dict(), set()
    for part in (None, "text_config", "vision_config"):
        x, y = (a, b) if part is None else (a.pop(part), b.pop(part))
        found |= {key for key in x.keys() | y.keys() if x.get(key) != y.get(key) and key != part}
    own = {key for key in found if key.startswith("reverie_")}
    return found - own - {"text_config", "vision_config", "_name_or_path"}


@functools.cache
def _random(sizes: Sizes) -> VisionLanguageModel:
    graph, state = nnx.split(nnx.eval_shape(lambda: VisionLanguageModel(sizes.ours, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(0)
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        noise = 0.3 * random.standard_normal(leaf.shape)
        if path[-1] == "scale":
            noise += 1
        elif path[-1] not in ("bias", "cls"):
            noise *= 4 * leaf.shape[-2] ** -0.5
        filled.append((path, leaf.replace(jnp.asarray(noise, jnp.float32))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def random_model(sizes: Sizes = GROUPED) -> VisionLanguageModel:
    """Return our model with every parameter random; a copy, which a test may change."""
    return nnx.clone(_random(sizes))


def flat(model: VisionLanguageModel) -> dict[str, np.ndarray]:
    """Return every parameter by its dotted path."""
    return {
        ".".join(map(str, path)): np.asarray(leaf.get_value())
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def assert_close(actual: object, expected: object, atol: float = 1e-4) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=atol)


def assert_same(first: VisionLanguageModel, second: VisionLanguageModel) -> None:
    """Check that two models have one configuration and the same parameters, bit for bit."""
    assert first.config == second.config
    a, b = flat(first), flat(second)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def assert_sharded(mesh: Mesh, model: VisionLanguageModel) -> None:
    """Check that every parameter is sharded by the rules, and that some are not replicated."""
    sharded = 0
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        sharding = leaf.get_value().sharding
        assert isinstance(sharding, NamedSharding), path
        spec = partition_spec(leaf.shape, leaf.axes, mesh)
        assert sharding == NamedSharding(mesh, spec), path  # by name too: others compare it, and would compile anew
        sharded += not sharding.is_fully_replicated
    assert sharded > 10
