"""Decoding from prefilled trees: greedy, sampled or by beams; from one stream of scores, or two set against each other.

A row is prefilled once. Its KV exists in one copy, whatever decodes from it: each leaf, or each beam of a leaf, sees its
ancestors there and has a short suffix of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from reverie_jax.data.packing import Batch
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.decoder import KV
from reverie_jax.models.vision import normalize

Against = Literal["", "image", "instruction"]

_NEVER = -1e9
"""What a beam that is none, or has ended, scores: transformers' number, for sums with it are compared."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are made; all of it is static in a compiled program.

    Attributes:
        new_tokens: longest answer.
        beams: of beam search; 1 for none.
        length_penalty: power of the length that a finished beam's sum is divided by.
        temperature: 0 for the likeliest token; else tokens are drawn, each question with randomness of its own.
        top_p: share of the probability that is drawn from.
        against: what the scores are contrasted with: the picture under noise (VCD, Leng et al., arXiv 2311.16922), the
            question behind a disturbing instruction (ICD, Wang et al., arXiv 2403.18715), or nothing.
        alpha: strength of the contrast.
        beta: tokens that are less likely than this share of the likeliest are out, whatever the contrast says.
        noise: how much of it the picture is put under, of 1,000; see `noisy`.
        track: tokens whose log-probability as an answer's first one is wanted too.
    """

    max_new_tokens: int
    beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    contrast: Against = ""
    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500
    track: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.beams < 1:
            raise ValueError("new_tokens and beams must be at least 1")
        if self.beams > 1 and (self.temperature or self.contrast):
            raise ValueError("beam search goes with neither sampling nor a contrast")
        if not 0 < self.beta <= 1 or self.alpha < 0 or not 0 <= self.noise_step <= 999:
            raise ValueError("alpha must not be negative, beta be above 0 and at most 1, and noise be 0 to 999")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must not be negative, and top_p be above 0 and at most 1")


class Stream(NamedTuple):
    """A prefilled batch, and what its leaves have said since.

    Attributes:
        leaves: row index of each leaf (of each beam's leaf).
        depth: RoPE position of the next token.
    """

    prefix: KV
    suffix: KV
    leaves: Int[Array, "B Q"]
    depth: Int[Array, "B Q"]
    ends: Int[Array, "B L"]


def prefill(
    model: VisionLanguageModel, batch: Batch, max_new_tokens: int, pixels: Any = None
) -> tuple[Float[Array, "B Q V"], Stream]:
    """Runs the rows once.

    Args:
        pixels: what is shown in place of the batch's pictures.

    Returns:
        The scores of each leaf's first token, and the stream to extend.
    """
    shown = batch.pixels if pixels is None else pixels
    hidden, prefix = model.prefill(batch.tokens, batch.positions, batch.ends, batch.image_slots, shown)
    at_leaf = jnp.take_along_axis(hidden, batch.leaves[:, :, None], axis=1)
    depth = jnp.take_along_axis(batch.positions, batch.leaves, axis=1) + 1
    layers, rows, _, heads, width = prefix.k.shape
    empty = jnp.zeros((layers, rows, batch.leaves.shape[1], max_new_tokens, heads, width), prefix.k.dtype)
    stream = Stream(prefix, KV(empty, empty), batch.leaves, depth, batch.ends)
    return model.decoder.logits(at_leaf), stream


def extend(
    model: VisionLanguageModel, stream: Stream, token: Int[Array, "B Q"], step: Int[Array, ""]
) -> tuple[Float[Array, "B Q V"], Stream]:
    """Appends the answer's token number `step` to every leaf; the scores of the next."""
    scores, suffix = model.extend(
        token, stream.depth + step, stream.leaves, stream.ends, step, stream.prefix, stream.suffix
    )
    return scores, stream._replace(suffix=suffix)


def noisy(pixels: Any, steps: int, seed: int) -> Float[Array, "B M S S 3"]:
    """Normalised pictures under VCD's noise of that number, of 1,000 (its script counts from 0: number n has n + 1 diffusion
    steps behind it); 0 for none. The noise is the same for all pictures: an answer depends on no other picture in the batch.
    """
    betas = jax.nn.sigmoid(jnp.linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5
    kept = jnp.cumprod(1 - betas)[steps] if steps else jnp.ones(())
    shown = normalize(pixels, jnp.float32)
    noise_step = jax.random.normal(jax.random.key(seed), pixels.shape[2:])
    return jnp.sqrt(kept) * shown + jnp.sqrt(1 - kept) * noise_step[None, None]


def distorted(model: VisionLanguageModel, batch: Batch, how: Decoding) -> Float[Array, "B M P W"]:
    """The tower's features of the batch's pictures under noise."""
    pixels = noisy(batch.pixels, how.noise_step, how.seed)
    flat = pixels.reshape(-1, *pixels.shape[2:]).astype(model.compute_dtype)
    features = model.vision(flat, model.config.feature_depth)
    return features.reshape(*pixels.shape[:2], *features.shape[1:])


def contrast(
    scores: Float[Array, "B Q V"], contrast: Float[Array, "B Q V"], alpha: float, beta: float
) -> Float[Array, "B Q V"]:
    """(1 + alpha) scores - alpha against, among the tokens that are likely enough by the scores alone."""
    likely = scores >= scores.max(-1, keepdims=True) + jnp.log(beta)
    return jnp.where(likely, (1 + alpha) * scores - alpha * contrast, -jnp.inf)


def generate(
    model: VisionLanguageModel,
    batch: Batch,
    how: Decoding,
    stops: tuple[int, ...],
    other: Batch | None = None,
) -> tuple[Int[Array, "B Q T"], Float[Array, "B Q N"]]:
    """Continuations of every leaf; the first of `stops` stands for whichever ended an answer, and fills the rest.

    Args:
        other: with `against="instruction"`, the same leaves behind the disturbing instruction.

    Returns:
        Tokens, and log-probabilities of the N tracked ones in the first place (without any contrast).
    """
    scores, stream = prefill(model, batch, how.max_new_tokens)
    tracked = jax.nn.log_softmax(scores, axis=-1)[..., jnp.asarray(how.track, jnp.int32)]
    if how.beams > 1:
        return _beam_search(model, batch, scores, stream, how, stops), tracked
    streams = [stream]
    if how.contrast:
        pixels = distorted(model, batch, how) if how.contrast == "image" else None
        contrasted, second = prefill(model, batch if other is None else other, how.max_new_tokens, pixels)
        streams.append(second)
        scores = contrast(scores, contrasted, how.alpha, how.beta)
    return _one_by_one(model, batch, scores, streams, how, stops), tracked


def _one_by_one(
    model: VisionLanguageModel,
    batch: Batch,
    scores: Float[Array, "B Q V"],
    streams: list[Stream],
    how: Decoding,
    stops: tuple[int, ...],
) -> Int[Array, "B Q T"]:
    """Greedy or drawn. Decoding stops when all leaves have ended."""
    end = stops[0]

    def choose(scores: Float[Array, "B Q V"], step: Any) -> Int[Array, "B Q"]:
        token = _draw(scores, batch.questions, step, how) if how.temperature else scores.argmax(-1).astype(jnp.int32)
        return jnp.where(jnp.isin(token, jnp.asarray(stops, jnp.int32)), end, token)

    token = jnp.where(batch.questions < 0, end, choose(scores, 0))
    out = jnp.full((*token.shape, how.max_new_tokens), end, jnp.int32).at[:, :, 0].set(token)

    def more(carry: tuple[Any, ...]) -> Array:
        step, token, _, _ = carry
        return (step < how.max_new_tokens - 1) & (token != end).any()

    def one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, out, streams = carry
        found = [extend(model, stream, token, step) for stream in streams]
        scores = found[0][0]
        if len(found) == 2:
            scores = contrast(scores, found[1][0], how.alpha, how.beta)
        token = jnp.where(token == end, end, choose(scores, step + 1))
        return step + 1, token, out.at[:, :, step + 1].set(token), [stream for _, stream in found]

    return jax.lax.while_loop(more, one, (jnp.zeros((), jnp.int32), token, out, streams))[2]


def _draw(scores: Float[Array, "B Q V"], questions: Int[Array, "B Q"], step: Any, how: Decoding) -> Int[Array, "B Q"]:
    """A token of each leaf, from the smallest set of likeliest tokens that hold `top_p` (nucleus sampling)."""
    scores = scores / how.temperature
    if how.top_p < 1:
        ordered = -jnp.sort(-scores, axis=-1)
        share = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
        # The token that passes the bound is in.
        last = (share - jax.nn.softmax(ordered, axis=-1) < how.top_p).sum(-1, keepdims=True) - 1
        scores = jnp.where(scores >= jnp.take_along_axis(ordered, last, axis=-1), scores, -jnp.inf)

    def one(question: Array, scores: Float[Array, "V"]) -> Array:
        # Of question and step alone, so that a batch's company changes no answer.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(how.seed), question), step)
        return jax.random.categorical(key, scores).astype(jnp.int32)

    return jax.vmap(jax.vmap(one))(questions, scores)


class _Beams(NamedTuple):
    """Beams of every leaf. Running ones have scores that are sums; finished ones, sums over a power of the length.

    Attributes:
        open: whether a leaf's finished beams can still be beaten by one that grows.
    """

    step: Int[Array, ""]
    tokens: Int[Array, "B Q K T"]
    sums: Float[Array, "B Q K"]
    finished: Int[Array, "B Q K T"]
    scores: Float[Array, "B Q K"]
    ended: Bool[Array, "B Q K"]
    open: Bool[Array, "B Q"]


def _pick(values: Array, index: Int[Array, "B Q K"]) -> Array:
    return jnp.take_along_axis(values, index.reshape(*index.shape, *(1,) * (values.ndim - 3)), axis=2)


def _beam_search(
    model: VisionLanguageModel,
    batch: Batch,
    first: Float[Array, "B Q V"],
    stream: Stream,
    how: Decoding,
    stops: tuple[int, ...],
) -> Int[Array, "B Q T"]:
    """transformers' beam search (`early_stopping=False`), for all leaves at once and each by itself."""
    beams, longest = how.beams, how.max_new_tokens
    rows, leaves = batch.leaves.shape
    # Beams of a leaf stand side by side, and share its ancestors.
    wide = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=2), stream.suffix)
    leaf, depth = (jnp.repeat(x, beams, axis=1) for x in (stream.leaves, stream.depth))
    stream = stream._replace(suffix=wide, leaves=leaf, depth=depth)
    keep = max(2, 1 + len(stops)) * beams
    among_best = (jnp.arange(keep) < beams)[None, None]
    blank = jnp.full((rows, leaves, beams, longest), stops[0], jnp.int32)
    never = jnp.full((rows, leaves, beams), _NEVER, jnp.float32)
    start = _Beams(
        step=jnp.zeros((), jnp.int32),
        tokens=blank,
        sums=never.at[:, :, 0].set(0.0),
        finished=blank,
        scores=never,
        ended=jnp.zeros((rows, leaves, beams), bool),
        open=batch.questions >= 0,
    )

    def build_tree(now: _Beams, scores: Float[Array, "B Q K V"]) -> tuple[_Beams, Int[Array, "B Q K"]]:
        """One more token a beam; and which beam each new one came from."""
        sums = (jax.nn.log_softmax(scores, axis=-1) + now.sums[..., None]).reshape(rows, leaves, -1)
        sums, place = jax.lax.top_k(sums, keep)
        origin, token = place // scores.shape[-1], (place % scores.shape[-1]).astype(jnp.int32)
        tokens = _pick(now.tokens, origin).at[..., now.step].set(token)
        length = now.step + 1
        ends = jnp.isin(token, jnp.asarray(stops, jnp.int32)) | (length == longest)
        running = sums + jnp.where(ends, jnp.float32(_NEVER), jnp.float32(0))
        running, chosen = jax.lax.top_k(running, beams)
        # Finished ones: of the best `beams` alone, and only while they can change the outcome.
        divided = sums / length.astype(jnp.float32) ** how.length_penalty
        lost = (~now.open)[..., None].astype(jnp.float32) + (~(ends & among_best)).astype(jnp.float32)
        merged = jnp.concatenate([now.scores, divided + lost * jnp.float32(_NEVER)], axis=2)
        best, kept = jax.lax.top_k(merged, beams)
        ended = _pick(jnp.concatenate([now.ended, ends & among_best], axis=2), kept)
        possible = running[..., :1] / length.astype(jnp.float32) ** how.length_penalty
        worst = jnp.where(ended, best.min(-1, keepdims=True), jnp.float32(_NEVER))
        after = _Beams(
            step=length,
            tokens=_pick(tokens, chosen),
            sums=running,
            finished=_pick(jnp.concatenate([now.finished, tokens], axis=2), kept),
            scores=best,
            ended=ended,
            open=now.open & (possible > worst).any(-1) & ~ends.all(-1),
        )
        return after, _pick(origin, chosen)

    def one(carry: tuple[_Beams, Int[Array, "B Q K"], Any]) -> tuple[_Beams, Int[Array, "B Q K"], Any]:
        now, origin, stream = carry
        # A beam goes on from the suffix of the one that it came from.
        home = (jnp.arange(leaves, dtype=origin.dtype)[None, :, None] * beams + origin).reshape(rows, -1)
        index = home[None, :, :, None, None, None]
        suffix = jax.tree.map(lambda x: jnp.take_along_axis(x, index, axis=2), stream.suffix)
        token = jax.lax.dynamic_index_in_dim(now.tokens, now.step - 1, axis=3, keepdims=False).reshape(rows, -1)
        scores, stream = extend(model, stream._replace(suffix=suffix), token, now.step - 1)
        after, origin = build_tree(now, scores.reshape(rows, leaves, beams, -1))
        return after, origin, stream

    def more(carry: tuple[_Beams, Any, Any]) -> Array:
        now = carry[0]
        return (now.step < longest) & now.open.any()

    opening = jnp.broadcast_to(first[:, :, None], (rows, leaves, beams, first.shape[-1]))
    now, origin = build_tree(start, opening)
    found = jax.lax.while_loop(more, one, (now, origin, stream))[0].finished[:, :, 0]
    # One id for all that end an answer, and behind it nothing else.
    stop = jnp.isin(found, jnp.asarray(stops, jnp.int32))
    return jnp.where(jnp.cumsum(stop, axis=-1) > 0, stops[0], found)
