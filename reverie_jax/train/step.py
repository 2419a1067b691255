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

from reverie_jax.data.packing import Batch
from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.train.objective import (
    Loss,
    answer_sums,
    by_origin,
    cross_entropy,
    edge_logps,
    edge_loss,
    preference_loss,
)
from reverie_jax.train.recipes import Recipe, Trainable


class TrainState(NamedTuple):
    """What a step changes: trainable parameters, optimizer state, and how many steps were taken."""

    params: nnx.State
    optimizer: optax.OptState
    step: Int[Array, ""]


class StepMetrics(NamedTuple):
    """Sums and norms of one step, on device until someone reads them.

    Attributes:
        seen: pairs of a query and a key that it sees.
        sums: of each source its losses and their weights (`source_loss`, `source_weight`), of pairs their `Rewards` and
            their number (`pairs`).
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    tokens: Int[Array, ""]
    flat_tokens: Int[Array, ""]
    supervised: Int[Array, ""]
    images: Int[Array, ""]
    seen: Float[Array, ""]
    sums: dict[str, Float[Array, "..."]]


def lora_and_projector(path: tuple[Any, ...], value: Any) -> bool:
    """Filter for `nnx.split`: adapters and projector are trained; the rest is frozen."""
    return isinstance(value, nnx.LoRAParam) or (isinstance(value, nnx.Param) and path[0] == "projector")


def trainable_filter(trainable: Trainable) -> Callable[[tuple[Any, ...], Any], bool]:
    """The filter of what a recipe tunes."""
    if trainable == "lora":
        return lora_and_projector
    parts = ("projector",) if trainable == "projector" else ("projector", "decoder")
    return lambda path, value: isinstance(value, nnx.Param) and path[0] in parts


def adapt(model: VisionLanguageModel, recipe: Recipe) -> bool:
    """Readies a model for tuning, in place: what is tuned is float32 from here on, and fresh adapters are there as the
    recipe has them; adapters that the model has already are tuned further.

    Returns:
        Whether the model without adapters is the model as it starts.

    Raises:
        UserError: it has some, of another rank or scale than the recipe's, or that tunes none.
    """
    widen(model, recipe)
    carriers = list(lora.adapters(model))
    if recipe.trainable != "lora":
        if carriers:
            raise UserError(f"recipe {recipe.name} tunes no adapters, and the model has some: merge them first")
        return False
    for path, layer, a, _ in carriers:
        found = a.shape[-1], layer.lora_scale
        if found != (recipe.rank, recipe.alpha / recipe.rank):
            raise UserError(
                f"the adapter on {path} has rank {found[0]} and scale {found[1]:g}; the recipe asks for rank {recipe.rank}"
                f" and scale {recipe.alpha / recipe.rank:g}: set rank and alpha to go on with it, or merge it first"
            )
        layer.lora_dropout = recipe.dropout
    if carriers:
        return False
    lora.attach(
        model,
        rank=recipe.rank,
        alpha=recipe.alpha,
        dropout=recipe.dropout,
        targets=recipe.target_modules,
        seed=recipe.seed,
    )
    return True


def widen(model: VisionLanguageModel, recipe: Recipe) -> None:
    """What the recipe tunes in float32, in place: updates of a usual size are lost in bfloat16's rounding.

    The computation stays in the model's own type: layers round their weights when they use them.
    """
    params = nnx.state(model, trainable_filter(recipe.trainable))
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.float32), params))


def schedule(peak: float, recipe: Recipe) -> optax.Schedule:
    """Linear warm-up over ceil(warmup * steps), then cosine to zero, as transformers' `cosine`.

    Args:
        recipe: with its steps known.
    """
    warmup = math.ceil(recipe.warmup_ratio * recipe.steps)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(recipe.steps, warmup + 1))


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW with the projector's learning rate apart; both follow the same shape."""

    def adam(peak: float) -> optax.GradientTransformation:
        return optax.adamw(schedule(peak, recipe), weight_decay=recipe.weight_decay)

    def labels(params: nnx.State) -> nnx.State:
        return nnx.map_state(lambda path, leaf: "projector" if path[0] == "projector" else "adapter", params)

    by_part = optax.partition(
        {"adapter": adam(recipe.learning_rate), "projector": adam(recipe.projector_learning_rate)}, labels
    )
    clip = [] if recipe.max_grad_norm is None else [optax.clip_by_global_norm(recipe.max_grad_norm)]
    return optax.chain(*clip, by_part)


Score = Callable[[nnx.State, Batch, PRNGKeyArray | None], tuple[Loss, dict[str, Array]]]
"""From parameters, a micro-batch and a key: what is minimised, and sums that are reported."""


def loss_and_grads(
    graph: nnx.GraphDef[VisionLanguageModel],
    params: nnx.State,
    frozen: nnx.State,
    batch: Batch,
    key: PRNGKeyArray | None,
    *,
    accumulate: int = 1,
    loss_reduction: Literal["tokens", "micro-batches"] = "tokens",
) -> tuple[Float[Array, ""], nnx.State]:
    """Mean cross-entropy of a batch, and its gradients by the trainable parameters. See `scored`."""

    def score(params: nnx.State, part: Batch, key: PRNGKeyArray | None) -> tuple[Loss, dict[str, Array]]:
        return edge_loss(nnx.merge(graph, params, frozen), part, key=key), {}

    loss, grads, _ = scored(score, params, batch, key, accumulate=accumulate, loss_reduction=loss_reduction)
    return loss, grads


def scored(
    score: Score,
    params: nnx.State,
    batch: Batch,
    key: PRNGKeyArray | None,
    *,
    accumulate: int = 1,
    loss_reduction: Literal["tokens", "micro-batches"] = "tokens",
) -> tuple[Float[Array, ""], nnx.State, dict[str, Array]]:
    """Mean loss of a batch, its gradients by the trainable parameters, and the reported sums.

    Args:
        accumulate: micro-batches, one after the other; row r is in micro-batch r % accumulate, so that each is spread over
            the devices as the batch is.
        mean: see `Recipe.loss_reduction`.
    """

    def total_of(params: nnx.State, part: Batch, key: PRNGKeyArray | None) -> tuple[Array, Any]:
        loss, sums = score(params, part, key)
        if loss_reduction == "tokens":
            return loss.total, (loss.weight, sums)
        return loss.total / jnp.maximum(loss.weight, 1e-6), (jnp.ones((), jnp.float32), sums)

    of_part = jax.value_and_grad(total_of, has_aux=True)
    if accumulate == 1:
        (total, (weight, sums)), grads = of_part(params, batch, key)
    else:

        def one(part: Batch, number: Array) -> Any:
            return of_part(params, part, None if key is None else jax.random.fold_in(key, number))

        def add(before: Any, numbered: tuple[Batch, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, before, one(*numbered)), None

        split = Batch(*(jnp.moveaxis(x.reshape(len(x) // accumulate, accumulate, *x.shape[1:]), 1, 0) for x in batch))
        numbered = split, jnp.arange(accumulate, dtype=jnp.uint32)
        shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], numbered))
        none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        ((total, (weight, sums)), grads), _ = jax.lax.scan(add, none, numbered)
    whole = jnp.maximum(weight, 1e-6)
    return total / whole, jax.tree.map(lambda g: (g.astype(jnp.float32) / whole).astype(g.dtype), grads), sums


def make_step(
    graph: nnx.GraphDef[VisionLanguageModel],
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    *,
    datasets: int = 1,
    reference: nnx.GraphDef[VisionLanguageModel] | None = None,
    shardings: TrainState | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The jitted step. It donates the trainable state, and never the frozen weights.

    Args:
        sources: of the data, for the losses of each.
        reference: `Reference.graph` (preference tuning).
        homes: shardings of the state, which it keeps. Without, XLA chooses those of the new one, and the next step
            compiles again for them.

    Returns:
        step(state, frozen, batch, held=None), with `Reference.held`, to the new state and its metrics.
    """

    def score_pairs(
        params: nnx.State, frozen: nnx.State, held: Any, part: Batch, key: PRNGKeyArray | None
    ) -> tuple[Loss, dict[str, Array]]:
        assert recipe.preference is not None
        if reference is None:
            numbers, stored = held
            before = stored[jnp.clip(jnp.searchsorted(numbers, part.questions), 0, len(numbers) - 1)]
        else:
            before = answer_sums(edge_logps(nnx.merge(reference, nnx.merge_state(params, held), frozen), part), part)
        logps = edge_logps(nnx.merge(graph, params, frozen), part, key=key, remat=recipe.remat)
        loss, rewards = preference_loss(
            answer_sums(logps, part), jax.lax.stop_gradient(before), part, recipe.preference
        )
        return loss, {**rewards._asdict(), "pairs": loss.weight}

    def score_tokens(
        params: nnx.State, frozen: nnx.State, held: Any, part: Batch, key: PRNGKeyArray | None
    ) -> tuple[Loss, dict[str, Array]]:
        logps = edge_logps(nnx.merge(graph, params, frozen), part, key=key, remat=recipe.remat)
        losses, weights = by_origin(jax.lax.stop_gradient(logps), part, datasets)
        return cross_entropy(logps, part), {"source_loss": losses, "source_weight": weights}

    score = score_tokens if recipe.preference is None else score_pairs

    kept = {} if shardings is None else {"out_shardings": (shardings, None)}

    @functools.partial(jax.jit, donate_argnums=0, **kept)
    def step(state: TrainState, frozen: nnx.State, batch: Batch, held: Any = None) -> tuple[TrainState, StepMetrics]:
        # The key is a function of seed and step alone: a resumed run draws what the uninterrupted one drew.
        key = jax.random.fold_in(jax.random.key(recipe.seed), state.step) if recipe.dropout else None
        loss, grads, sums = scored(
            lambda params, part, key: score(params, frozen, held, part, key),
            state.params,
            batch,
            key,
            accumulate=recipe.gradient_accumulation_steps,
            loss_reduction=recipe.loss_reduction,
        )
        moments = state.optimizer
        if recipe.offload:
            moments = jax.device_put(moments, jax.memory.Space.Device)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a Python float to an int32 power
            updates, moments = optimizer.update(grads, moments, state.params)
            params = optax.apply_updates(state.params, updates)
        if recipe.offload:
            moments = jax.device_put(moments, jax.memory.Space.Host)
        metrics = StepMetrics(
            loss=loss,
            grad_norm=optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads)),
            # A filled token's subtree is its own index at least; padding says ends = index + 1 at depth 0.
            tokens=((batch.positions > 0).sum() + (batch.flat_tokens > 0).sum()).astype(jnp.int32),
            flat_tokens=batch.flat_tokens.sum().astype(jnp.int32),
            supervised=(batch.weight > 0).sum().astype(jnp.int32),
            images=(batch.flat_tokens > 0).sum().astype(jnp.int32),
            seen=(batch.ends - jnp.arange(batch.ends.shape[1], dtype=jnp.int32)[None]).astype(jnp.float32).sum(),
            sums=sums,
        )
        return TrainState(params, moments, state.step + 1), metrics

    return step
