"""One optimizer step: a pure function of trainable state, frozen weights and a batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from reverie_jax.data.rows import Batch
from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.train.objective import edge_loss
from reverie_jax.train.recipes import Recipe, Tune


class TrainState(NamedTuple):
    """What a step changes: trainable parameters, optimizer state, and how many steps were taken."""

    params: nnx.State
    optimizer: optax.OptState
    step: Int[Array, ""]


class StepMetrics(NamedTuple):
    """Sums and norms of one step, on device until someone reads them."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    tokens: Int[Array, ""]
    flat_tokens: Int[Array, ""]
    supervised: Int[Array, ""]
    images: Int[Array, ""]


def trainable(path: tuple[Any, ...], value: Any) -> bool:
    """Filter for `nnx.split`: adapters and projector are trained; the rest is frozen."""
    return isinstance(value, nnx.LoRAParam) or (isinstance(value, nnx.Param) and path[0] == "projector")


def tuned(tune: Tune) -> Callable[[tuple[Any, ...], Any], bool]:
    """The filter of what a recipe tunes."""
    if tune == "lora":
        return trainable
    parts = ("projector",) if tune == "projector" else ("projector", "decoder")
    return lambda path, value: isinstance(value, nnx.Param) and path[0] in parts


def adapt(model: VisionLanguageModel, recipe: Recipe) -> None:
    """Fresh adapters as the recipe has them, in place; adapters that the model has already are tuned further.

    Raises:
        UserError: it has some, of another rank or scale than the recipe's, or that tunes none.
    """
    carriers = list(lora.adapters(model))
    if recipe.tune != "lora":
        if carriers:
            raise UserError(f"recipe {recipe.name} tunes no adapters, and the model has some: merge them first")
        return
    for path, layer, a, _ in carriers:
        found = a.shape[-1], layer.lora_scale
        if found != (recipe.rank, recipe.alpha / recipe.rank):
            raise UserError(
                f"the adapter on {path} has rank {found[0]} and scale {found[1]:g}; the recipe asks for rank {recipe.rank}"
                f" and scale {recipe.alpha / recipe.rank:g}: set rank and alpha to go on with it, or merge it first"
            )
        layer.lora_dropout = recipe.dropout
    if carriers:
        return
    lora.attach(
        model, rank=recipe.rank, alpha=recipe.alpha, dropout=recipe.dropout, targets=recipe.targets, seed=recipe.seed
    )


def schedule(peak: float, recipe: Recipe) -> optax.Schedule:
    """Linear warm-up over ceil(warmup * steps), then cosine to zero, as transformers' `cosine`.

    Args:
        recipe: with its steps known.
    """
    warmup = math.ceil(recipe.warmup * recipe.steps)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(recipe.steps, warmup + 1))


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW with the projector's learning rate apart; both follow the same shape."""

    def adam(peak: float) -> optax.GradientTransformation:
        return optax.adamw(schedule(peak, recipe), weight_decay=recipe.weight_decay)

    def labels(params: nnx.State) -> nnx.State:
        return nnx.map_state(lambda path, leaf: "projector" if path[0] == "projector" else "adapter", params)

    by_part = optax.partition({"adapter": adam(recipe.rate), "projector": adam(recipe.projector_rate)}, labels)
    clip = [] if recipe.clip is None else [optax.clip_by_global_norm(recipe.clip)]
    return optax.chain(*clip, by_part)


def loss_and_grads(
    graph: nnx.GraphDef[VisionLanguageModel],
    params: nnx.State,
    frozen: nnx.State,
    batch: Batch,
    key: PRNGKeyArray | None,
    *,
    accumulate: int = 1,
    mean: Literal["tokens", "micro-batches"] = "tokens",
) -> tuple[Float[Array, ""], nnx.State]:
    """Mean loss of a batch, and its gradients by the trainable parameters.

    Args:
        accumulate: micro-batches, one after the other; row r is in micro-batch r % accumulate, so that each is spread over
            the devices as the batch is.
        mean: see `Recipe.mean`.
    """

    def total_of(params: nnx.State, part: Batch, key: PRNGKeyArray | None) -> tuple[Array, Array]:
        loss = edge_loss(nnx.merge(graph, params, frozen), part, key=key)
        weight = jnp.maximum(loss.weight, 1e-6)
        return (loss.total, loss.weight) if mean == "tokens" else (loss.total / weight, jnp.ones((), jnp.float32))

    of_part = jax.value_and_grad(total_of, has_aux=True)
    if accumulate == 1:
        (total, weight), grads = of_part(params, batch, key)
    else:

        def add(sums: Any, numbered: tuple[Batch, Array]) -> tuple[Any, None]:
            part, number = numbered
            (total, weight), grads = of_part(params, part, None if key is None else jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, sums, (total, weight, grads)), None

        split = Batch(*(jnp.moveaxis(x.reshape(len(x) // accumulate, accumulate, *x.shape[1:]), 1, 0) for x in batch))
        zero = jnp.zeros((), jnp.float32)
        none = zero, zero, jax.tree.map(jnp.zeros_like, params)
        (total, weight, grads), _ = jax.lax.scan(add, none, (split, jnp.arange(accumulate, dtype=jnp.uint32)))
    whole = jnp.maximum(weight, 1e-6)
    return total / whole, jax.tree.map(lambda g: (g / whole).astype(g.dtype), grads)


def make_step(
    graph: nnx.GraphDef[VisionLanguageModel], optimizer: optax.GradientTransformation, recipe: Recipe
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, StepMetrics]]:
    """The jitted step. It donates the trainable state, and never the frozen weights."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, StepMetrics]:
        # The key is a function of seed and step alone: a resumed run draws what the uninterrupted one drew.
        key = jax.random.fold_in(jax.random.key(recipe.seed), state.step) if recipe.dropout else None
        loss, grads = loss_and_grads(
            graph, state.params, frozen, batch, key, accumulate=recipe.accumulate, mean=recipe.mean
        )
        with jax.numpy_dtype_promotion("standard"):  # optax raises a Python float to an int32 power
            updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = StepMetrics(
            loss=loss,
            grad_norm=optax.tree.norm(grads),
            # A filled token's subtree is its own index at least; padding says ends = index + 1 at depth 0.
            tokens=((batch.positions > 0).sum() + (batch.flat_tokens > 0).sum()).astype(jnp.int32),
            flat_tokens=batch.flat_tokens.sum().astype(jnp.int32),
            supervised=(batch.weight > 0).sum().astype(jnp.int32),
            images=(batch.flat_tokens > 0).sum().astype(jnp.int32),
        )
        return TrainState(params, opt_state, state.step + 1), metrics

    return step
