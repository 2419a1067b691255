"""Decoding from prefilled trees: greedy, sampled or beam search, with or without contrastive decoding.

A sequence is prefilled once and its KV exists in one copy: every leaf, or every beam of a leaf, attends to its ancestors
there and keeps only a short suffix of its own.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int16, Key

from reverie_jax.data.packing import Batch
from reverie_jax.eval import penalties
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.config import VisionConfig
from reverie_jax.models.decoder import LayersKV
from reverie_jax.models.vision import normalize

Contrast = Literal["", "image", "instruction", "nothing"]

_ROOMS = (8, 32, 128)
"""Tokens of an answer that programs have room for; longer ones have powers of two."""
_EXCLUDED = -1e9
"""Score of a beam that does not exist or has ended: transformers' number, for sums with it are compared."""


def room(new_tokens: int) -> int:
    """Return the tokens that a program has room for: a few sizes, so that 64 and 65 new tokens are one program."""
    return next((size for size in _ROOMS if size >= new_tokens), 1 << (new_tokens - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are decoded; all of it is static in a compiled program.

    Attributes:
        max_new_tokens: Maximum length of an answer.
        beams: Number of beams; 1 decodes without beam search.
        length_penalty: The sum of a finished beam is divided by its length to this power.
        temperature: 0 decodes greedily; otherwise tokens are sampled, with randomness of its own for each question.
        top_p: Nucleus (top-p) threshold of sampling.
        top_k: Only the likeliest tokens are sampled, this many; 0 for all.
        repetition_penalty, no_repeat_ngram: See `penalties.penalize`.
        penalize_prompt: The prompt's tokens count as repeated too, image placeholders included. transformers does so where
            it is given ids (Muffin), not where it is given embeddings (MiniGPT-4, mPLUG-Owl, original LLaVA).
        stop: Text that ends an answer, beside the template's own end; the answer ends with it.
        early_beams: Search with beams as transformers before 4.36 did: a beam's length counts the prompt but not the token
            that ends it; a stop text ends no beam, but the search once all running beams hold it (Muffin's criterion).
        seed: Of sampling and of the noise.
        contrast: What the scores are contrasted with: the image under noise (VCD, Leng et al., arXiv 2311.16922), the
            question after a disturbing instruction (ICD, Wang et al., arXiv 2403.18715), or nothing: the same sequence, in
            which no token sees the image, that is the language prior alone. By default, scores are not contrasted.
        alpha: Strength of the contrast.
        beta: Tokens below this share of the likeliest token's probability are excluded from the contrast.
        noise_step: Diffusion step of the noise, of 1,000; see `add_noise`.
        track: Tokens whose log-probabilities as an answer's first token are returned too.

    Raises:
        ValueError: An option is out of range, or beam search is combined with sampling or a contrast.
    """

    max_new_tokens: int
    beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    penalize_prompt: bool = False
    stop: str = ""
    early_beams: bool = False
    seed: int = 0
    contrast: Contrast = ""
    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500
    track: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.beams < 1:
            raise ValueError("max_new_tokens and beams must be at least 1")
        if self.beams > 1 and (self.temperature or self.contrast):
            raise ValueError("beams above 1 exclude temperature and contrast: set beams to 1, or temperature to 0")
        if not 0 < self.beta <= 1 or self.alpha < 0 or not 0 <= self.noise_step <= 999:
            raise ValueError("alpha must be at least 0, beta above 0 and at most 1, and noise_step from 0 to 999")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError("temperature must be at least 0, and top_p above 0 and at most 1")
        if self.top_k < 0 or self.no_repeat_ngram < 0 or not 0 < self.repetition_penalty < math.inf:
            raise ValueError("top_k and no_repeat_ngram must be at least 0, and repetition_penalty above 0")


class DecodeState(NamedTuple):
    """A prefilled batch and the tokens that its leaves decoded since.

    Attributes:
        prefix: KV of the prefilled sequences.
        suffix: KV of each leaf's (or beam's) own tokens.
        leaves: Index in the sequence of each leaf (of each beam's leaf).
        depth: RoPE position of the next token.
        ends: Of the prefilled tokens, see `data.packing.Batch`.
    """

    prefix: LayersKV
    suffix: LayersKV
    leaves: Int[Array, "B Q"]
    depth: Int[Array, "B Q"]
    ends: Int[Array, "B L"]


def prefill(
    model: VisionLanguageModel, batch: Batch, max_new_tokens: int, images: Any = None
) -> tuple[Float[Array, "B Q V"], DecodeState]:
    """Run the sequences once; return the scores of each leaf's first token, and the state to extend.

    Args:
        model: The model.
        batch: Packed sequences.
        max_new_tokens: Room for decoded tokens.
        images: Features or pixels in place of the batch's images.
    """
    inputs = batch.inputs if images is None else batch.inputs._replace(images=images)
    hidden, prefix = model.prefill(inputs)
    at_leaf = jnp.take_along_axis(hidden, batch.leaves[:, :, None], axis=1)
    depth = jnp.take_along_axis(batch.positions, batch.leaves, axis=1) + 1
    suffix = empty_suffix(prefix, batch.leaves.shape[1], max_new_tokens)
    state = DecodeState(prefix, suffix, batch.leaves, depth, batch.ends)
    return model.decoder.logits(at_leaf), state


def empty_suffix(prefix: LayersKV, leaves: int, max_new_tokens: int) -> LayersKV:
    """Return the KV of no tokens of that many leaves, with room for some."""
    room = leaves, max_new_tokens
    suffix: LayersKV = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-3], *room, *x.shape[-2:]), x.dtype), prefix)
    return suffix


def extend(
    model: VisionLanguageModel, state: DecodeState, token: Int[Array, "B Q"], step: Int[Array, ""]
) -> tuple[Float[Array, "B Q V"], DecodeState]:
    """Append token number `step` of the answer to every leaf; return the scores of the next token."""
    scores, suffix = model.extend(token, state.depth + step, state.leaves, state.ends, step, state.prefix, state.suffix)
    return scores, state._replace(suffix=suffix)


def add_noise(images: Any, noise_step: int, seed: int, config: VisionConfig) -> Float[Array, "B M S S 3"]:
    """Return normalized images after diffusion noise as in VCD; step 0 adds none.

    VCD's script counts from 0: step n is n + 1 diffusion steps. The noise is the same for all images, so that an
    answer does not depend on the other images of the batch.
    """
    betas = jax.nn.sigmoid(jnp.linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5
    signal = jnp.cumprod(1 - betas)[noise_step] if noise_step else jnp.ones(())
    noise = jax.random.normal(jax.random.key(seed), images.shape[2:])
    return jnp.sqrt(signal) * normalize(images, config, jnp.float32) + jnp.sqrt(1 - signal) * noise[None, None]


def _noisy_features(model: VisionLanguageModel, batch: Batch, decoding: Decoding) -> Float[Array, "B M P W"]:
    """Return the vision tower's features of the batch's images under noise."""
    noisy = add_noise(batch.images, decoding.noise_step, decoding.seed, model.config.vision)
    flat = noisy.reshape(-1, *noisy.shape[2:]).astype(model.compute_dtype)
    features = model.vision(flat, model.config.feature_depths, select=model.config.feature_select)
    return features.reshape(*noisy.shape[:2], *features.shape[1:])


def contrast_scores(
    scores: Float[Array, "B Q V"], contrast: Float[Array, "B Q V"], alpha: float, beta: float
) -> Float[Array, "B Q V"]:
    """Return (1 + alpha) scores - alpha contrast; -inf for tokens that are not plausible by `scores` (see `beta`)."""
    plausible = scores >= scores.max(-1, keepdims=True) + jnp.log(beta)
    return jnp.where(plausible, (1 + alpha) * scores - alpha * contrast, -jnp.inf)


def generate(
    model: VisionLanguageModel,
    batch: Batch,
    decoding: Decoding,
    stops: tuple[int, ...],
    contrast_batch: Batch | None = None,
    longest: Int[Any, ""] | None = None,
    stop_table: Int16[Any, "S V"] | None = None,
) -> tuple[Int[Array, "B Q T"], Float[Array, "B Q N"]]:
    """Decode an answer for every leaf.

    Args:
        model: The model.
        batch: Packed sequences.
        decoding: How to decode; there is room for its `max_new_tokens`, T.
        stops: Tokens that end an answer; the first of them stands for whichever did, and fills the rest.
        contrast_batch: With `contrast="instruction"`, the same leaves after the disturbing instruction.
        longest: Maximum length of an answer, at most T: data, so that one program serves all; T if omitted.
        stop_table: Automaton of a text that ends answers too (`stop_text.stop_table`); it remains in their tokens.

    Returns:
        Tokens, and log-probabilities of the N tracked tokens in the first place (without any contrast).
    """
    longest = jnp.asarray(decoding.max_new_tokens if longest is None else longest, jnp.int32)
    scores, state = prefill(model, batch, decoding.max_new_tokens)
    tracked = jax.nn.log_softmax(scores, axis=-1)[..., jnp.asarray(decoding.track, jnp.int32)]
    if decoding.beams > 1:
        return _beam_search(model, batch, scores, state, decoding, longest, stops, stop_table), tracked
    states = [state]
    if decoding.contrast:
        images = _noisy_features(model, batch, decoding) if decoding.contrast == "image" else None
        second = batch if contrast_batch is None else contrast_batch
        if decoding.contrast == "nothing":
            alone = jnp.arange(1, batch.ends.shape[1] + 1, dtype=batch.ends.dtype)
            second = batch._replace(ends=jnp.where(batch.image_slots >= 0, alone, batch.ends))
        contrast, state = prefill(model, second, decoding.max_new_tokens, images)
        states.append(state)
        scores = contrast_scores(scores, contrast, decoding.alpha, decoding.beta)
    return _decode_by_token(model, batch, scores, states, decoding, longest, stops, stop_table), tracked


def _advance(
    table: Int16[Any, "S V"] | None, state: Int16[Array, "*lead"], token: Int[Array, "*lead"]
) -> tuple[Int16[Array, "*lead"], Bool[Array, "*lead"]]:
    """Return the stop text's state behind the tokens, and whether the answers hold all of it."""
    if table is None:
        return state, jnp.zeros(state.shape, bool)
    state = jnp.asarray(table)[state.astype(jnp.int32), token]
    return state, state == table.shape[0] - 1


def _decode_by_token(
    model: VisionLanguageModel,
    batch: Batch,
    scores: Float[Array, "B Q V"],
    states: list[DecodeState],
    decoding: Decoding,
    longest: Int[Array, ""],
    stops: tuple[int, ...],
    stop_table: Int16[Any, "S V"] | None,
) -> Int[Array, "B Q T"]:
    """Decode greedily or by sampling, until all leaves have ended."""
    end, prompts = stops[0], penalties.prompt_tokens(batch, decoding.penalize_prompt)

    def choose(scores: Float[Array, "B Q V"], out: Int[Array, "B Q T"], step: Any) -> Int[Array, "B Q"]:
        scores = penalties.penalize(
            *(scores, prompts, out, step), decoding.repetition_penalty, decoding.no_repeat_ngram
        )
        greedy = not decoding.temperature
        token = scores.argmax(-1).astype(jnp.int32) if greedy else _sample(scores, batch.questions, step, decoding)
        return jnp.where(jnp.isin(token, jnp.asarray(stops, jnp.int32)), end, token)

    blank = jnp.full((*batch.leaves.shape, decoding.max_new_tokens), end, jnp.int32)
    token = jnp.where(batch.questions < 0, end, choose(scores, blank, 0))
    found, held = _advance(stop_table, jnp.zeros(token.shape, jnp.int16), token)

    def unfinished(carry: tuple[Any, ...]) -> Array:
        step, _, ended, *_ = carry
        return (step < longest - 1) & ~ended.all()

    def decode_step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, ended, found, out, states = carry
        extended = [extend(model, state, token, step) for state in states]
        scores = extended[0][0]
        if len(extended) == 2:
            scores = contrast_scores(scores, extended[1][0], decoding.alpha, decoding.beta)
        token = jnp.where(ended, end, choose(scores, out, step + 1))
        found, held = _advance(stop_table, found, token)
        out = out.at[:, :, step + 1].set(token)
        return step + 1, token, ended | (token == end) | held, found, out, [state for _, state in extended]

    start = jnp.zeros((), jnp.int32), token, (token == end) | held, found, blank.at[:, :, 0].set(token), states
    return jax.lax.while_loop(unfinished, decode_step, start)[4]


def _sample(
    scores: Float[Array, "B Q V"], questions: Int[Array, "B Q"], step: Any, decoding: Decoding
) -> Int[Array, "B Q"]:
    """Sample a token of each leaf from the `top_k` likeliest, and of them the fewest that hold `top_p` (nucleus)."""
    scores = scores / decoding.temperature
    if 0 < decoding.top_k < scores.shape[-1]:
        least = jax.lax.top_k(scores, decoding.top_k)[0][..., -1:]
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    if decoding.top_p < 1:
        scores = nucleus(scores, decoding.top_p)
    return draw(scores, questions, step, jnp.broadcast_to(jax.random.key(decoding.seed), questions.shape))


def nucleus(scores: Float[Array, "B Q V"], top_p: float | Float[Array, "B Q 1"]) -> Float[Array, "B Q V"]:
    """Return -inf for all but the fewest likeliest tokens that hold `top_p`."""
    ordered = -jnp.sort(-scores, axis=-1)
    share = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    # The token that passes the bound is included.
    last = (share - jax.nn.softmax(ordered, axis=-1) < top_p).sum(-1, keepdims=True) - 1
    return jnp.where(scores >= jnp.take_along_axis(ordered, last, axis=-1), scores, -jnp.inf)


def draw(
    scores: Float[Array, "B Q V"], questions: Int[Array, "B Q"], step: Any, keys: Key[Array, "B Q"]
) -> Int[Array, "B Q"]:
    """Sample a token of each leaf, with its own random key."""

    def one(key: Array, question: Array, scores: Float[Array, "V"]) -> Array:
        # Keyed by question and step alone: an answer does not depend on the rest of the batch.
        key = jax.random.fold_in(jax.random.fold_in(key, question), step)
        return jax.random.categorical(key, scores).astype(jnp.int32)

    return jax.vmap(jax.vmap(one))(keys, questions, scores)


class _Beams(NamedTuple):
    """Beams of every leaf. Running beams are scored by sums; finished ones by sums over a power of the length.

    Attributes:
        open: Whether a running beam can still beat a leaf's finished ones.
        found: The stop text's state of running beams.
    """

    step: Int[Array, ""]
    tokens: Int[Array, "B Q K T"]
    sums: Float[Array, "B Q K"]
    finished: Int[Array, "B Q K T"]
    scores: Float[Array, "B Q K"]
    ended: Bool[Array, "B Q K"]
    open: Bool[Array, "B Q"]
    found: Int16[Array, "B Q K"]


def _pick(values: Array, index: Int[Array, "B Q K"]) -> Array:
    """Select beams; values: [B, Q, K, ...]."""
    return jnp.take_along_axis(values, index.reshape(*index.shape, *(1,) * (values.ndim - 3)), axis=2)


def _pick_suffixes(suffix: LayersKV, index: Int[Array, "B Q"]) -> LayersKV:
    """Select suffixes of a row; of stacked layers as of unstacked ones."""
    index = index[:, :, None, None, None]
    return jax.tree.map(
        lambda x: jnp.take_along_axis(x, jnp.expand_dims(index, tuple(range(x.ndim - 5))), axis=-4), suffix
    )


def _no_beams(asked: Bool[Array, "B Q"], beams: int, room: int, end: int) -> _Beams:
    """Return beams before the first token: one of each leaf, all tokens `end`."""
    blank = jnp.full((*asked.shape, beams, room), end, jnp.int32)
    never = jnp.full(blank.shape[:3], _EXCLUDED, jnp.float32)
    return _Beams(
        step=jnp.zeros((), jnp.int32),
        tokens=blank,
        sums=never.at[:, :, 0].set(0.0),
        finished=blank,
        scores=never,
        ended=jnp.zeros(never.shape, bool),
        open=asked,
        found=jnp.zeros(never.shape, jnp.int16),
    )


def _close(now: _Beams, divided: Float[Array, "B Q K"], held: Bool[Array, "B Q K"], longest: Int[Array, ""]) -> _Beams:
    """Let the best running beam win against the finished ones where a search ends while beams are running."""
    over = now.open & (held.all(-1) | (now.step == longest))
    wins = over & (divided[..., 0] > now.scores[..., 0])
    first = jnp.where(wins[..., None], now.tokens[:, :, 0], now.finished[:, :, 0])
    score = jnp.where(wins, divided[..., 0], now.scores[..., 0])
    return now._replace(
        finished=now.finished.at[:, :, 0].set(first), scores=now.scores.at[:, :, 0].set(score), open=now.open & ~over
    )


def _beam_search(
    model: VisionLanguageModel,
    batch: Batch,
    first: Float[Array, "B Q V"],
    state: DecodeState,
    decoding: Decoding,
    longest: Int[Array, ""],
    stops: tuple[int, ...],
    stop_table: Int16[Any, "S V"] | None,
) -> Int[Array, "B Q T"]:
    """Decode by transformers' beam search (`early_stopping=False`), all leaves at once and each by itself."""
    beams, early = decoding.beams, decoding.early_beams
    rows, leaves = batch.leaves.shape
    prompts = jnp.repeat(penalties.prompt_tokens(batch, decoding.penalize_prompt)[:, :, None], beams, axis=2)
    asked = state.depth[..., None].astype(jnp.float32) if early else jnp.zeros((rows, leaves, 1))
    # Beams of a leaf are neighbors, and share its ancestors.
    wide = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=-4), state.suffix)
    leaf, depth = (jnp.repeat(x, beams, axis=1) for x in (state.leaves, state.depth))
    state = state._replace(suffix=wide, leaves=leaf, depth=depth)
    keep = max(2, 1 + len(stops)) * beams
    among_best = (jnp.arange(keep) < beams)[None, None]

    def grow(now: _Beams, scores: Float[Array, "B Q K V"]) -> tuple[_Beams, Int[Array, "B Q K"]]:
        """Return the beams with one more token each, and which beam each of them continues."""
        scores = penalties.penalize(
            *(jax.nn.log_softmax(scores, axis=-1), prompts, now.tokens, now.step),
            *(decoding.repetition_penalty, decoding.no_repeat_ngram),
        )
        sums = (scores + now.sums[..., None]).reshape(rows, leaves, -1)
        sums, index = jax.lax.top_k(sums, keep)
        origin, token = index // scores.shape[-1], (index % scores.shape[-1]).astype(jnp.int32)
        tokens = _pick(now.tokens, origin).at[..., now.step].set(token)
        found, held = _advance(stop_table, _pick(now.found, origin), token)
        length = now.step + 1
        stopped = jnp.isin(token, jnp.asarray(stops, jnp.int32))
        ends = stopped if early else stopped | held | (length == longest)
        running = sums + jnp.where(ends, jnp.float32(_EXCLUDED), jnp.float32(0))
        running, chosen = jax.lax.top_k(running, beams)
        # Only the best `beams` may finish, and only while they can change the outcome.
        reached = (asked + length.astype(jnp.float32)) ** decoding.length_penalty
        divided = sums / ((asked + length.astype(jnp.float32) - 1) ** decoding.length_penalty if early else reached)
        lost = (~now.open)[..., None].astype(jnp.float32) + (~(ends & among_best)).astype(jnp.float32)
        merged = jnp.concatenate([now.scores, divided + lost * jnp.float32(_EXCLUDED)], axis=2)
        best, kept = jax.lax.top_k(merged, beams)
        ended = _pick(jnp.concatenate([now.ended, ends & among_best], axis=2), kept)
        possible = (sums if early else running)[..., :1] / reached
        worst = jnp.where(ended, best.min(-1, keepdims=True), jnp.float32(_EXCLUDED))
        after = _Beams(
            step=length,
            tokens=_pick(tokens, chosen),
            sums=running,
            finished=_pick(jnp.concatenate([now.finished, tokens], axis=2), kept),
            scores=best,
            ended=ended,
            open=now.open & (possible > worst).any(-1) & ~ends.all(-1),
            found=_pick(found, chosen),
        )
        if early:
            after = _close(after, running / reached, _pick(held, chosen), longest)
        return after, _pick(origin, chosen)

    def decode_step(carry: tuple[_Beams, Int[Array, "B Q K"], Any]) -> tuple[_Beams, Int[Array, "B Q K"], Any]:
        now, origin, state = carry
        # A beam continues the suffix of the beam that it came from.
        source = (jnp.arange(leaves, dtype=origin.dtype)[None, :, None] * beams + origin).reshape(rows, -1)
        suffix = _pick_suffixes(state.suffix, source)
        token = jax.lax.dynamic_index_in_dim(now.tokens, now.step - 1, axis=3, keepdims=False).reshape(rows, -1)
        scores, state = extend(model, state._replace(suffix=suffix), token, now.step - 1)
        return *grow(now, scores.reshape(rows, leaves, beams, -1)), state

    def unfinished(carry: tuple[_Beams, Any, Any]) -> Array:
        return (carry[0].step < longest) & carry[0].open.any()

    opening = jnp.broadcast_to(first[:, :, None], (rows, leaves, beams, first.shape[-1]))
    now, origin = grow(_no_beams(batch.questions >= 0, beams, decoding.max_new_tokens, stops[0]), opening)
    best = jax.lax.while_loop(unfinished, decode_step, (now, origin, state))[0].finished[:, :, 0]
    # One id for all that end an answer, and nothing else after it.
    stop = jnp.isin(best, jnp.asarray(stops, jnp.int32))
    return jnp.where(jnp.cumsum(stop, axis=-1) > 0, stops[0], best)
