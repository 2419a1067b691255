"""The language model: a decoder over packed sequences of trees, of any family that `TextConfig` describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from reverie_jax.models.attention import attend, attend_leaves, leaf_visible, rope, rope_frequencies
from reverie_jax.models.attention.rule import is_padding
from reverie_jax.models.config import Routing, TextConfig
from reverie_jax.models.layers import (
    Linear,
    Remat,
    RMSNorm,
    activate,
    make_norm,
    parameter,
    recomputed,
    scan_layers,
)
from reverie_jax.models.moe import RouterStats, apply_experts


class KV(NamedTuple):
    """Keys (rotated) and values of all layers: each [N, B, L, K, d], or [N, B, Q, T, K, d] for the leaves' suffixes."""

    k: Float[Array, "..."]
    v: Float[Array, "..."]


LayersKV = KV | tuple[KV, ...]
"""`KV`; of a decoder whose layers are unstacked a tuple, with one for each layer without the axis N."""


class DecoderOutput(NamedTuple):
    """Normalized hidden states; every layer's keys and values, if they are kept; what the routers of experts did, if any."""

    hidden: Float[Array, "B L D"]
    kv: LayersKV | None
    router: RouterStats | None


class DecoderLayer(nnx.Module):
    """A stack of pre-norm layers: attention, then an MLP or experts; or both side by side."""

    def __init__(
        self, config: TextConfig, *, rngs: nnx.Rngs, layers: int, dtype: DTypeLike, experts: int | None = None
    ):
        self.config = config
        width, q_width, kv_width = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
        stack: Any = {"rngs": rngs, "layers": layers}
        qkv: Any = {**stack, "dtype": dtype, "bias": config.qkv_bias}
        self.norm1 = make_norm(config.norm, width, config.norm_eps, **stack)
        self.norm2 = nnx.data(None) if config.parallel else make_norm(config.norm, width, config.norm_eps, **stack)
        if config.fused_qkv:
            self.qkv = Linear(width, q_width + 2 * kv_width, ("embed", "heads"), **qkv)
        else:
            self.query = Linear(width, q_width, ("embed", "heads"), **qkv)
            self.key = Linear(width, kv_width, ("embed", "heads"), **qkv)
            self.value = Linear(width, kv_width, ("embed", "heads"), **qkv)
        self.query_norm = self.key_norm = nnx.data(None)
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config.norm_eps, **stack)
            self.key_norm = RMSNorm(config.head_dim, config.norm_eps, **stack)
        self.out = Linear(q_width, width, ("heads", "embed"), **stack, bias=config.out_bias, dtype=dtype)
        # Devices that share out the experts have them whole.
        inner = "mlp" if experts is None else None
        mlp: Any = {**stack, "dtype": dtype, "bias": config.mlp_bias, "experts": experts}
        if config.fused_mlp:
            self.gate_up = Linear(width, 2 * config.mlp, ("embed", inner), **mlp)
        else:
            self.gate = Linear(width, config.mlp, ("embed", inner), **mlp) if config.gated else nnx.data(None)
            self.up = Linear(width, config.mlp, ("embed", inner), **mlp)
        self.down = Linear(config.mlp, width, (inner, "embed"), **mlp)
        self.router = nnx.data(None)
        if experts is not None:
            self.router = Linear(width, experts, ("embed", None), **stack)

    def attention_inputs(
        self, x: Float[Array, "B L D"], positions: Int[Array, "B L"], keys: list[PRNGKeyArray | None]
    ) -> tuple[Float[Array, "B L H d"], Float[Array, "B L K d"], Float[Array, "B L K d"]]:
        """Return queries, keys and values of normalized `x`; queries and keys are rotated."""
        config = self.config
        if config.fused_qkv:
            q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
            parts = jnp.split(self.qkv(x, keys[0]), [q_width, q_width + kv_width], axis=-1)
        else:
            parts = [part(x, key) for part, key in zip((self.query, self.key, self.value), keys, strict=True)]
        q, k, v = (part.reshape(*x.shape[:2], -1, config.head_dim) for part in parts)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        frequencies = rope_frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling)
        return rope(q, positions, frequencies), rope(k, positions, frequencies), v

    def mlp(self, x: Float[Array, "... T D"], keys: list[PRNGKeyArray | None]) -> Float[Array, "... T D"]:
        """Apply the MLP to normalized `x`; where the layer has experts, all of them (see `Linear`)."""
        activation = self.config.activation
        if self.config.fused_mlp:
            gate, up = jnp.split(self.gate_up(x, keys[0]), 2, axis=-1)
            inner = activate(activation, gate) * up
        elif self.gate is not None:
            inner = activate(activation, self.gate(x, keys[0])) * self.up(x, keys[1])
        else:
            inner = activate(activation, self.up(x, keys[1]))
        return self.down(inner, keys[2])

    def add_mlp(
        self,
        x: Float[Array, "B L D"],
        attended: Float[Array, "B L D"],
        normed: Float[Array, "B L D"],
        keys: list[PRNGKeyArray | None],
        routing: Routing | None = None,
        used: Bool[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L D"], RouterStats | None]:
        """Return the layer's output from its input, the attention's output and the normalized input; and router stats."""
        y = x + attended
        normed = normed if self.norm2 is None else self.norm2(y)
        if self.router is None:
            return y + self.mlp(normed, keys), None
        key = None if keys[0] is None else jax.random.fold_in(keys[0], 1)
        out, stats = apply_experts(
            lambda tokens: self.mlp(tokens, keys), self.router, normed, routing, key=key, used=used
        )
        return y + out, stats

    def __call__(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        ends: Int[Array, "B L"],
        key: PRNGKeyArray | None = None,
        routing: Routing | None = None,
    ) -> tuple[Float[Array, "B L D"], tuple[Float[Array, "B L K d"], Float[Array, "B L K d"]], RouterStats | None]:
        """Return one layer's output, its keys and values, and what its router did."""
        keys = list(jax.random.split(key, 7)) if key is not None else [None] * 7
        normed = self.norm1(x)
        q, k, v = self.attention_inputs(normed, positions, keys[:3])
        attended = self.out(attend(q, k, v, ends).reshape(*x.shape[:2], -1), keys[3])
        used = ~is_padding(ends) if routing is not None and routing.mask_padding else None
        x, stats = self.add_mlp(x, attended, normed, keys[4:], routing, used)
        return x, (k, v), stats

    def extend(
        self,
        x: Float[Array, "B Q D"],
        positions: Int[Array, "B Q"],
        seen: Bool[Array, "B Q L"],
        step: Int[Array, ""],
        prefix: tuple[Float[Array, "B L K d"], Float[Array, "B L K d"]],
        suffix: tuple[Float[Array, "B Q T K d"], Float[Array, "B Q T K d"]],
    ) -> tuple[Float[Array, "B Q D"], tuple[Float[Array, "B Q T K d"], Float[Array, "B Q T K d"]]]:
        """Return the output of one more token per leaf, and the suffixes with it at index `step`."""
        none: list[PRNGKeyArray | None] = [None] * 3
        normed = self.norm1(x)
        q, k, v = self.attention_inputs(normed, positions, none)
        suffix = tuple(
            jax.lax.dynamic_update_index_in_dim(cache, new.astype(cache.dtype), step, axis=2)
            for cache, new in zip(suffix, (k, v), strict=True)
        )
        attended = self.out(attend_leaves(q, prefix, seen, suffix, step).reshape(*x.shape[:2], -1))
        return self.add_mlp(x, attended, normed, none)[0], suffix

    def append(
        self,
        x: Float[Array, "B N D"],
        positions: Int[Array, "B N"],
        before: Bool[Array, "B N L"],
        start: Int[Array, ""],
        kept: tuple[Float[Array, "B L K d"], Float[Array, "B L K d"]],
    ) -> tuple[Float[Array, "B N D"], tuple[Float[Array, "B L K d"], Float[Array, "B L K d"]]]:
        """Return the output of tokens that continue a sequence, and its KV with theirs from index `start` on."""
        none: list[PRNGKeyArray | None] = [None] * 3
        normed = self.norm1(x)
        q, k, v = self.attention_inputs(normed, positions, none)
        new = k.astype(kept[0].dtype), v.astype(kept[1].dtype)
        kept = (
            jax.lax.dynamic_update_slice_in_dim(kept[0], new[0], start, axis=1),
            jax.lax.dynamic_update_slice_in_dim(kept[1], new[1], start, axis=1),
        )
        own = new[0][:, :, None], new[1][:, :, None]
        attended = self.out(attend_leaves(q, kept, before, own, jnp.int32(0)).reshape(*x.shape[:2], -1))
        return self.add_mlp(x, attended, normed, none)[0], kept


class Decoder(nnx.Module):
    """Token embedding, stacked layers, final norm and LM head.

    Layers without experts are one stack, `layers`, and layers with experts another, `expert_layers`; each may be absent.
    For inference all may be `unstacked` instead, in their order.
    """

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.config = config
        self.embedding = parameter(rngs, (config.vocab, config.hidden), ("vocab", "embed"), scale=0.02, dtype=dtype)
        self.layers = self.expert_layers = nnx.data(None)
        if dense := len(config.dense_layers):
            self.layers = DecoderLayer(config, rngs=rngs, layers=dense, dtype=dtype)
        if experts := config.experts:
            self.expert_layers = DecoderLayer(
                config, rngs=rngs, layers=len(experts.layers), dtype=dtype, experts=experts.count
            )
        self.unstacked: nnx.List[DecoderLayer] | None = nnx.data(None)
        self.norm = make_norm(config.norm, config.hidden, config.norm_eps, rngs=rngs)
        self.head = nnx.data(None)
        if not config.tied_head:
            self.head = Linear(
                config.hidden, config.vocab, ("embed", "vocab"), rngs=rngs, bias=config.head_bias, dtype=dtype
            )

    def unstack(self) -> None:
        """Give each layer arrays of its own, in place, one stack of weights after the other: for inference alone.

        A scan over a stack copies the weights and KV of each layer for every decoded token, on GPUs and CPUs.
        """
        if self.unstacked is not None:
            return
        stacks = {False: self.layers, True: self.expert_layers}
        self.layers = self.expert_layers = nnx.data(None)
        layers = {kind: iter(_unstacked(stacks.pop(kind))) for kind in tuple(stacks)}
        order = [index in self.config.expert_layers for index in range(self.config.layers)]
        self.unstacked = nnx.List([next(layers[kind]) for kind in order])

    def embed(self, tokens: Int[Array, "..."], dtype: DTypeLike) -> Float[Array, "... D"]:
        """Return the embeddings of token ids."""
        return jnp.take(self.embedding[...], tokens, axis=0).astype(dtype)

    def _scan(
        self,
        body: Callable[..., tuple[Array, tuple[KV | None, RouterStats | None]]],
        x: Array,
        *per_layer: Any,
        remat: Remat,
    ) -> tuple[Array, LayersKV | None, RouterStats | None]:
        """Run `body(layer, x, *per_layer)` over all layers in their order; see `layers.scan_layers`."""
        if self.unstacked is not None:
            kvs = []
            for index, layer in enumerate(self.unstacked):
                x, (kv, _) = body(layer, x, *(part[index] for part in per_layer))
                kvs.append(kv)
            return x, tuple(kv for kv in kvs if kv is not None) or None, None
        if self.expert_layers is None and self.layers is not None:
            x, (kv, router) = scan_layers(self.layers, body, x, *per_layer, remat=remat)
            return x, kv, router
        return _scan_mixed(self, body, x, *per_layer, remat=remat)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        ends: Int[Array, "B L"],
        *,
        key: PRNGKeyArray | None = None,
        routing: Routing | None = None,
        keep_kv: bool = False,
        remat: Remat = "full",
    ) -> DecoderOutput:
        """Run all layers.

        Args:
            x: Embeddings (`VisionLanguageModel.embed`).
            positions: As in `ModelInputs`.
            ends: As in `ModelInputs`.
            key: Randomness of LoRA dropout and of routing; None disables both.
            routing: How tokens are routed to experts in training; None is evaluation (see `moe.apply_experts`).
            keep_kv: Return keys and values.
            remat: See `layers.scan_layers`.
        """
        keys = None if key is None else jax.random.split(key, self.config.layers)

        def body(
            layer: DecoderLayer, x: Array, layer_key: PRNGKeyArray | None = None
        ) -> tuple[Array, tuple[KV | None, RouterStats | None]]:
            x, kv, router = layer(x, positions, ends, layer_key, routing)
            return x, (KV(*kv) if keep_kv else None, router)

        x, kv, router = self._scan(body, x, *(() if keys is None else (keys,)), remat=remat)
        return DecoderOutput(self.norm(x), kv, router)

    def extend(
        self,
        x: Float[Array, "B Q D"],
        positions: Int[Array, "B Q"],
        leaves: Int[Array, "B Q"],
        ends: Int[Array, "B L"],
        step: Int[Array, ""],
        prefix: LayersKV,
        suffix: LayersKV,
    ) -> tuple[Float[Array, "B Q D"], LayersKV]:
        """Decode one more token of each leaf; see `VisionLanguageModel.extend`."""
        seen = leaf_visible(leaves, ends)

        def body(layer: DecoderLayer, x: Array, prefix: KV, suffix: KV) -> tuple[Array, tuple[KV, None]]:
            x, kv = layer.extend(x, positions, seen, step, prefix, suffix)
            return x, (KV(*kv), None)

        x, kv, _ = self._scan(body, x, prefix, suffix, remat="none")
        assert kv is not None
        return self.norm(x), kv

    def append(
        self, x: Float[Array, "B N D"], start: Int[Array, ""], kept: LayersKV
    ) -> tuple[Float[Array, "B N D"], LayersKV]:
        """Continue sequences without branches; see `VisionLanguageModel.append`."""
        length = jax.tree.leaves(kept)[0].shape[-3]
        positions = jnp.broadcast_to(start + jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        before = jnp.arange(length, dtype=jnp.int32)[None, None, :] < positions[:, :, None]

        def body(layer: DecoderLayer, x: Array, kept: KV) -> tuple[Array, tuple[KV, None]]:
            x, kv = layer.append(x, positions, before, start, kept)
            return x, (KV(*kv), None)

        x, kv, _ = self._scan(body, x, kept, remat="none")
        assert kv is not None
        return self.norm(x), kv

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Return vocabulary logits in float32."""
        if self.head is None:
            return (hidden @ self.embedding[...].astype(hidden.dtype).T).astype(jnp.float32)
        return self.head(hidden).astype(jnp.float32)


def _unstacked(stack: DecoderLayer | None) -> list[DecoderLayer]:
    """Return the layers of a stack, whose own arrays are freed one by one if nobody else holds them."""
    if stack is None:
        return []
    graph, state = nnx.split(stack)
    variables, tree = jax.tree.flatten(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    del stack, state
    for index, variable in enumerate(variables):
        kind, axes = type(variable), variable.axes[1:]
        variables[index] = [kind(layer, axes=axes) for layer in variable[...]]
    layers: list[DecoderLayer] = [
        nnx.merge(graph, jax.tree.unflatten(tree, own)) for own in zip(*variables, strict=True)
    ]
    for layer in layers:
        for _, part in nnx.iter_modules(layer):
            if isinstance(part, Linear):
                part.layers = None
    return layers


def _pattern(kinds: list[bool]) -> list[tuple[list[bool], int]]:
    """Return an order of layers as (kinds that repeat, how often) one after the other: one pair if it repeats as a whole."""
    for period in range(1, 5):
        if len(kinds) % period == 0 and kinds == kinds[:period] * (len(kinds) // period):
            return [(kinds[:period], len(kinds) // period)]
    runs: list[tuple[list[bool], int]] = []
    for kind in kinds:
        if runs and runs[-1][0] == [kind]:
            runs[-1] = ([kind], runs[-1][1] + 1)
        else:
            runs.append(([kind], 1))
    return runs


def _scan_mixed(
    decoder: Decoder,
    body: Callable[..., tuple[Array, tuple[KV | None, RouterStats | None]]],
    x: Array,
    *per_layer: Any,
    remat: Remat,
) -> tuple[Array, KV | None, RouterStats | None]:
    """Run layers of two stacks in their order: a scan for each part of it that repeats (see `Decoder._scan`).

    Where a part uses only some layers of a stack, they are copied; no published order of MoE-LLaVA does.
    """
    stacks = {True: nnx.split(decoder.expert_layers)}
    if decoder.layers is not None:
        stacks[False] = nnx.split(decoder.layers)
    taken, done = dict.fromkeys(stacks, 0), 0
    kvs: list[Any] = []
    routers: list[Any] = []

    def part(tree: Any, start: int, count: int, repeats: int) -> Any:
        return jax.tree.map(lambda v: v[start : start + count * repeats].reshape(repeats, count, *v.shape[1:]), tree)

    for kinds, repeats in _pattern([index in decoder.config.expert_layers for index in range(decoder.config.layers)]):
        counts = {kind: kinds.count(kind) for kind in stacks}
        states = {kind: part(stacks[kind][1], taken[kind], counts[kind], repeats) for kind in set(kinds)}

        def step(x: Array, inputs: Any, kinds: list[bool] = kinds) -> tuple[Array, Any]:
            states, rest = inputs
            used, outputs = dict.fromkeys(stacks, 0), []
            for position, kind in enumerate(kinds):
                layer = jax.tree.map(lambda v, at=used[kind]: v[at], states[kind])
                own = jax.tree.map(lambda v, at=position: v[at], rest)
                graph = stacks[kind][0]
                run = recomputed(lambda x, layer, own, graph=graph: body(nnx.merge(graph, layer), x, *own), remat)
                x, output = run(x, layer, own)
                outputs.append(output)
                used[kind] += 1
            return x, outputs

        x, outputs = jax.lax.scan(step, x, (states, part(per_layer, done, len(kinds), repeats)))
        kvs.append(_interleave([kv for kv, _ in outputs]))
        routers.append(_interleave([router for _, router in outputs if router is not None]))
        done += len(kinds) * repeats
        taken = {kind: taken[kind] + counts[kind] * repeats for kind in stacks}
    return x, _concatenate(kvs), _concatenate(routers)


def _interleave(trees: list[Any]) -> Any:
    """Return trees of stacks, one for each position in a repeated part, as one in the layers' order."""
    trees = [tree for tree in trees if tree is not None]
    if not trees:
        return None
    return jax.tree.map(lambda *v: jnp.stack(v, axis=1).reshape(-1, *v[0].shape[1:]), *trees)


def _concatenate(trees: list[Any]) -> Any:
    trees = [tree for tree in trees if tree is not None]
    return jax.tree.map(lambda *v: jnp.concatenate(v), *trees) if trees else None
