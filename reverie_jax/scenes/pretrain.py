"""Pretraining of the shipped model from scratch: `reverie scenes pretrain`.

Two stages, as for LLaVA. The vision tower is trained on the scene graphs (what each patch shows; CLIP learns from captions),
then projector and decoder on conversations, with the tower frozen. Neither sees rationales or evaluation scenes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from reverie_jax.data.packing import Batch, SequenceShape, make_element, pack
from reverie_jax.data.tokenization import Encoder
from reverie_jax.data.tree import Trie
from reverie_jax.models import TextConfig, VisionConfig, VisionLanguageModel, VLMConfig
from reverie_jax.models.layers import Linear
from reverie_jax.models.vision import VisionTower, normalize
from reverie_jax.scenes.corpus import make_plain_conversations
from reverie_jax.scenes.draw import render
from reverie_jax.scenes.graph import CATEGORIES, COLORS, SIZES, TEXTURES, Scene, World, take_scenes
from reverie_jax.train.objective import edge_loss


@dataclasses.dataclass(frozen=True)
class PretrainRecipe:
    """All settings that determine the model's weights.

    Attributes:
        scenes: training scenes, of both stages.
        tower_steps, tower_batch_size, tower_learning_rate: of the vision tower's stage.
        steps, batch_size, learning_rate: of the language stage.
        questions: plain questions about an image.
        absent_share: share of the language stage's questions about absent objects.
        finish_steps, finish_learning_rate, finish_absent_share: of the language stage's last part, which asks almost only
            about what is there, as early instruction data does; the model then says yes too readily.
        sequence: static sizes of a sequence, which holds one image.
        seed: fixes scenes, questions and initial weights.
    """

    scenes: int = 60_000
    tower_steps: int = 2_500
    tower_batch_size: int = 64
    tower_learning_rate: float = 1.5e-3
    steps: int = 4_000
    batch_size: int = 24
    learning_rate: float = 2e-3
    questions: int = 9
    absent_share: float = 0.3
    finish_steps: int = 150
    finish_learning_rate: float = 7e-4
    finish_absent_share: float = 0.01
    sequence: SequenceShape = dataclasses.field(default_factory=lambda: SequenceShape(length=192, images=1, edges=80))
    seed: int = 0


def base_config(vocab: int, image_token_id: int) -> VLMConfig:
    """Return the model's architecture: LLaVA-1.5's, small."""
    return VLMConfig(
        vision=VisionConfig(hidden=128, layers=5, heads=4, mlp=512, image_size=144, patch_size=24),
        text=TextConfig(vocab=vocab, hidden=128, layers=5, heads=4, kv_heads=4, head_dim=32, mlp=384),
        image_token_id=image_token_id,
    )


PATCH_FACTS: tuple[tuple[str, ...], ...] = (CATEGORIES, COLORS, tuple(SIZES), TEXTURES)


def label_patches(scene: Scene, grid: int) -> np.ndarray:
    """Return int32 [grid * grid, 4]: category, color, size, texture of the object over each patch's center; 0 for none."""
    labels = np.zeros((grid, grid, 4), np.int32)
    center = (np.arange(grid) + 0.5) / grid
    for obj in scene.objects:
        left, top, right, bottom = obj.box
        inside = np.ix_((center > top) & (center < bottom), (center > left) & (center < right))
        facts = (obj.category, obj.color, obj.size, obj.texture)
        labels[inside] = [1 + names.index(fact) for names, fact in zip(PATCH_FACTS, facts, strict=True)]
    return labels.reshape(grid * grid, 4)


class PatchHeads(nnx.Module):
    """Linear classifiers of each patch's category, color, size and texture; discarded after the tower's stage."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.sizes = tuple(len(names) + 1 for names in PATCH_FACTS)
        self.out = Linear(width, sum(self.sizes), (None, None), rngs=rngs, bias=True)

    def loss(self, features: jax.Array, labels: jax.Array) -> jax.Array:
        """Return the cross-entropy, summed over the four labels, averaged over patches.

        Args:
            features: float32 [batch, patches, width].
            labels: int32 [batch, patches, 4], as `label_patches` returns them.
        """
        parts = jnp.split(self.out(features), np.cumsum(self.sizes)[:-1], axis=-1)
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(part, labels[..., i]).mean() for i, part in enumerate(parts)
        ]
        return jnp.stack(losses).sum()


def _schedule(learning_rate: float, steps: int) -> optax.GradientTransformation:
    cosine = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 20), steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(cosine, b2=0.98, weight_decay=0.01))


def tower_batches(scenes: list[Scene], recipe: PretrainRecipe, size: int, grid: int) -> Iterator[Any]:
    """Yield batches of images, uint8 [batch, size, size, 3], and their patches' labels, without end."""
    data = grain.MapDataset.source(scenes).seed(recipe.seed).shuffle().repeat()
    data = data.map(lambda scene: (render(scene, size), label_patches(scene, grid)))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)
    return iter(data.to_iter_dataset(options).batch(recipe.tower_batch_size))


def language_batches(scenes: list[Scene], recipe: PretrainRecipe, encoder: Encoder, size: int) -> Iterator[Batch]:
    """Yield batches of one image a sequence: a description and as many plain answers as fit."""

    def build(index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([recipe.seed, index])
        scene, trie = scenes[index % len(scenes)], Trie()
        for conversation in make_plain_conversations(scene, rng, recipe.questions, recipe.absent_share):
            tokens = encoder(conversation)
            more, edges = trie.cost(tokens)
            if len(trie) + more <= recipe.sequence.length and trie.edges + edges <= recipe.sequence.edges:
                trie.add(tokens)
        return make_element(trie.tree(), render(scene, size)[None])

    # A scene's index grows from epoch to epoch, so each visit draws new questions.
    data = grain.MapDataset.range(recipe.steps * recipe.batch_size).map(build)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)
    sequences = pack(data.to_iter_dataset(options), recipe.sequence, encoder.patches)
    return iter(sequences.batch(recipe.batch_size))


def pretrain_tower(model: VisionLanguageModel, scenes: list[Scene], recipe: PretrainRecipe, log: Any) -> None:
    """Train `model.vision` in place to tell what each patch shows.

    Args:
        model: its vision tower is trained.
        scenes: to draw.
        recipe: all settings.
        log: called with (stage, step, loss) every 50 steps.
    """
    config = model.config.vision
    heads = PatchHeads(config.hidden, rngs=nnx.Rngs(recipe.seed + 1))
    tower_graph, tower = nnx.split(model.vision)
    heads_graph, head_state = nnx.split(heads)
    optimizer = _schedule(recipe.tower_learning_rate, recipe.tower_steps)

    def loss_of(params: Any, pixels: jax.Array, labels: jax.Array) -> jax.Array:
        vision: VisionTower = nnx.merge(tower_graph, params[0])
        features = vision(
            normalize(pixels, model.config.vision, jnp.float32), model.config.feature_depths, remat="full"
        )
        return nnx.merge(heads_graph, params[1]).loss(features, labels)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, pixels: jax.Array, labels: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params, pixels, labels)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = (tower, head_state)
    state = optimizer.init(params)
    grid = config.image_size // config.patch_size
    batches = tower_batches(scenes, recipe, config.image_size, grid)
    for number in range(recipe.tower_steps):
        params, state, loss = step(params, state, *next(batches))
        if number % 50 == 0 or number == recipe.tower_steps - 1:
            log("tower", number, float(loss))
    nnx.update(model.vision, params[0])


def pretrain_language(
    model: VisionLanguageModel, encoder: Encoder, scenes: list[Scene], recipe: PretrainRecipe, log: Any
) -> None:
    """Train projector and decoder in place to describe and to answer; the tower is frozen.

    Args:
        model: its projector and decoder are trained.
        encoder: tokenizes conversations.
        scenes: to draw.
        recipe: all settings.
        log: called with (stage, step, loss) every 50 steps.
    """
    is_tower = nnx.PathContains("vision")
    graph, frozen, params = nnx.split(model, is_tower, ...)  # type: ignore[misc]
    optimizer = _schedule(recipe.learning_rate, recipe.steps)

    def loss_of(params: Any, frozen: Any, batch: Batch) -> jax.Array:
        loss = edge_loss(nnx.merge(graph, frozen, params), batch)
        return loss.total / loss.weight

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, frozen: Any, batch: Batch) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params, frozen, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    batches = language_batches(scenes, recipe, encoder, model.config.vision.image_size)
    for number in range(recipe.steps):
        params, state, loss = step(params, state, frozen, next(batches))
        if number % 50 == 0 or number == recipe.steps - 1:
            log("language", number, float(loss))
    nnx.update(model, params)


def finish_recipe(recipe: PretrainRecipe) -> PretrainRecipe:
    """Return the recipe of the language stage's last part."""
    return dataclasses.replace(
        recipe,
        steps=recipe.finish_steps,
        learning_rate=recipe.finish_learning_rate,
        absent_share=recipe.finish_absent_share,
        seed=recipe.seed + 1,
    )


def take_pretraining_scenes(recipe: PretrainRecipe) -> list[Scene]:
    """Return the training scenes of a recipe."""
    return take_scenes(World.skewed(), "train", recipe.seed, recipe.scenes)
