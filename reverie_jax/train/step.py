"""Optimizer step: a pure function of trainable state, frozen weights and a batch."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from reverie_jax.data.packing import Batch
from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.models.config import Routing
from reverie_jax.models.moe import RouterStats
from reverie_jax.models.upcycling import upcycle
from reverie_jax.train.objective import (
    Loss,
    add_router_loss,
    answer_logps,
    cross_entropy,
    edge_logps,
    loss_by_dataset,
    preference_loss,
    routed_edge_logps,
    router_sums,
)
from reverie_jax.train.recipe import LossReduction, Recipe


class TrainState(NamedTuple):
    """Everything a step changes: trainable parameters, optimizer state and the number of steps taken."""

    params: nnx.State[Any, Any]
    optimizer: optax.OptState
    step: Int[Array, ""]


class StepMetrics(NamedTuple):
    """Loss, gradient norm and counts of one step, on the device until they are read.

    Attributes:
        tokens: filled positions of all sequences.
        flat_tokens: tokens of the same conversations without prefix sharing.
        supervised: edges with a weight.
        attention_pairs: pairs of a query and a key that it attends to.
        sums: of each dataset its losses and weights (`dataset_loss`, `dataset_weight`, [S] each), or of preference pairs
            their `Rewards` and their number (`pairs`).
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    tokens: Int[Array, ""]
    flat_tokens: Int[Array, ""]
    supervised: Int[Array, ""]
    images: Int[Array, ""]
    attention_pairs: Float[Array, ""]
    sums: dict[str, Float[Array, "..."]]


def is_lora_or_projector(path: tuple[Any, ...], value: Any) -> bool:
    """Return whether a parameter is an adapter's or the projector's. A filter for `nnx.split`."""
    return isinstance(value, nnx.LoRAParam) or (isinstance(value, nnx.Param) and path[0] == "projector")


_MLP = frozenset(("gate", "up", "gate_up", "down"))


def trainable_filter(recipe: Recipe) -> Callable[[tuple[Any, ...], Any], bool]:
    """Return the filter for `nnx.split` that selects the parameters that a recipe trains."""
    trainable = recipe.trainable

    def is_image_expert(path: tuple[Any, ...]) -> bool:
        return path[0] == "vision" and ("image" in path or path[1] in ("patch", "cls", "position"))

    def is_trained(path: tuple[Any, ...], value: Any) -> bool:
        if not isinstance(value, nnx.Param):
            return False
        if "router" in path:
            return trainable in ("mlp", "full", "all") and not recipe.freeze_router
        if recipe.has_adapters:
            return isinstance(value, nnx.LoRAParam) or (trainable == "lora" and path[0] == "projector")
        if trainable == "all":
            return not (recipe.freeze_image_experts and is_image_expert(path))
        if trainable == "mlp" and path[0] == "decoder":
            return not _MLP.isdisjoint(path)
        return path[0] == "projector" or (trainable == "full" and path[0] == "decoder")

    return is_trained


def tunes_tower(params: nnx.State[Any, Any]) -> bool:
    """Return whether trained parameters include some of the vision tower's, adapters on it too."""
    return "vision" in params


def make_trainable(model: VisionLanguageModel, recipe: Recipe) -> bool:
    """Prepare a model for training, in place: make its experts, cast trained parameters to float32, attach adapters.

    Adapters are attached, and MLPs replaced by experts, where the model has none. A model whose tower is tuned loses the
    tower's name: the repository that it names has other weights.

    Returns:
        Whether the model without adapters is the model at the start: its adapters are fresh.

    Raises:
        UserError: existing adapters differ from the recipe in layers, rank or scale, or the recipe trains none; or no layer
            is called as `target_modules` says; or the tower has no image experts to freeze.
    """
    if recipe.freeze_image_experts and not model.config.vision.queries:
        raise UserError(
            f"recipe {recipe.name}: freeze_image_experts=true, but this model's tower has none (Muffin's has); set it to"
            " false"
        )
    if recipe.upcycle is not None and model.config.text.experts is None:
        try:
            upcycle(model, recipe.upcycle, recipe.experts, routing=recipe.routing, seed=recipe.seed)
        except ValueError as error:
            raise UserError(f"recipe {recipe.name}: upcycle={recipe.upcycle}: {error}") from None
    cast_trainable_to_float32(model, recipe)
    adapters = list(lora.adapters(model))
    if adapters and not recipe.has_adapters:
        raise UserError(
            f"recipe {recipe.name}: trainable={recipe.trainable}, but the model has adapters; merge them first"
        )
    is_fresh = recipe.has_adapters and _make_adapters(model, recipe, adapters)
    if tunes_tower(nnx.state(model, trainable_filter(recipe))):
        model.config = dataclasses.replace(model.config, vision_tower="")
    return is_fresh


def _make_adapters(model: VisionLanguageModel, recipe: Recipe, adapters: list[Any]) -> bool:
    """Attach a recipe's adapters, or check those that a model has; return whether they are fresh.

    Raises:
        UserError: as for `make_trainable`.
    """
    rank, scale = recipe.rank, recipe.alpha / recipe.rank
    for path, layer, a, _ in adapters:
        if layer.lora_magnitude is not None:
            raise UserError(f"adapter on {path}: it is DoRA (use_dora), which cannot be trained here; merge it first")
        if (a.shape[-1], layer.lora_scale) != (rank, scale):
            raise UserError(
                f"adapter on {path}: rank {a.shape[-1]} and scale {layer.lora_scale:g}, but recipe {recipe.name} has rank"
                f" {rank} and scale {scale:g}; set rank and alpha to continue it, or merge it first"
            )
        layer.lora_dropout = recipe.dropout
    if adapters:
        _check_targets(model, recipe, [path for path, *_ in adapters])
        return False
    targets, alpha, dropout, seed = recipe.target_modules, recipe.alpha, recipe.dropout, recipe.seed
    try:
        lora.attach(model, rank=rank, alpha=alpha, dropout=dropout, targets=targets, seed=seed)
    except ValueError as error:
        raise UserError(f"recipe {recipe.name}: target_modules={targets}: {error}") from None
    return True


def _check_targets(model: VisionLanguageModel, recipe: Recipe, adapted: list[str]) -> None:
    """Check that a recipe would adapt the layers that have an adapter: a run is loaded by its recipe."""
    targets = [path for path, _ in lora.linears(model) if re.fullmatch(recipe.target_modules, path)]
    if set(targets) != set(adapted):
        pattern = "|".join(path.replace(".", "\\.") for path in adapted)
        raise UserError(
            f"the adapter is on {', '.join(adapted)}, but recipe {recipe.name} adapts {', '.join(targets) or 'nothing'};"
            f" to continue the adapter add 'target_modules={pattern}' to --set, or merge it first"
        )


def cast_trainable_to_float32(model: VisionLanguageModel, recipe: Recipe) -> None:
    """Cast the trained parameters to float32, in place: bfloat16 would round away updates of a usual size.

    Activations keep the model's dtype: layers cast their weights when they use them.
    """
    params = nnx.state(model, trainable_filter(recipe))
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.float32), params))


def schedule(peak: float, recipe: Recipe) -> optax.Schedule:
    """Return the learning rate as a function of the number of steps taken: `Recipe.schedule` after a linear warm-up.

    Args:
        peak: learning rate after the warm-up.
        recipe: must have its number of steps.
    """
    warmup, low = recipe.warmup_steps or math.ceil(recipe.warmup_ratio * recipe.steps), recipe.min_learning_rate
    decay, share = max(recipe.steps - warmup, 1), low / peak if peak else 0.0
    after = {
        "cosine": optax.cosine_decay_schedule(peak, decay, share),
        "cosine-lavis": lambda count: optax.cosine_decay_schedule(peak, max(recipe.steps, 1), share)(count + warmup),
        "linear": optax.linear_schedule(peak, low, decay),
        "constant": optax.constant_schedule(peak),
    }
    rise = optax.linear_schedule(recipe.warmup_learning_rate, peak, warmup)
    return optax.join_schedules([rise, after[recipe.schedule]], [warmup])


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Return AdamW with a learning rate for the projector and one for everything else, on the same schedule."""

    def adam(peak: float) -> optax.GradientTransformation:
        return optax.adamw(schedule(peak, recipe), weight_decay=recipe.weight_decay, mask=is_decayed)

    def is_decayed(params: Any) -> Any:
        return nnx.map_state(lambda path, leaf: path[-1] != "scale" and not path[-1].endswith("bias"), params)

    def labels(params: nnx.State[Any, Any]) -> nnx.State[Any, Any]:
        return nnx.map_state(lambda path, leaf: "projector" if path[0] == "projector" else "adapter", params)

    by_part = optax.partition(
        {"adapter": adam(recipe.learning_rate), "projector": adam(recipe.projector_learning_rate)}, labels
    )
    clip = [] if recipe.max_grad_norm is None else [optax.clip_by_global_norm(recipe.max_grad_norm)]
    return optax.chain(*clip, by_part)


def routing_of(model: VisionLanguageModel, recipe: Recipe) -> Routing | None:
    """Return how a recipe routes tokens to a model's experts; None without experts."""
    experts = model.config.text.experts
    return None if experts is None else recipe.routing or experts.routing


LossFunction = Callable[[nnx.State[Any, Any], Batch, PRNGKeyArray | None], tuple[Loss, dict[str, Array]]]
"""Function of parameters, micro-batch and random key that returns the loss and sums to report."""


def accumulate_gradients(
    loss_function: LossFunction,
    params: nnx.State[Any, Any],
    batch: Batch,
    key: PRNGKeyArray | None,
    *,
    steps: int = 1,
    loss_reduction: LossReduction = "tokens",
) -> tuple[Float[Array, ""], nnx.State[Any, Any], dict[str, Array]]:
    """Return the mean loss of a batch, its gradients with respect to the parameters, and the summed reports.

    Args:
        loss_function: of the parameters and a micro-batch.
        params: trainable parameters.
        batch: of all micro-batches.
        key: random key of dropout; None disables dropout.
        steps: micro-batches, computed one after the other. Sequence i is in micro-batch i % steps, so that each
            micro-batch is spread over the devices as the batch is.
        loss_reduction: see `Recipe.loss_reduction`.
    """

    def loss_of(params: nnx.State[Any, Any], part: Batch, key: PRNGKeyArray | None) -> tuple[Array, Any]:
        loss, sums = loss_function(params, part, key)
        if loss_reduction == "tokens":
            return loss.total, (loss.weight, sums)
        return loss.total / jnp.maximum(loss.weight, 1e-6), (jnp.ones((), jnp.float32), sums)

    loss_and_grads = jax.value_and_grad(loss_of, has_aux=True)
    if steps == 1:
        (total, (weight, sums)), grads = loss_and_grads(params, batch, key)
    else:

        def run_part(part: Batch, index: Array) -> Any:
            return loss_and_grads(params, part, None if key is None else jax.random.fold_in(key, index))

        def add(carry: Any, inputs: tuple[Batch, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, run_part(*inputs)), None

        parts = Batch(*(jnp.moveaxis(x.reshape(len(x) // steps, steps, *x.shape[1:]), 1, 0) for x in batch))
        inputs = parts, jnp.arange(steps, dtype=jnp.uint32)
        shapes = jax.eval_shape(run_part, *jax.tree.map(lambda x: x[0], inputs))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        ((total, (weight, sums)), grads), _ = jax.lax.scan(add, zeros, inputs)
    divisor = jnp.maximum(weight, 1e-6)
    return total / divisor, jax.tree.map(lambda g: (g.astype(jnp.float32) / divisor).astype(g.dtype), grads), sums


def _make_loss(
    graph: nnx.GraphDef[VisionLanguageModel],
    recipe: Recipe,
    datasets: int,
    reference: nnx.GraphDef[VisionLanguageModel] | None,
) -> Callable[
    [nnx.State[Any, Any], nnx.State[Any, Any], Any, Batch, PRNGKeyArray | None], tuple[Loss, dict[str, Array]]
]:
    """Return the recipe's loss as a function of (params, frozen, reference inputs, micro-batch, key)."""

    def policy(
        params: nnx.State[Any, Any], frozen: nnx.State[Any, Any], part: Batch, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B E"], RouterStats | None, Routing | None]:
        model = nnx.merge(graph, params, frozen)
        routing, train_tower = routing_of(model, recipe), tunes_tower(params)
        logps, router = routed_edge_logps(model, part, routing, key=key, train_tower=train_tower, remat=recipe.remat)
        return logps, router, routing

    def preference(
        params: nnx.State[Any, Any],
        frozen: nnx.State[Any, Any],
        reference_inputs: Any,
        part: Batch,
        key: PRNGKeyArray | None,
    ) -> tuple[Loss, dict[str, Array]]:
        assert recipe.preference is not None
        if reference is None:
            numbers, stored = reference_inputs
            before = stored[jnp.clip(jnp.searchsorted(numbers, part.questions), 0, len(numbers) - 1)]
        else:
            initial = nnx.merge(reference, nnx.merge_state(params, reference_inputs), frozen)
            before = answer_logps(edge_logps(initial, part), part)
        logps, router, routing = policy(params, frozen, part, key)
        loss, rewards = preference_loss(
            answer_logps(logps, part), jax.lax.stop_gradient(before), part, recipe.preference
        )
        sums = {**rewards._asdict(), "pairs": loss.weight}
        return add_router_loss(loss, router, routing), {**sums, **router_sums(router)}

    def tokens(
        params: nnx.State[Any, Any],
        frozen: nnx.State[Any, Any],
        reference_inputs: Any,
        part: Batch,
        key: PRNGKeyArray | None,
    ) -> tuple[Loss, dict[str, Array]]:
        logps, router, routing = policy(params, frozen, part, key)
        losses, weights = loss_by_dataset(jax.lax.stop_gradient(logps), part, datasets)
        loss = add_router_loss(cross_entropy(logps, part), router, routing)
        return loss, {"dataset_loss": losses, "dataset_weight": weights, **router_sums(router)}

    return tokens if recipe.preference is None else preference


def _metrics(loss: Float[Array, ""], grads: nnx.State[Any, Any], batch: Batch, sums: dict[str, Array]) -> StepMetrics:
    return StepMetrics(
        loss=loss,
        grad_norm=optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads)),
        # A root has position 0, as padding has: roots are counted by their trees.
        tokens=((batch.positions > 0).sum() + (batch.flat_tokens > 0).sum()).astype(jnp.int32),
        flat_tokens=batch.flat_tokens.sum().astype(jnp.int32),
        supervised=(batch.weight > 0).sum().astype(jnp.int32),
        images=(batch.flat_tokens > 0).sum().astype(jnp.int32),
        attention_pairs=(batch.ends - jnp.arange(batch.ends.shape[1], dtype=jnp.int32)[None]).astype(jnp.float32).sum(),
        sums=sums,
    )


def make_step(
    graph: nnx.GraphDef[VisionLanguageModel],
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    *,
    datasets: int = 1,
    reference: nnx.GraphDef[VisionLanguageModel] | None = None,
    shardings: TrainState | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Return the jitted step. It donates the trainable state, never the frozen weights.

    Args:
        graph: of the model, with `trainable_filter` applied.
        optimizer: of `make_optimizer`.
        recipe: with its number of steps.
        datasets: number of datasets in the data, for the loss of each.
        reference: `ReferenceModel.graph` (preference tuning).
        shardings: of the state, kept by every step. If omitted, XLA chooses the new state's, and the second step compiles
            again for them.

    Returns:
        step(state, frozen, batch, reference_inputs=None), with `ReferenceModel.inputs`, to the new state and its metrics.
    """
    loss_function = _make_loss(graph, recipe, datasets, reference)
    options = {} if shardings is None else {"out_shardings": (shardings, None)}

    @functools.partial(jax.jit, donate_argnums=0, **options)
    def step(
        state: TrainState, frozen: nnx.State[Any, Any], batch: Batch, reference_inputs: Any = None
    ) -> tuple[TrainState, StepMetrics]:
        # The key depends on seed and step only: a resumed run draws what an uninterrupted one draws.
        routing = routing_of(nnx.merge(graph, state.params, frozen), recipe)
        is_random = recipe.dropout or (routing is not None and routing.second_expert == "gumbel")
        key = jax.random.fold_in(jax.random.key(recipe.seed), state.step) if is_random else None
        loss, grads, sums = accumulate_gradients(
            lambda params, part, key: loss_function(params, frozen, reference_inputs, part, key),
            state.params,
            batch,
            key,
            steps=recipe.gradient_accumulation_steps,
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
        return TrainState(params, moments, state.step + 1), _metrics(loss, grads, batch, sums)

    return step
