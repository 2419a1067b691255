"""Formulas for the cost of a step: FLOPs, bytes of activations, bytes moved. They depend on shapes only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.models.attention.dense import QUERY_CHUNK
from reverie_jax.models.config import VLMConfig
from reverie_jax.train.recipe import Recipe

FLOPS_FORMULA = (
    "decoder: (4 N + 6 N_lora) per token, 6 N for what is trained, two of a layer's experts; head: the same per "
    "supervised token; attention: 6 L H d per layer and token; projector: 6 N, minus 2 N of its first layer; tower and "
    "resampler, forward only: 2 N + 4 P H d per layer and token, thrice that where they are trained"
)
EDGE_CHUNK = 512
"""Supervised tokens of a sequence whose logits exist at the same time (`objective.edge_loss`)."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Number of elements of a step's weight matrices, by part.

    Attributes:
        layers: of the decoder's layers, without experts.
        mlps: those of `layers` that are MLPs.
        experts: of all experts; a token passes two of `count` in its layer.
        adapters: LoRA factors.
        expert_adapters: those of them that are on experts.
        head: LM head.
        projector: of each projector layer.
        patch: patch embedding of the tower.
        tower: of the tower's layers up to the feature layer, as far as one token uses them.
        resampler: of the resampler's layers, each times the tokens of an image that pass it.
    """

    layers: int
    mlps: int
    experts: int
    adapters: int
    expert_adapters: int
    head: int
    projector: tuple[int, ...]
    patch: int
    tower: int
    resampler: int

    @classmethod
    def of(cls, model: VisionLanguageModel) -> Sizes:
        """Count a model's elements, abstract or not; tower layers above the feature layer never run and are left out."""
        layers = dict(lora.linears(model))
        kernels = {
            path: layer.inputs * layer.outputs * (layer.layers or 1) * (layer.experts or 1)
            for path, layer in layers.items()
        }
        factors = [(math.prod(a.shape) + math.prod(b.shape), layer.experts) for _, layer, a, b in lora.adapters(model)]
        config, vision = model.config, model.config.vision

        def total(prefix: str) -> int:
            return sum(size for path, size in kernels.items() if path.startswith(prefix))

        def read(path: str) -> int:
            """Return how many tokens pass a layer of the resampler: keys and values are the tower's, its own, or both."""
            assert vision.resampler is not None
            queries, is_abstractor = vision.resampler.queries, vision.resampler.kind == "abstractor"
            if not path.endswith((".key", ".value")):
                return queries
            return vision.tokens + queries if is_abstractor else vision.tokens if ".cross." in path else queries

        experts = sum(size for path, size in kernels.items() if layers[path].experts)
        return cls(
            layers=total("decoder.layers.") + total("decoder.expert_layers.") - experts,
            mlps=sum(total(f"decoder.layers.{name}") for name in ("gate", "up", "down")),
            experts=experts,
            adapters=sum(size for size, _ in factors),
            expert_adapters=sum(size for size, experts in factors if experts),
            head=total("decoder.head") or config.text.vocab * config.text.hidden,
            projector=tuple(size for path, size in sorted(kernels.items()) if path.startswith("projector.")),
            patch=total("vision.patch"),
            tower=total("vision.layers.")
            * max(config.feature_depths)
            // (vision.layers * (2 if vision.queries else 1)),
            resampler=sum(size * read(path) for path, size in kernels.items() if path.startswith("vision.resampler.")),
        )


def step_flops(config: VLMConfig, sizes: Sizes, recipe: Recipe, *, causal: bool = True) -> int:
    """Return the model FLOPs of one optimizer step on full sequences, over all chips. See `model_flops`.

    Args:
        config: architecture.
        sizes: of its weight matrices.
        recipe: batch size, sequence shape and what is trained.
        causal: count the causal half of the attention map only; a tree of several conversations has fewer pairs.
    """
    shape = recipe.sequence
    tokens = recipe.batch_size * shape.length
    pairs = tokens * shape.length // (2 if causal else 1)
    edges, images = recipe.batch_size * shape.edges, recipe.batch_size * shape.images
    return model_flops(config, sizes, recipe, tokens=tokens, pairs=pairs, edges=edges, images=images)


def model_flops(
    config: VLMConfig, sizes: Sizes, recipe: Recipe, *, tokens: int, pairs: int, edges: int, images: int
) -> int:
    """Return useful FLOPs by `FLOPS_FORMULA`: without recomputation, padding and DPO's reference model.

    Args:
        config: architecture.
        sizes: of its weight matrices.
        recipe: batch size, sequence shape and what is trained.
        tokens: filled positions.
        pairs: pairs of a query and a key that it attends to.
        edges: supervised tokens.
        images: through tower and projector.
    """
    text = config.text
    linear = 6 if recipe.trainable in ("full", "all") else 4
    attention = 12 * pairs * text.heads * text.head_dim * text.layers
    count = text.experts.count if text.experts else 2  # a token passes two of them
    linear_mlp = 6 if recipe.trainable == "mlp" else linear
    weights = linear * (sizes.layers - sizes.mlps) + linear_mlp * (sizes.mlps + sizes.experts * 2 // count)
    adapters = sizes.adapters - sizes.expert_adapters + sizes.expert_adapters * 2 // count
    decoder = (weights + 6 * adapters) * tokens + attention
    return decoder + linear * sizes.head * edges + images * _image_flops(config, sizes, recipe)


def _image_flops(config: VLMConfig, sizes: Sizes, recipe: Recipe) -> int:
    """Return the model FLOPs of tower, resampler and projector for one image."""
    vision, is_trained = config.vision, recipe.trainable == "all"
    weights = queries = 6 if is_trained else 2
    if is_trained and recipe.freeze_image_experts:
        weights = 4  # of the image's tokens: gradients for what they are computed from, not for the weights
    first, *rest = sizes.projector
    projector = config.features * (2 if recipe.trainable == "adapters" else 6) * (first + sum(rest))
    if recipe.trainable != "adapters" and not is_trained:
        projector -= config.features * 2 * first  # the tower needs no gradient
    patch = (2 if weights < 6 else 4) * sizes.patch * vision.patches  # pixels need none
    pairs = (vision.tokens + vision.queries) ** 2 * vision.hidden * max(config.feature_depths)
    if (resampler := vision.resampler) is not None:
        own, tower = resampler.queries**2, resampler.queries * vision.tokens
        per_layer = own + tower // 2 if resampler.kind == "qformer" else own + tower
        pairs += per_layer * resampler.hidden * resampler.layers
    attention = (12 if is_trained else 4) * pairs
    tower = (weights * vision.tokens + queries * vision.queries) * sizes.tower
    return projector + patch + attention + tower + queries * sizes.resampler


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes on one chip in addition to parameters and optimizer state.

    Attributes:
        saved: input of every decoder layer, kept for the backward pass, and of every tower layer where the tower is trained.
        layer: intermediates of one decoder layer and their gradients, while it is recomputed.
        scores: attention scores of one layer on GPUs and CPUs, for the queries computed together: 2.5 float32 maps.
        logits: logits of one chunk of supervised tokens, their softmax and gradient, and the gathered head.
        tower: one layer of the vision tower, and its gradients where it is trained.
        gathered: weights of two layers, one in use and one being gathered.
        gradients: of the trained parameters; twice with micro-batches.
    """

    saved: int
    layer: int
    scores: int
    logits: int
    tower: int
    gathered: int
    gradients: int

    @property
    def total(self) -> int:
        """Peak: layers, head and tower run one after the other, everything else stays."""
        running = max(self.layer + self.scores, self.logits, self.tower)
        return self.saved + self.gathered + self.gradients + running


def activations(
    config: VLMConfig,
    sizes: Sizes,
    recipe: Recipe,
    mesh: Mapping[str, int],
    *,
    width: int,
    trained: int,
) -> Activations:
    """Estimate the bytes of activations, for GPUs and to order candidates of a search.

    Args:
        config: architecture.
        sizes: of its weight matrices.
        recipe: batch size, sequence shape and what is trained.
        mesh: chips by axis.
        width: bytes of an element of the computation's dtype.
        trained: bytes of the trained parameters on a chip.
    """
    text, vision, shape = config.text, config.vision, recipe.sequence
    batch = -(-recipe.batch_size // (recipe.gradient_accumulation_steps * mesh["data"] * mesh["fsdp"]))
    tensor, tokens = mesh["tensor"], batch * shape.length
    heads = text.heads * text.head_dim + 2 * text.kv_heads * text.head_dim
    mlps = 1.0  # of a token; experts have room for more than the two that it takes
    if text.experts is not None:
        factor = (recipe.routing or text.experts.routing).capacity_factor
        mlps = text.experts.count if factor is None else min(text.experts.count, 2 * factor)
    intermediates = 6 * text.hidden + (heads + text.heads * text.head_dim + int(3 * mlps * text.mlp)) // tensor
    chunk = batch * min(shape.edges, EDGE_CHUNK)
    queries = QUERY_CHUNK
    gathered_layer = (sizes.layers + sizes.experts) // text.layers * width // tensor
    is_gathered = mesh["fsdp"] > 1
    image_tokens, floats = vision.tokens + vision.queries, 4
    patches, is_trained = batch * shape.images * image_tokens, recipe.trainable == "all"
    tower = patches * (4 * vision.hidden + vision.mlp // tensor) * width
    tower += 2 * patches * image_tokens * vision.heads // tensor * floats
    return Activations(
        saved=((text.layers + 1) * tokens * text.hidden + is_trained * vision.layers * patches * vision.hidden) * width,
        layer=2 * tokens * intermediates * width,
        scores=int(2.5 * batch * queries * shape.length * text.heads // tensor * floats),
        logits=3 * chunk * text.vocab // tensor * floats + is_gathered * sizes.head * width // tensor,
        tower=tower * (1 + is_trained),
        gathered=2 * gathered_layer if is_gathered else 0,
        gradients=trained * (1 if recipe.gradient_accumulation_steps == 1 else 2),
    )


def collective_bytes(
    config: VLMConfig, sizes: Sizes, recipe: Recipe, mesh: Mapping[str, int], *, width: int, trained: int
) -> int:
    """Estimate the bytes that one chip receives over its links in a step, where no program is compiled.

    In every micro-batch weights are gathered three times (forward, recomputation, backward) and gradients are
    reduce-scattered. Tensor parallelism sums the residual stream after attention and after the MLP, in the same passes.

    Args:
        config: architecture.
        sizes: of its weight matrices.
        recipe: batch size, sequence shape and what is trained.
        mesh: chips by axis.
        width: bytes of an element of weights and computation.
        trained: bytes of the trained parameters on a chip.
    """
    fsdp, tensor, data = mesh["fsdp"], mesh["tensor"], mesh["data"]
    weights = (sizes.layers + sizes.experts + sizes.adapters + sizes.head) * width // tensor
    gathered = 3 * recipe.gradient_accumulation_steps * weights * (fsdp - 1) // fsdp
    summed = recipe.gradient_accumulation_steps * trained * (fsdp - 1) + 2 * trained * (data - 1) // data
    stream = recipe.batch_size // (data * fsdp) * recipe.sequence.length * config.text.hidden * width
    return gathered + summed + 3 * 2 * config.text.layers * 2 * stream * (tensor - 1) // tensor


def memory_bytes(recipe: Recipe, mesh: Mapping[str, int], by_kind: Mapping[str, int], saved: int) -> int:
    """Return a lower bound of the bytes that one chip reads from and writes to its memory in a step.

    The chip's share of the weights, gathered over fsdp, is read forward, recomputed and backward in every micro-batch.
    Trained parameters, gradients and moments are read and written once; the residual stream is written and read once.

    Args:
        recipe: number of micro-batches.
        mesh: chips by axis.
        by_kind: bytes on the chip: frozen, trainable, optimizer.
        saved: `Activations.saved`.
    """
    weights = 3 * recipe.gradient_accumulation_steps * (by_kind["frozen"] + by_kind["trainable"]) * mesh["fsdp"]
    update = 2 * (2 * by_kind["trainable"] + by_kind["optimizer"])
    return weights + update + 2 * recipe.gradient_accumulation_steps * saved
