"""Jitted batch inference over trees: an image's prefix is prefilled once, and all its questions decode from that copy."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int16

from reverie_jax.data.conversation import Conversation, ImageRecord, Turn
from reverie_jax.data.packing import Batch, SequenceShape
from reverie_jax.data.pipeline import ImageQuestions, question_batches
from reverie_jax.data.processor import Processor
from reverie_jax.errors import UserError
from reverie_jax.eval import decode
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.schedule import EngineShape, Group, Schedule, deduplicated, plan
from reverie_jax.eval.stop_text import stop_table
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.sharding import batch_sharding, global_batch, local_rows, make_mesh, mesh_of, shard_state

SUFFIX_BYTES = 4 << 30
"""Maximum size of the KV of all leaves' own tokens, on the devices of one sequence; it bounds the batch size."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's answer.

    Attributes:
        text: Without special tokens; what goes on from a begun message begins with the white space between them.
        tracked: Log-probabilities of `Decoding.track` as its first token.
    """

    text: str
    tracked: tuple[float, ...] = ()


@functools.partial(jax.jit, static_argnames=("graph", "decoding", "stops"))
def _decode(
    graph: Any,
    state: Any,
    batch: Batch,
    contrast_batch: Batch | None,
    longest: Int[Any, ""],
    stop_table: Int16[Any, "S V"] | None,
    *,
    decoding: Decoding,
    stops: tuple[int, ...],
) -> tuple[Array, Array]:
    # At module level: engines of models of one architecture share the compiled program.
    return decode.generate(nnx.merge(graph, state), batch, decoding, stops, contrast_batch, longest, stop_table)


class Engine:
    """Answers questions about images with one model.

    Several processes (`jax.distributed`) call it alike; each decodes the images of its own part of a batch, and all get all
    answers.

    Args:
        model: With or without adapters; it is not modified. `model.decoder.unstack()` makes it decode faster.
        processor: The model's own, from `load_model`.
        shape: Limits.
        mesh: Devices that a batch is spread over; by default those that the model is on, or one.

    Raises:
        ValueError: The tokenizer has no end-of-sequence token.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        shape: EngineShape | None = None,
        *,
        mesh: Mesh | None = None,
    ):
        self.processor, self.encoder, self.shape = processor, processor.encoder, shape or EngineShape()
        self.graph, state = nnx.split(model)
        self.mesh = mesh or mesh_of(state) or make_mesh()
        self.state = shard_state(state, self.mesh)
        text = model.config.text
        self.dtype = jnp.dtype(model.compute_dtype).name
        self._token_bytes = 2 * text.layers * text.kv_heads * text.head_dim * jnp.dtype(model.compute_dtype).itemsize
        if not self.encoder.stop_ids:
            raise ValueError("the tokenizer has no end-of-sequence token: answers would never stop")
        self._stop_table = functools.cache(functools.partial(stop_table, self.encoder, text.vocab))

    def answer(
        self,
        images: Sequence[ImageQuestions],
        *,
        max_new_tokens: int,
        on_progress: Callable[[int], None] = lambda answered: None,
    ) -> dict[int, str]:
        """Return each question's greedy answer, by the question's number, in the order of the questions.

        Args:
            images: Images with their questions.
            max_new_tokens: Maximum length of an answer.
            on_progress: Called with the number of answers of each batch.

        Raises: as `schedule` and `stream`.
        """
        answers: dict[int, str] = {}
        decoding = Decoding(max_new_tokens)
        for batch in self.stream(self.schedule(images, decoding), decoding):
            answers |= {number: answer.text for number, answer in batch.items()}
            on_progress(len(batch))
        return {number: answers[number] for image in images for number, _ in image.questions}

    def schedule(
        self, images: Sequence[ImageQuestions], decoding: Decoding, *, expected_new_tokens: int | None = None
    ) -> Schedule:
        """Assign questions to batches; the order depends on the questions and the limits alone.

        Args:
            images: Images with their questions.
            decoding: How they will be decoded.
            expected_new_tokens: See `stream`.

        Raises:
            ValueError: Two questions have the same number.
            DataError: A question is too long for a sequence.
        """
        numbers = [number for image in images for number, _ in image.questions]
        if len(set(numbers)) != len(numbers):
            raise ValueError("two questions have the same number: their answers could not be told apart")
        # A sampled question may have two answers.
        unique, duplicates = (images, {}) if decoding.temperature else deduplicated(images)
        limit = self.limits(decoding, expected_new_tokens)
        contrast = decoding.contrast == "instruction"
        groups = plan(unique, self.processor, limit, multiple=self.data_parallel, contrast=contrast)
        return Schedule(groups, duplicates)

    def limits(self, decoding: Decoding, expected_new_tokens: int | None = None) -> EngineShape:
        """Return the limits within which the KV of a batch's answers fits (see `SUFFIX_BYTES`)."""
        longest = decoding.max_new_tokens
        leaves = min(self.shape.questions, self._leaves_that_fit(longest, decoding))
        together = self._leaves_that_fit(min(expected_new_tokens or longest, longest), decoding)
        batch_size = min(self.shape.batch_size, self.data_parallel * max(1, together // leaves))
        return dataclasses.replace(self.shape, questions=leaves, batch_size=batch_size)

    @property
    def data_parallel(self) -> int:
        """Devices, or groups of them, that a batch is divided among."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def _leaves_that_fit(self, new_tokens: int, decoding: Decoding) -> int:
        """Return how many leaves can be decoded together on the devices of one sequence (see `SUFFIX_BYTES`)."""
        streams = decoding.beams + bool(decoding.contrast)
        return max(1, SUFFIX_BYTES // (self._token_bytes * decode.room(new_tokens) * streams))

    def stream(
        self, schedule: Schedule, decoding: Decoding, *, expected_new_tokens: int | None = None, skip: int = 0
    ) -> Iterator[dict[int, Answer]]:
        """Yield answers by the questions' numbers, a batch at a time, in the order of `schedule.numbers()`.

        Args:
            schedule: From `schedule`.
            decoding: How to decode.
            expected_new_tokens: Length that most answers do not exceed; batches with longer ones are decoded a second time,
                with room for `decoding.max_new_tokens`.
            skip: Number of batches at the start to leave out.

        Raises:
            BrokenImage: An image cannot be read.
        """
        for group in schedule.groups:
            skipped, skip = min(skip, group.batches), max(0, skip - group.batches)
            # The last token of each message that is only begun.
            begun = {
                number: int(self.encoder(one).ids[-1])
                for image in group.images
                for number, one in image.questions
                if one.turns[-1].is_begun
            }
            # Closed by hand: a prefetching iterator left to the collector complains when the interpreter ends.
            with jax.set_mesh(self.mesh), contextlib.ExitStack() as stack:
                for batch, contrast_batch in self._batches(group, skipped, stack):
                    answers = self._answers(batch, contrast_batch, decoding, expected_new_tokens, begun)
                    yield {
                        same: answer for number, answer in answers.items() for same in schedule.with_duplicates(number)
                    }

    def _batches(self, group: Group, skip: int, stack: contextlib.ExitStack) -> Iterator[tuple[Batch, Batch | None]]:
        """Yield a group's batches on the devices, from number `skip` on."""
        # Closed last, after the batches that it works for.
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count() or 1))

        def batches(shape: SequenceShape, images: list[ImageQuestions]) -> Iterator[Batch]:
            rest = images[skip * group.batch_size :]
            if not rest:
                return
            local = local_rows(self.mesh, group.batch_size)
            loader = iter(
                question_batches(rest, self.processor, shape, batch_size=group.batch_size, local=local, pool=pool)
            )
            stack.enter_context(contextlib.closing(loader))
            for batch in loader:
                yield global_batch(batch, self.mesh, group.batch_size)

        if group.contrast is None:
            for batch in batches(group.shape, group.images):
                yield batch, None
        else:
            yield from zip(batches(group.shape, group.images), batches(*group.contrast), strict=True)

    def _answers(
        self,
        batch: Batch,
        contrast_batch: Batch | None,
        decoding: Decoding,
        expected_new_tokens: int | None,
        begun: Mapping[int, int],
    ) -> dict[int, Answer]:
        end, numbers, longest = self.encoder.stop_ids[0], _gather(batch.questions), decoding.max_new_tokens
        expected = expected_new_tokens if decoding.beams == 1 and expected_new_tokens else longest
        first = dataclasses.replace(decoding, max_new_tokens=min(expected, longest))
        ids, tracked = self._run(batch, contrast_batch, first)
        long = (ids[..., -1] != end) & (numbers >= 0)
        if expected < longest and long.any():
            full = self._decode_in_parts(batch, contrast_batch, decoding)
            ids = np.concatenate([ids, np.full((*ids.shape[:2], longest - expected), end, ids.dtype)], axis=2)
            ids[long] = full[long]
        answers = {}
        for b, q in np.argwhere(numbers >= 0):
            tokens, number = ids[b, q].tolist(), int(numbers[b, q])
            tokens = tokens[: tokens.index(end)] if end in tokens else tokens
            text = self.encoder.decode(tokens, stop=decoding.stop, before=begun.get(number))
            answers[number] = Answer(text, tuple(tracked[b, q].tolist()))
        return answers

    def _decode_in_parts(
        self, batch: Batch, contrast_batch: Batch | None, decoding: Decoding
    ) -> Int[np.ndarray, "B Q T"]:
        """Decode a batch with long answers, as many sequences at a time as their KV has room."""
        size, leaves = batch.leaves.shape
        part = min(
            size, self.data_parallel * max(1, self._leaves_that_fit(decoding.max_new_tokens, decoding) // leaves)
        )
        while size % part:
            part -= self.data_parallel
        if part == size:
            return self._run(batch, contrast_batch, decoding)[0]
        sharding = batch_sharding(self.mesh)

        def cut(whole: Batch, start: int) -> Batch:
            return jax.device_put(Batch(*(field[start : start + part] for field in whole)), sharding)

        return np.concatenate(
            [
                self._run(cut(batch, start), contrast_batch and cut(contrast_batch, start), decoding)[0]
                for start in range(0, size, part)
            ]
        )

    def _run(
        self, batch: Batch, contrast_batch: Batch | None, decoding: Decoding
    ) -> tuple[Int[np.ndarray, "B Q T"], Float[np.ndarray, "B Q N"]]:
        longest = decoding.max_new_tokens
        roomy = dataclasses.replace(decoding, max_new_tokens=decode.room(longest))
        ids, tracked = _decode(
            *(self.graph, self.state, batch, contrast_batch, np.int32(longest), self._stop_table(decoding.stop)),
            decoding=roomy,
            stops=self.encoder.stop_ids,
        )
        return _gather(ids)[..., :longest], _gather(tracked)

    def first_token(self, conversation: Conversation, answer: str) -> int:
        """Return the token that an answer to an open conversation begins with."""
        closed = dataclasses.replace(conversation, turns=(*conversation.turns, Turn("assistant", answer)))
        before, after = self.encoder(conversation).ids, self.encoder(closed).ids
        return int(after[len(before)])


def _gather(x: Any) -> np.ndarray:
    """Return an array over all processes, on every host."""
    if jax.process_count() == 1:
        return np.array(x)
    return np.array(multihost_utils.process_allgather(x, tiled=True))


def generate(
    model: VisionLanguageModel,
    processor: Processor,
    records: ImageRecord | Sequence[ImageRecord],
    max_new_tokens: int = 64,
    *,
    mesh: Mesh | None = None,
) -> list[str]:
    """Return greedy answers to open conversations; each image is encoded and prefilled once.

    Args:
        model: The model.
        processor: The model's own.
        records: Images with open conversations, or one; `data.processor.ask` makes them.
        max_new_tokens: Maximum length of an answer.
        mesh: See `Engine`.

    Returns:
        One answer for each conversation, in the records' order.

    Raises:
        UserError: A conversation is not open, or does not fit the decoder's context.
        BrokenImage: An image cannot be read.
    """
    images, number = [], 0
    for index, record in enumerate([records] if isinstance(records, ImageRecord) else records):
        if not isinstance(record, ImageRecord):
            raise UserError(f"generate: records must be what `ask` returns, not {type(record).__name__}")
        if closed := [n for n, conversation in enumerate(record.conversations) if not conversation.is_open]:
            raise UserError(f"record {record.id}: conversation {closed[0]} ends with an answer; end it with a question")
        processor.tokenize(record.id, record.conversations, max_new_tokens)
        questions = [(number + n, conversation) for n, conversation in enumerate(record.conversations)]
        number += len(questions)
        # Two records may share a name and have different images.
        images.append(ImageQuestions(f"{record.id} ({index})", record.image, questions))
    # Long enough for any one conversation; a record's tree takes several sequences where it is longer.
    shape = EngineShape(sequence_length=max(2048, processor.context), batch_size=min(8, max(1, len(images))))
    answers = Engine(model, processor, shape, mesh=mesh).answer(images, max_new_tokens=max_new_tokens)
    return [answers[n] for n in range(number)]
