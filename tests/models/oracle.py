"""What the tests of the model are held against: transformers' LLaVA at a size that runs at once, and plain numpy."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from reverie_jax.models import ModelInputs, TextConfig, VisionConfig, VisionLanguageModel, VLMConfig
from reverie_jax.models.vision import CLIP_MEAN, CLIP_STD

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
            self.vision, self.text, feature_layer=self.feature_layer, image_token_id=IMAGE, image_aspect_ratio="square"
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


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, norms and biases too: none of them may go unread."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            noise = torch.randn(tensor.shape, generator=random)
            if tensor.ndim > 1:
                tensor.copy_(noise * 1.2 / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    return module.eval()


def llava(sizes: Sizes = GROUPED, seed: int = 0, **config: object) -> LlavaForConditionalGeneration:
    """transformers' own model, at random."""
    vision, text = sizes.vision, sizes.text
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=vision.hidden,
                num_hidden_layers=vision.layers,
                num_attention_heads=vision.heads,
                intermediate_size=vision.mlp,
                image_size=vision.image_size,
                patch_size=vision.patch_size,
                layer_norm_eps=vision.norm_eps,
                hidden_act=vision.activation,
            ),
            text_config=LlamaConfig(
                vocab_size=text.vocab,
                hidden_size=text.hidden,
                num_hidden_layers=text.layers,
                num_attention_heads=text.heads,
                num_key_value_heads=text.kv_heads,
                head_dim=text.head_dim,
                intermediate_size=text.mlp,
                rms_norm_eps=text.norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
                max_position_embeddings=text.max_positions,
            ),
            image_token_index=IMAGE,
            vision_feature_layer=sizes.feature_layer,
            **config,
        )
    ).eval()
    return randomise(model, seed)


def normalized(pixels: np.ndarray) -> torch.Tensor:
    """[..., S, S, 3] bytes as CLIP wants them in torch: one axis of images, channels second."""
    floats = (pixels.astype(np.float64) / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    return torch.tensor(np.moveaxis(floats.reshape(-1, *pixels.shape[-3:]), -1, 1), dtype=torch.float32)


def picture_rows(
    sizes: Sizes = GROUPED, seed: int = 0, rows: int = 2, images: int = 2, words: int = 9
) -> tuple[np.ndarray, ...]:
    """(tokens, positions, ends, image_slots, pixels) of causal rows: `images` pictures among `words` random words."""
    random = np.random.default_rng(seed)
    patches, side = sizes.vision.patches, sizes.vision.image_size
    length = images * patches + words
    tokens = random.integers(IMAGE + 1, sizes.text.vocab, (rows, length), dtype=np.int32)
    slots = np.full((rows, length), -1, np.int32)
    for row in range(rows):
        start = 0
        for image in range(images):
            start += int(random.integers(1, 4))
            slots[row, start : start + patches] = np.arange(image * patches, (image + 1) * patches)
            start += patches
    tokens[slots >= 0] = IMAGE
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    pixels = random.integers(0, 256, (rows, images, side, side, 3), dtype=np.uint8)
    return tokens, positions, np.full((rows, length), length, np.int32), slots, pixels


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, state, batch, key):
    model = nnx.merge(graph, state)
    return model.decoder.logits(model.hidden(ModelInputs(*batch), key=key))


def logits(model: VisionLanguageModel, batch: tuple[np.ndarray, ...], key: jax.Array | None = None) -> np.ndarray:
    """Our logits at every place. Models of equal sizes share one compilation."""
    return np.asarray(_logits(*nnx.split(model), tuple(map(jnp.asarray, batch)), key))


def llava_logits(model: torch.nn.Module, batch: tuple[np.ndarray, ...]) -> np.ndarray:
    """transformers' logits of the same causal rows."""
    tokens, _, _, _, pixels = batch
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens, dtype=torch.long), pixel_values=normalized(pixels))
    return out.logits.numpy()


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
    """Ours, with every parameter random; a copy, so a test may change it."""
    return nnx.clone(_random(sizes))


def flat(model: VisionLanguageModel) -> dict[str, np.ndarray]:
    """Every parameter by its dotted path."""
    return {
        ".".join(map(str, path)): np.asarray(leaf.get_value())
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def saved(model: LlavaForConditionalGeneration, folder: Path, **options: object) -> Path:
    """As transformers saves it."""
    model.save_pretrained(folder, **options)
    return folder
