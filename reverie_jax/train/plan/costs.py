"""What a step costs by formula: FLOPs, bytes of activations, bytes moved. All of it follows from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.models.attention import DENSE_UP_TO, QUERY_CHUNK
from reverie_jax.models.config import VLMConfig
from reverie_jax.train.recipes import Recipe

FLOPS_FORMULA = (
    "decoder: (4 N + 6 N_lora) per token, 6 N where tuned in full; head: the same per taught token; attention: 6 L H d a "
    "layer and token; projector: 6 N, less 2 N of its first layer; tower, forward only: 2 N + 4 P H d a layer and patch"
)
EDGE_CHUNK = 512
"""Taught tokens of a row whose logits exist together (`objective.edge_loss`)."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Elements of the matrices that a step multiplies with, by part."""

    layers: int
    adapters: int
    head: int
    projector: tuple[int, ...]
    patch: int
    tower: int

    @classmethod
    def of(cls, model: VisionLanguageModel) -> Sizes:
        """Of a model, abstract or not. Tower layers above the feature layer never run and are not counted."""
        kernels = {path: layer.inputs * layer.outputs * (layer.layers or 1) for path, layer in lora.linears(model)}
        factors = [math.prod(a.shape) + math.prod(b.shape) for _, _, a, b in lora.adapters(model)]
        config = model.config

        def total(prefix: str) -> int:
            return sum(size for path, size in kernels.items() if path.startswith(prefix))

        return cls(
            layers=total("decoder.layers."),
            adapters=sum(factors),
            head=total("decoder.head"),
            projector=tuple(size for path, size in sorted(kernels.items()) if path.startswith("projector.")),
            patch=total("vision.patch"),
            tower=total("vision.layers.") * config.feature_depth // config.vision.layers,
        )


def step_flops(config: VLMConfig, sizes: Sizes, recipe: Recipe, *, causal: bool = True) -> int:
    """Model FLOPs of one optimizer step on filled rows, over all chips. See `model_flops`.

    Args:
        causal: count the half of the attention map that the rule lets through; a tree of several conversations has less.
    """
    row = recipe.sequence
    tokens = recipe.batch_size * row.length
    pairs = tokens * row.length // (2 if causal else 1)
    edges, images = recipe.batch_size * row.edges, recipe.batch_size * row.images
    return model_flops(config, sizes, recipe, tokens=tokens, pairs=pairs, edges=edges, images=images)


def model_flops(
    config: VLMConfig, sizes: Sizes, recipe: Recipe, *, tokens: int, pairs: int, edges: int, images: int
) -> int:
    """Useful FLOPs: recomputation, padding and a preference's reference are not counted. See `FLOPS_FORMULA`.

    Args:
        pairs: of a query and a key that it sees.
        edges: taught tokens.
    """
    text, vision = config.text, config.vision
    linear = 6 if recipe.trainable == "full" else 4
    attention = 12 * pairs * text.heads * text.head_dim * text.layers
    decoder = (linear * sizes.layers + 6 * sizes.adapters) * tokens + attention
    first, *rest = sizes.projector
    projector = images * vision.patches * (4 * first + 6 * sum(rest))
    seen = vision.patches + 1
    tower = (
        2 * sizes.patch * vision.patches + (2 * sizes.tower + 4 * seen * vision.hidden * config.feature_depth) * seen
    )
    return decoder + linear * sizes.head * edges + projector + images * tower


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes on one chip, beside parameters and optimizer state, by what holds them.

    Attributes:
        saved: the residual stream before every decoder layer, which the backward pass starts from.
        layer: inside of one decoder layer and its gradients, while it is recomputed.
        scores: of one layer's attention off a TPU, of as many queries as go together: 2.5 maps of floats.
        logits: of one chunk of taught tokens, their softmax and gradient, and the gathered head.
        tower: one layer of the tower.
        gathered: two layers' weights, one in use and one on its way.
        gradients: of what is trained; twice where micro-batches are summed.
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
        """The peak: layers, head and tower work one after the other, the rest stays."""
        work = max(self.layer + self.scores, self.logits, self.tower)
        return self.saved + self.gathered + self.gradients + work


def activations(
    config: VLMConfig,
    sizes: Sizes,
    recipe: Recipe,
    mesh: Mapping[str, int],
    *,
    width: int,
    trained: int,
) -> Activations:
    """An estimate, for machines that are not compiled for and to order candidates.

    Args:
        mesh: chips by axis.
        width: bytes of an element of the computation's type.
        trained: bytes of the trained parameters on a chip.
    """
    text, vision, row = config.text, config.vision, recipe.sequence
    rows = -(-recipe.batch_size // (recipe.gradient_accumulation_steps * mesh["data"] * mesh["fsdp"]))
    tensor, tokens = mesh["tensor"], rows * row.length
    heads = text.heads * text.head_dim + 2 * text.kv_heads * text.head_dim
    inside = 6 * text.hidden + (heads + text.heads * text.head_dim + 3 * text.mlp) // tensor
    chunk = rows * min(row.edges, EDGE_CHUNK)
    queries = row.length if row.length <= DENSE_UP_TO else QUERY_CHUNK
    whole = sizes.layers // text.layers * width // tensor
    spread = mesh["fsdp"] > 1
    patches, floats = rows * row.images * (vision.patches + 1), 4
    tower = patches * (4 * vision.hidden + vision.mlp // tensor) * width
    return Activations(
        saved=(text.layers + 1) * tokens * text.hidden * width,
        layer=2 * tokens * inside * width,
        scores=int(2.5 * rows * queries * row.length * text.heads // tensor * floats),
        logits=3 * chunk * text.vocab // tensor * floats + spread * sizes.head * width // tensor,
        tower=tower + 2 * patches * (vision.patches + 1) * vision.heads // tensor * floats,
        gathered=2 * whole if spread else 0,
        gradients=trained * (1 if recipe.gradient_accumulation_steps == 1 else 2),
    )


def collective_bytes(
    config: VLMConfig, sizes: Sizes, recipe: Recipe, mesh: Mapping[str, int], *, width: int, trained: int
) -> int:
    """Bytes into one chip a step, by formula, where no compiled program says it.

    Weights are gathered forward, recomputed and backward in every micro-batch, gradients are summed where they are kept,
    and tensor parallelism sums the residual stream after attention and after the MLP, in the same three passes.

    Args:
        width: bytes of an element of the base and of the computation.
        trained: bytes of the trained parameters on a chip.
    """
    fsdp, tensor, data = mesh["fsdp"], mesh["tensor"], mesh["data"]
    whole = (sizes.layers + sizes.adapters + sizes.head) * width // tensor
    gathered = 3 * recipe.gradient_accumulation_steps * whole * (fsdp - 1) // fsdp
    summed = recipe.gradient_accumulation_steps * trained * (fsdp - 1) + 2 * trained * (data - 1) // data
    stream = recipe.batch_size // (data * fsdp) * recipe.sequence.length * config.text.hidden * width
    return gathered + summed + 3 * 2 * config.text.layers * 2 * stream * (tensor - 1) // tensor


def memory_bytes(
    recipe: Recipe,
    mesh: Mapping[str, int],
    by_kind: Mapping[str, int],
    saved: int,
) -> int:
    """Bytes to and from one chip's memory a step, a lower bound.

    The chip's share of the weights, gathered over fsdp, is read forward, recomputed and backward in every micro-batch; what
    is trained, its gradient and its moments are read and written once; the residual stream is written and read once.

    Args:
        by_kind: bytes on the chip: base, trainable, optimizer.
        saved: of `Activations.saved`.
    """
    weights = 3 * recipe.gradient_accumulation_steps * (by_kind["base"] + by_kind["trainable"]) * mesh["fsdp"]
    update = 2 * (2 * by_kind["trainable"] + by_kind["optimizer"])
    return weights + update + 2 * recipe.gradient_accumulation_steps * saved
